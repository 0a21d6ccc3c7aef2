"""What fields mean: the cache's part of a request, and which form an answer must have."""

from __future__ import annotations

from typing import Any

import pytest

from pagemill.base.errors import CapacityError, PagemillError, RequestError
from pagemill.base.params import CacheOptions, Grammar, Retain
from pagemill.server.asking import cache_of, chat_sampling, completion_sampling, fault_of, grammar_of
from pagemill.server.schema import ChatBody, CompletionBody


def completion(**fields: Any) -> CompletionBody:
    return CompletionBody.model_validate({"prompt": "x", **fields})


def chat(**fields: Any) -> ChatBody:
    return ChatBody.model_validate({"messages": [{"role": "user", "content": "x"}], **fields})


@pytest.mark.parametrize(
    ("fields", "breakpoints", "retain"),
    [
        ({}, (), ()),
        ({"prompt_cache_key": "a", "prompt_cache_retention": "in_memory"}, (), ()),
        ({"prompt_cache_retention": "24h"}, (), (Retain(0, 100, 80, 86_400.0),)),
        ({"prompt_cache_options": {"ttl": "30m"}}, (), (Retain(0, 100, 80, 1800.0),)),
        ({"prompt_cache_options": {"mode": "explicit"}}, (), (Retain(0, 100, 0),)),
        (
            {"prompt_cache_options": {"mode": "explicit", "ttl": 5}},
            (10, 60),
            (Retain(0, 60, 80, 5.0), Retain(60, 100, 0)),
        ),
        ({"prompt_cache_options": {"mode": "explicit"}}, (100,), (Retain(0, 100, 80),)),
        ({}, (40,), (Retain(0, 40, 80),)),
        ({"cache": {"retain": [{"from": 2, "to": 9, "priority": 90, "ttl": "1h"}]}}, (), (Retain(2, 9, 90, 3600.0),)),
        ({"cache": {"retain": [{"from": 2}]}, "prompt_cache_options": {"ttl": 1}}, (5,), (Retain(2, 100, 80),)),
    ],
)
def test_what_is_retained(fields: dict[str, Any], breakpoints: tuple[int, ...], retain: tuple[Retain, ...]) -> None:
    assert cache_of(chat(**fields), "t", 100, breakpoints) == CacheOptions(tenant="t", retain=retain)


def test_the_tenant_comes_from_the_identity_and_never_from_a_field() -> None:
    body = completion(tenant="other", user="other", cache_salt="s", prompt_cache_key="other")
    assert cache_of(body, "mine", 5) == CacheOptions(tenant="mine", salt="s")


@pytest.mark.parametrize(
    "cache", [{"retain": [{"from": 5, "to": 2}]}, {"retain": [{"ttl": -1}]}, {"retain": [{"priority": 101}]}]
)
def test_ranges_that_are_none_are_refused(cache: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        cache_of(completion(cache=cache), "t", 10)


@pytest.mark.parametrize(
    ("fields", "grammar"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Grammar("json_schema", '{"type":"object"}')),
        ({"response_format": {"type": "regex", "regex": "a"}}, Grammar("regex", "a")),
        ({"response_format": {"type": "grammar", "grammar": "start: A"}}, Grammar("lark", "start: A")),
        ({"guided_json": {"a": 1}}, Grammar("json_schema", '{"a":1}')),
        ({"guided_json": '{"a": 1}'}, Grammar("json_schema", '{"a": 1}')),
        ({"guided_choice": ['a"', "b"]}, Grammar("lark", 'start: "a\\"" | "b"')),
        ({"structured_outputs": {"regex": "a"}}, Grammar("regex", "a")),
        ({"structured_outputs": {"json": {"b": True}}}, Grammar("json_schema", '{"b":true}')),
        ({"structured_outputs": {"json_object": True}}, Grammar("json_schema", '{"type":"object"}')),
    ],
)
def test_forms_of_all_dialects(fields: dict[str, Any], grammar: Grammar | None) -> None:
    assert grammar_of(completion(**fields)) == grammar


def test_an_echo_with_logprobs_asks_for_those_of_the_prompt() -> None:
    params = completion_sampling(completion(echo=True, logprobs=3, max_tokens=0), 0)
    assert (params.prompt_logprobs, params.logprobs, params.max_tokens) == (3, 3, 1)
    assert completion_sampling(completion(logprobs=3), 0).prompt_logprobs is None


def test_the_newer_name_of_max_tokens_wins_and_none_means_no_limit() -> None:
    assert chat_sampling(chat(max_tokens=3, max_completion_tokens=5), 0).max_tokens == 5
    assert chat_sampling(chat(), 0).max_tokens is None
    assert completion_sampling(completion(), 0).max_tokens == 16


def test_every_parameter_arrives() -> None:
    fields = {
        "n": 2, "seed": 7, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "min_tokens": 2, "stop": "x",
        "stop_token_ids": [4], "presence_penalty": 0.5, "frequency_penalty": -0.5, "repetition_penalty": 1.1,
        "logit_bias": {"3": 1.5}, "ignore_eos": True, "include_stop_str_in_output": True, "skip_special_tokens": False,
        "deadline_s": 4.0, "prompt_logprobs": 1,
    }  # fmt: skip
    params = completion_sampling(completion(**fields), priority=3)
    assert (params.n, params.seed, params.temperature, params.top_p, params.top_k) == (2, 7, 0.5, 0.9, 3)
    assert (params.min_p, params.min_tokens, params.stop, params.stop_token_ids) == (0.1, 2, ("x",), (4,))
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0.5, -0.5, 1.1)
    assert (params.logit_bias, params.ignore_eos, params.include_stop_str_in_output) == (((3, 1.5),), True, True)
    assert (params.skip_special_tokens, params.deadline_s, params.priority) == (False, 4.0, 3)
    assert params.prompt_logprobs == 1


@pytest.mark.parametrize(
    ("error", "body", "param"),
    [
        (RequestError("too long", param="prompt"), completion(), "prompt"),
        (RequestError("too long", param="prompt"), chat(), "messages"),
        (CapacityError("too long", param="prompt"), chat(), "messages"),
        (RequestError("out of range", param="retain"), chat(), "cache"),
        (RequestError("of another kind", param="salt"), chat(), "cache_salt"),
        (RequestError("no such id", param="stop_token_ids"), chat(), "stop_token_ids"),
        (RequestError("no text fits", param="grammar", status=500), chat(guided_regex="a"), "guided_regex"),
        (
            RequestError("no text fits", param="grammar"),
            chat(response_format={"type": "json_object"}),
            "response_format",
        ),
        (RequestError("no call fits", param="grammar"), chat(tools=[], tool_choice="required"), "tools"),
        (RequestError("the prompt is what this is about"), chat(), None),
        (PagemillError("the prompt is what this is about"), chat(), None),
    ],
    ids=str,
)
def test_parameters_of_the_engine_are_told_as_fields_of_the_request(
    error: PagemillError, body: CompletionBody | ChatBody, param: str | None
) -> None:
    told = fault_of(error, body)
    assert getattr(told, "param", None) == param
    assert param in (None, "tools") or str(told) == str(error)
