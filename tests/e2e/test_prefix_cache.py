"""The prefix cache is invisible but in what it tells: tokens and log-probabilities equal those of an empty cache."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pagemill import LLM, CacheOptions, CapacityError, ConfigError, RequestError, Retain, SamplingParams
from pagemill.llm import RequestOutput
from pagemill.text import remembered
from tests.fixtures.tiny import tiny_llama

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=3)
SYSTEM = "You are a mill. You grind what is brought to you, slowly and exactly. "
CODECS = ["f32", "f16", "bf16", "int8"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_llama(tmp_path_factory.mktemp("tiny")))


def make(model: str, **options: object) -> LLM:
    return LLM(model, **{"kv_cache_memory_bytes": "4MiB", "packed_weights_cache": "off", **options})


@pytest.fixture
def llm(model: str) -> Iterator[LLM]:
    with make(model) as made:
        yield made


def told(output: RequestOutput) -> object:
    return [(choice.token_ids, choice.logprobs, choice.text) for choice in output.outputs]


@pytest.mark.parametrize("codec", CODECS)
def test_a_warm_prompt_gives_the_bits_of_a_cold_one(model: str, codec: str) -> None:
    """At every length of the common beginning, so that whole blocks, copied parts and both together are met."""
    prompt = [(7 * i * i + 3 * i) % 250 for i in range(49)]
    with (
        make(model, kv_cache_dtype=codec) as warm,
        make(model, kv_cache_dtype=codec, enable_prefix_caching="off") as cold,
    ):
        for length in range(1, 41):
            for ids in (prompt, prompt[:length] + [251] + prompt[length:]):
                [found] = warm.generate({"prompt_token_ids": ids}, GREEDY)
                [expected] = cold.generate({"prompt_token_ids": ids}, GREEDY)
                assert told(found) == told(expected)
            assert found.num_cached_tokens == length
            assert expected.num_cached_tokens == 0
            warm.cache.purge_tenant("default")


@pytest.mark.parametrize("codec", ["bf16", "int8"])
@pytest.mark.parametrize("length", [5, 16, 37])
def test_a_warm_prompt_gives_the_same_on_the_reference(model: str, codec: str, length: int) -> None:
    """numpy's products depend on their shape in the last digits: tokens are equal and log-probabilities close."""
    prompt = [(7 * i * i + 3 * i) % 250 for i in range(49)]
    with make(model, executor="reference", kv_cache_dtype=codec) as llm:
        llm.generate({"prompt_token_ids": prompt}, GREEDY)
        ids = {"prompt_token_ids": prompt[:length] + [251] + prompt[length:]}
        [found] = llm.generate(ids, GREEDY)
        [expected] = llm.generate(ids, GREEDY, cache=False)
        assert (found.num_cached_tokens, expected.num_cached_tokens) == (length, 0)
        assert found.outputs[0].token_ids == expected.outputs[0].token_ids
        sums = [output.outputs[0].cumulative_logprob for output in (found, expected)]
        assert sums[0] == pytest.approx(sums[1], abs=0.02)


def test_the_same_prompt_twice_computes_one_token(llm: LLM) -> None:
    first, second = (llm.generate(SYSTEM, GREEDY)[0] for _ in range(2))
    num_tokens = len(first.prompt_token_ids)
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, num_tokens - 1)
    assert told(first) == told(second)
    assert first.receipt is not None
    assert first.receipt.miss == "not seen recently"
    assert second.receipt is not None
    assert (second.receipt.miss, second.receipt.num_computed_tokens) == (None, 1)
    assert second.receipt.saved_s > 0


def test_a_turn_finds_the_answer_of_the_turn_before(llm: LLM) -> None:
    [first] = llm.generate(SYSTEM, GREEDY)
    ids = first.prompt_token_ids + first.outputs[0].token_ids
    [second] = llm.generate({"prompt_token_ids": [*ids, 65, 66]}, GREEDY)
    assert second.num_cached_tokens == len(ids) - 1, "the last token of an answer is never computed"


def test_a_prompt_that_differs_says_where(llm: LLM) -> None:
    ids = llm.tokenizer.encode(SYSTEM)
    llm.generate({"prompt_token_ids": ids}, GREEDY)
    [other] = llm.generate({"prompt_token_ids": [*ids[:20], 1, *ids[21:]]}, GREEDY)
    assert other.num_cached_tokens == 20
    assert other.receipt is not None
    assert (other.receipt.miss, other.receipt.miss_position) == ("differs at token 20", 20)


