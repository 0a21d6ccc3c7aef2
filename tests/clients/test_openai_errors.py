"""OpenAI's SDK refused: each refusal arrives as the exception that the SDK has for it, with a message that helps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.serve_process import ServeProcess

openai = pytest.importorskip("openai", reason="openai is not installed; `make clients` installs it")
pytestmark = pytest.mark.clients

MODEL = "smollm2-135m"
ASKED: Any = [{"role": "user", "content": "Hello"}]
SHORT: Any = {"model": MODEL, "messages": ASKED, "temperature": 0, "max_tokens": 4}


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[Any]:
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120) as made:
        yield made


def with_key(server: ServeProcess, key: str) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=120)


def test_a_model_that_is_not_served_is_not_found(client: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="this server has smollm2-135m") as caught:
        client.chat.completions.create(**{**SHORT, "model": "gpt-4o"})
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4o")
    with pytest.raises(openai.NotFoundError, match="there is no POST"):
        client.audio.speech.create(model=MODEL, voice="alloy", input="hello")


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": -1},
        {"temperature": float(10**9)},
        {"top_p": 1.5},
        {"n": 0},
        {"n": 2},  # of a greedy answer
        {"max_tokens": -1},
        {"max_tokens": 10**9},
        {"presence_penalty": 3},
        {"stop": [""]},
        {"top_logprobs": 3},
        {"logprobs": True, "top_logprobs": 10**6},
        {"logit_bias": {"no id": 1}},
        {"tool_choice": "required"},
        {"messages": [{"role": "user", "content": "x " * 20_000}]},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no type"}}}},
        {"extra_body": {"response_format": {"type": "regex", "regex": "("}}},
    ],
    ids=lambda fields: "-".join(fields),
)
@pytest.mark.parametrize("stream", [False, True])
def test_wrong_values_are_bad_requests(client: Any, fields: dict[str, Any], stream: bool) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{**SHORT, **fields}, stream=stream)
    assert caught.value.body["type"] == "invalid_request_error"
    assert len(caught.value.body["message"]) > 10


@pytest.mark.parametrize("fields", [{"messages": []}, {"messages": "hello"}, {"max_tokens": "many"}, {"n": 1.5}])
def test_wrong_types_are_told_by_their_field(client: Any, fields: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{**SHORT, **fields})
    assert caught.value.param == next(iter(fields))


def test_a_refusal_leaves_the_server_answering(client: Any) -> None:
    assert client.chat.completions.create(**SHORT).usage.completion_tokens > 0


def test_keys_say_who_may_ask(guarded: ServeProcess, keys: tuple[Path, dict[str, str]]) -> None:
    made = keys[1]
    for wrong in ("none", made["alice"][:-1] + "#", ""):
        with pytest.raises(openai.AuthenticationError):
            with_key(guarded, wrong or "x").chat.completions.create(**SHORT)
    with pytest.raises(openai.AuthenticationError):
        with_key(guarded, "none").models.list()
    with pytest.raises(openai.PermissionDeniedError):
        with_key(guarded, made["prometheus"]).chat.completions.create(**SHORT)
    answer = with_key(guarded, made["alice"]).chat.completions.create(**SHORT)
    assert answer.usage.completion_tokens > 0


def test_a_rate_limit_is_told_with_the_time_to_wait(guarded: ServeProcess, keys: tuple[Path, dict[str, str]]) -> None:
    client = with_key(guarded, keys[1]["slow"])
    client.chat.completions.create(**SHORT)
    with pytest.raises(openai.RateLimitError) as caught:
        client.chat.completions.create(**SHORT)
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60


def test_the_cache_of_one_key_tells_another_nothing(guarded: ServeProcess, keys: tuple[Path, dict[str, str]]) -> None:
    text = "The secret garden of keys. " * 20
    fields = {**SHORT, "messages": [{"role": "user", "content": text}]}
    cached = []
    for name in ("alice", "alice", "bob"):
        answer = with_key(guarded, keys[1][name]).chat.completions.create(**fields)
        cached.append(answer.usage.prompt_tokens_details.cached_tokens)
    assert cached[0] < 32 < cached[1], "alice finds her own"
    assert cached[2] == 0, "bob finds nothing of alice's"
