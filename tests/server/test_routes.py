"""Models, tokens, version, the schema of the interface, unknown fields, and a storm of wrong bodies."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.fixtures.live_server import LiveServer

TRIALS = 400


def test_models_are_listed_under_each_name(tiny_model: Path) -> None:
    with (
        LiveServer(str(tiny_model), settings={"served_names": ("first", "org/second")}) as server,
        server.client() as http,
    ):
        listed = http.get("/v1/models").json()
        assert [each["id"] for each in listed["data"]] == ["first", "org/second"]
        assert http.get("/v1/models/").json() == listed
        assert listed["data"][0]["max_model_len"] == 1536
        assert http.get("/v1/models/org/second").json()["id"] == "org/second"
        assert http.get("/v1/models/third").status_code == 404
        answer = http.post("/v1/completions", json={"model": "org/second", "prompt": "x", "max_tokens": 1})
        assert answer.json()["model"] == "first"


def test_tokens_go_there_and_back(http: httpx.Client) -> None:
    answer = http.post("/tokenize", json={"prompt": "Hello", "return_token_strs": True}).json()
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert "".join(answer["token_strs"]) == "Hello"
    assert http.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": "Hello"}


def test_a_tokeniser_s_control_tokens_are_told(http: httpx.Client) -> None:
    answer = http.get("/tokenizer_info").json()
    assert answer["eos_token"] == "<|im_end|>"
    assert answer["bos_token"] is None
    assert len(http.post("/tokenize", json={"prompt": answer["eos_token"]}).json()["tokens"]) == 1
    assert "messages" in answer["chat_template"]
    assert answer["model_max_length"] == 1536


def test_an_operator_s_template_is_not_told(tiny_model: Path) -> None:
    with (
        LiveServer(str(tiny_model), settings={"chat_template": "secret {{ messages[0].content }}"}) as server,
        server.client() as http,
    ):
        answer = http.get("/tokenizer_info").json()
        assert answer["chat_template"] is None
        assert answer["eos_token"] == "<|im_end|>"


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/tokenize", {}, 400),
        ("/tokenize", {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, 400),
        ("/tokenize", {"messages": []}, 400),
        ("/tokenize", {"prompt": "x", "model": "other"}, 404),
        ("/tokenize", {"messages": [{"role": "user", "content": "x"}], "chat_template": "{{ messages }}"}, 400),
        ("/tokenize", {"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"tools": []}}, 400),
        ("/tokenize", {"messages": [{"role": "user", "content": "x"}], "tools": [{"function": {}}]}, 400),
        ("/detokenize", {"tokens": [-1]}, 400),
        ("/detokenize", {"tokens": [10**9]}, 400),
        ("/detokenize", {"tokens": ["a"]}, 400),
        ("/detokenize", {"tokens": [2**70]}, 400),
    ],
)
def test_wrong_tokens_are_told(http: httpx.Client, path: str, body: dict[str, Any], status: int) -> None:
    answer = http.post(path, json=body)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["message"]


def test_version_and_unknown_routes(http: httpx.Client) -> None:
    assert http.get("/version").json() == {"version": "0"}
    assert http.get("/v1/nothing").json()["error"]["type"] == "not_found_error"
    assert http.get("/v1/completions").status_code == 405


@pytest.mark.parametrize("path", ["/health", "/version", "/v1/models", "/v1/models/tiny", "/tokenizer_info"])
def test_a_head_is_a_get_without_its_body(http: httpx.Client, path: str) -> None:
    head, got = http.head(path), http.get(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(got.content))


def test_the_interface_describes_itself(http: httpx.Client) -> None:
    schema = http.get("/openapi.json").json()
    assert {"/v1/completions", "/v1/chat/completions", "/v1/models", "/tokenize", "/health"} <= schema["paths"].keys()
    fields = schema["components"]["schemas"]["CompletionBody"]["properties"]
    assert {"prompt", "cache", "prompt_cache_options", "response_format"} <= fields.keys()


def test_the_interface_describes_errors_as_they_are_sent(http: httpx.Client) -> None:
    schema = http.get("/openapi.json").json()
    asked = schema["paths"]["/v1/completions"]["post"]["responses"]
    assert "422" not in asked
    described = asked["4XX"]["content"]["application/json"]["schema"]["properties"]["error"]
    sent = http.post("/v1/completions", json={"prompt": "x", "temperature": "hot"})
    assert sent.status_code == 400
    assert sent.json()["error"].keys() == set(described["required"]) == described["properties"].keys()


def test_unknown_fields_are_told_once(http: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "pagemill.server.asking"):
        for _ in range(3):
            answer = http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1, "a_new_field": {"b": 1}})
            assert answer.status_code == 200
    assert sum("a_new_field" in each.getMessage() for each in caplog.records) == 1


def test_what_is_no_name_of_a_field_is_not_repeated_in_the_log(
    http: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    secret = "my secret is a canary"
    names = [secret, "canary\nrequest status=200", "\x1b[31mcanary", "canary" * 20, ""]
    with caplog.at_level(logging.DEBUG, "pagemill.server.asking"):
        for name in names:
            assert http.post("/tokenize", json={"prompt": "x", name: 1}).status_code == 200
    told = [each.getMessage() for each in caplog.records]
    assert "canary" not in "".join(told)
    assert len(told) <= 1, "once"


def test_strict_refuses_unknown_fields(tiny_model: Path) -> None:
    with LiveServer(str(tiny_model), settings={"strict": True}) as server, server.client() as http:
        answer = http.post("/v1/completions", json={"prompt": "x", "promt": "y"})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "promt")
        for path, body in (("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [1]})):
            assert http.post(path, json=body).status_code == 200
            assert http.post(path, json={**body, "promt": "y"}).json()["error"]["param"] == "promt"


@pytest.mark.parametrize(
    "field", ['"\\ud800": 1', '"model": "\\ud800"', '"stop": "\\ud800"', '"cache_salt": "\\ud800"']
)
def test_half_of_a_surrogate_pair_breaks_nothing(tiny_model: Path, field: str) -> None:
    with LiveServer(str(tiny_model), settings={"strict": True}) as server, server.client() as http:
        body = b'{"prompt": "x", ' + field.encode() + b"}"
        answer = http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
        assert answer.status_code < 500, answer.text
        assert answer.json()


def test_a_template_of_the_server_s_is_used(tiny_model: Path) -> None:
    settings = {"chat_template": "{{ messages[0].content }}!"}
    with LiveServer(str(tiny_model), settings=settings) as server, server.client() as http:
        ids = http.post("/tokenize", json={"messages": [{"role": "user", "content": "abc"}]}).json()["tokens"]
        assert http.post("/detokenize", json={"tokens": ids}).json()["prompt"] == "abc!"


def test_no_wrong_body_is_answered_as_our_mistake(live: LiveServer) -> None:
    rng = random.Random(1)
    schema = None
    with live.client() as http:
        schema = http.get("/openapi.json").json()["components"]["schemas"]
        statuses = []
        for trial in range(TRIALS):
            path, name = rng.choice([("/v1/completions", "CompletionBody"), ("/v1/chat/completions", "ChatBody")])
            body: dict[str, Any] = {"max_tokens": 2}
            if name == "CompletionBody":
                body["prompt"] = "x"
            else:
                body["messages"] = [{"role": "user", "content": "x"}]
            for field in rng.sample(sorted(schema[name]["properties"]), rng.randint(1, 3)):
                body[field] = _value(rng)
            answer = http.post(path, json=body)
            statuses.append(answer.status_code)
            assert answer.status_code < 500, (trial, body, answer.text)
            if not body.get("stream"):
                assert answer.json()
        assert set(statuses) == {200, 400}
    stats = live.call(lambda engine: engine.stats())
    assert (stats.num_running, stats.num_waiting) == (0, 0)


def _value(rng: random.Random) -> Any:
    simple: list[Any] = [
        None, True, False, 0, 1, -1, 2, 0.5, -0.0, 1e308, 10**18, 2**80, "", "x", "json_object", "auto", "required",
        "\x00", "é" * 3, "{", "[0-9]+", "30m", [], {}, [1], ["x"], [None], [[1, 2]], [[]], {"1": 5}, {"a": "b"},
        {"type": "regex", "regex": "a|b"}, {"type": "json_object"}, {"type": "json_schema", "json_schema": {}},
        {"type": "grammar", "grammar": "start: x"}, {"include_usage": True}, {"retain": [{"from": 0}]},
        {"retain": [{"from": 5, "to": 2}]}, {"bypass": True}, {"mode": "explicit"}, {"ttl": "1s"}, {"ttl": -1},
        {"regex": "("}, {"choice": ["a"]}, {"choice": [""]}, {"json": "{"}, [{"role": "user", "content": None}],
        [{"role": "tool", "content": "x"}], [{"type": "function", "function": {"name": "f"}}],
        [{"type": "function", "function": {"name": "f", "parameters": {"type": 5}}}], "{{ messages }}", "{% x %}",
    ]  # fmt: skip
    return rng.choice(simple)
