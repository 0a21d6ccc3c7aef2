"""From logits to one token per row: greedy or drawn, with log-probabilities. Owns the order of the cuts and their ties;
knows nothing of sequences, steps or stops (`forbid` says what must not be chosen).

    logits (adjusted, `adjust.py`)
           -> forbid -> greedy: the largest, ties to the lowest id
                     -> ÷ temperature -> top-k -> top-p -> min-p -> inverse CDF in the order of token ids

The cuts mean what they mean in vLLM, in the order of its V0 sampler:
* top-k keeps every token whose logit is at least the k-th largest, so ties with the k-th stay.
* top-p sums the weights that top-k left, largest logit first (ties: lower id first), and keeps the shortest beginning
  that reaches p of them, never less than one token.
* min-p drops what weighs less than min_p × the largest logit's weight.

A weight is exp((logit - largest) ÷ temperature) in whole 2^-40ths: an f32 polynomial without fused operations, rounded.
Whole numbers make every sum exact, so neither the order of summation nor threads, batch or instruction set can change a
token. This module is the specification; `csrc/generic/sampling-inl.h` chooses the same tokens without sorting.
Log-probabilities are those of the raw logits, before adjustments, forbid, temperature and cuts, good to 1e-6.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pagemill.base.params import MAX_LOGPROBS, SamplingParams
from pagemill.base.step import Sample, SampleFailure, TokenLogprob
from pagemill.decoding.random import RANDOM_BITS, random_bits

_Logits = NDArray[np.float32]
_Weights = NDArray[np.int64]

WHOLE = 2**40  # the weight of the largest logit

_LOG2_E = 1.4426950408889634
_F32_MAX = float(np.finfo(np.float32).max)
_LEAST_EXPONENT = np.float32(-64.0)  # below 2^-41 a weight is 0 anyway
_ROUNDER = np.float32(1.5 * 2**23)  # adding and taking it away rounds an f32 to a whole number
# 2^x for |x| ≤ 1/2, the highest power first; relative error below 2e-7.
_EXP2 = tuple(np.float32(c) for c in (0.00132647087, 0.00967151113, 0.0555073395, 0.240222424, 0.693147004, 1.0))

NOT_A_NUMBER = "the model computed NaN as logit of token {token}; its weights are damaged"
NOTHING_LEFT = "every token is forbidden or has a logit of -inf; forbid fewer tokens"


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """What one row of logits is for.

    seed, choice, position: key of the random number; position is the absolute position of the token to be chosen.
    forbid: token ids that must not be chosen (stop ids before `min_tokens`); ids beyond the vocabulary are ignored.
    """

    seq_id: int
    params: SamplingParams
    seed: int
    choice: int
    position: int
    forbid: tuple[int, ...] = ()


def sample(
    logits: _Logits, requests: Sequence[SamplingRow], best: Sequence[int] | None = None
) -> list[Sample | SampleFailure]:
    """Choose one token for each row.

    logits: [rows, vocab] f32, not changed. requests: one for each row, in the same order. A row with a NaN, or with no
    token left to choose, gives SampleFailure. +inf counts as certain: such tokens share all probability. best: index
    of each row's largest logit, or of its first NaN, where the executor has found it already.
    """
    assert logits.dtype == np.float32
    assert logits.ndim == 2
    assert logits.shape[0] == len(requests), (logits.shape, len(requests))
    if best is None:
        best = np.argmax(logits, axis=1).tolist() if len(requests) else []
    return [_sample_row(row, request, top) for row, request, top in zip(logits, requests, best, strict=True)]


def _sample_row(row: _Logits, request: SamplingRow, best: int) -> Sample | SampleFailure:
    """row: [vocab] f32; best: its argmax, which is the first NaN where there is one."""
    if math.isnan(row[best]):
        return SampleFailure(request.seq_id, NOT_A_NUMBER.format(token=best))
    params = request.params
    allowed = row
    if request.forbid:
        allowed = row.copy()
        allowed[[token for token in request.forbid if 0 <= token < row.shape[0]]] = -np.inf
        if best in request.forbid:
            best = int(np.argmax(allowed))
    if allowed[best] == -np.inf:
        return SampleFailure(request.seq_id, NOTHING_LEFT)
    token = best if params.greedy else _draw(allowed, request)
    if params.logprobs is None:
        return Sample(request.seq_id, token)
    return report(row, request.seq_id, token, params.logprobs)


def _draw(row: _Logits, request: SamplingRow) -> int:
    """One token of a row [vocab] f32 by temperature, cuts and the row's random number."""
    params = request.params
    weights = weigh(row, params.temperature)
    ranking = np.argsort(-row, kind="stable")
    keep = np.ones(row.shape[0], dtype=np.bool_)
    if 0 < params.top_k < row.shape[0]:
        keep = row >= row[ranking[params.top_k - 1]]
        ranking = ranking[keep[ranking]]
    if params.top_p < 1.0:
        reached = np.cumsum(weights[ranking])
        wanted = _share(int(reached[-1]), params.top_p)
        keep[ranking[int(np.searchsorted(reached, wanted)) + 1 :]] = False
    if params.min_p > 0.0:
        keep &= weights >= math.ceil(params.min_p * WHOLE)
    reached = np.cumsum(np.where(keep, weights, 0))
    number = random_bits(request.seed, request.choice, request.position)
    return int(np.searchsorted(reached, number * int(reached[-1]) >> RANDOM_BITS, side="right"))


