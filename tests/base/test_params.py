"""What may be asked of one request: wrong types, ranges and contradictions are refused before a request exists."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pagemill.base.errors import RequestError
from pagemill.base.params import MAX_CHOICES, CacheOptions, Grammar, Retain, SamplingParams

WRONG = [
    ({"temperature": "hot"}, "temperature is 'hot'; give a number"),
    ({"temperature": None}, "temperature is None; give a number"),
    ({"temperature": True}, "temperature is True; give a number"),
    ({"temperature": float("nan")}, "temperature is nan"),
    ({"temperature": float("inf")}, "temperature is inf"),
    ({"temperature": -0.1}, "temperature is -0.1"),
    ({"top_p": 10**400}, "top_p is 1000.*give a number"),
    ({"top_p": 0.0}, "top_p is 0.0"),
    ({"top_p": float("nan")}, "top_p is nan"),
    ({"min_p": 1.5}, "min_p is 1.5"),
    ({"min_p": float("nan")}, "min_p is nan"),
    ({"top_k": 1.5}, "top_k is 1.5; give a whole number"),
    ({"top_k": -2}, "top_k is -2"),
    ({"seed": 1.5}, "seed is 1.5; give a whole number"),
    ({"seed": 2**64}, "seed is 18446744073709551616"),
    ({"seed": -1}, "seed is -1"),
    ({"n": 2.0}, "n is 2.0; give a whole number"),
    ({"n": True}, "n is True; give a whole number"),
    ({"n": 0}, "n is 0"),
    ({"n": MAX_CHOICES + 1}, "from 1 to 128"),
    ({"n": 2, "temperature": 0}, "greedy choices would all be equal"),
    ({"max_tokens": "3"}, "max_tokens is '3'; give a whole number"),
    ({"max_tokens": 2.5}, "max_tokens is 2.5; give a whole number"),
    ({"max_tokens": 0}, "max_tokens is 0; give at least 1"),
    ({"min_tokens": None}, "min_tokens is None; give a whole number"),
    ({"min_tokens": -1}, "min_tokens is -1"),
    ({"min_tokens": 9, "max_tokens": 3}, r"min_tokens \(9\) is above max_tokens \(3\)"),
    ({"logprobs": True}, "logprobs is True; give a whole number"),
    ({"logprobs": 21}, "logprobs is 21"),
    ({"stop": 5}, "stop is 5; give a list of texts"),
    ({"stop": b"x"}, "stop is b'x'; give a list of texts"),
    ({"stop": [5]}, "no text"),
    ({"stop": [""]}, "empty"),
    ({"stop": ["x" * 1025]}, "longer than 1,024"),
    ({"stop": ["x"] * 17}, "stop has 17 strings"),
    ({"stop_token_ids": 5}, "stop_token_ids is 5; give a list of token ids"),
    ({"stop_token_ids": ["a"]}, "'a'; give a whole number"),
    ({"stop_token_ids": [-1]}, "stop_token_ids holds -1"),
    ({"ignore_eos": "no"}, "ignore_eos is 'no'; give True or False"),
    ({"skip_special_tokens": 1}, "skip_special_tokens is 1; give True or False"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG, ids=[str(fields)[:40] for fields, _ in WRONG])
def test_wrong_values_are_refused_with_what_to_give(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        SamplingParams(**fields)
    assert caught.value.status == 400
    assert len(str(caught.value)) < 200
    assert caught.value.param in fields


@pytest.mark.parametrize(
    ("make", "param"),
    [
        (lambda: SamplingParams(logit_bias={1: 101}), "logit_bias"),  # type: ignore[arg-type]
        (lambda: SamplingParams(logit_bias={"a": 1}), "logit_bias"),  # type: ignore[arg-type]
        (lambda: SamplingParams(min_tokens=1, grammar=Grammar("regex", "a")), "min_tokens"),
        (lambda: SamplingParams(deadline_s=0), "deadline_s"),
        (lambda: SamplingParams(priority=101), "priority"),
        (lambda: SamplingParams(frequency_penalty=3), "frequency_penalty"),
        (lambda: Grammar("regex", ""), "grammar"),
        (lambda: Retain(3, 3), "retain"),
        (lambda: Retain(0, 3, priority=101), "retain"),
        (lambda: Retain(0, 3, ttl_s=0), "retain"),
        (lambda: CacheOptions(tenant=""), "tenant"),
        (lambda: CacheOptions(salt="x" * 1025), "salt"),
    ],
)
def test_errors_carry_the_name_of_the_parameter(make: Callable[[], object], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        make()
    assert caught.value.param == param


def test_numbers_of_other_libraries_become_pythons_own() -> None:
    params = SamplingParams(temperature=np.float32(0.5), seed=np.uint64(2**64 - 1), stop_token_ids=np.arange(3))
    assert params == SamplingParams(temperature=0.5, seed=2**64 - 1, stop_token_ids=(0, 1, 2))
    assert [type(each) for each in (params.temperature, params.seed, params.stop_token_ids[0])] == [float, int, int]


def test_extremes_that_mean_something_are_accepted() -> None:
    params = SamplingParams(temperature=1e-300, top_k=10**30, seed=2**64 - 1, n=MAX_CHOICES, max_tokens=10**30)
    assert not params.greedy
    assert SamplingParams(temperature=0).greedy


def test_one_stop_string_may_stand_without_a_list() -> None:
    assert SamplingParams(stop="end").stop == ("end",)
    assert SamplingParams(stop=None, stop_token_ids=None).stop == ()  # type: ignore[arg-type]
