"""OpenAI's SDK in conversations: at once and streamed, sync and async, choices, log-probabilities, stops, seeds."""

from __future__ import annotations

import asyncio
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.fixtures.markdown import blocks_of
from tests.fixtures.serve_process import ROOT

openai = pytest.importorskip("openai", reason="openai is not installed; `make clients` installs it")
pytestmark = pytest.mark.clients

PAGE = ROOT / "docs" / "serve.md"
MODEL = "smollm2-135m"
ASKED: Any = [{"role": "user", "content": "Name three colours."}]
GREEDY: Any = {"model": MODEL, "messages": ASKED, "temperature": 0, "max_tokens": 24}
DRAWN: Any = {"model": MODEL, "messages": ASKED, "temperature": 1.0, "max_tokens": 24}


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[Any]:
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120) as made:
        yield made


def text_of(answer: Any) -> str:
    text: str = answer.choices[0].message.content
    return text


def test_models_are_listed_and_shown(client: Any) -> None:
    assert [each.id for each in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "pagemill"


def test_an_answer_counts_its_tokens(client: Any) -> None:
    answer = client.chat.completions.create(**GREEDY)
    [choice] = answer.choices
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert choice.message.role == "assistant"
    assert choice.finish_reason in ("stop", "length")
    assert 0 < answer.usage.completion_tokens <= 24
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    # OpenAI's later name of the limit
    fields = {name: value for name, value in GREEDY.items() if name != "max_tokens"}
    short = client.chat.completions.create(**fields, max_completion_tokens=3)
    assert short.usage.completion_tokens == 3
    assert short.choices[0].finish_reason == "length"
    assert text_of(answer).startswith(text_of(short))


def test_a_stream_is_the_answer_in_pieces(client: Any) -> None:
    whole = client.chat.completions.create(**GREEDY)
    chunks = list(client.chat.completions.create(**GREEDY, stream=True, stream_options={"include_usage": True}))
    *told, last = chunks
    assert "".join(each.choices[0].delta.content or "" for each in told) == text_of(whole)
    assert told[0].choices[0].delta.role == "assistant"
    assert [each.choices[0].finish_reason for each in told if each.choices[0].finish_reason] == [
        whole.choices[0].finish_reason
    ]
    assert len(told) > 3, "an answer of many tokens comes in many pieces"
    assert last.choices == []
    assert last.usage.total_tokens == whole.usage.total_tokens
    assert {each.usage for each in told} == {None}
    assert len({each.id for each in chunks}) == 1


def test_no_usage_is_streamed_unless_asked_for(client: Any) -> None:
    chunks = list(client.chat.completions.create(**GREEDY, stream=True))
    assert all(each.choices and each.usage is None for each in chunks)


def test_the_stream_helper_accumulates(client: Any) -> None:
    fields = {**GREEDY, "max_tokens": 400}  # the helper raises for an answer that is cut short
    with client.chat.completions.stream(**fields) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    deltas = [each.delta for each in events if each.type == "content.delta"]
    assert "".join(deltas) == text_of(final) == text_of(client.chat.completions.create(**fields))
    assert [each.content for each in events if each.type == "content.done"] == [text_of(final)]


def test_async_clients_ask_side_by_side(client: Any, url: str) -> None:
    cities = ("Paris", "Rome", "Oslo", "Cairo")
    asked = [[{"role": "user", "content": f"Where is {each}?"}] for each in cities]
    fields: Any = {"model": MODEL, "temperature": 0, "max_tokens": 12}

    async def streamed(own: Any, messages: Any) -> str:
        pieces = []
        async for chunk in await own.chat.completions.create(messages=messages, stream=True, **fields):
            pieces += [each.delta.content or "" for each in chunk.choices]
        return "".join(pieces)

    async def ask() -> tuple[list[Any], list[str]]:
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=120) as own:
            whole = asyncio.gather(*(own.chat.completions.create(messages=each, **fields) for each in asked))
            pieces = asyncio.gather(*(streamed(own, each) for each in asked))
            return list(await whole), list(await pieces)

    whole, streams = asyncio.run(ask())
    alone = [text_of(client.chat.completions.create(messages=each, **fields)) for each in asked]
    assert [text_of(each) for each in whole] == streams == alone
    assert len(set(alone)) == len(cities)


