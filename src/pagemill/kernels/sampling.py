"""The native sampler: one call for all rows of a step. Owns array shapes and dtypes; what is computed is specified in
`decoding/sampling.py`, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pagemill.kernels import _native

Int32 = NDArray[np.int32]
Float64 = NDArray[np.float64]

# How one row is sampled (SamplingRow in csrc/sampling.h). logprobs: -1 where none are wanted.
ROW_DTYPE = np.dtype(
    [
        ("temperature", np.float64),
        ("top_p", np.float64),
        ("min_p", np.float64),
        ("seed", np.uint64),
        ("choice", np.uint64),
        ("position", np.uint64),
        ("top_k", np.int32),
        ("logprobs", np.int32),
    ]
)
CHOSEN, NOT_A_NUMBER, NOTHING_LEFT = 0, 1, 2  # status of a row


@dataclass(frozen=True, slots=True, eq=False)
class Reports:
    """Log-probabilities of rows that asked for them; elsewhere undefined.

    ranks [rows] i32 and logprobs [rows] f64: of the chosen token. top_ids [rows, most] i32, top_logprobs [rows, most]
    f64: of the most likely tokens, best first; a row's own number of them, or all of a smaller vocabulary, is defined.
    """

    ranks: Int32
    logprobs: Float64
    top_ids: Int32
    top_logprobs: Float64


@dataclass(frozen=True, slots=True, eq=False)
class Choices:
    """tokens [rows] i32. status [rows] i32: CHOSEN; NOT_A_NUMBER, where the token is the one with NaN; NOTHING_LEFT.
    reports: None where no row asked."""

    tokens: Int32
    status: Int32
    reports: Reports | None


class NativeSampler:
    """Samples the logits of one native model on that model's threads. Mutated by `sample` (scratch memory).

    model: the native model, whose step must not run at the same time.
    """

    def __init__(self, model: _native.NativeModel) -> None:
        self._native = _native.NativeSampler(model)

    def sample(
        self,
        logits: NDArray[np.float32],
        best: Int32,
        requests: NDArray[np.void],
        forbidden: tuple[Int32, Int32] | None = None,
        most_logprobs: int = -1,
    ) -> Choices:
        """Choose one token for each row.

        logits: [rows, vocab] f32, C-contiguous, not changed. best: [rows] i32, the first largest logit of each row, or
        its first NaN. requests: [rows] of ROW_DTYPE. forbidden: starts [rows + 1] i32 into ids [n] i32, token ids that
        must not be chosen. most_logprobs: the largest `logprobs` of the requests. Raises ValueError for shapes or
        values out of range.
        """
        rows = len(logits)
        tokens, status = np.empty(rows, np.int32), np.empty(rows, np.int32)
        reports = None
        if most_logprobs >= 0:
            shape = (rows, most_logprobs)
            reports = Reports(np.empty(rows, np.int32), np.empty(rows), np.empty(shape, np.int32), np.empty(shape))
        self._native.sample(
            logits,
            best,
            requests.view(np.uint8),
            tokens,
            status,
            forbidden,
            None if reports is None else (reports.ranks, reports.logprobs, reports.top_ids, reports.top_logprobs),
        )
        return Choices(tokens, status, reports)
