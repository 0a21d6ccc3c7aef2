"""The native sampler against the specification, token for token and bit for bit, on every target; and its failures."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pagemill.base.params import SamplingParams
from pagemill.base.step import SequenceStep
from pagemill.decoding.random import random_bits
from pagemill.decoding.step_sampler import BatchSampler, SpecificationSampler
from pagemill.kernels import _native
from pagemill.kernels.sampling import ROW_DTYPE, NativeSampler
from pagemill.kernels.target import available_targets

Logits = NDArray[np.float32]
ROWS = 6


def step(seq_id: int, params: SamplingParams, position: int = 5, forbid: tuple[int, ...] = ()) -> SequenceStep:
    return SequenceStep(seq_id, (1,), position - 1, (0,), True, params, seed=seq_id * 977, choice=1, forbid=forbid)


def native(target: str, vocab: int, threads: int = 2) -> BatchSampler:
    return BatchSampler(NativeSampler(_native.NativeModel(target, threads, 64, vocab, 8)))


def both(target: str, logits: Logits, rows: list[SequenceStep], threads: int = 2) -> tuple[object, object]:
    best = np.argmax(logits, axis=1).astype(np.int32)
    expected = SpecificationSampler().choose(rows, logits, best)
    return native(target, logits.shape[1], threads).choose(rows, logits, best), expected


def random_logits(rng: np.random.Generator, vocab: int) -> Logits:
    """Flat and peaked rows, with ties, infinities and damage now and then."""
    logits = rng.normal(0, rng.choice([0.01, 1, 3, 8]), (ROWS, vocab)).astype(np.float32)
    if rng.random() < 0.4:
        logits = np.round(logits * 2) / 2
    if rng.random() < 0.2:
        logits[:, rng.integers(0, vocab, vocab // 2 + 1)] = -np.inf
    for value in (np.inf, np.nan):
        if rng.random() < 0.1:
            logits[rng.integers(ROWS), rng.integers(vocab)] = value
    return logits


def random_rows(rng: np.random.Generator, vocab: int) -> list[SequenceStep]:
    rows = []
    for _ in range(ROWS):
        params = SamplingParams(
            temperature=float(rng.choice([0, 1e-300, 1e-3, 0.5, 1, 1, 2, 100])),
            top_k=int(rng.choice([-1, 0, 1, 2, 40, 500, 3000])),
            top_p=float(rng.choice([1, 1, 1e-9, 0.1, 0.5, 0.9, 0.99, 1 - 1e-12])),
            min_p=float(rng.choice([0, 0, 1e-9, 0.01, 0.3, 1])),
            logprobs=(None, 0, 5, 20)[rng.integers(4)],
        )
        forbid = tuple(rng.integers(-2, vocab + 5, rng.integers(0, 4)).tolist()) if rng.random() < 0.3 else ()
        rows.append(step(int(rng.integers(2**40)), params, int(rng.integers(1, 9999)), forbid))
    return rows


@pytest.mark.parametrize("target", available_targets())
@pytest.mark.parametrize("vocab", [1, 2, 100, 127, 128, 129, 1000, 4099])
def test_native_sampling_is_the_specification_s(target: str, vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    for _ in range(30):
        found, expected = both(target, random_logits(rng, vocab), random_rows(rng, vocab))
        assert found == expected


@pytest.mark.parametrize("target", available_targets())
def test_a_whole_vocabulary_is_sampled_as_specified(target: str) -> None:
    rng = np.random.default_rng(9)
    for _ in range(3):
        found, expected = both(target, random_logits(rng, 49_152), random_rows(rng, 49_152))
        assert found == expected


def test_threads_and_company_change_nothing() -> None:
    rng = np.random.default_rng(4)
    logits = rng.normal(0, 2, (12, 3001)).astype(np.float32)
    rows = [step(i, SamplingParams(top_p=0.9, temperature=0.5 + i / 10, logprobs=i)) for i in range(12)]
    best = np.argmax(logits, axis=1).astype(np.int32)
    target = available_targets()[0]
    together = native(target, 3001, threads=1).choose(rows, logits, best)
    assert native(target, 3001, threads=3).choose(rows, logits, best) == together
    sampler = native(target, 3001)
    alone = [sampler.choose([rows[i]], logits[i : i + 1], best[i : i + 1])[0][0] for i in range(12)]
    assert tuple(alone) == together[0]


def test_rows_that_come_and_go_keep_their_own_parameters() -> None:
    """One sampler over many steps, whose rows change, against a fresh one for each."""
    rng = np.random.default_rng(5)
    sampler = native(available_targets()[0], 500)
    kinds: list[dict[str, Any]] = [{"temperature": 0}, {"top_k": 3}, {"top_p": 0.5, "logprobs": 2}, {"min_p": 0.2}]
    for position in range(1, 40):
        ids = sorted(rng.choice(8, rng.integers(1, 8), replace=False).tolist())
        rows = [step(i, SamplingParams(**kinds[i % 4]), position, (7,) if i == position % 8 else ()) for i in ids]
        logits = rng.normal(0, 2, (len(rows), 500)).astype(np.float32)
        best = np.argmax(logits, axis=1).astype(np.int32)
        assert sampler.choose(rows, logits, best) == SpecificationSampler().choose(rows, logits, best)


def test_a_nan_fails_its_row_and_no_other() -> None:
    logits = np.zeros((3, 50), np.float32)
    logits[1, 17] = np.nan
    logits[2] = -np.inf
    rows = [step(i, SamplingParams()) for i in range(3)]
    samples, failures = native(available_targets()[0], 50).choose(rows, logits, np.array([0, 17, 0], np.int32))
    assert [s.seq_id for s in samples] == [0]
    assert [f.seq_id for f in failures] == [1, 2]
    assert "NaN as logit of token 17" in failures[0].reason
    assert "every token is forbidden" in failures[1].reason


PLAIN: dict[str, Any] = {"temperature": 0, "top_k": 3, "min_tokens": 2}
NOT_PLAIN: list[dict[str, Any]] = [
    {"temperature": 0.1},
    {"temperature": 0, "logprobs": 0},
    {"temperature": 0, "logit_bias": {3: 1.0}},
    {"temperature": 0, "repetition_penalty": 1.1},
    {"temperature": 0, "presence_penalty": 0.5},
]


@pytest.mark.parametrize("other", NOT_PLAIN, ids=str)
def test_one_row_that_reads_its_logits_has_them_all_computed(other: dict[str, Any]) -> None:
    sampler = native(available_targets()[0], 50)
    plain = [step(i, SamplingParams(**PLAIN)) for i in range(4)]
    for at in range(5):
        rows = [*plain[:at], step(9, SamplingParams(**other)), *plain[at:]]
        assert sampler.takes_largest(plain)
        assert not sampler.takes_largest(rows)
        assert not sampler.takes_largest(rows), "the same rows again, which are remembered"
    assert sampler.takes_largest(plain)
    assert not sampler.takes_largest([*plain[:3], step(3, SamplingParams(**PLAIN), forbid=(7,))])
    assert not sampler.takes_largest([*plain, step(4, SamplingParams(**PLAIN), forbid=(7,))])
    assert sampler.takes_largest(plain[1:])
    assert not SpecificationSampler().takes_largest(plain)


def test_where_the_largest_logits_are_taken_no_other_is_looked_at() -> None:
    """Whatever the largest is: a number, NaN, or so low that nothing is left."""
    rng, sampler = np.random.default_rng(8), native(available_targets()[0], 300)
    for _ in range(60):
        logits = random_logits(rng, 300)
        if rng.random() < 0.2:
            logits[rng.integers(ROWS)] = -np.inf
        ids = sorted(rng.choice(9, ROWS, replace=False).tolist())
        rows = [step(i, SamplingParams(**PLAIN)) for i in ids]
        best = np.argmax(logits, axis=1).astype(np.int32)
        assert sampler.takes_largest(rows)
        alone = np.full_like(logits, 1e9)
        alone[np.arange(ROWS), best] = logits[np.arange(ROWS), best]
        assert sampler.choose(rows, alone, best) == SpecificationSampler().choose(rows, logits, best)


@pytest.mark.parametrize("key", [(0, 0, 0), (2**64 - 1, 2**64 - 1, 2**64 - 1), (7, 3, 1234567), (2**63, 127, 2**32)])
def test_native_random_bits_are_the_specification_s(key: tuple[int, int, int]) -> None:
    assert _native.random_bits(*key) == random_bits(*key)


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -1.0), ("temperature", math.nan), ("top_p", 0.0), ("top_p", 1.5), ("min_p", 2.0), ("logprobs", 3)],
)
def test_a_request_out_of_range_is_refused_before_anything_is_read(field: str, value: float) -> None:
    requests = np.zeros(1, ROW_DTYPE)
    requests[0] = (1.0, 1.0, 0.0, 1, 0, 1, 0, -1)
    requests[field] = value
    sampler = NativeSampler(_native.NativeModel("scalar", 1, 64, 10, 8))
    with pytest.raises(ValueError, match="request"):
        sampler.sample(np.zeros((1, 10), np.float32), np.zeros(1, np.int32), requests)


def test_arrays_of_wrong_shapes_are_refused() -> None:
    sampler = NativeSampler(_native.NativeModel("scalar", 1, 64, 10, 8))
    requests = np.zeros(2, ROW_DTYPE)
    requests["temperature"] = requests["top_p"] = 1.0
    logits, best = np.zeros((2, 10), np.float32), np.zeros(2, np.int32)
    starts = np.array([0, 1, 1], np.int32)
    with pytest.raises(ValueError, match="logits"):
        sampler.sample(np.zeros((2, 11), np.float32), best, requests)
    with pytest.raises(ValueError, match="one request"):
        sampler.sample(logits, best, requests[:1])
    with pytest.raises(ValueError, match="best token out of range"):
        sampler.sample(logits, np.array([0, 10], np.int32), requests)
    with pytest.raises(ValueError, match="forbidden"):
        sampler.sample(logits, best, requests, (starts, np.zeros(2, np.int32)))


def test_greedy_rows_that_come_and_go_are_the_specification_s() -> None:
    rng = np.random.default_rng(3)
    sampler, specification = native(available_targets()[0], 50), SpecificationSampler()
    kept, ids = np.empty((8, 50), np.float32), np.empty(8, np.int32)
    for number in range(200):
        count = int(rng.integers(1, 9))
        logits, best = kept[:count], ids[:count]
        logits[:] = rng.normal(0, 3, logits.shape)
        if number % 5 == 0:
            logits[rng.integers(count), rng.integers(50)] = rng.choice([np.nan, np.inf])
        if number % 7 == 0:
            logits[rng.integers(count)] = -np.inf
        best[:] = np.argmax(logits, axis=1)
        seq_ids = rng.choice(12, count, replace=False) if number % 3 == 0 else range(number % 2, number % 2 + count)
        forbid = (int(best[0]),) if number % 4 == 0 else ()
        rows = [step(int(each), SamplingParams(temperature=0), number + 5, forbid) for each in seq_ids]
        assert sampler.choose(rows, logits, best) == specification.choose(rows, logits, best)
