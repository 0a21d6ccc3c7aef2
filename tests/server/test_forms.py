"""Forms of answers that are asked for: applied or refused, never left out in silence; refusals say what is wrong."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from pagemill.server import asking
from tests.fixtures.live_server import LiveServer
from tests.server.test_chat import TIME, WEATHER
from tests.server.test_completions import events

COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]
BASES: dict[str, dict[str, Any]] = {COMPLETION: {"prompt": "x"}, CHAT: {"messages": HELLO}}
OBJECT = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"], "additionalProperties": False}


@pytest.fixture(scope="module")
def strict(tiny_model: Path) -> Iterator[httpx.Client]:
    with LiveServer(str(tiny_model), settings={"strict": True}) as server, server.client() as client:
        yield client


def refusal(http: httpx.Client, path: str, **fields: Any) -> dict[str, Any]:
    answer = http.post(path, json={**BASES[path], "max_tokens": 4, **fields})
    assert answer.status_code == 400, answer.text
    error: dict[str, Any] = answer.json()["error"]
    return error


@pytest.mark.parametrize("path", BASES)
@pytest.mark.parametrize(
    ("fields", "param", "told"),
    [
        ({"structured_outputs": {"choices": ["a"]}}, "structured_outputs", "choice, grammar, json_object"),
        ({"structured_outputs": {"json_schema": {}}}, "structured_outputs", "there is json, regex"),
        ({"structured_outputs": {"regex": "a", "indent": 2}}, "structured_outputs", "unknown field"),
        ({"structured_outputs": {}}, "structured_outputs", "names no form"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs", "names no form"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs", "no text to choose"),
        ({"guided_choice": []}, "guided_choice", "no text to choose"),
        ({"response_format": {"type": "json_object", "shema": {}}}, "response_format", "there is type, json_schema"),
        ({"response_format": {"type": "text", "schema": {}}}, "response_format", "is of type text and brings schema"),
        (
            {"response_format": {"type": "json_object", "regex": "a"}},
            "response_format",
            "regex; it takes schema",
        ),
        ({"response_format": {"type": "json_schema", "schema": {}}}, "response_format", "it takes json_schema"),
    ],
)
def test_a_form_that_is_empty_or_unknown_is_refused(
    http: httpx.Client, path: str, fields: dict[str, Any], param: str, told: str
) -> None:
    error = refusal(http, path, **fields)
    assert error["param"] == param
    assert told in error["message"]


def test_a_json_object_with_a_schema_follows_the_schema(http: httpx.Client) -> None:
    asked = {"response_format": {"type": "json_object", "schema": OBJECT}, "max_tokens": 64, "temperature": 0}
    answer = http.post(CHAT, json={"messages": HELLO, **asked})
    assert json.loads(answer.json()["choices"][0]["message"]["content"]) == {"a": 1}


PARTS = [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]
NESTED: list[tuple[str, dict[str, Any], str, str]] = [
    (COMPLETION, {"stream_options": {"foo": 1}}, "stream_options", "stream_options.foo"),
    (CHAT, {"messages": [*HELLO, {"role": "user", "content": "x", "foo": 1}]}, "messages", "messages.1.foo"),
    (CHAT, {"messages": [{"role": "user", "content": PARTS}]}, "messages", "messages.0.content.0.cache_control"),
    (CHAT, {"tools": [{**TIME, "foo": 1}]}, "tools", "tools.0.foo"),
    (CHAT, {"tools": [{**TIME, "function": {"name": "f", "foo": 1}}]}, "tools", "tools.0.function.foo"),
    (
        CHAT,
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "foo": 1}}},
        "response_format",
        "response_format.json_schema.foo",
    ),
]


@pytest.mark.parametrize(("path", "fields", "param", "name"), NESTED, ids=[each[3] for each in NESTED])
def test_an_unknown_field_within_another_is_told_or_refused(
    http: httpx.Client,
    strict: httpx.Client,
    caplog: pytest.LogCaptureFixture,
    path: str,
    fields: dict[str, Any],
    param: str,
    name: str,
) -> None:
    error = refusal(strict, path, **fields)
    assert error["param"] == param
    assert name in error["message"]
    asking._reported.clear()
    with caplog.at_level(logging.WARNING, logger="pagemill.server.asking"):
        for _ in range(2):
            assert http.post(path, json={**BASES[path], "max_tokens": 4, **fields}).status_code == 200
    [record] = caplog.records
    assert ".".join(each for each in name.split(".") if not each.isdigit()) in record.getMessage()


def test_what_clients_send_back_of_an_answer_is_known(strict: httpx.Client) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "get_time", "arguments": "{}"}}
    nulls = dict.fromkeys(("refusal", "audio", "annotations", "function_call", "reasoning_content", "name"))
    messages = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call], **nulls},
        {"role": "tool", "content": "noon", "tool_call_id": "call_1"},
    ]
    answer = strict.post(CHAT, json={"messages": messages, "tools": [TIME], "max_tokens": 2})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("path", BASES)
@pytest.mark.parametrize(
    ("fields", "param", "told"),
    [
        ({"guided_regex": r"[^\s\S]"}, "guided_regex", "the regex cannot be used: no text fits it"),
        ({"guided_regex": r"ab[^\s\S]"}, "guided_regex", "the regex cannot be used: no text fits it"),
        ({"guided_grammar": "start: start"}, "guided_grammar", "the grammar cannot be used: no text fits it"),
        ({"guided_grammar": 'start: "a" start'}, "guided_grammar", "has no end"),
        ({"guided_json": {"$ref": "#"}}, "guided_json", "the json_schema cannot be used: no text fits it"),
    ],
)
def test_a_form_that_nothing_fits_is_refused_before_the_answer(
    http: httpx.Client, path: str, fields: dict[str, Any], param: str, told: str
) -> None:
    error = refusal(http, path, **fields, stream=True)
    assert error["param"] == param
    assert told in error["message"]
    assert "<" not in error["message"]


DEAD_END = 'start: "a" x | "b" x\nx: /[^\\s\\S]/'


def test_a_form_that_ends_nowhere_is_a_wrong_value_midway_too(http: httpx.Client) -> None:
    error = refusal(http, COMPLETION, guided_grammar=DEAD_END)
    assert error["param"] == "guided_grammar"
    assert "the grammar cannot go on from the text so far: no text fits it" in error["message"]
    answer = http.post(COMPLETION, json={"prompt": "x", "guided_grammar": DEAD_END, "stream": True})
    last = json.loads(answer.text.split("\n\n")[-3].removeprefix("data: "))
    assert last["error"]["param"] == "guided_grammar"
    assert last["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"guided_regex": "ab("}, "the regex cannot be used: unclosed group (at character 3)"),
        ({"guided_regex": "x" * 600 + "[z-a]"}, "(at character 602)"),
        ({"guided_json": {"type": "string", "pattern": "("}}, "a pattern in it: unclosed group"),
    ],
)
def test_an_expression_that_is_wrong_says_what_and_where(http: httpx.Client, fields: dict[str, Any], told: str) -> None:
    message = refusal(http, COMPLETION, **fields)["message"]
    assert told in message
    assert "start:" not in message
    assert "\n" not in message


def with_parameters(parameters: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "broken", "parameters": parameters}}


P = {"type": "integer"}
AT_P = {"type": "object", "properties": {"a": {"$ref": "#/$defs/P"}}, "required": ["a"], "$defs": {"P": P}}


@pytest.mark.parametrize(
    "parameters",
    [
        AT_P,
        {**AT_P, "$id": "https://example.org/schema"},
        {**AT_P, "properties": {"a": {"$ref": "#pt"}}, "$defs": {"P": {"$anchor": "pt", **P}}},
    ],
    ids=["plain", "id", "anchor"],
)
def test_a_schema_s_references_hold_within_a_call(http: httpx.Client, parameters: dict[str, Any]) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    body = {"messages": HELLO, "tools": [tool], "tool_choice": "required", "max_tokens": 4}
    assert http.post(CHAT, json=body).status_code == 200


def test_a_reference_to_nothing_is_told_as_it_was_written(http: httpx.Client) -> None:
    broken = with_parameters({"type": "object", "properties": {"a": {"$ref": "#/$defs/Q"}}, "required": ["a"]})
    message = refusal(http, CHAT, tools=[broken], tool_choice="required")["message"]
    assert "/$defs/Q" in message
    assert "arguments" not in message


def test_what_is_null_or_false_asks_for_nothing(strict: httpx.Client) -> None:
    form = {"regex": "a+", "structural_tag": None, "disable_any_whitespace": False}
    body = {"prompt": "x", "max_tokens": 4, "structured_outputs": form, "response_format": None}
    assert strict.post(COMPLETION, json=body).status_code == 200
    body = {"prompt": "x", "max_tokens": 4, "response_format": {"type": "text", "strict": None}}
    assert strict.post(COMPLETION, json=body).status_code == 200
    refused = {**body, "response_format": {"type": "text", "strict": True}}
    assert strict.post(COMPLETION, json=refused).status_code == 400


def test_a_demanded_call_keeps_to_parameters_that_refer_to_themselves(http: httpx.Client) -> None:
    """As pydantic writes nested models; a property may be named like a keyword."""
    parameters = {
        "type": "object",
        "properties": {
            "at": {"$ref": "#/$defs/Place"},
            "enum": {"$ref": "#/$defs/Place"},
            "then": {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
        },
        "required": ["at", "enum", "then"],
        "additionalProperties": False,
        "$defs": {"Place": {"enum": ["here", "#/$defs/Place"]}},
    }
    tool = {"type": "function", "function": {"name": "go", "parameters": parameters}}
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Go."}], "tools": [tool], "max_tokens": 600}
    answer = http.post(CHAT, json={**body, "tool_choice": "required", "temperature": 0.9, "seed": 4, "n": 4})
    assert answer.status_code == 200, answer.text
    ended = [each for each in answer.json()["choices"] if each["finish_reason"] != "length"]
    assert ended
    for each in ended:
        [call] = each["message"]["tool_calls"]
        found = json.loads(call["function"]["arguments"])
        while found is not None:
            assert {found["at"], found["enum"]} <= {"here", "#/$defs/Place"}
            found = found["then"]


@pytest.mark.parametrize(
    ("parameters", "told"),
    [
        ({"type": "nix"}, "Invalid type: nix"),
        ({"type": "object", "properties": {"a": {"type": "string", "pattern": "("}}}, "unclosed group"),
    ],
)
def test_a_tool_whose_schema_is_wrong_is_named(http: httpx.Client, parameters: dict[str, Any], told: str) -> None:
    broken = with_parameters(parameters)
    named = {"type": "function", "function": {"name": "broken"}}
    for choice in ("required", named):
        error = refusal(http, CHAT, tools=[WEATHER, TIME, broken], tool_choice=choice)
        assert error["param"] == "tools"
        assert error["message"].startswith("tools.2.function.parameters of 'broken' cannot be used: ")
        assert told in error["message"]
        assert "tool_call" not in error["message"]
        assert "start" not in error["message"]


def test_a_call_that_was_demanded_and_cut_short_shows_no_markup(http: httpx.Client) -> None:
    asked = {"tools": [WEATHER], "tool_choice": "required", "temperature": 0}
    for max_tokens in (1, 5):
        answer = http.post(CHAT, json={"messages": HELLO, "max_tokens": max_tokens, **asked})
        [choice] = answer.json()["choices"]
        assert choice["message"]["content"] is None
        assert choice["finish_reason"] == "length"
        chunks = events(http, CHAT, messages=HELLO, max_tokens=max_tokens, ignore_eos=False, **asked)
        assert [each["choices"][0]["delta"].get("content") for each in chunks] == [None] * len(chunks)
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
