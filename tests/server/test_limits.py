"""One test a limit (S11): what is too large is refused in milliseconds, before any model work, and what is just large
enough passes."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import fields
from typing import Any

import httpx
import pytest

from pagemill.base.errors import ConfigError, RequestError
from pagemill.cli.serve_access import read_limits
from pagemill.server.access_door import Message, Receive, Scope, Send, send_json
from pagemill.server.limits import Limits, check_regex, check_request, check_schema, check_shape
from pagemill.server.limits_body import BodyLimits
from pagemill.telemetry.metrics import Metrics

LIMITS = Limits()
SMALL = Limits(max_body_bytes=1000, max_header_bytes=600, max_headers=10, max_url_bytes=100, body_timeout_s=0.2)


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def message(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def schema_of(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


def tool(**changes: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **changes}}


# limit -> (a body that is just within it, one that is just beyond it, the name that the error tells)
BODIES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "max_depth": ({"x": nested(63)}, {"x": nested(64)}, "nested"),
    "max_fields": ({"x": [0] * 499_999}, {"x": [0] * 500_000}, "names and elements"),
    "max_messages": ({"messages": [message("a")] * 2048}, {"messages": [message("a")] * 2049}, "messages"),
    "max_parts": ({"messages": [message(["a"] * 256)]}, {"messages": [message(["a"] * 257)]}, "messages.0.content"),
    "max_prompts": ({"prompt": ["a"] * 256}, {"prompt": ["a"] * 257}, "prompt"),
    "max_choices": ({"prompt": ["a"] * 64, "n": 4}, {"prompt": ["a"] * 65, "n": 4}, "n"),
    "max_n": ({"prompt": "a", "n": 128}, {"prompt": "a", "n": 129}, "n"),
    "max_prompt_chars": ({"prompt": "a" * 4 * 2**20}, {"prompt": "a" * (4 * 2**20 + 1)}, "characters"),
    "max_prompt_tokens": ({"prompt": [1] * 4000}, {"prompt": [1] * 4001}, "tokens"),
    "max_max_tokens": ({"max_tokens": 2**20}, {"max_tokens": 2**20 + 1}, "max_tokens"),
    "max_logprobs": ({"logprobs": 20}, {"logprobs": 21}, "logprobs"),
    "max_stops": ({"stop": ["a"] * 16}, {"stop": ["a"] * 17}, "stop"),
    "max_stop_chars": ({"stop": "a" * 1024}, {"stop": ["b", "a" * 1025]}, "stop"),
    "max_logit_bias": (
        {"logit_bias": {str(at): 1 for at in range(1024)}},
        {"logit_bias": {str(at): 1 for at in range(1025)}},
        "logit_bias",
    ),
    "max_schema_bytes": (
        {"response_format": {"json_schema": {"schema": {"title": "x" * 65_000}}}},
        {"response_format": {"json_schema": {"schema": {"title": "x" * 66_000}}}},
        "response_format.json_schema",
    ),
    "max_schema_depth": ({"guided_json": schema_of(31)}, {"guided_json": schema_of(33)}, "guided_json"),
    "max_regex_chars": ({"guided_regex": "a" * 4096}, {"guided_regex": "a" * 4097}, "guided_regex"),
    "max_regex_size": (
        {"structured_outputs": {"regex": "(a{100}){300}"}},
        {"structured_outputs": {"regex": "(a{100}){400}"}},
        "structured_outputs.regex",
    ),
    "max_repeat": (
        {"guided_json": {"type": "string", "maxLength": 65_536}},
        {"guided_json": {"type": "string", "maxLength": 65_537}},
        "maxLength",
    ),
    "max_tools": ({"tools": [tool()] * 128}, {"tools": [tool()] * 129}, "tools"),
    "max_tool_bytes": ({"tools": [tool(x="a" * 65_000)]}, {"tools": [tool(x="a" * 66_000)]}, "tools.0"),
    "max_extra_bytes": (
        {"chat_template_kwargs": {"x": "a" * 16_000}},
        {"chat_template_kwargs": {"x": "a" * 17_000}},
        "chat_template_kwargs",
    ),
}  # fmt: skip
HEAD = {"max_body_bytes", "max_header_bytes", "max_headers", "max_url_bytes", "body_timeout_s"}
CONNECTION = {"max_connections", "header_timeout_s", "write_timeout_s"}


def check(body: dict[str, Any], limits: Limits) -> None:
    check_shape(body, limits)
    check_request(body, limits)


def test_every_limit_has_its_test() -> None:
    assert {each.name for each in fields(Limits)} == BODIES.keys() | HEAD | CONNECTION


@pytest.mark.parametrize("name", BODIES)
def test_a_body_within_its_limit_passes_and_one_beyond_is_refused(name: str) -> None:
    limits = Limits(max_prompt_tokens=4000) if name == "max_prompt_tokens" else LIMITS
    within, beyond, told = BODIES[name]
    check(within, limits)
    with pytest.raises(RequestError) as caught:
        check(beyond, limits)
    assert told in str(caught.value)
    assert 400 <= caught.value.status < 500


@pytest.mark.parametrize("name", BODIES)
def test_a_refusal_takes_less_than_a_tenth_of_a_second_of_cpu(name: str) -> None:
    limits = Limits(max_prompt_tokens=4000) if name == "max_prompt_tokens" else LIMITS
    body = json.dumps(BODIES[name][1]).encode()
    took = []
    for _ in range(3):
        began = time.thread_time()
        status = asyncio.run(post(body, limits)).status_code
        took.append(time.thread_time() - began)
        assert 400 <= status < 500
    assert min(took) < 0.1


@pytest.mark.parametrize(
    "field", ["best_of", "max_completion_tokens", "min_tokens", "top_logprobs", "prompt_logprobs", "n"]
)
def test_numbers_under_other_names_have_the_same_limit(field: str) -> None:
    with pytest.raises(RequestError, match=field):
        check({field: 2**40}, LIMITS)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"n": "129"}, "n is 129"), ({"n": 129.0}, "n is 129"), ({"max_tokens": 1e30}, "max_tokens is huge"),
        ({"logprobs": " 21 "}, "logprobs"), ({"prompt": ["a"] * 65, "n": "4"}, "256 in all"),
        ({"prompt": "a", "n": "9" * 5000}, "n is huge"), ({"n": 300}, r"at most 128 \(max_n\)"),
    ],
)  # fmt: skip
def test_a_number_has_the_same_limit_in_every_form_that_the_schema_takes(body: dict[str, Any], told: str) -> None:
    with pytest.raises(RequestError, match=told):
        check(body, LIMITS)


@pytest.mark.parametrize(
    "encode",
    [
        lambda text: b"\xef\xbb\xbf" + text.encode(), lambda text: text.encode("utf-16"),
        lambda text: text.encode("utf-32"), lambda text: text.replace("0", "NaN").encode(),
        lambda text: text.replace("0", '"\\ud800"').encode(), lambda text: text.replace("0", "-Infinity").encode(),
    ],
)  # fmt: skip
def test_no_way_to_write_json_leads_past_the_limits(encode: Any) -> None:
    text = json.dumps({"n": 129, "user": 0})
    assert json.loads(encode(text))["n"] == 129, "the route reads it"
    answer = asyncio.run(post(encode(text)))
    assert answer.status_code == 400
    assert "n is 129" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "place",
    [
        lambda pattern: {"response_format": {"type": "regex", "regex": pattern}},
        lambda pattern: {"guided_json": {"properties": {"a": {"pattern": pattern}}}},
        lambda pattern: {"response_format": {"json_schema": {"schema": {"items": [{"pattern": pattern}]}}}},
        lambda pattern: {"tools": [tool(parameters={"properties": {"a": {"pattern": pattern}}})]},
        lambda pattern: {"structured_outputs": {"json": {"pattern": pattern}}},
        lambda pattern: {"structured_outputs": {"json": json.dumps({"pattern": pattern})}},
        lambda pattern: {"guided_json": json.dumps({"items": {"pattern": pattern}})},
        lambda pattern: {"guided_json": {"patternProperties": {pattern: {}}}},
    ],
)
def test_a_regex_is_measured_wherever_it_stands(place: Any) -> None:
    check(place("[a-z]{1,100}@[a-z]{1,100}"), LIMITS)
    with pytest.raises(RequestError, match="written out"):
        check(place("((a{200}){200}){200}"), LIMITS)


@pytest.mark.parametrize("pattern", ["a{99999999999}", "(a{1000}){1000}", "((((a{9}){9}){9}){9}){9}", "[ab]{40000}"])
def test_repetitions_that_grow_too_far_are_refused(pattern: str) -> None:
    with pytest.raises(RequestError, match="written out"):
        check_regex(pattern, LIMITS)


@pytest.mark.parametrize(
    "pattern",
    [r"\d{4}-\d{2}-\d{2}", r"\{99999\}", "[{99999}]", "{", "}", "a{,5}", "a{x}", "((((", "))))", "[", "\\", ""],
)
def test_harmless_patterns_pass_whether_they_are_patterns_or_not(pattern: str) -> None:
    check_regex(pattern, LIMITS)


def test_a_client_s_own_template_is_refused() -> None:
    with pytest.raises(RequestError, match="may not bring a template"):
        check({"chat_template": "{{ messages }}"}, LIMITS)


@pytest.mark.parametrize(
    "body",
    [
        {"messages": "x"}, {"messages": [1, None, "x"]}, {"prompt": None}, {"prompt": []}, {"prompt": {"a": 1}},
        {"prompt": [[1], "a", None]}, {"n": "many"}, {"n": None}, {"n": 1.5}, {"stop": 5}, {"stop": [1, None]},
        {"logit_bias": 3}, {"tools": {"a": 1}}, {"tools": [1]}, {"response_format": "json"}, {"guided_json": 3},
        {"structured_outputs": [1]}, {"cache": 3}, {"max_tokens": True}, {"suffix": 3},
    ],
)  # fmt: skip
def test_fields_of_a_wrong_type_are_left_to_the_schema(body: dict[str, Any]) -> None:
    check(body, LIMITS)


def test_a_prompt_beyond_the_model_s_context_is_refused_without_being_tokenised() -> None:
    limits = LIMITS.for_model(100)
    check({"prompt": "a" * 1600}, limits)
    with pytest.raises(RequestError) as caught:
        check({"messages": [message("a" * 800), message([{"type": "text", "text": "a" * 801}])]}, limits)
    assert caught.value.status == 413
    with pytest.raises(RequestError, match="101 tokens"):
        check({"prompt": [1] * 101}, limits)


def test_several_prompts_may_each_be_as_long_as_one() -> None:
    limits = LIMITS.for_model(100)
    check({"prompt": ["a" * 1600] * 4}, limits)
    check({"prompt": [[1] * 100] * 4}, limits)
    with pytest.raises(RequestError, match="characters"):
        check({"prompt": ["a" * 1601] * 4}, limits)


@pytest.mark.parametrize("wrong", [{"max_depth": 0}, {"max_body_bytes": -1}, {"body_timeout_s": 0.0}, {"max_n": True}])
def test_limits_that_let_nothing_in_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="at least"):
        Limits(**wrong)


def test_a_schema_is_measured_as_it_is_read() -> None:
    check_schema({"type": "object"}, LIMITS)
    with pytest.raises(RequestError, match="bytes"):
        check_schema({"enum": ["x"] * 40_000}, LIMITS)


# Over HTTP


async def counting(scope: Scope, receive: Receive, send: Send) -> None:
    """Reads the body and tells its size and what was parsed."""
    body, more = b"", True
    while more:
        told = await receive()
        body += told.get("body", b"")
        more = told.get("more_body", False)
    await send_json(send, 200, {"bytes": len(body), "parsed": scope.get("state", {}).get("json")})


async def post(body: Any, limits: Limits = SMALL, path: str = "/v1/completions", **headers: str) -> httpx.Response:
    app = BodyLimits(counting, lambda: limits, Metrics("tiny"))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
        return await client.post(path, content=body, headers=headers)


def test_the_route_gets_the_same_bytes_and_the_parsed_object() -> None:
    answer = asyncio.run(post(b' {"prompt": "hi"} '))
    assert answer.json() == {"bytes": 18, "parsed": {"prompt": "hi"}}


@pytest.mark.parametrize("body", [b"", b"  ", b"no json", b"[1]", b'{"a":', b"3", b"\xff", b'{"a":1}x', b"nul"])
def test_what_is_no_json_object_is_left_to_the_route(body: bytes) -> None:
    answer = asyncio.run(post(body))
    assert answer.json() == {"bytes": len(body), "parsed": None}


def test_a_large_body_is_refused_whether_it_says_its_size_or_not() -> None:
    assert asyncio.run(post(b"x" * 1000)).status_code == 200
    assert asyncio.run(post(b"x" * 1001)).status_code == 413

    async def pieces() -> Any:
        for _ in range(11):
            yield b"x" * 100

    answer = asyncio.run(post(pieces()))
    assert answer.status_code == 413
    assert answer.headers["connection"] == "close"
    for length in ("99999999999999999999999", "-1", "x", "1e9", "1001"):
        assert asyncio.run(post(b"x", **{"content-length": length})).status_code == 413, length


def test_a_compressed_body_is_refused() -> None:
    assert asyncio.run(post(b"x", **{"content-encoding": "gzip"})).status_code == 415


def test_large_or_many_headers_and_long_addresses_are_refused() -> None:
    assert asyncio.run(post(b"{}", **{"x-long": "a" * 600})).status_code == 431
    assert asyncio.run(post(b"{}", **{f"x-{at}": "a" for at in range(12)})).status_code == 431
    assert asyncio.run(post(b"{}", path="/v1/" + "a" * 100)).status_code == 414
    assert asyncio.run(post(b"{}", path="/v1/x?" + "a" * 100)).status_code == 414


def test_a_body_that_does_not_come_in_time_is_refused() -> None:
    async def dripping() -> Any:
        for _ in range(100):
            yield b"x"
            await asyncio.sleep(0.05)

    answer = asyncio.run(post(dripping()))
    assert answer.status_code == 408
    assert "faster" in answer.json()["error"]["message"]


def test_a_client_that_leaves_within_its_body_reaches_no_route() -> None:
    reached: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        reached.append(scope["path"])

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(told: Message) -> None:
        reached.append(told["type"])

    scope = {"type": "http", "method": "POST", "path": "/", "raw_path": b"/", "query_string": b"", "headers": []}
    asyncio.run(BodyLimits(app, lambda: SMALL, Metrics("tiny"))(scope, receive, send))
    assert reached == []


def test_a_refusal_is_counted_by_reason() -> None:
    metrics = Metrics("tiny")
    app = BodyLimits(counting, lambda: SMALL, metrics)

    async def go() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
            await client.post("/", content=b"x" * 2000)
            await client.post("/", content=json.dumps({"x": nested(70)}))

    asyncio.run(go())
    assert {each.labels: each.value for each in metrics["pagemill:http_refused"].samples()} == {
        ("body",): 1,
        ("limit",): 1,
    }


# On the command line


def test_limits_are_set_by_name_with_the_units_of_their_kind() -> None:
    limits = read_limits(["max_body_bytes=1MiB", "max-n = 4", "header_timeout_s=500ms", "max_depth=1k"])
    assert (limits.max_body_bytes, limits.max_n, limits.header_timeout_s, limits.max_depth) == (2**20, 4, 0.5, 1000)
    assert read_limits([]) == Limits()


@pytest.mark.parametrize(
    "text", ["", "max_n", "max_m=3", "=3", "max_n=few", "max_n=0", "body_timeout_s=soon", "max_n=-1"]
)
def test_a_limit_that_there_is_not_or_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        read_limits([text])
