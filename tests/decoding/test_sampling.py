"""Sampling against a slow and obvious version, and its promises: determinism, ties, extremes, distributions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.typing import NDArray

from pagemill.base.params import SamplingParams
from pagemill.base.step import Sample
from pagemill.decoding import sampling
from pagemill.decoding.random import uniform
from pagemill.decoding.sampling import SampleFailure, SamplingRow, sample

Logits = NDArray[np.float32]
INF = np.float32(np.inf)


def row(seed: int = 0, position: int = 0, choice: int = 0, forbid: Sequence[int] = (), **params: Any) -> SamplingRow:
    return SamplingRow(11, SamplingParams(**params), seed, choice, position, tuple(forbid))


def one(logits: Sequence[float] | Logits, request: SamplingRow) -> Sample:
    result = sample(np.array([logits], np.float32), [request])[0]
    assert isinstance(result, Sample), result
    return result


def slow_kept(logits: Logits, request: SamplingRow) -> dict[int, float]:
    """Token -> weight after every cut, one token at a time, by the definitions of the module."""
    p = request.params
    left = {i: float(x) for i, x in enumerate(logits) if i not in request.forbid}
    largest = max(left.values())
    if p.top_k > 0:
        kth = sorted(left.values(), reverse=True)[min(p.top_k, len(left)) - 1]
        left = {i: x for i, x in left.items() if x >= kth}
    weights = {i: math.exp((x - largest) / p.temperature) for i, x in left.items()}
    if p.top_p < 1.0:
        total, reached, kept = sum(weights.values()), 0.0, {}
        for i in sorted(weights, key=lambda i: (-weights[i], i)):
            kept[i] = weights[i]
            reached += weights[i]
            if reached >= p.top_p * total:
                break
        weights = {i: kept[i] for i in sorted(kept)}
    return {i: w for i, w in weights.items() if w >= p.min_p}


def slow(logits: Logits, request: SamplingRow) -> int:
    kept = slow_kept(logits, request)
    target = Fraction(uniform(request.seed, request.choice, request.position)) * sum(map(Fraction, kept.values()))
    reached = Fraction(0)
    for token, weight in kept.items():
        reached += Fraction(weight)
        if target < reached:
            return token
    raise AssertionError("the total is above every target")


# Halves and few values make ties; their sums are the same in any order, so both versions cut at the same token.
LOGITS = npst.arrays(np.float32, st.integers(1, 40), elements=st.sampled_from([-3.0, -1.0, 0.0, 0.5, 2.0]))
PARAMS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.25, 0.7, 1.0, 3.0]),
        "top_k": st.sampled_from([-1, 0, 1, 2, 5, 39, 1000]),
        "top_p": st.sampled_from([1e-9, 0.1, 0.437, 0.83, 0.991, 1.0]),
        "min_p": st.sampled_from([0.0, 0.013, 0.3, 1.0]),
    }
)


@given(LOGITS, PARAMS, st.integers(0, 2**64 - 1), st.sets(st.integers(0, 40), max_size=3))
def test_draws_what_the_slow_version_draws(logits: Logits, params: dict[str, Any], seed: int, forbid: set[int]) -> None:
    request = row(seed=seed, forbid=tuple(forbid), **params)
    result = sample(logits[None], [request])[0]
    if set(range(len(logits))) <= forbid:
        assert isinstance(result, SampleFailure)
        return
    assert isinstance(result, Sample)
    assert result.token_id == slow(logits, request)


@pytest.mark.parametrize("vocab", [1, 63, 64, 500, 5000])
@pytest.mark.parametrize(
    "params", [{"top_k": 40}, {"top_p": 0.9}, {"min_p": 0.05}, {"top_k": 100, "top_p": 0.95, "min_p": 0.01}, {}]
)
def test_large_vocabularies_draw_what_the_slow_version_draws(vocab: int, params: dict[str, Any]) -> None:
    generator = np.random.default_rng(vocab)
    for position in range(8):
        logits = generator.normal(0, 3, vocab).astype(np.float32)
        request = row(seed=5, position=position, temperature=0.9, **params)
        assert one(logits, request).token_id == slow(logits, request)


@given(npst.arrays(np.float32, st.integers(1, 60), elements=st.floats(-60, 60, width=32)), st.floats(0.01, 100.0))
def test_weights_are_the_exponentials_in_whole_parts(logits: Logits, temperature: float) -> None:
    weights = sampling.weigh(logits, temperature)
    assert int(weights[int(np.argmax(logits))]) == sampling.WHOLE
    exponents = (logits.astype(np.float64) - float(logits.max())) / temperature
    assert np.abs(weights / sampling.WHOLE - np.exp(exponents)).max() < 1e-6


@settings(max_examples=50, deadline=None)
@given(npst.arrays(np.float32, st.integers(1, 80), elements=st.floats(-12, 12, width=32)), st.floats(0.001, 0.999))
def test_the_nucleus_is_the_shortest_that_reaches_p(logits: Logits, p: float) -> None:
    weights = sampling.weigh(logits, 1.0).tolist()
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    wanted = Fraction(p) * sum(weights)
    shortest = next(n for n in range(1, len(order) + 1) if sum(weights[i] for i in order[:n]) >= wanted)
    drawn = {one(logits, row(seed=seed, top_p=p)).token_id for seed in range(64)}
    assert drawn <= set(order[:shortest])
    if weights[order[shortest - 1]] * 4 > sum(weights):  # the last one is missed by all draws once in 10^8
        assert order[shortest - 1] in drawn


# ---- distributions: fixed seeds, so these never flicker


@pytest.mark.parametrize(
    "params",
    [{}, {"temperature": 0.5}, {"temperature": 2.0}, {"top_k": 4}, {"top_p": 0.8}, {"min_p": 0.2}],
    ids=["plain", "cold", "hot", "top-k", "top-p", "min-p"],
)
def test_tokens_come_as_often_as_their_probability_says(params: dict[str, Any]) -> None:
    logits = np.array([2.0, 1.0, 0.5, 0.0, 1.5, -1.0, 0.25, -0.5], np.float32)
    draws = 4000
    requests = [row(seed=123, position=i, **params) for i in range(draws)]
    results = sample(np.tile(logits, (draws, 1)), requests)
    counts = np.bincount([r.token_id for r in results if isinstance(r, Sample)], minlength=8)
    kept = slow_kept(logits, requests[0])
    total = sum(kept.values())
    expected = {i: draws * w / total for i, w in kept.items()}
    assert set(np.flatnonzero(counts)) == set(expected)
    chi_square = sum((counts[i] - e) ** 2 / e for i, e in expected.items())
    assert chi_square < 24.3  # 7 degrees of freedom, 1 in 1,000


def test_choices_and_seeds_draw_apart() -> None:
    logits = np.zeros(1000, np.float32)
    draws = [one(logits, row(seed=s, choice=c)).token_id for s in range(4) for c in range(4)]
    assert len(set(draws)) > 12


# ---- determinism


def test_a_row_alone_draws_what_it_draws_in_any_batch() -> None:
    generator = np.random.default_rng(3)
    logits = generator.normal(0, 2, (12, 777)).astype(np.float32)
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.8, "logprobs": 5},
        {"top_k": 30, "top_p": 0.9},
        {"min_p": 0.1, "logprobs": 0},
    ]
    requests = [row(seed=i, position=i * i, **kinds[i % 4]) for i in range(12)]
    alone = [sample(logits[i : i + 1], [request])[0] for i, request in enumerate(requests)]
    assert sample(logits, requests) == alone
    assert sample(np.asfortranarray(logits)[::-1], requests[::-1]) == alone[::-1]
    wide = np.full((12, 999), np.nan, np.float32)
    wide[:, 100:877] = logits
    assert sample(wide[:, 100:877], requests) == alone


def test_logits_are_not_changed() -> None:
    logits = np.random.default_rng(0).normal(size=(3, 100)).astype(np.float32)
    before = logits.copy()
    sample(logits, [row(forbid=(3,), logprobs=4), row(temperature=0.0, forbid=(1,)), row(top_p=0.5)])
    assert np.array_equal(logits, before)


def test_no_rows_give_no_tokens() -> None:
    assert sample(np.empty((0, 10), np.float32), []) == []


# ---- greedy, ties, forbidden tokens


def test_greedy_takes_the_lowest_id_of_the_largest() -> None:
    assert one([1.0, 5.0, 5.0, 2.0], row(temperature=0.0)) == Sample(11, 1)


def test_a_forbidden_token_is_never_taken() -> None:
    logits = [0.0, 9.0, 8.0, 1.0]
    assert one(logits, row(temperature=0.0, forbid=(1,))).token_id == 2
    assert one(logits, row(temperature=0.0, forbid=(3,))).token_id == 1
    drawn = {one(logits, row(seed=i, temperature=50.0, forbid=(1, 3))).token_id for i in range(60)}
    assert drawn == {0, 2}


def test_forbidden_ids_beyond_the_vocabulary_are_ignored() -> None:
    assert one([0.0, 1.0], row(temperature=0.0, forbid=(-1, 7, 2**40))).token_id == 1


def test_ties_with_the_kth_stay() -> None:
    drawn = {one([3.0, 1.0, 1.0, 0.0], row(seed=i, top_k=2)).token_id for i in range(200)}
    assert drawn == {0, 1, 2}


# ---- extremes


@pytest.mark.parametrize("temperature", [5e-324, 1e-30, 1e-3])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = np.array([-3e38, 3.0, 3e38, 2.9e38], np.float32)
    assert {one(logits, row(seed=i, temperature=temperature)).token_id for i in range(20)} == {2}


def test_a_tiny_top_p_or_a_full_min_p_leaves_the_most_likely() -> None:
    logits = np.linspace(0.0, 0.001, 300, dtype=np.float32)
    assert {one(logits, row(seed=i, top_p=1e-300)).token_id for i in range(20)} == {299}
    assert {one(logits, row(seed=i, min_p=1.0)).token_id for i in range(20)} == {299}


def test_k_above_the_vocabulary_keeps_everything() -> None:
    logits = np.zeros(5, np.float32)
    assert {one(logits, row(seed=i, top_k=99)).token_id for i in range(60)} == set(range(5))


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.5}])
def test_infinite_logits_are_certain_or_impossible(params: dict[str, Any]) -> None:
    assert one([0.0, INF, 3e38, -INF], row(logprobs=4, **params)).token_id == 1
    assert one([-INF, -3.4e38, -INF], row(**params)).token_id == 1


def test_several_infinite_logits_share_all_probability() -> None:
    result = one([INF, 0.0, INF], row(logprobs=3, seed=1))
    assert result.token_id in (0, 2)
    assert [(t.token_id, t.logprob) for t in result.top] == [(0, -math.log(2)), (2, -math.log(2)), (1, -math.inf)]


@pytest.mark.parametrize("where", [0, 1, 31, 99])
@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"temperature": 1.0, "logprobs": 2}])
def test_a_nan_fails_its_row_and_no_other(where: int, params: dict[str, Any]) -> None:
    logits = np.random.default_rng(1).normal(size=(3, 100)).astype(np.float32)
    logits[0, 5] = INF
    good = [sample(logits[i : i + 1], [row(**params)])[0] for i in range(3)]
    logits[1, where] = np.nan
    results = sample(logits, [row(**params)] * 3)
    assert (results[0], results[2]) == (good[0], good[2])
    failed = results[1]
    assert isinstance(failed, SampleFailure)
    assert f"NaN as logit of token {where}" in failed.reason


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"temperature": 1.0}])
def test_a_row_with_nothing_to_choose_fails(params: dict[str, Any]) -> None:
    everything_forbidden, impossible = sample(
        np.array([[1.0, 2.0], [-INF, -INF]], np.float32), [row(forbid=(0, 1), **params), row(**params)]
    )
    for failed in (everything_forbidden, impossible):
        assert isinstance(failed, SampleFailure)
        assert "every token is forbidden" in failed.reason


# ---- log-probabilities


@given(LOGITS, st.integers(0, 20), st.integers(0, 1000))
def test_logprobs_are_those_of_the_raw_logits(logits: Logits, count: int, seed: int) -> None:
    result = one(
        logits, row(seed=seed, temperature=0.3, top_k=3, forbid=(0,) if len(logits) > 1 else (), logprobs=count)
    )
    total = math.log(math.fsum(math.exp(x) for x in logits.tolist()))
    ranking = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    assert [t.token_id for t in result.top] == ranking[:count]
    assert [t.rank for t in result.top] == list(range(1, min(count, len(logits)) + 1))
    assert result.logprob is not None
    assert result.logprob.token_id == result.token_id
    assert result.logprob.rank == ranking.index(result.token_id) + 1
    for entry in (result.logprob, *result.top):
        assert entry.logprob == pytest.approx(float(logits[entry.token_id]) - total, abs=1e-6)


def test_top_logprobs_of_a_large_vocabulary_are_the_largest() -> None:
    logits = np.random.default_rng(2).normal(size=49_152).astype(np.float32)
    result = one(logits, row(temperature=0.0, logprobs=20))
    assert [t.token_id for t in result.top] == np.argsort(-logits, kind="stable")[:20].tolist()
    assert math.isclose(
        math.fsum(math.exp(t.logprob) for t in result.top), float(_softmax_top(logits, 20)), rel_tol=1e-6
    )


def _softmax_top(logits: Logits, count: int) -> float:
    weights = np.exp(logits.astype(np.float64))
    return float(np.sort(weights)[-count:].sum() / weights.sum())


def test_no_logprobs_unless_asked() -> None:
    result = one([1.0, 2.0], row(temperature=0.0))
    assert (result.logprob, result.top) == (None, ())
