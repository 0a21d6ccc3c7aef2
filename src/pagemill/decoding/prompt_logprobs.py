"""Log-probabilities of a prompt's own tokens, gathered while it is read in chunks. Owns which rows they need, the
arithmetic, and what has been gathered; running the model is the runner's.

The logits of position p say how likely the token at p + 1 is: a prompt of n tokens has n - 1 of them, the first token
has none. Numbers are those of `sampling.py`: raw logits, ranks with ties to the lower id.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pagemill.base.step import PositionLogprobs, SequenceStep, TokenLogprob

MOST_PROMPTS = 64
MOST_ROWS = 256  # logits of so many positions at a time: 50 MB for a vocabulary of 49,152


def wants_prompt(step: SequenceStep) -> bool:
    """True for a row of a prompt that is to be reported. Choices beyond the first have the same prompt."""
    return step.params.prompt_logprobs is not None and step.choice == 0 and step.num_generated == 0


def num_positions(step: SequenceStep) -> int:
    """How many of the row's tokens, from its first, have a successor in the prompt."""
    return min(len(step.token_ids), len(step.history) - 1 - step.start) if wants_prompt(step) else 0


def pieces(steps: Sequence[SequenceStep]) -> list[tuple[SequenceStep, ...]]:
    """The rows of a step in rounds that follow each other, so that no round reports more than MOST_ROWS positions.

    Rows that report nothing run in the last round.
    """
    wanting = [each for each in steps if num_positions(each)]
    size = max(1, MOST_ROWS // max(1, len(wanting)))
    num_rounds = max((-(-len(each.token_ids) // size) for each in wanting), default=1)
    rounds: list[list[SequenceStep]] = [[] for _ in range(num_rounds)]
    for step in steps:
        if not num_positions(step):
            rounds[-1].append(step)
            continue
        count = -(-len(step.token_ids) // size)
        for index in range(count):
            tokens = step.token_ids[index * size : (index + 1) * size]
            last = index == count - 1
            piece = step._replace(token_ids=tokens, start=step.start + index * size, sample=step.sample and last)
            rounds[num_rounds - count + index].append(piece)
    return [tuple(each) for each in rounds]


class PromptReports:
    """What has been gathered of prompts that are still being read. Mutated by `take` and `finish`.

    A prompt that was left is forgotten once MOST_PROMPTS others, or those of the step, have been read since.
    """

    def __init__(self) -> None:
        self._gathered: OrderedDict[int, dict[int, PositionLogprobs]] = OrderedDict()  # by sequence and position

    def take(self, steps: Sequence[SequenceStep], logits: NDArray[np.float32], best: NDArray[np.int32]) -> None:
        """Read the logits [positions, vocab] f32 of the rows' prompt positions, in order, and best [positions] i32."""
        at = 0
        for step in steps:
            count = num_positions(step)
            if not count:
                continue
            found = self._gathered.setdefault(step.seq_id, {})
            self._gathered.move_to_end(step.seq_id)
            first = step.start + 1
            following = np.array(step.history[first : first + count], np.int64)
            assert step.params.prompt_logprobs is not None
            made = _positions(logits[at : at + count], best[at : at + count], following, step.params.prompt_logprobs)
            found.update(enumerate(made, start=first))
            at += count
        while len(self._gathered) > max(MOST_PROMPTS, len(steps)):
            self._gathered.popitem(last=False)

    def finish(self, seq_id: int) -> tuple[PositionLogprobs, ...]:
        """All of a prompt that has been read, in order of position."""
        found = self._gathered.pop(seq_id, {})
        return tuple(found[position] for position in sorted(found))


def _positions(
    logits: NDArray[np.float32], best: NDArray[np.int32], following: NDArray[np.int64], count: int
) -> list[PositionLogprobs]:
    """logits [positions, vocab] f32; best [positions] i32; following [positions] i64: the tokens that stand there."""
    each = np.arange(len(logits))
    largest = logits[each, best]
    with np.errstate(invalid="ignore", over="ignore"):
        log_total = np.log(np.exp(logits - largest[:, None]).sum(axis=1, dtype=np.float64))
    values = logits[each, following]
    above = (logits > values[:, None]).sum(axis=1)
    made = []
    for index, token in enumerate(following.tolist()):
        row, base = logits[index], float(largest[index]) + float(log_total[index])
        rank = 1 + int(above[index]) + int(np.count_nonzero(row[:token] == values[index]))
        sampled = TokenLogprob(token, float(values[index]) - base, rank)
        top = tuple(
            TokenLogprob(other, float(row[other]) - base, place)
            for place, other in enumerate(_most_likely(row, int(best[index]), count), start=1)
        )
        made.append(PositionLogprobs(sampled, top))
    return made


def _most_likely(row: NDArray[np.float32], best: int, count: int) -> list[int]:
    """The `count` largest of a row [vocab] f32, ties to the lower id."""
    if count < 2:
        return [best][:count]
    count = min(count, len(row))
    least = np.partition(row, len(row) - count)[len(row) - count]
    candidates = np.flatnonzero(row >= least)
    order = np.lexsort((candidates, -row[candidates]))
    found: list[int] = candidates[order[:count]].tolist()
    return found
