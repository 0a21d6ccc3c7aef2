"""What an operator is told of pins: when they have ended, and what ended them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pagemill import LLM, CacheOptions, RequestError, SamplingParams
from pagemill.base.clock import VirtualClock
from tests.fixtures.tiny import tiny_llama

SHORT = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
TEXT = "The miller grinds the corn that the farmer brought before the rain came."


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


@pytest.fixture
def llm(model: Path, clock: VirtualClock) -> Iterator[LLM]:
    """With the text in the caches of two tenants, pinned twice by one of them."""
    with LLM(str(model), kv_cache_memory_bytes="8MiB", packed_weights_cache="off", clock=clock) as made:
        for tenant in ("default", "bakery"):
            made.generate(TEXT, SHORT, tenant=tenant)
        yield made


def test_a_pin_whose_time_is_over_has_ended(llm: LLM, clock: VirtualClock) -> None:
    pin = llm.cache.pin(TEXT, 1)
    assert llm.cache.stats()["blocks"]["pinned"] == 5
    clock.advance(1.5)
    assert not llm.cache.unpin(pin)
    pin = llm.cache.pin(TEXT, 1)
    clock.advance(1.5)
    assert llm.cache.stats()["blocks"]["pinned"] == 0
    llm.cache.pin(TEXT, 1)
    clock.advance(1.5)
    assert llm.stats().cache.num_pinned_blocks == 0


def test_a_purge_tells_the_pins_that_it_ended(llm: LLM) -> None:
    pins = [llm.cache.pin(text, 60) for text in (TEXT, TEXT[:40], TEXT[:20])]
    other = llm.cache.pin(TEXT, 60, CacheOptions("bakery"))
    assert llm.cache.purge_prefix("Nobody asked for this").num_pins == 0
    first = llm.cache.purge_prefix(TEXT[:33])
    assert (first, first.num_pins) == (3, 2)
    second = llm.cache.purge_namespace()
    assert (second, second.num_pins) == (2, 1)
    assert [llm.cache.unpin(each) for each in pins] == [False] * 3
    third = llm.cache.purge_tenant("bakery")
    assert (third, third.num_pins) == (5, 1)
    assert not llm.cache.unpin(other)


@pytest.mark.parametrize("prompt", ["", {"prompt": ""}, {"prompt_token_ids": []}])
def test_an_empty_prompt_names_no_text(llm: LLM, prompt: object) -> None:
    before = llm.cache.stats()
    with pytest.raises(RequestError, match="the prompt is empty; name a beginning, or drop all of them"):
        llm.cache.purge_prefix(prompt)
    with pytest.raises(RequestError, match="the prompt is empty; give the text"):
        llm.cache.pin(prompt, 60)
    assert llm.cache.stats() == before