def test_logprobs_are_of_the_tokens_told(client: Any) -> None:
    answer = client.chat.completions.create(**GREEDY, logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    raw = b"".join(bytes(each.bytes) for each in content).decode()
    assert raw.removesuffix("<|im_end|>") == text_of(answer)
    for each in content:
        assert len(each.top_logprobs) == 3
        tops = [top.logprob for top in each.top_logprobs]
        assert tops == sorted(tops, reverse=True)
        assert each.token == each.top_logprobs[0].token, "a greedy answer takes the likeliest"
        assert sum(map(math.exp, tops)) <= 1 + 1e-6


def test_choices_differ_and_seeds_repeat_them(client: Any) -> None:
    first = client.chat.completions.create(**DRAWN, n=2, seed=7)
    again = client.chat.completions.create(**DRAWN, n=2, seed=7)
    other = client.chat.completions.create(**DRAWN, n=2, seed=8)
    texts = [[each.message.content for each in answer.choices] for answer in (first, again, other)]
    assert [each.index for each in first.choices] == [0, 1]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0][0] != texts[0][1]
    chunks = client.chat.completions.create(**DRAWN, n=2, seed=7, stream=True)
    pieces = ["", ""]
    for chunk in chunks:
        for choice in chunk.choices:
            pieces[choice.index] += choice.delta.content or ""
    assert pieces == texts[0]


def test_a_stop_ends_the_answer_before_it(client: Any) -> None:
    whole = text_of(client.chat.completions.create(**GREEDY))
    stop = whole[len(whole) // 2 :][:4]
    for given in (stop, ["never said so", stop]):
        answer = client.chat.completions.create(**GREEDY, stop=given)
        assert answer.choices[0].finish_reason == "stop"
        assert text_of(answer) == whole[: whole.index(stop)]
    streamed = client.chat.completions.create(**GREEDY, stop=stop, stream=True)
    assert "".join(each.choices[0].delta.content or "" for each in streamed) == whole[: whole.index(stop)]


def test_a_bias_forces_a_token(client: Any) -> None:
    first = client.chat.completions.create(**GREEDY, logprobs=True, top_logprobs=2)
    token = client.post("/../tokenize", body={"prompt": "blue", "add_special_tokens": False}, cast_to=object)["tokens"]
    forced = client.chat.completions.create(**{**GREEDY, "max_tokens": 3}, logit_bias={str(token[0]): 100})
    assert text_of(forced).startswith("blue")
    assert not text_of(first).startswith("blue")


def test_the_forms_of_a_message_are_one_prompt(client: Any) -> None:
    messages: Any = [
        {"role": "developer", "content": "You are terse."},
        {"role": "user", "content": [{"type": "text", "text": "My name is Ada. "}, {"type": "text", "text": "Hello."}]},
        {"role": "assistant", "content": "Hello, Ada."},
        {"role": "user", "content": "What is my name?", "name": "ada"},
    ]
    plain: Any = [
        {"role": "system", "content": "You are terse."},
        {"role": "user", "content": "My name is Ada. Hello."},
        {"role": "assistant", "content": [{"type": "text", "text": "Hello, Ada."}]},
        {"role": "user", "content": "What is my name?"},
    ]
    answers = [client.chat.completions.create(**{**GREEDY, "messages": each}) for each in (messages, plain)]
    assert text_of(answers[0]) == text_of(answers[1])
    assert answers[0].usage.prompt_tokens == answers[1].usage.prompt_tokens


def test_fields_of_other_servers_go_through_extra_body(client: Any) -> None:
    extra = {"top_k": 1, "return_token_ids": True, "ignore_eos": True, "min_p": 0.0}
    fields = {**DRAWN, "max_tokens": 8}
    answer = client.chat.completions.create(**fields, extra_body=extra)
    greedy = client.chat.completions.create(**{**GREEDY, "max_tokens": 8}, extra_body={"ignore_eos": True})
    assert text_of(answer) == text_of(greedy), "the likeliest of one"
    assert len(answer.choices[0].token_ids) == 8
    assert len(answer.prompt_token_ids) == answer.usage.prompt_tokens


def test_the_documented_program_runs(url: str) -> None:
    [block] = [each for each in blocks_of(PAGE) if each.language == "python" and "import OpenAI" in each.text]
    program = block.text.replace("http://127.0.0.1:8000/v1", url)
    assert program != block.text
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\S.* \d+$", done.stdout.strip(), re.DOTALL), "the answer and its cached tokens"
