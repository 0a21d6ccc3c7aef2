"""AsyncLLM over a small random model: answers, aborts, refusals, and what is left behind."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from pagemill import LLM, AsyncLLM, RequestError, SamplingParams
from pagemill.base.errors import ConfigError, ModelError, PagemillError
from pagemill.base.params import CacheOptions, Grammar
from pagemill.decoding import adjust
from pagemill.engine.engine import Engine
from pagemill.llm import RequestOutput
from tests.fixtures.tiny import tiny_llama

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
OPTIONS: dict[str, Any] = {"kv_cache_memory_bytes": "8MiB", "max_num_seqs": 8, "packed_weights_cache": "off"}
Use = Callable[[AsyncLLM], Coroutine[Any, Any, Any]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_llama(tmp_path_factory.mktemp("tiny")))


def use(model: str, function: Use, **options: Any) -> Any:
    """What `function` returns for an AsyncLLM of its own, which must be idle afterwards."""

    async def run() -> Any:
        llm = AsyncLLM(model, **{**OPTIONS, **options})
        try:
            found = await function(llm)
            stats = await llm.stats()
            await llm.call(lambda engine: engine.cache.check())
            assert (stats.num_running, stats.num_waiting, llm.num_open) == (0, 0, 0)
            return found
        finally:
            llm.shutdown(10)

    return asyncio.run(run())


async def last_of(llm: AsyncLLM, prompt: Any, params: SamplingParams = GREEDY, **more: Any) -> RequestOutput:
    last: RequestOutput | None = None
    async for output in llm.generate(prompt, params, **more):
        last = output
    assert last is not None
    return last


def test_answers_are_those_of_the_synchronous_interface(model: str) -> None:
    prompts = ["Hello", "The capital of France is", "x"]
    with LLM(model, **OPTIONS) as llm:
        expected = [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY)]

    async def all_at_once(llm: AsyncLLM) -> list[list[int]]:
        outputs = await asyncio.gather(*(last_of(llm, prompt) for prompt in prompts))
        return [output.outputs[0].token_ids for output in outputs]

    assert use(model, all_at_once) == expected


def test_each_output_holds_the_answer_so_far(model: str) -> None:
    async def watch(llm: AsyncLLM) -> None:
        lengths = []
        async for output in llm.generate("Hello", GREEDY, "mine"):
            assert output.request_id == "mine"
            lengths.append(len(output.outputs[0].token_ids))
        assert lengths == sorted(lengths)
        assert lengths[-1] == 12
        assert output.outputs[0].finish_reason == "length"
        assert output.timing.finished_s is not None

    use(model, watch)


def test_leaving_the_iterator_aborts_the_request(model: str) -> None:
    """Before the next step: while it is left, the engine's thread is held between two."""

    async def leave(llm: AsyncLLM) -> None:
        held, go_on = asyncio.Event(), threading.Event()
        loop = asyncio.get_running_loop()

        def hold(engine: Engine) -> int:
            loop.call_soon_threadsafe(held.set)
            assert go_on.wait(30)
            return engine.stats().num_steps

        iterator = llm.generate("Hello", LONG)
        async for _ in iterator:
            break
        holding = asyncio.create_task(llm.call(hold))
        await held.wait()
        leaving = asyncio.create_task(iterator.aclose())  # type: ignore[attr-defined]
        await asyncio.sleep(0)
        go_on.set()
        await leaving
        stats, before = await llm.stats(), await holding
        assert stats.num_running == 0
        assert before < 400, "it had come to its end before it was left"
        assert stats.num_steps <= before + 1

    use(model, leave)


def test_a_cancelled_task_aborts_its_request(model: str) -> None:
    async def cancel(llm: AsyncLLM) -> None:
        await llm.ready()
        task = asyncio.create_task(last_of(llm, "Hello", LONG))
        while not (await llm.stats()).num_running:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    use(model, cancel)


def test_abort_ends_a_request_by_its_name(model: str) -> None:
    async def abort(llm: AsyncLLM) -> None:
        reasons = []
        async for output in llm.generate("Hello", LONG, "mine"):
            await llm.abort("mine")
            reasons.append(output.outputs[0].finish_reason)
        assert reasons[-1] == "abort"
        await llm.abort("nobody's")

    use(model, abort)


def test_a_name_in_use_is_refused(model: str) -> None:
    async def twice(llm: AsyncLLM) -> None:
        async for _ in llm.generate("Hello", GREEDY, "mine"):
            with pytest.raises(RequestError, match="in use"):
                await last_of(llm, "x", request_id="mine")
        await last_of(llm, "x", request_id="mine")

    use(model, twice)


def test_of_two_that_take_a_name_at_a_time_one_is_refused(model: str) -> None:
    async def twice(llm: AsyncLLM) -> None:
        await llm.ready()
        found = await asyncio.gather(
            *(last_of(llm, "x", LONG, request_id="mine") for _ in range(2)), return_exceptions=True
        )
        assert sorted(type(each).__name__ for each in found) == ["RequestError", "RequestOutput"]

    use(model, twice)


def test_requests_that_never_entered_are_not_told_as_left(model: str) -> None:
    async def ask(llm: AsyncLLM) -> None:
        left: list[str] = []
        llm.leaving = left.extend
        with pytest.raises(RequestError):
            await llm.open([([65], GREEDY, CacheOptions()), ([-1], GREEDY, CacheOptions())])
        assert left == []

    use(model, ask)


