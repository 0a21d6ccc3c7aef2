"""Scores of predicted tokens: log-probabilities, perplexity, KL divergence, agreement, each with its standard error.

Owns the arithmetic on logits, in float64 throughout; which rows are scored, and against what, is `quality`'s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and its standard error over scored tokens, taken as independent; None for a single token."""

    value: float
    error: float | None


def log_softmax(logits: Float32) -> Float64:
    """Natural log-probabilities of each row: logits [rows, vocab] f32 -> [rows, vocab] f64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def negative_log_likelihood(logp: Float64, targets: NDArray[np.int32]) -> Float64:
    """-log p(target) in nats: logp [rows, vocab], targets [rows] -> [rows]."""
    chosen: Float64 = logp[np.arange(len(targets)), targets]
    return -chosen


def divergence(p: Float64, reference: Float64, other: Float64) -> Float64:
    """KL(reference ‖ other) of each row in nats: the reference's probabilities p = exp(reference) and both
    log-probabilities, [rows, vocab] each -> [rows]."""
    terms: Float64 = reference - other
    terms *= p
    total: Float64 = terms.sum(axis=1)
    return total


def same_top1(reference: Float64, other: Float64) -> Float64:
    """1.0 where both rows have the same most likely token, else 0.0; ties go to the lower id. [rows] f64."""
    same: Float64 = (reference.argmax(axis=1) == other.argmax(axis=1)).astype(np.float64)
    return same


def mean(values: Float64) -> Estimate:
    """The mean of values [n]."""
    error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
    return Estimate(float(values.mean()), error)


def perplexity(nll: Float64) -> Estimate:
    """exp(mean nll) of [n] nats; the error is carried through the exponential to first order."""
    return _exp(mean(nll))


def perplexity_ratio(nll: Float64, nll_reference: Float64) -> Estimate:
    """Perplexity ÷ the reference's over the same tokens [n]; paired, so its error is far below either's own."""
    return _exp(mean(nll - nll_reference))


def _exp(log: Estimate) -> Estimate:
    value = math.exp(log.value)
    return Estimate(value, None if log.error is None else value * log.error)