def test_a_bypass_reads_nothing_and_leaves_nothing(llm: LLM) -> None:
    llm.generate(SYSTEM, GREEDY, cache=False)
    assert llm.stats().cache.num_cached_blocks == 0
    llm.generate(SYSTEM, GREEDY)
    [output] = llm.generate(SYSTEM, GREEDY, cache=False)
    assert output.num_cached_tokens == 0
    assert output.receipt is not None
    assert output.receipt.miss == "the request goes past the cache"


def test_choices_share_the_prompt_of_the_first(model: str) -> None:
    params = SamplingParams(temperature=1.0, seed=3, n=4, max_tokens=5, ignore_eos=True, logprobs=1)
    with make(model) as llm, make(model, enable_prefix_caching="off") as cold:
        [found] = llm.generate(SYSTEM, params)
        [expected] = cold.generate(SYSTEM, params)
        num_tokens = len(found.prompt_token_ids)
        assert told(found) == told(expected)
        assert llm.stats().num_computed_tokens == num_tokens + 3 + 4 * 4
        assert found.num_cached_tokens == 0, "a request does not count what its own choices share"


@pytest.mark.parametrize("other", [{"tenant": "b"}, {"cache_salt": "x"}, {"cache_salt": ""}])
def test_namespaces_never_share(llm: LLM, other: dict[str, str]) -> None:
    llm.generate(SYSTEM, GREEDY)
    first, second = (llm.generate(SYSTEM, GREEDY, **other)[0] for _ in range(2))  # type: ignore[arg-type]
    assert first.num_cached_tokens == 0
    assert first.receipt is not None
    assert first.receipt.miss == "not seen recently", "a reason tells nothing of another namespace"
    assert second.num_cached_tokens > 0


def test_a_public_namespace_is_shared_once_it_is_declared(llm: LLM) -> None:
    with pytest.raises(RequestError, match="no public namespace 'manual'") as caught:
        llm.generate(SYSTEM, GREEDY, cache=CacheOptions("a", public="manual"))
    assert caught.value.status == 403
    llm.cache.declare_public("manual")
    llm.generate(SYSTEM, GREEDY, cache=CacheOptions("a", public="manual"))
    [output] = llm.generate(SYSTEM, GREEDY, cache=CacheOptions("b", public="manual"))
    assert output.num_cached_tokens == len(output.prompt_token_ids) - 1


def test_preemption_resumes_from_what_it_computed_and_counts_it_once(model: str) -> None:
    params = replace(GREEDY, max_tokens=90)
    prompts = [{"prompt_token_ids": [(i * 31 + j * 7) % 250 for j in range(60)]} for i in range(4)]
    with make(model, enable_prefix_caching="off", max_model_len=200) as ample:
        expected = [told(output) for output in ample.generate(prompts, params)]
    with make(model) as probe:
        block_bytes = probe.built.kv_spec.block_bytes
    with make(model, kv_cache_memory_bytes=str(22 * block_bytes), max_model_len=200) as tight:
        outputs = tight.generate(prompts, params)
        assert tight.stats().num_preemptions > 0
        assert [told(output) for output in outputs] == expected
        assert [output.num_cached_tokens for output in outputs] == [0, 0, 0, 0]


def test_a_purge_leaves_no_trace(llm: LLM) -> None:
    llm.generate(SYSTEM, GREEDY)
    arena = llm.built.executor.model._pages._blocks  # type: ignore[attr-defined]
    assert arena.any()
    assert llm.cache.purge_tenant("default") > 0
    assert not arena.any(), "purge returns after the wipe"
    assert llm.generate(SYSTEM, GREEDY)[0].num_cached_tokens == 0


@pytest.mark.parametrize("num_choices", [1, 3])
def test_a_purged_request_leaves_no_trace_but_what_others_share(llm: LLM, num_choices: int) -> None:
    params = replace(GREEDY, temperature=1.0, seed=3, n=num_choices, max_tokens=20)
    other = {"prompt_token_ids": [*llm.tokenizer.encode(SYSTEM)[:32], *range(40)]}
    llm.generate(other, GREEDY)
    [output] = llm.generate(SYSTEM, params)
    shared, ids = llm.built.engine.cache.shared, output.prompt_token_ids
    assert shared is not None
    texts = [array("i", [*ids, *choice.token_ids[:-1]]) for choice in output.outputs]
    chains = [[node.block for node in shared.chain_of(CacheOptions(), text)] for text in texts]
    assert all(len(chain) * 16 >= len(text) for chain, text in zip(chains, texts, strict=True)), "all of it is cached"
    common, own = chains[0][:2], {block for chain in chains for block in chain[2:]}
    arena = llm.built.executor.model._pages._blocks  # type: ignore[attr-defined]
    assert all(arena[block].any() for block in own)

    assert llm.cache.purge(SYSTEM) == 0, "its answer goes on from the prompt"
    assert llm.cache.purge(output) == len(own)
    assert not any(arena[block].any() for block in own), "purge returns after the wipe"
    assert all(arena[block].any() for block in common)
    for choice in output.outputs:
        [again] = llm.generate({"prompt_token_ids": [*ids, *choice.token_ids]}, GREEDY)
        assert again.num_cached_tokens == 32
        assert llm.cache.purge(again) > 0
    assert llm.generate(other, GREEDY)[0].num_cached_tokens == len(other["prompt_token_ids"]) - 1


