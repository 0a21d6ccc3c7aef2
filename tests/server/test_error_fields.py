"""Errors name the field that is at fault (`param`): a wrong type and a wrong value of every field of every route."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import BaseModel, ValidationError

from pagemill.server.limits import Limits
from pagemill.server.limits_body import BodyLimits
from pagemill.server.schema import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from pagemill.telemetry.metrics import Metrics
from tests.fixtures.live_server import LiveServer
from tests.server.test_admin import Office

CONTEXT = 1536  # of the tiny model
HELLO = {"role": "user", "content": "Hello"}
TOOL = {"type": "function", "function": {"name": "f"}}
BAD_TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "no such type"}}}
NAMED = {"type": "function", "function": {"name": "other"}}
COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"
ROUTES: dict[str, tuple[type[BaseModel], dict[str, Any]]] = {
    COMPLETION: (CompletionBody, {"prompt": "x", "max_tokens": 1}),
    CHAT: (ChatBody, {"messages": [HELLO], "max_tokens": 1}),
    "/tokenize": (TokenizeBody, {"prompt": "x"}),
    "/detokenize": (DetokenizeBody, {"tokens": [1]}),
}

# Right types and wrong values, of completions and of chats.
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"model": "none such"}, "model"),
    ({"n": 0}, "n"),
    ({"n": 129, "temperature": 1}, "n"),
    ({"n": 2, "temperature": 0}, "n"),
    ({"stop": ""}, "stop"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"stop": ["x" * 1025]}, "stop"),
    ({"temperature": -1}, "temperature"),
    ({"top_p": 2}, "top_p"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"logit_bias": {"99999": 1}}, "logit_bias"),
    ({"logit_bias": {str(token): 1 for token in range(1025)}}, "logit_bias"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"min_tokens": 5, "max_tokens": 1}, "min_tokens"),
    ({"min_tokens": 1, "guided_regex": "a"}, "min_tokens"),
    ({"ignore_eos": True, "guided_regex": "a"}, "ignore_eos"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"stop_token_ids": [99_999]}, "stop_token_ids"),
    ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ({"priority": 101}, "priority"),
    ({"deadline_s": 0}, "deadline_s"),
    ({"cache_salt": "x" * 1025}, "cache_salt"),
    ({"prompt_cache_key": "x" * 1025}, "prompt_cache_key"),
    ({"prompt_cache_retention": "48h"}, "prompt_cache_retention"),
    ({"prompt_cache_options": {"ttl": "soon"}}, "prompt_cache_options.ttl"),
    ({"prompt_cache_options": {"ttl": -1}}, "prompt_cache_options.ttl"),
    ({"prompt_cache_options": {"ttl": 1e12}}, "prompt_cache_options"),
    ({"cache": {"retain": [{"from": 0, "to": 9999}]}}, "cache"),
    ({"cache": {"retain": [{"from": 1, "to": 1}]}}, "cache"),
    ({"cache": {"retain": [{"priority": 101}]}}, "cache"),
    ({"cache": {"retain": [{"ttl": "soon"}]}}, "cache.retain.ttl"),
    ({"cache": {"retain": [{"ttl": 0}]}}, "cache"),
    ({"cache": {"retain": [{"ttl": 1e12}]}}, "cache"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"response_format": {"type": "regex", "regex": ""}}, "response_format"),
    ({"response_format": {"type": "regex", "regex": "("}}, "response_format"),
    ({"response_format": {"type": "grammar", "grammar": "nonsense"}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "no"}}}}, "response_format"),
    ({"structured_outputs": {"regex": ""}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
    ({"structured_outputs": {"json": "no schema"}}, "structured_outputs"),
    ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs"),
    ({"guided_json": "no schema"}, "guided_json"),
    ({"guided_json": ""}, "guided_json"),
    ({"guided_regex": ""}, "guided_regex"),
    ({"guided_regex": "("}, "guided_regex"),
    ({"guided_choice": ["x"] * 4097}, "guided_choice"),
    ({"guided_grammar": ""}, "guided_grammar"),
    ({"guided_grammar": "nonsense"}, "guided_grammar"),
]
OWN: dict[str, list[tuple[dict[str, Any], str]]] = {
    COMPLETION: [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": "x" * CONTEXT}, "prompt"),
        ({"prompt": "x" * 100_000}, "prompt"),
        ({"prompt": [1] * CONTEXT}, "prompt"),
        ({"prompt": [1] * (CONTEXT + 1)}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [99_999]}, "prompt"),
        ({"prompt": ["x"] * 2000}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": 21, "echo": True}, "logprobs"),
        ({"prompt": [[1] * 1500] * 40, "logprobs": 20, "echo": True}, "logprobs"),
        ({"prompt": [[1] * 1500] * 40, "prompt_logprobs": 20}, "prompt_logprobs"),
        ({"best_of": 3}, "best_of"),
        ({"suffix": "y"}, "suffix"),
    ],
    CHAT: [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": "user", "content": None}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x" * CONTEXT}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 100_000}]}, "messages"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "".join(map(chr, range(0xFDD0, 0xFDF0)))}]}, "messages"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"top_logprobs": -1, "logprobs": True}, "top_logprobs"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": NAMED, "tools": [TOOL]}, "tool_choice"),
        ({"tool_choice": "required", "tools": [BAD_TOOL]}, "tools"),
        ({"tools": [TOOL] * 300}, "tools"),
        ({"chat_template": "x"}, "chat_template"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ],
    "/tokenize": [
        ({"model": "none such"}, "model"),
        ({"prompt": None}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"prompt": None, "messages": []}, "messages"),
        ({"prompt": None, "messages": [{"role": "user"}]}, "messages"),
        ({"prompt": None, "messages": [HELLO], "tool_choice": "required"}, "tool_choice"),
        ({"prompt": None, "messages": [HELLO], "chat_template": "x"}, "chat_template"),
        ({"prompt": None, "messages": [HELLO], "chat_template_kwargs": {"tools": 1}}, "chat_template_kwargs"),
    ],
    "/detokenize": [({"model": "none such"}, "model"), ({"tokens": [99_999]}, "tokens"), ({"tokens": [-1]}, "tokens")],
}
CASES = [(path, *row) for path in (COMPLETION, CHAT) for row in WRONG]
CASES += [(path, *row) for path, rows in OWN.items() for row in rows]


# What the limits refuse before the routes do.
LARGE: list[tuple[dict[str, Any], str]] = [
    ({"n": 200}, "n"),
    ({"max_tokens": 2**21}, "max_tokens"),
    ({"stop": ["x"] * 100}, "stop"),
    ({"logit_bias": {str(token): 1 for token in range(5000)}}, "logit_bias"),
    ({"guided_regex": "(a{1000}){1000}"}, "guided_regex"),
    ({"guided_json": {"maxLength": 10**9}}, "guided_json"),
    ({"guided_json": {"pattern": "(a{1000}){1000}"}}, "guided_json"),
    ({"response_format": {"type": "regex", "regex": "(a{1000}){1000}"}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"maxItems": 10**9}}}}, "response_format"),
    ({"tools": [{**TOOL, "function": {"name": "f", "parameters": {"minItems": 10**9}}}]}, "tools"),
    ({"metadata": {"x": "y" * 10**6}}, "metadata"),
    ({"vllm_xargs": {"x": "y" * 10**6}}, "vllm_xargs"),
    ({"chat_template": "x"}, "chat_template"),
    ({"messages": [{"role": "user", "content": ["x"] * 300}]}, "messages"),
]


@pytest.fixture(scope="module")
def limited(tiny_model: Path) -> Iterator[httpx.Client]:
    """A server whose bodies pass the limits first, as those of `pagemill serve` do."""
    limits = Limits().for_model(CONTEXT)
    wrappers = [lambda app: BodyLimits(app, lambda: limits, Metrics("tiny"))]
    with LiveServer(str(tiny_model), wrappers=wrappers) as server, server.client() as client:
        yield client


def of_wrong_type(model: type[BaseModel], base: dict[str, Any], name: str) -> Any:
    """A value that the schema refuses for a field."""
    values: tuple[Any, ...] = (5, "none such", {"x": 5}, [[[]]])
    for value in values:
        try:
            model.model_validate({**base, name: value})
        except ValidationError:
            return value
    raise AssertionError(f"{name} takes anything")


def refused(client: httpx.Client, path: str, fields: dict[str, Any]) -> dict[str, Any]:
    body = json.dumps({**ROUTES[path][1], **fields}).encode()  # httpx itself refuses halves of pairs
    answer = client.post(path, content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 404, 413), answer.text
    error: dict[str, Any] = answer.json()["error"]
    return error


@pytest.mark.parametrize("path", ROUTES)
def test_a_wrong_type_of_any_field_names_it(http: httpx.Client, limited: httpx.Client, path: str) -> None:
    model, base = ROUTES[path]
    for name, field in model.model_fields.items():
        value = of_wrong_type(model, base, field.alias or name)
        for client in (http, limited):
            error = refused(client, path, {field.alias or name: value})
            assert error["param"] == (field.alias or name), error


@pytest.mark.parametrize(
    ("path", "fields", "param"), CASES, ids=[f"{path.split('/')[-1]}-{str(row)[:40]}" for path, row, _ in CASES]
)
def test_a_wrong_value_of_any_field_names_it(
    http: httpx.Client, limited: httpx.Client, path: str, fields: dict[str, Any], param: str
) -> None:
    for client in (http, limited):
        error = refused(client, path, fields)
        assert error["param"] == param, error


@pytest.mark.parametrize(("fields", "param"), LARGE, ids=lambda each: str(each)[:40])
def test_a_value_beyond_a_limit_names_its_field(limited: httpx.Client, fields: dict[str, Any], param: str) -> None:
    error = refused(limited, CHAT, fields)
    assert error["param"] == param, error


def test_tools_that_make_too_large_a_form_are_named(http: httpx.Client) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"description": "x" * 2**18}}}
    error = refused(http, CHAT, {"tools": [tool], "tool_choice": "required"})
    assert error["param"] == "tools", error


def test_a_form_beside_a_demanded_call_names_the_choice(http: httpx.Client) -> None:
    fields = {"tools": [TOOL], "tool_choice": "required", "response_format": {"type": "json_object"}}
    assert refused(http, CHAT, fields)["param"] == "tool_choice"


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (COMPLETION, {"prompt": "x" * CONTEXT}),
        (COMPLETION, {"prompt": "x" * 100_000}),
        (COMPLETION, {"prompt": [1] * (CONTEXT + 1)}),
        (CHAT, {"messages": [{"role": "user", "content": "x" * CONTEXT}]}),
        (CHAT, {"messages": [{"role": "user", "content": "x" * 100_000}]}),
    ],
    ids=lambda each: str(each)[:40],
)
def test_a_prompt_that_is_too_long_has_openai_s_code(
    http: httpx.Client, limited: httpx.Client, path: str, fields: dict[str, Any]
) -> None:
    for client in (http, limited):
        assert refused(client, path, fields)["code"] == "context_length_exceeded"
    assert refused(http, path, {**fields, "temperature": -1})["code"] is None


def test_an_error_of_two_fields_or_none_names_none(http: httpx.Client) -> None:
    for fields in ({"guided_regex": "a", "guided_json": {}}, {"response_format": {"type": "json_object"}}):
        error = refused(http, COMPLETION, {**fields, "guided_grammar": "start: A"})
        assert error["param"] is None, error


@pytest.mark.parametrize(
    ("method", "path", "body", "param"),
    [
        ("GET", "/admin/cache/stats?sizes=0", {}, "sizes"),
        ("GET", "/admin/cache/stats?sizes=many", {}, "sizes"),
        ("GET", "/admin/cache/stats?sizes=" + ",".join("1" * 257), {}, "sizes"),
        ("GET", "/admin/cache/stats?what=1", {}, "what"),
        ("GET", "/admin/cache/blocks?limit=0", {}, "limit"),
        ("GET", "/admin/cache/blocks?limit=x", {}, "limit"),
        ("GET", "/admin/cache/blocks?after=x", {}, "after"),
        ("GET", "/admin/cache/tree?depth=0", {}, "depth"),
        ("GET", "/admin/cache/tree?depth=x", {}, "depth"),
        ("GET", "/admin/cache/tree?limit=x", {}, "limit"),
        ("POST", "/admin/cache/purge", {"unknown": 1}, "unknown"),
        ("POST", "/admin/cache/purge", {"what": "everything"}, "what"),
        ("POST", "/admin/cache/purge", {"what": "text"}, "prompt"),
        ("POST", "/admin/cache/purge", {"what": "tenant", "prompt": "x"}, "what"),
        ("POST", "/admin/cache/purge", {"tenant": ""}, "tenant"),
        ("POST", "/admin/cache/purge", {"salt": 5}, "salt"),
        ("POST", "/admin/cache/purge", {"public": 5}, "public"),
        ("POST", "/admin/cache/purge", {"what": "namespace", "public": "nobody"}, "public"),
        ("POST", "/admin/cache/purge", {"tenant": "default"}, "what"),
        ("POST", "/admin/cache/purge", {"prompt": ""}, "prompt"),
        ("POST", "/admin/cache/purge", {"prompt": "x", "prompt_token_ids": [1]}, "prompt_token_ids"),
        ("POST", "/admin/cache/purge", {"prompt_token_ids": [-1]}, "prompt_token_ids"),
        ("POST", "/admin/cache/purge", {"prompt": 5}, "prompt"),
        ("POST", "/admin/cache/purge", {"prompt_token_ids": "x"}, "prompt_token_ids"),
        ("POST", "/admin/cache/purge", {"prompt_token_ids": [2**40]}, "prompt_token_ids"),
        ("POST", "/admin/cache/pin", {"prompt": "x"}, "seconds"),
        ("POST", "/admin/cache/pin", {"prompt": "x", "seconds": -1}, "seconds"),
        ("POST", "/admin/cache/pin", {"seconds": 5}, "prompt"),
        ("POST", "/admin/cache/pin", {"seconds": 5, "prompt": "never asked"}, "prompt"),
        ("POST", "/admin/cache/pin", {"seconds": 5, "prompt_token_ids": [9, 8, 7]}, "prompt_token_ids"),
        ("DELETE", "/admin/cache/pin/x", {}, "pin"),
        ("PUT", "/admin/tenants/a", {"unknown": 1}, "unknown"),
        ("PUT", "/admin/tenants/a", {"floor_tokens": "many"}, "floor_tokens"),
        ("PUT", "/admin/tenants/a", {"floor_tokens": 10**6}, "floor_tokens"),
        ("PUT", "/admin/tenants/a", {"cap_tokens": -4}, "cap_tokens"),
        ("PUT", "/admin/tenants/a", {"cap_tokens": 10**6}, "cap_tokens"),
        ("PUT", "/admin/tenants/a", {"cap_tokens": 0}, "cap_tokens"),
        ("PUT", "/admin/tenants/a", {"floor_tokens": 40, "cap_tokens": 4}, None),
        ("PUT", "/admin/tenants/" + "x" * 300, {"floor_tokens": 4}, "tenant"),
    ],
    ids=lambda each: str(each)[:40],
)
def test_the_admin_port_names_the_field_that_is_wrong(
    method: str, path: str, body: dict[str, Any], param: str | None
) -> None:
    answer = Office().ask(method, path, **body)
    assert 400 <= answer.status_code < 500, answer.text
    assert answer.json()["error"]["param"] == param, answer.text
