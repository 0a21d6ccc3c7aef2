"""Answers that the KV cache cannot hold: refused at once where they are asked for, cut where they are not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from pagemill import LLM, AsyncLLM, SamplingParams
from pagemill.base.errors import CapacityError
from tests.fixtures.live_server import LiveServer

BLOCKS, ROOM = 28, 448  # of the cache, which is less than the model's context of 1,536; tokens in them
COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"
# 20 tokens each.
PROMPTS: dict[str, dict[str, Any]] = {
    COMPLETION: {"prompt": "x" * 20},
    CHAT: {"messages": [{"role": "user", "content": "x"}]},
}


@pytest.fixture(scope="module")
def small(tiny_model: Path) -> Iterator[LiveServer]:
    """A server whose cache was made smaller than the context, which it could not begin with."""
    with LiveServer(str(tiny_model)) as server:
        server.call(lambda engine: engine.resize_cache(BLOCKS))
        yield server


@pytest.fixture(scope="module")
def http(small: LiveServer) -> Iterator[httpx.Client]:
    with small.client() as client:
        yield client


def asked(path: str, **fields: Any) -> dict[str, Any]:
    return {**PROMPTS[path], "temperature": 0, "ignore_eos": True, **fields}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "field"), [(COMPLETION, "max_tokens"), (CHAT, "max_tokens"), (CHAT, "max_completion_tokens")]
)
def test_more_than_fits_is_refused_before_anything_is_computed(
    small: LiveServer, http: httpx.Client, path: str, field: str, stream: bool
) -> None:
    count = http.post(path, json=asked(path, max_tokens=1)).json()["usage"]["prompt_tokens"]
    most = ROOM + 1 - count
    before = small.call(lambda engine: engine.stats())
    for number in (most + 1, 1400, 99_999):
        answer = http.post(path, json=asked(path, **{field: number}, stream=stream))
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert error["param"] == field
        assert error["message"].startswith(f"{field} is {number:,} and the prompt has {count} tokens")
        assert f"give {field} of {most} at the most or raise kv_cache_memory_bytes" in error["message"]
    after = small.call(lambda engine: engine.stats())
    assert (after.num_steps, after.num_computed_tokens) == (before.num_steps, before.num_computed_tokens)
    assert small.llm.num_open == 0
    answer = http.post(path, json=asked(path, **{field: most}))
    assert answer.json()["choices"][0]["finish_reason"] == "length"
    assert answer.json()["usage"]["completion_tokens"] == most


def test_more_min_tokens_than_fit_into_an_answer_are_told_by_the_field_that_was_given(http: httpx.Client) -> None:
    answer = http.post(CHAT, json=asked(CHAT, max_completion_tokens=3, min_tokens=5))
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == "min_tokens"
    assert "max_completion_tokens (3)" in error["message"]


@pytest.mark.parametrize("path", PROMPTS)
def test_without_a_wish_the_answer_ends_where_the_cache_does(http: httpx.Client, path: str) -> None:
    answer = http.post(path, json=asked(path, max_tokens=None)).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == ROOM + 1


def test_the_default_of_completions_gives_way(http: httpx.Client) -> None:
    prompt = "x" * (ROOM - 8)
    answer = http.post(COMPLETION, json=asked(COMPLETION, prompt=prompt)).json()
    assert (answer["choices"][0]["finish_reason"], answer["usage"]["completion_tokens"]) == ("length", 9)
    refused = http.post(COMPLETION, json=asked(COMPLETION, prompt=prompt, max_tokens=16))
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "max_tokens")


def test_the_default_is_described(http: httpx.Client) -> None:
    described = json.loads(http.get("/openapi.json").text)["components"]["schemas"]["CompletionBody"]
    assert described["properties"]["max_tokens"]["default"] == 16


def test_the_python_interface_does_the_same(tiny_model: Path) -> None:
    with LLM(str(tiny_model), kv_cache_memory_bytes="8MiB", packed_weights_cache="off") as llm:
        llm.resize_kv_cache(llm.built.kv_spec.memory_bytes(BLOCKS))
        for params, prompt, count in (
            (SamplingParams(max_tokens=None, ignore_eos=True), "x" * 20, 429),
            (SamplingParams(ignore_eos=True), "x" * 440, 9),
            (SamplingParams(max_tokens=9, ignore_eos=True), "x" * 440, 9),
        ):
            [answer] = llm.generate(prompt, params)
            assert (answer.outputs[0].finish_reason, len(answer.outputs[0].token_ids)) == ("length", count)
        with pytest.raises(CapacityError, match=r"^prompt 1: max_tokens is 10 .*max_tokens of 9 at the most"):
            llm.generate(["x", "x" * 440], SamplingParams(max_tokens=10))
        assert llm.stats().num_waiting == llm.stats().num_running == 0


def test_the_asynchronous_interface_does_the_same(small: LiveServer) -> None:
    async def last(llm: AsyncLLM, params: SamplingParams) -> tuple[str | None, int]:
        async for output in llm.generate("x" * 440, params):
            found = output.outputs[0]
        return found.finish_reason, len(found.token_ids)

    assert small.on_loop(last(small.llm, SamplingParams(max_tokens=None, ignore_eos=True))) == ("length", 9)
    assert small.on_loop(last(small.llm, SamplingParams(ignore_eos=True))) == ("length", 9)
    with pytest.raises(CapacityError, match="max_tokens of 9 at the most"):
        small.on_loop(last(small.llm, SamplingParams(max_tokens=10)))
