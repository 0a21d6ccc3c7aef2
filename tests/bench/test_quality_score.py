from __future__ import annotations

import math

import numpy as np
import pytest

from pagemill.bench.quality_score import (
    divergence,
    log_softmax,
    mean,
    negative_log_likelihood,
    perplexity,
    perplexity_ratio,
    same_top1,
)


def test_log_softmax_of_known_odds() -> None:
    logits = np.log(np.array([[1.0, 2.0, 5.0], [4.0, 4.0, 8.0]])).astype(np.float32)
    expected = np.log([[1 / 8, 2 / 8, 5 / 8], [0.25, 0.25, 0.5]])
    assert log_softmax(logits) == pytest.approx(expected, abs=1e-6)


def test_log_softmax_bears_logits_of_any_size() -> None:
    logp = log_softmax(np.array([[3e38, 0.0, -3e38], [1e4, 1e4, 1e4]], np.float32))
    assert logp[0, 0] == 0
    assert logp[1] == pytest.approx([-math.log(3)] * 3, rel=1e-15)


def test_log_softmax_keeps_small_probabilities() -> None:
    logp = log_softmax(np.array([[0.0, -200.0]], np.float32))
    assert logp[0, 1] == -200.0
    assert np.exp(log_softmax(np.zeros((1, 49_152), np.float32))).sum() == pytest.approx(1, rel=1e-12)


def test_likelihood_is_that_of_the_target() -> None:
    logp = np.log([[0.25, 0.75], [0.5, 0.5]])
    assert negative_log_likelihood(logp, np.array([1, 0], np.int32)) == pytest.approx([-math.log(0.75), math.log(2)])


def test_divergence_of_known_distributions_goes_from_the_reference() -> None:
    reference, other = np.log([[0.5, 0.5]]), np.log([[0.25, 0.75]])
    assert divergence(np.exp(reference), reference, other) == pytest.approx([0.5 * math.log(2) + 0.5 * math.log(2 / 3)])
    assert divergence(np.exp(other), other, reference) == pytest.approx([0.25 * math.log(0.5) + 0.75 * math.log(1.5)])
    assert divergence(np.exp(reference), reference, reference)[0] == 0


def test_top1_compares_the_most_likely_tokens() -> None:
    reference = np.log([[0.5, 0.3, 0.2], [0.2, 0.3, 0.5], [0.4, 0.4, 0.2]])
    other = np.log([[0.4, 0.35, 0.25], [0.5, 0.3, 0.2], [0.4, 0.3, 0.3]])
    assert same_top1(reference, other).tolist() == [1, 0, 1]


def test_perplexity_is_the_exponential_of_the_mean() -> None:
    nll = np.log(np.array([2.0, 8.0]))
    found = perplexity(nll)
    assert found.value == pytest.approx(4)
    assert found.error == pytest.approx(4 * math.log(4) / 2)  # std(ddof=1) = ln 4 / √2, ÷ √2


def test_ratio_of_paired_tokens_has_the_error_of_their_differences() -> None:
    reference = np.array([0.1, 5.0, 2.5])
    found = perplexity_ratio(reference + math.log(1.25), reference)
    assert found.value == pytest.approx(1.25)
    assert found.error == pytest.approx(0, abs=1e-12)
    assert perplexity(reference).error > 1


def test_one_token_has_no_error() -> None:
    assert mean(np.array([3.0])) == mean(np.array([3.0]))
    assert mean(np.array([3.0])).error is None
    assert perplexity(np.array([0.0])).error is None


def test_standard_error_of_a_mean() -> None:
    found = mean(np.array([1.0, 2.0, 3.0, 4.0]))
    assert (found.value, found.error) == (2.5, pytest.approx(math.sqrt(5 / 3) / 2))
