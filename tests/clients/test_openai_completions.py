"""OpenAI's SDK in plain completions: text and token ids, lists, echo, log-probabilities, streams."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

openai = pytest.importorskip("openai", reason="openai is not installed; `make clients` installs it")
pytestmark = pytest.mark.clients

MODEL = "smollm2-135m"
PROMPT = "The capital of France is"
GREEDY: Any = {"model": MODEL, "temperature": 0, "max_tokens": 6}


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[Any]:
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120) as made:
        yield made


@pytest.fixture(scope="module")
def token_ids(client: Any) -> list[int]:
    found: list[int] = client.post("/../tokenize", body={"prompt": PROMPT}, cast_to=object)["tokens"]
    return found


def test_text_and_token_ids_are_one_prompt(client: Any, token_ids: list[int]) -> None:
    text = client.completions.create(**GREEDY, prompt=PROMPT)
    ids = client.completions.create(**GREEDY, prompt=token_ids)
    assert text.choices[0].text == ids.choices[0].text
    assert "Paris" in text.choices[0].text
    assert text.usage.prompt_tokens == len(token_ids)
    assert text.object == "text_completion"


def test_several_prompts_are_answered_in_order(client: Any, token_ids: list[int]) -> None:
    prompts = [PROMPT, "Two plus two is", "Water boils at"]
    together = client.completions.create(**GREEDY, prompt=prompts)
    alone = [client.completions.create(**GREEDY, prompt=each).choices[0].text for each in prompts]
    assert [each.index for each in together.choices] == [0, 1, 2]
    assert [each.text for each in together.choices] == alone
    ids = client.completions.create(**GREEDY, prompt=[token_ids, token_ids[:3]])
    assert ids.choices[0].text == alone[0]
    assert ids.usage.prompt_tokens == len(token_ids) + 3


def test_a_stream_is_the_answer_in_pieces(client: Any) -> None:
    whole = client.completions.create(**GREEDY, prompt=PROMPT)
    *told, last = client.completions.create(
        **GREEDY, prompt=PROMPT, stream=True, stream_options={"include_usage": True}
    )
    assert "".join(each.choices[0].text for each in told) == whole.choices[0].text
    assert told[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert last.choices == []
    assert last.usage.completion_tokens == whole.usage.completion_tokens


def test_echo_with_logprobs_scores_the_prompt(client: Any, token_ids: list[int]) -> None:
    answer = client.completions.create(
        model=MODEL, prompt=token_ids, max_tokens=1, echo=True, logprobs=2, temperature=0
    )
    found = answer.choices[0].logprobs
    assert answer.choices[0].text.startswith(PROMPT)
    assert "".join(found.tokens) == answer.choices[0].text
    assert len(found.token_logprobs) == len(token_ids) + 1
    assert found.token_logprobs[0] is None
    assert all(value < 0 for value in found.token_logprobs[1:])
    assert found.text_offset == [len("".join(found.tokens[:index])) for index in range(len(found.tokens))]
    assert found.token_logprobs[-1] == max(found.top_logprobs[-1].values()), "a greedy answer takes the likeliest"
    alone = client.completions.create(model=MODEL, prompt=token_ids, max_tokens=0, echo=True, logprobs=2)
    assert alone.choices[0].text == PROMPT
    assert alone.choices[0].logprobs.token_logprobs == found.token_logprobs[:-1]


def test_choices_stops_and_seeds(client: Any) -> None:
    fields: Any = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 12, "temperature": 1.0, "n": 2}
    first = [each.text for each in client.completions.create(**fields, seed=3).choices]
    again = [each.text for each in client.completions.create(**fields, seed=3).choices]
    assert first == again
    assert first[0] != first[1]
    stopped = client.completions.create(**GREEDY, prompt=PROMPT, stop="Paris")
    assert "Paris" not in stopped.choices[0].text
    assert stopped.choices[0].finish_reason == "stop"
