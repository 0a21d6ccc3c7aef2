"""Models whose layers read a window: answers are those of full memory, bit for bit, and pages behind a window are free.

Without a prefix cache such layers keep every position in the blocks of all layers; that is what answers are held to.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pagemill import LLM, CacheOptions, CapacityError, ConfigError, SamplingParams
from pagemill.llm import RequestOutput
from tests.fixtures.tiny import llama_weights, mistral_config, qwen2_config, write_hf

WINDOW = 40
CHUNK = 32
REACH = (WINDOW + CHUNK + 16 - 3) // 16 + 1  # pages that a sequence holds at a time, at most
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=3)
OTHERS = CacheOptions("others")
PAST = CacheOptions(bypass=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """All layers read the window, and the upper two of four."""
    configs = {"mistral": mistral_config(window=WINDOW), "qwen2": qwen2_config(window=WINDOW, first=2, layers=4)}
    folder: Path = tmp_path_factory.mktemp("windowed")
    return {name: str(write_hf(folder / name, each, llama_weights(each, 5))) for name, each in configs.items()}


@pytest.fixture(params=["mistral", "qwen2"])
def model(request: pytest.FixtureRequest, models: dict[str, str]) -> str:
    return models[request.param]


def make(model: str, **options: object) -> LLM:
    defaults = {"kv_cache_memory_bytes": "2MiB", "packed_weights_cache": "off", "max_num_batched_tokens": CHUNK}
    return LLM(model, **{**defaults, **options})  # type: ignore[arg-type]


def make_full(model: str, **options: object) -> LLM:
    """The same with every position kept in every layer."""
    llm = make(model, enable_prefix_caching="off", max_num_batched_tokens=512, **options)
    assert llm.built.kv_spec.window_pages == ()
    return llm


@pytest.fixture
def llm(model: str) -> Iterator[LLM]:
    with make(model) as made:
        yield made


def text(seed: int, length: int) -> list[int]:
    return [int(each) for each in np.random.default_rng(seed).integers(0, 250, length)]


def told(output: RequestOutput) -> object:
    assert output.outputs[0].finish_reason == "length", output
    return [(choice.token_ids, choice.logprobs) for choice in output.outputs]


def pages_of(llm: LLM) -> list[int]:
    """Pages of the window group whose bytes are not all zero."""
    [memory] = llm.built.executor.model._windows  # type: ignore[attr-defined]
    return np.flatnonzero(memory.reshape(llm.built.kv_spec.window_pages[0], -1).any(axis=1)).tolist()


def num_held(llm: LLM) -> int:
    shared = llm.built.engine.cache.shared
    assert shared is not None
    assert shared.windows is not None
    return len(shared.windows.groups[0].pages)


@pytest.mark.parametrize("codec", ["f32", "int8"])
def test_a_warm_prompt_gives_the_bits_of_full_memory(model: str, codec: str) -> None:
    """At lengths of the common beginning within the window, at its edge and behind it, in whole blocks and in parts."""
    prompt = text(1, 150)
    with make(model, kv_cache_dtype=codec) as warm, make_full(model, kv_cache_dtype=codec) as full:
        for length in (1, 16, 39, 40, 41, 55, 64, 100, 145):
            for ids in (prompt, [*prompt[:length], 251, *prompt[length:]]):
                [found] = warm.generate({"prompt_token_ids": ids}, GREEDY)
                [expected] = full.generate({"prompt_token_ids": ids}, GREEDY)
                assert told(found) == told(expected)
            assert 0 < found.num_cached_tokens <= length
            warm.built.engine.cache.verify()
            warm.cache.purge_tenant("default")


def test_a_prompt_again_is_hit_to_its_last_token_with_the_tail_of_its_window(llm: LLM) -> None:
    ids = {"prompt_token_ids": text(2, 200)}
    first, again = (llm.generate(ids, GREEDY)[0] for _ in range(2))
    assert (first.num_cached_tokens, again.num_cached_tokens) == (0, 199)
    assert told(first) == told(again)
    [other] = llm.generate({"prompt_token_ids": [*text(2, 120), 251, 3]}, GREEDY, cache=False)
    assert other.num_cached_tokens == 0


@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_prompts_side_by_side_in_chunks_give_the_bits_of_each_alone(model: str, codec: str) -> None:
    prompts = [{"prompt_token_ids": text(seed, length)} for seed, length in enumerate((300, 3, 41, 170, 33))]
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=1)
    with make(model, kv_cache_dtype=codec) as together, make_full(model, kv_cache_dtype=codec) as full:
        expected = [told(full.generate(each, params)[0]) for each in prompts]
        assert [told(each) for each in together.generate(prompts, params)] == expected
        assert [told(each) for each in together.generate(prompts, params)] == expected, "warm"
        together.built.engine.cache.verify()


def test_choices_share_the_prompt(model: str) -> None:
    params = SamplingParams(temperature=1.0, seed=3, n=4, max_tokens=30, ignore_eos=True, logprobs=1)
    with make(model) as grouped, make_full(model) as full:
        ids = {"prompt_token_ids": text(3, 100)}
        assert told(grouped.generate(ids, params)[0]) == told(full.generate(ids, params)[0])


def test_a_text_longer_than_the_pages_of_the_window_is_read_and_goes_on(model: str) -> None:
    """27 blocks through the fewest pages that there can be; what is behind the window goes while the text lives."""
    params = SamplingParams(temperature=0, max_tokens=80, ignore_eos=True, logprobs=1)
    ids = {"prompt_token_ids": text(6, 340)}
    with make_full(model, kv_cache_dtype="f32") as full:
        expected = told(full.generate(ids, params)[0])
    with make(model, kv_cache_dtype="f32") as some:
        sizes = [group.spec.block_bytes for group in some.built.kv_spec.groups]
    with make(model, kv_cache_dtype="f32", kv_cache_memory_bytes=str(32 * sizes[0] + 14 * sizes[1])) as least:
        assert (least.built.num_blocks, least.built.kv_spec.window_pages) == (32, (13,))
        for _ in range(2):
            assert told(least.generate(ids, params)[0]) == expected


def test_a_sequence_holds_no_more_than_its_window_and_a_chunk(llm: LLM) -> None:
    engine = llm.built.engine
    engine.add_request("long", text(4, 400), SamplingParams(max_tokens=50, temperature=0, ignore_eos=True), cache=PAST)
    most = 0
    while engine.has_unfinished:
        engine.step()
        most = max(most, num_held(llm))
        assert len(pages_of(llm)) <= REACH + CHUNK // 16, "those let go of in this step are wiped in the next one"
    assert 3 <= most <= REACH
    assert num_held(llm) == 0
    assert pages_of(llm) == [], "all of it is wiped"


def test_pages_that_had_to_go_are_computed_again_and_the_receipt_says_so(model: str) -> None:
    prompt = text(5, 160)
    with make(model, kv_cache_memory_bytes="512KiB", kv_cache_dtype="f32") as small:
        [first] = small.generate({"prompt_token_ids": prompt}, GREEDY)
        for seed in range(20, 20 + small.built.kv_spec.window_pages[0] // 6):
            small.generate({"prompt_token_ids": text(seed, 100)}, GREEDY, cache=OTHERS)
        small.built.engine.cache.verify()
        [again] = small.generate({"prompt_token_ids": [*prompt[:100], 7, 8]}, GREEDY)
        assert again.receipt is not None
        assert again.receipt.miss == "window not kept"
        [full] = small.generate({"prompt_token_ids": [*prompt[:100], 7, 8]}, GREEDY, cache=False)
        assert told(again) == told(full)
        assert told(small.generate({"prompt_token_ids": prompt}, GREEDY)[0]) == told(first)


@pytest.mark.parametrize("codec", ["f32", "int8"])
def test_too_little_room_for_all_changes_no_answer(model: str, codec: str) -> None:
    """Texts that together need several times the pages: they wait, give way to each other and come again."""
    prompts = [{"prompt_token_ids": text(seed % 4, 40 + 30 * (seed % 5))} for seed in range(9)]
    params = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True, logprobs=1)
    with make_full(model, kv_cache_dtype=codec) as full:
        expected = [full.generate(each, params)[0].outputs[0].token_ids for each in prompts]
    num_crowded = 0
    sizes = {"f32": 400_000, "int8": 120_000}
    with make(model, kv_cache_dtype=codec, kv_cache_memory_bytes=str(sizes[codec]), max_model_len=300) as small:
        engine = small.built.engine
        for number, prompt in enumerate(prompts):
            cache = PAST if number % 3 == 2 else CacheOptions()
            engine.add_request(str(number), prompt["prompt_token_ids"], params, cache=cache)
        answers: dict[str, list[int]] = {str(number): [] for number in range(len(prompts))}
        while engine.has_unfinished:
            for delta in engine.step():
                assert delta.error is None
                answers[delta.request_id] += delta.token_ids
            engine.cache.verify()
            num_crowded += engine.stats().num_waiting > 0
        assert num_crowded > 10
        assert list(answers.values()) == [list(each) for each in expected]


def test_conversations_of_all_kinds_keep_their_bits(model: str) -> None:
    draw = random.Random(11)
    with make(model, kv_cache_memory_bytes="300KiB", max_model_len=400, kv_cache_dtype="int8") as small:
        with make_full(model, kv_cache_dtype="int8") as full:
            known = [text(50, 30)]
            num_hits = 0
            for number in range(25):
                base = draw.choice(known)
                ids = [*base[: draw.randint(1, len(base))], *text(100 + number, draw.randint(1, 60))][:320]
                params = SamplingParams(temperature=0, max_tokens=draw.randint(1, 40), ignore_eos=True, logprobs=1)
                [found] = small.generate({"prompt_token_ids": ids}, params)
                [expected] = full.generate({"prompt_token_ids": ids}, params)
                assert told(found) == told(expected)
                num_hits += found.num_cached_tokens > 0
                known.append([*ids, *found.outputs[0].token_ids])
                small.built.engine.cache.verify()
        assert num_hits > 12


def test_the_reference_gives_the_same_tokens(model: str) -> None:
    prompts = [{"prompt_token_ids": text(seed, length)} for seed, length in enumerate((150, 60))]
    with (
        make(model, executor="reference", kv_cache_dtype="f32") as reference,
        make_full(model, kv_cache_dtype="f32") as f,
    ):
        expected = [each.outputs[0].token_ids for each in f.generate(prompts, GREEDY)]
        for _ in range(2):
            found = reference.generate(prompts, GREEDY)
            assert [each.outputs[0].token_ids for each in found] == expected
        assert [each.num_cached_tokens for each in found] == [149, 59]


def test_a_window_that_no_sequence_can_pass_needs_no_group(model: str) -> None:
    with make(model, max_model_len=WINDOW) as llm:
        assert llm.built.kv_spec.window_pages == ()


def test_memory_for_less_than_one_sequence_is_refused_with_its_pages(models: dict[str, str]) -> None:
    with pytest.raises(CapacityError, match=r"needs 32 blocks × 0 bytes \+ 13 pages of a window × [\d,]+ bytes = "):
        make(models["mistral"], kv_cache_memory_bytes="8KiB")
    with pytest.raises(CapacityError, match=r"needs 32 blocks × [1-9][\d,]+ bytes \+ 13 pages of a window"):
        make(models["qwen2"], kv_cache_memory_bytes="8KiB")


def test_another_size_is_one_of_the_layers_that_read_all(models: dict[str, str]) -> None:
    ids = {"prompt_token_ids": text(7, 200)}
    with make(models["qwen2"]) as llm:
        [first] = llm.generate(ids, GREEDY)
        full, window = llm.built.kv_spec.groups
        taken = window.num_pages * window.spec.block_bytes
        llm.resize_kv_cache(taken + 40 * full.spec.block_bytes)
        assert llm.stats().cache.num_blocks == 40
        [again] = llm.generate(ids, GREEDY)
        assert (again.num_cached_tokens, told(again)) == (199, told(first))
        llm.built.engine.cache.verify()
        with pytest.raises(ConfigError, match=rf"give at least {taken + full.spec.block_bytes:,} bytes \(1 block\)"):
            llm.resize_kv_cache(taken)
        for point in llm.cache.curve([20, 40, 80])["points"]:
            assert point["bytes"] == point["blocks"] * (taken + 40 * full.spec.block_bytes) // 40
        assert told(llm.generate(ids, GREEDY)[0]) == told(first)
    with make(models["mistral"]) as llm, pytest.raises(ConfigError, match="every layer of this model reads a window"):
        llm.resize_kv_cache("1MiB")


def test_texts_past_the_cache_that_give_way_are_sent_back_whole(models: dict[str, str]) -> None:
    """What such a text has let go of is kept nowhere: there is no tail to drop that would not cost all of it."""
    params = SamplingParams(temperature=0, max_tokens=90, ignore_eos=True, logprobs=1)
    prompts = [{"prompt_token_ids": text(seed, 20)} for seed in range(12)]
    for name, memory in (("mistral", "70000"), ("qwen2", "130000")):
        model = models[name]
        with make_full(model) as full:
            expected = [told(each) for each in full.generate(prompts, params)]
        with make(model, kv_cache_memory_bytes=memory, max_model_len=300, max_num_batched_tokens=64) as small:
            assert [told(each) for each in small.generate(prompts, params, cache=False)] == expected
            stats = small.stats()
            assert stats.num_preemptions > 0
            assert stats.cache.num_rebuilds == 0
            small.built.engine.cache.verify()
