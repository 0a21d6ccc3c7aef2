"""From logits to one token per row: greedy or drawn, with log-probabilities. Owns the order of the cuts and their ties;
knows nothing of sequences, steps or stops (`forbid` says what must not be chosen).

    logits -> forbid -> greedy: the largest, ties to the lowest id
                     -> ÷ temperature -> top-k -> top-p -> min-p -> inverse CDF in the order of token ids

The cuts mean what they mean in vLLM, in the order of its V0 sampler:
* top-k keeps every token whose logit is at least the k-th largest, so ties with the k-th stay.
* top-p sums the probabilities that top-k left, most likely first (ties: lower id first), and keeps the shortest
  beginning that reaches p, never less than one token.
* min-p drops what is less likely than min_p × the most likely token.

Weights are exp((logit - largest) ÷ temperature) in f64, row by row, so a row's token depends on its own logits and key
only. Log-probabilities are those of the raw logits: before forbid, temperature and cuts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pagemill.base.params import MAX_LOGPROBS, SamplingParams
from pagemill.base.step import Sample, SampleFailure, TokenLogprob
from pagemill.decoding.random import uniform

_Logits = NDArray[np.float32]
_Weights = NDArray[np.float64]
_Ids = NDArray[np.intp]

_STRIPE = 512  # weights that are added before they are cumulated
_BITS_OF_ONE = 0x3FF0_0000_0000_0000  # 1.0 in f64
_CLASS_SHIFT = 46  # weights are classed by exponent and 6 bits of mantissa


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
        return SampleFailure(
            request.seq_id, f"the model computed NaN as logit of token {best}; its weights are damaged"
        )
    params = request.params
    allowed = row
    if request.forbid:
        allowed = row.copy()
        allowed[[token for token in request.forbid if 0 <= token < row.shape[0]]] = -np.inf
        if best in request.forbid:
            best = int(np.argmax(allowed))
    if allowed[best] == -np.inf:
        return SampleFailure(request.seq_id, "every token is forbidden or has a logit of -inf; forbid fewer tokens")
    token = best if params.greedy else _draw(allowed, request, float(allowed[best]))
    if params.logprobs is None:
        return Sample(request.seq_id, token)
    return _with_logprobs(row, request.seq_id, token, params.logprobs)


def _draw(row: _Logits, request: SamplingRow, largest: float) -> int:
    """One token of a row [vocab] f32 by temperature, cuts and the row's random number."""
    params = request.params
    ids: _Ids | None = None  # None: all tokens
    logits = row
    if 0 < params.top_k < row.shape[0]:
        ids = _at_least_kth(row, params.top_k)
        logits = row[ids]
    weights = _weights(logits, largest, params.temperature)
    keep: NDArray[np.bool_] | None = None
    if params.top_p < 1.0:
        keep = _nucleus(weights, params.top_p)
    if params.min_p > 0.0:
        likely = weights >= params.min_p
        keep = likely if keep is None else keep & likely
    if keep is not None:
        kept = np.flatnonzero(keep)
        weights = weights[kept]
        ids = kept if ids is None else ids[kept]
    index = _inverse_cdf(weights, uniform(request.seed, request.choice, request.position))
    return index if ids is None else int(ids[index])


def _weights(logits: _Logits, largest: float, temperature: float) -> _Weights:
    """exp((logit - largest) ÷ temperature), f64; where the largest is +inf: 1 for +inf, 0 for the rest."""
    if largest == math.inf:
        return np.where(logits == np.inf, 1.0, 0.0)
    scaled = logits.astype(np.float64)
    scaled -= largest
    with np.errstate(over="ignore"):  # -inf: as unlikely as it gets
        scaled /= temperature
    return np.exp(scaled, out=scaled)


def _at_least_kth(row: _Logits, k: int) -> _Ids:
    """Ids, ascending, of all values that are at least the k-th largest of a row [vocab] f32; 0 < k < vocab."""
    return np.flatnonzero(row >= np.partition(row, -k)[-k])


def _nucleus(weights: _Weights, p: float) -> NDArray[np.bool_]:
    """Which of the weights [n] f64, at most 1, are in the shortest beginning, heaviest first, that reaches p of all.

    What weighs less than (1 - p) ÷ n of the total weighs, together, less than may be left out: half of that bound is a
    safe floor. The rest is counted by classes of weight, so that only the class where p is reached must be sorted.
    """
    total = float(weights.sum())
    wanted = p * total
    heavy = np.flatnonzero(weights >= 0.5 * (1.0 - p) * total / weights.shape[0])
    values = weights[heavy]
    classes = (_BITS_OF_ONE - values.view(np.int64)) >> _CLASS_SHIFT  # positive f64 are ordered as their bits
    reached = np.cumsum(np.bincount(classes, weights=values))
    last = min(int(np.searchsorted(reached, wanted)), reached.shape[0] - 1)
    edge = np.flatnonzero(classes == last)
    edge = edge[np.argsort(-values[edge], kind="stable")]
    missing = wanted - (float(reached[last - 1]) if last else 0.0)
    count = int(np.searchsorted(np.cumsum(values[edge]), missing)) + 1
    keep = np.zeros(weights.shape[0], dtype=np.bool_)
    keep[heavy[classes < last]] = True
    keep[heavy[edge[:count]]] = True
    return keep


def _inverse_cdf(weights: _Weights, number: float) -> int:
    """The index whose stretch of the cumulated weights [n] f64 holds `number` (in [0, 1)) of the total.

    Cumulated by stripes first, since a sum of a stripe is several times faster than cumulating it.
    """
    whole = weights.shape[0] // _STRIPE * _STRIPE
    stripes = np.append(weights[:whole].reshape(-1, _STRIPE).sum(axis=1), weights[whole:].sum())
    reached = np.cumsum(stripes)
    target = number * float(reached[-1])
    stripe = int(np.searchsorted(reached, target, side="right"))
    if stripe == reached.shape[0]:  # the product was rounded up to the total
        return int(np.flatnonzero(weights)[-1])
    start = stripe * _STRIPE
    inside = weights[start : start + _STRIPE]
    rest = target - (float(reached[stripe - 1]) if stripe else 0.0)
    index = int(np.searchsorted(np.cumsum(inside), rest, side="right"))
    return start + (index if index < inside.shape[0] else int(np.flatnonzero(inside)[-1]))


def _with_logprobs(row: _Logits, seq_id: int, token: int, count: int) -> Sample:
    """The chosen token and the `count` most likely ones (ties: lower id first), from raw logits [vocab] f32."""
    assert count <= MAX_LOGPROBS
    largest = float(row.max())
    weights = _weights(row, largest, 1.0)
    log_total = math.log(float(weights.sum()))

    def logprob(index: int) -> float:
        if largest == math.inf:
            return -log_total if row[index] == np.inf else -math.inf
        return float(row[index]) - largest - log_total

    value = row[token]
    rank = 1 + int(np.count_nonzero(row > value)) + int(np.count_nonzero(row[:token] == value))
    chosen = TokenLogprob(token, logprob(token), rank)
    if count == 0:
        return Sample(seq_id, token, chosen)
    near = _at_least_kth(row, count) if count < row.shape[0] else np.arange(row.shape[0])
    best = near[np.argsort(-row[near], kind="stable")][:count].tolist()
    return Sample(seq_id, token, chosen, tuple(TokenLogprob(t, logprob(t), i) for i, t in enumerate(best, start=1)))
