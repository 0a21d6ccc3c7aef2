"""What is added to or taken from logits because of the text so far, or because the request says so. Owns the order and
the formulas of biases and penalties; masks of grammars are in `grammar.py`.

    logits + bias -> repetition -> frequency, presence

* Repetition (Keskar et al., "CTRL", arXiv 1909.05858): logits of tokens in prompt or answer are divided by the penalty
  where positive, multiplied where negative.
* Frequency and presence (OpenAI): from the logit of a token of the answer, frequency times its count and presence once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pagemill.base.params import SamplingParams


class TokenCounts:
    """How often each token of one text was generated; those of its prompt alone count 0. Mutated by `follow`, which
    looks at new tokens only."""

    __slots__ = ("_counts", "_ids", "_num_read", "_places")

    def __init__(self) -> None:
        self._places: dict[int, int] = {}
        self._ids = np.zeros(64, np.int64)
        self._counts = np.zeros(64, np.float32)
        self._num_read = 0

    @property
    def ids(self) -> NDArray[np.int64]:
        """Tokens of the text, each once: [tokens] i64."""
        return self._ids[: len(self._places)]

    @property
    def counts(self) -> NDArray[np.float32]:
        """How often each was generated: [tokens] f32."""
        return self._counts[: len(self._places)]

    def follow(self, history: Sequence[int], num_generated: int) -> None:
        """Come to the end of a text, prompt and then num_generated ids; a shorter one is counted anew."""
        if len(history) < self._num_read:
            self._places.clear()
            self._counts[:] = 0
            self._num_read = 0
        num_prompt = len(history) - num_generated
        for token in history[self._num_read : num_prompt]:
            self._place(token)
        for token in history[max(self._num_read, num_prompt) :]:
            place = self._place(token)  # which may replace the array
            self._counts[place] += 1
        self._num_read = len(history)

    def _place(self, token: int) -> int:
        place = self._places.get(token)
        if place is None:
            place = self._places[token] = len(self._places)
            if place == len(self._ids):
                self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            self._ids[place] = token
        return place


def penalize(row: NDArray[np.float32], params: SamplingParams, text: TokenCounts) -> None:
    """Change the logits row [vocab] f32 in place. Ids of biases beyond the vocabulary are ignored."""
    vocab = row.shape[0]
    if params.logit_bias:
        known = [(token, value) for token, value in params.logit_bias if token < vocab]
        np.add.at(row, [token for token, _ in known], np.array([value for _, value in known], np.float32))
    if not params.penalizes:
        return
    ids, counts = text.ids, text.counts
    values = row[ids]
    if params.repetition_penalty != 1.0:
        factor = np.float32(params.repetition_penalty)
        values = np.where(values > 0, values / factor, values * factor)
    if params.frequency_penalty or params.presence_penalty:
        values -= counts * np.float32(params.frequency_penalty)
        values[counts > 0] -= np.float32(params.presence_penalty)
    row[ids] = values