def weigh(row: _Logits, temperature: float) -> _Weights:
    """Weights [vocab] i64 of a row [vocab] f32 without NaN whose largest logit is above -inf; the largest's is WHOLE.

    Where the largest is +inf: WHOLE for +inf, 0 for the rest.
    """
    largest = row.max()
    if largest == np.inf:
        return np.where(row == np.inf, WHOLE, 0)
    rate = np.float32(min(_LOG2_E / temperature, _F32_MAX))
    with np.errstate(over="ignore"):  # -inf: as unlikely as it gets
        exponent = np.maximum((row - largest) * rate, _LEAST_EXPONENT)
    whole = (exponent + _ROUNDER) - _ROUNDER
    rest = exponent - whole
    power = np.full_like(rest, _EXP2[0])
    for coefficient in _EXP2[1:]:
        power = power * rest + coefficient
    weights: _Weights = np.rint(np.ldexp(power, whole.astype(np.int32)).astype(np.float64) * WHOLE).astype(np.int64)
    return weights


def _share(total: int, p: float) -> int:
    """What the nucleus must reach: p of the total, rounded up, at least 1."""
    return min(total, max(1, math.ceil(p * float(total))))


def report(row: _Logits, seq_id: int, token: int, count: int) -> Sample:
    """The chosen token and the `count` most likely ones (ties: lower id first), from raw logits [vocab] f32."""
    assert count <= MAX_LOGPROBS
    largest = float(row.max())
    log_total = math.log(float(weigh(row, 1.0).sum()) / WHOLE)

    top = np.argsort(-row, kind="stable")[:count].tolist()
    return Sample(
        seq_id,
        token,
        report_token(row, token, largest, log_total),
        tuple(TokenLogprob(each, _logprob(row, each, largest, log_total), i) for i, each in enumerate(top, start=1)),
    )


def report_token(row: _Logits, token: int, largest: float, log_total: float) -> TokenLogprob:
    """One token of raw logits [vocab] f32. largest: of the row; log_total: of the sum of its weights at temperature 1,
    where the largest logit weighs 1."""
    value = row[token]
    rank = 1 + int(np.count_nonzero(row > value)) + int(np.count_nonzero(row[:token] == value))
    return TokenLogprob(token, _logprob(row, token, largest, log_total), rank)


def _logprob(row: _Logits, token: int, largest: float, log_total: float) -> float:
    if largest == math.inf:
        return -log_total if row[token] == np.inf else -math.inf
    return float(row[token]) - largest - log_total