def test_a_purged_request_is_found_nowhere(llm: LLM) -> None:
    options = CacheOptions("mine", salt="s")
    [output] = llm.generate(SYSTEM, GREEDY, cache=options)
    [told] = llm.chat([{"role": "user", "content": "Hello"}], GREEDY, cache=options)
    assert llm.cache.purge(output) == 0, "in another namespace"
    assert llm.cache.purge(output, options) > 0
    [again] = llm.generate(SYSTEM, GREEDY, cache=options)
    assert again.num_cached_tokens == 0
    assert llm.cache.purge(again, options) > 0
    assert llm.cache.purge(told, options) > 0
    assert not llm.built.executor.model._pages._blocks.any()  # type: ignore[attr-defined]


def test_a_prompt_is_purged_once_what_goes_on_from_it_is(llm: LLM) -> None:
    llm.generate(SYSTEM, GREEDY)
    assert llm.cache.purge(SYSTEM) == 0
    assert llm.cache.purge_prefix(SYSTEM) > 0
    assert llm.cache.purge(SYSTEM) > 0
    assert not llm.built.executor.model._pages._blocks.any()  # type: ignore[attr-defined]


def test_a_request_that_still_runs_is_not_purged(llm: LLM) -> None:
    [output] = llm.generate(SYSTEM, GREEDY)
    running = replace(output, outputs=[replace(output.outputs[0], finish_reason=None)])
    with pytest.raises(RequestError, match=r"had not ended.*purge_prefix"):
        llm.cache.purge(running)
    assert llm.cache.purge(output) > 0


def test_an_aborted_request_leaves_no_unwiped_page(llm: LLM) -> None:
    stream = llm.stream(SYSTEM, GREEDY, cache=False)
    next(stream)
    stream.close()
    assert not llm.built.executor.model._pages._blocks.any()  # type: ignore[attr-defined]


def test_sessions_branch_and_share(llm: LLM) -> None:
    with llm.session(system=SYSTEM) as session:
        first = session.say("Hello", GREEDY)
        assert first.num_cached_tokens == 0
        mark = session.snapshot()
        branch = session.fork()
        one, two = session.say("And then?", GREEDY), branch.say("And then?", GREEDY)
        assert told(one) == told(two)
        assert two.num_cached_tokens == len(two.prompt_token_ids) - 1
        session.restore(mark)
        assert len(session.messages) == 3
        assert session.num_tokens < len(one.prompt_token_ids)
        deltas = list(session.stream("And then?", GREEDY))
        assert "".join(delta.text for delta in deltas) == one.outputs[0].text
    with pytest.raises(RequestError, match="closed"):
        session.say("Hello")
    with pytest.raises(RequestError, match="no snapshot 3"):
        branch.restore(3)


def test_a_session_asks_with_the_tokens_of_its_messages_however_many_it_remembers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remembered, "PIECE_CHARACTERS", 16)
    model = str(tiny_llama(tmp_path, format="gguf", weight_format="q4_1"))
    params = replace(GREEDY, max_tokens=2, logprobs=None)
    with make(model) as llm, llm.session(SYSTEM) as session:
        for text in ("What turns and what grinds?", "What comes after that?", "And <|im_end|> then?"):
            asked = [*session.messages, {"role": "user", "content": text}]
            found = session.say(text, params)
            assert found.prompt_token_ids == llm.chat_prompt(asked)["prompt_token_ids"]
        assert session._encoder._pieces
        assert session.fork().num_tokens == session.num_tokens


def test_quotas_pins_and_ranges_out_of_bounds_are_refused(llm: LLM) -> None:
    with pytest.raises(ConfigError, match="exceeds the"):
        llm.cache.set_quota("a", floor_tokens=10**9)
    with pytest.raises(ConfigError, match="below the floor"):
        llm.cache.set_quota("a", floor_tokens=320, cap_tokens=160)
    with pytest.raises(RequestError, match="a retained range is 0 to 900"):
        llm.generate("Hello", GREEDY, cache=CacheOptions(retain=(Retain(0, 900),)))
    with pytest.raises(RequestError, match="time above 0"):
        llm.cache.pin("Hello", 0)
    with pytest.raises(RequestError, match="generate it first"):
        llm.cache.pin("Hello", 60)
    assert llm.stats().cache.num_pinned_blocks == 0
    with pytest.raises(RequestError, match="cache is 'no'"):
        llm.generate("Hello", GREEDY, cache="no")  # type: ignore[arg-type]