@pytest.mark.parametrize("prompt", ["", 5, {"prompt": 5}, {"nothing": 1}, {"prompt_token_ids": [-1]}, "x" * 600])
def test_wrong_prompts_are_refused_and_leave_nothing(model: str, prompt: Any) -> None:
    async def ask(llm: AsyncLLM) -> None:
        with pytest.raises(RequestError):
            await last_of(llm, prompt)
        assert len((await last_of(llm, "Hello")).outputs[0].token_ids) == 12

    use(model, ask)


def test_requests_enter_together_or_not_at_all(model: str) -> None:
    async def ask(llm: AsyncLLM) -> None:
        with pytest.raises(RequestError):
            await llm.open([([65], GREEDY, CacheOptions()), ([-1], GREEDY, CacheOptions())])

    use(model, ask)


def test_a_grammar_that_is_wrong_is_refused_before_anything_runs(model: str) -> None:
    async def ask(llm: AsyncLLM) -> None:
        with pytest.raises(RequestError, match="regex"):
            await last_of(llm, "Hello", SamplingParams(grammar=Grammar("regex", "(")))
        assert (await llm.stats()).num_steps == 0

    use(model, ask)


def test_tenants_do_not_share(model: str) -> None:
    async def ask(llm: AsyncLLM) -> list[int]:
        prompt = "A text of some blocks, each of sixteen tokens. " * 2
        found = []
        for tenant in ("one", "one", "two"):
            found.append((await last_of(llm, prompt, tenant=tenant)).num_cached_tokens)
        return found

    first, again, other = use(model, ask)
    assert first == other == 0
    assert again > 64


def test_a_model_that_is_not_there_raises_where_it_is_awaited(tmp_path: Path) -> None:
    async def run() -> None:
        llm = AsyncLLM(str(tmp_path / "nothing.gguf"), **OPTIONS)
        try:
            with pytest.raises(ModelError):
                await llm.ready()
            with pytest.raises(ModelError):
                await last_of(llm, "x")
            assert llm.status == "failed"
        finally:
            llm.shutdown(10)

    asyncio.run(run())


def test_wrong_options_raise_at_once(model: str) -> None:
    with pytest.raises(ConfigError):
        AsyncLLM(model, max_num_seq=5)


def test_shutting_down_ends_what_runs(model: str) -> None:
    async def run() -> None:
        llm = AsyncLLM(model, **OPTIONS)
        await llm.ready()
        task = asyncio.create_task(last_of(llm, "Hello", LONG))
        while not (await llm.stats()).num_running:
            await asyncio.sleep(0)
        await asyncio.to_thread(llm.shutdown, 10)
        assert (await task).outputs[0].finish_reason == "abort"
        with pytest.raises(PagemillError, match="ended"):
            await last_of(llm, "x")
        with pytest.raises(PagemillError):
            await llm.stats()

    asyncio.run(run())


def test_an_engine_that_cannot_even_fail_ends_everybody(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: Any) -> list[Any]:
        raise RuntimeError("lost")

    async def run() -> None:
        llm = AsyncLLM(model, **OPTIONS)
        await llm.ready()
        task = asyncio.create_task(last_of(llm, "Hello", LONG))
        while not (await llm.stats()).num_running:
            await asyncio.sleep(0)
        monkeypatch.setattr(Engine, "step", lost)
        monkeypatch.setattr(Engine, "abort", lost)
        monkeypatch.setattr(Engine, "discard", lost)
        with pytest.raises(RuntimeError, match="lost"):
            await task
        assert llm.status == "failed"
        with pytest.raises(PagemillError, match="ended"):
            await last_of(llm, "x")
        llm.shutdown(10)

    asyncio.run(run())


def test_the_synchronous_interface_takes_grammars_and_penalties(model: str) -> None:
    with LLM(model, **OPTIONS) as llm:
        wanted = SamplingParams(temperature=1, seed=1, max_tokens=40, grammar=Grammar("regex", "[a-c]{4}-x"))
        [output] = llm.generate("Hello", wanted)
        assert (output.outputs[0].text[4:], output.outputs[0].finish_reason) == ("-x", "stop")
        with pytest.raises(RequestError, match="prompt 1"):
            llm.generate(["Hello", "x"], [wanted, SamplingParams(grammar=Grammar("lark", "nonsense"))])
        [plain], [bound] = (
            llm.generate("Hello", SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, **more))
            for more in ({}, {"frequency_penalty": 2.0, "presence_penalty": 2.0, "repetition_penalty": 2.0})  # type: ignore[arg-type]
        )
        assert len(set(bound.outputs[0].token_ids)) > len(set(plain.outputs[0].token_ids))


def test_texts_are_followed_anew_where_they_were_forgotten(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [
        SamplingParams(temperature=1, seed=seed, max_tokens=120, presence_penalty=1, grammar=Grammar("regex", form))
        for seed, form in enumerate(["([a-d]{9}-){9}x"] * 4)
    ]
    found = []
    for most in (adjust.MOST_STATES, 2):
        monkeypatch.setattr(adjust, "MOST_STATES", most)
        with LLM(model, **OPTIONS) as llm:
            found.append([output.outputs[0].text for output in llm.generate(["Hello"] * 4, wanted)])
    assert found[0] == found[1]
    assert all(text.endswith("-x") for text in found[0])
