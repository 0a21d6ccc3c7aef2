"""OpenAI's SDK and the prefix cache: true counts on the second ask, salts, controls, and clients that leave."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from tests.fixtures.serve_process import ServeProcess

openai = pytest.importorskip("openai", reason="openai is not installed; `make clients` installs it")
pytestmark = pytest.mark.clients

MODEL = "smollm2-135m"
SHORT: Any = {"model": MODEL, "temperature": 0, "max_tokens": 4}


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[Any]:
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120) as made:
        yield made


def fresh(words: int = 60) -> Any:
    """A conversation that nobody has asked before."""
    return [{"role": "user", "content": f"{uuid.uuid4().hex} " + "and so on " * words}]


def cached(answer: Any) -> int:
    found: int = answer.usage.prompt_tokens_details.cached_tokens
    return found


def figures(server: ServeProcess, name: str) -> dict[str, float]:
    """The samples of one metric by their labels."""
    with server.client() as http:
        text = http.get("/metrics").text
    found = re.findall(rf"^{re.escape(name)}(\{{[^}}]*\}})? (\S+)$", text, re.MULTILINE)
    assert found, f"no {name}"
    return {labels: float(value) for labels, value in found}


def test_the_second_ask_finds_the_prompt(client: Any) -> None:
    messages = fresh()
    first = client.chat.completions.create(messages=messages, **SHORT)
    second = client.chat.completions.with_raw_response.create(messages=messages, **SHORT)
    again = second.parse()
    details = again.usage.prompt_tokens_details
    assert cached(first) < 64 < cached(again) < again.usage.prompt_tokens
    assert again.usage.prompt_tokens - cached(again) <= 16, "all but less than a block"
    assert details.cache_write_tokens == again.usage.prompt_tokens - cached(again)
    assert details.cache["tiers"]["hot"] == cached(again)
    assert second.headers["x-cache"].startswith(f"hit; cached={cached(again)};")
    assert again.choices[0].message.content == first.choices[0].message.content
    *_, last = client.chat.completions.create(
        messages=messages, stream=True, stream_options={"include_usage": True}, **SHORT
    )
    assert cached(last) == cached(again)


def test_a_conversation_that_goes_on_finds_its_beginning(client: Any) -> None:
    messages = fresh()
    first = client.chat.completions.create(messages=messages, **SHORT)
    longer = [*messages, first.choices[0].message, {"role": "user", "content": "Go on."}]
    second = client.chat.completions.create(messages=longer, **SHORT)
    assert cached(second) >= first.usage.prompt_tokens - 16


def test_salts_and_controls_of_the_prompt_cache(client: Any) -> None:
    messages = fresh()
    for salt in ("one", "two"):
        answers = [
            client.chat.completions.create(messages=messages, extra_body={"cache_salt": salt}, **SHORT)
            for _ in range(2)
        ]
        assert cached(answers[0]) < 64 < cached(answers[1])
    extra: Any = {"prompt_cache_options": {"mode": "implicit", "ttl": "30m"}, "cache": {"purge_on_end": True}}
    kept = client.chat.completions.create(messages=messages, prompt_cache_key="a", extra_body=extra, **SHORT)
    assert cached(kept) < 64, "another salt's prompt is not found without it"
    bypass = client.chat.completions.create(messages=messages, extra_body={"cache": {"bypass": True}}, **SHORT)
    assert cached(bypass) == 0
    assert bypass.usage.prompt_tokens_details.cache_write_tokens == 0


def test_a_client_that_leaves_frees_its_blocks(client: Any, server: ServeProcess) -> None:
    def held() -> tuple[float, float]:
        used = figures(server, "vllm:kv_cache_usage_perc")
        return sum(figures(server, "vllm:num_requests_running").values()), sum(used.values())

    idle = held()
    assert idle[0] == 0
    fields: Any = {"model": MODEL, "temperature": 0, "max_tokens": 4000, "extra_body": {"ignore_eos": True}}
    streams = [client.chat.completions.create(messages=fresh(200), stream=True, **fields) for _ in range(3)]
    for stream in streams:
        iterator = iter(stream)
        for _ in range(3):
            next(iterator)
    running = held()
    assert running[0] == 3
    assert running[1] > idle[1]
    for stream in streams:
        stream.close()
    with pytest.raises(openai.APITimeoutError):  # one that does not wait for its answer
        client.with_options(timeout=0.3).chat.completions.create(messages=fresh(), **fields)
    end = time.monotonic() + 20
    while held()[0] and time.monotonic() < end:
        time.sleep(0.05)
    assert held() == (0, idle[1])
    assert sum(figures(server, "pagemill:kv_leaked_blocks").values()) == 0