def test_without_a_cache_control_says_so(model: str) -> None:
    with make(model, enable_prefix_caching="off") as llm:
        with pytest.raises(ConfigError, match="enable_prefix_caching"):
            _ = llm.cache
        with pytest.raises(RequestError, match="no public namespace 'manual'"):
            llm.generate(SYSTEM, GREEDY, cache=CacheOptions(public="manual"))
        assert llm.generate(SYSTEM, GREEDY, tenant="a", cache_salt="b")[0].num_cached_tokens == 0


def test_an_unknown_policy_is_refused_by_name(model: str) -> None:
    with pytest.raises(ConfigError, match="'lruu'"):
        make(model, cache_policy="lruu")


@pytest.mark.parametrize("prompt", [SYSTEM, "Hello"])
def test_pinned_texts_outlive_a_flood(model: str, prompt: str) -> None:
    """To their last token, whether they fill a block or not."""
    with make(model) as probe:
        block_bytes = probe.built.kv_spec.block_bytes
    with make(model, kv_cache_memory_bytes=str(30 * block_bytes), max_model_len=256) as llm:
        [kept] = llm.generate(prompt, GREEDY)
        pin = llm.cache.pin(prompt, 1000)
        assert pin.num_tokens == len(kept.prompt_token_ids)
        for seed in range(6):
            llm.generate({"prompt_token_ids": [(seed * 17 + j * j) % 250 for j in range(200)]}, GREEDY)
        assert llm.generate(prompt, GREEDY)[0].num_cached_tokens == pin.num_tokens - 1
        assert llm.cache.unpin(pin)
        assert not llm.cache.unpin(pin)


def test_models_stay_apart(tmp_path: Path, model: str) -> None:
    """Two engines in one process have nothing in common."""
    with make(model) as one, make(model) as two:
        one.generate(SYSTEM, GREEDY)
        assert two.generate(SYSTEM, GREEDY)[0].num_cached_tokens == 0


@pytest.mark.parametrize("executor", ["native", "reference"])
def test_the_cache_grows_and_shrinks_while_requests_run(model: str, executor: str) -> None:
    params = replace(GREEDY, max_tokens=24, logprobs=None)
    prompts = [{"prompt_token_ids": [(seed * 17 + 5 * j) % 250 for j in range(40)]} for seed in range(3)]
    with make(model, max_model_len=128, executor=executor) as llm:
        expected = [llm.generate(prompt, params, cache=False)[0].outputs[0].token_ids for prompt in prompts]
        size = llm.built.kv_spec.block_bytes
        for seed in range(20):
            llm.generate(
                {"prompt_token_ids": [(seed * 3 + j * j) % 250 for j in range(60)]}, replace(params, max_tokens=1)
            )
        streams = [llm.stream(prompt, params) for prompt in prompts]
        got: list[list[int]] = [[] for _ in streams]
        for turn, num_blocks in enumerate([40, 13, 200, 14, 30, 12] * 4):
            for index, stream in enumerate(streams):
                got[index] += next(stream).token_ids
            llm.resize_kv_cache(num_blocks * size)
            llm.built.engine.cache.verify()
            assert llm.stats().cache.num_blocks == num_blocks, turn
        for index, stream in enumerate(streams):
            got[index] += [token for delta in stream for token in delta.token_ids]
        assert got == expected


def test_a_cache_below_what_runs_is_refused_and_nothing_is_lost(llm: LLM) -> None:
    stream = llm.stream(SYSTEM, GREEDY)
    first = next(stream)
    before = llm.stats().cache
    with pytest.raises(CapacityError, match="that sequences and pins use; give at least"):
        llm.resize_kv_cache(2 * llm.built.kv_spec.block_bytes)
    with pytest.raises(ConfigError, match=r"holds no block of the KV cache; give at least [\d,]+ bytes \([1-9]"):
        llm.resize_kv_cache(1)
    with pytest.raises(ConfigError):
        llm.resize_kv_cache("much")
    assert llm.stats().cache == before
    rest = [token for delta in stream for token in delta.token_ids]
    assert [*first.token_ids, *rest] == llm.generate(SYSTEM, GREEDY, cache=False)[0].outputs[0].token_ids
