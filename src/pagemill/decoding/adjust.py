"""Logits as requests want them changed before a token is chosen: penalties, biases, masks of grammars. Owns the order
and which rows are touched; rows that ask for nothing cost nothing, and their numbers stay as they are."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pagemill.base.blame import failure_of
from pagemill.base.step import SampleFailure, SequenceStep
from pagemill.decoding.grammar import GrammarCompiler, GrammarState
from pagemill.decoding.penalties import TokenCounts, penalize

_LOG: Final = logging.getLogger(__name__)
MOST_STATES = 1024  # texts that are remembered; others are followed again from their beginning


@dataclass(slots=True)
class Adjusted:
    """What `adjust` did, filled by it.

    reported: indices of the rows whose log-probabilities are wanted; raw [reported, vocab] f32 and best [reported] i32:
    their logits as computed, and the first largest of each. failed: the rows for which nothing can be chosen, and why.
    """

    reported: list[int]
    raw: NDArray[np.float32]
    best: NDArray[np.int32]
    failed: list[SampleFailure] = field(default_factory=list)


@dataclass(slots=True)
class _Text:
    """How far one text has been followed. Mutated by `LogitAdjuster`."""

    counts: TokenCounts
    grammar: GrammarState | None


class LogitAdjuster:
    """Changes logits row by row. Mutated by `adjust`: remembers how far texts have been followed.

    grammars: None where no request may bring one.
    """

    def __init__(self, grammars: GrammarCompiler | None = None) -> None:
        self.grammars = grammars
        self._texts: OrderedDict[int, _Text] = OrderedDict()

    def adjust(
        self, rows: Sequence[SequenceStep], which: Sequence[int], logits: NDArray[np.float32], best: NDArray[np.int32]
    ) -> Adjusted:
        """Change the rows `which` of logits [rows, vocab] f32 and of best [rows] i32 in place.

        A row whose largest logit is NaN stays as it is. A row that fails, by whatever error, is left with -inf alone.
        """
        which = [index for index in which if not np.isnan(logits[index, best[index]])]
        reported = [index for index in which if rows[index].params.logprobs is not None]
        done = Adjusted(reported, logits[reported], best[reported])
        for index in which:
            row = logits[index]
            try:
                self._adjust_row(row, rows[index])
            except MemoryError:  # which is everybody's
                raise
            except Exception as error:
                done.failed.append(failure_of(rows[index].seq_id, error, _LOG))
                row[:] = -np.inf
            best[index] = np.argmax(row)
        return done

    def _adjust_row(self, row: NDArray[np.float32], step: SequenceStep) -> None:
        text, history = self._text(step), step.history
        if step.params.penalizes:
            text.counts.follow(history, step.num_generated)
        penalize(row, step.params, text.counts)
        if text.grammar is None:
            return
        text.grammar.follow(history[len(history) - step.num_generated :])
        allowed = text.grammar.allowed()[: len(row)]
        row[: len(allowed)][~allowed] = -np.inf
        row[len(allowed) :] = -np.inf

    def _text(self, step: SequenceStep) -> _Text:
        text = self._texts.get(step.seq_id)
        if text is None:
            grammar = step.params.grammar
            assert grammar is None or self.grammars is not None, "a grammar without a compiler"
            state = None if grammar is None or self.grammars is None else self.grammars.state(grammar)
            text = self._texts[step.seq_id] = _Text(TokenCounts(), state)
            while len(self._texts) > MOST_STATES:
                self._texts.popitem(last=False)
        self._texts.move_to_end(step.seq_id)
        return text
