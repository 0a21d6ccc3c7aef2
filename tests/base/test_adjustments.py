"""Penalties, biases and grammars of SamplingParams: ranges, types, and what goes with what."""

from __future__ import annotations

from typing import Any

import pytest

from pagemill import Grammar, RequestError, SamplingParams


@pytest.mark.parametrize(
    "fields",
    [
        {"presence_penalty": 2.5},
        {"presence_penalty": "1"},
        {"frequency_penalty": float("nan")},
        {"repetition_penalty": 0},
        {"repetition_penalty": float("inf")},
        {"logit_bias": {-1: 1.0}},
        {"logit_bias": {1: 101}},
        {"logit_bias": {1: float("nan")}},
        {"logit_bias": {"a": 1}},
        {"logit_bias": 5},
        {"logit_bias": [(1, 2, 3)]},
        {"logit_bias": dict.fromkeys(range(1025), 1.0)},
        {"prompt_logprobs": -1},
        {"prompt_logprobs": 21},
        {"grammar": "a"},
        {"grammar": Grammar("regex", "a"), "min_tokens": 1},
        {"grammar": Grammar("regex", "a"), "ignore_eos": True},
    ],
)
def test_values_out_of_range_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        SamplingParams(**fields)


def test_biases_may_be_a_mapping_or_pairs() -> None:
    pairs = SamplingParams(logit_bias=((1, 2), (3, -1.5)))
    assert SamplingParams(logit_bias={1: 2, 3: -1.5}) == pairs  # type: ignore[arg-type]
    assert hash(pairs) == hash(SamplingParams(logit_bias=((1, 2.0), (3, -1.5))))


@pytest.mark.parametrize(
    ("fields", "adjusts", "reads"),
    [
        ({}, False, False),
        ({"logit_bias": {1: 1}}, True, True),
        ({"presence_penalty": 1}, True, True),
        ({"repetition_penalty": 1.1}, True, True),
        ({"grammar": Grammar("regex", "a")}, True, True),
        ({"prompt_logprobs": 0}, False, True),
        ({"logprobs": 5, "temperature": 0}, False, False),
    ],
)
def test_only_rows_that_ask_are_adjusted(fields: dict[str, Any], adjusts: bool, reads: bool) -> None:
    params = SamplingParams(**fields)
    assert (params.adjusts_logits, params.reads_history) == (adjusts, reads)
