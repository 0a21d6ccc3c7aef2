"""`LLM` over a small random model and the native executor: what a caller sees."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from threading import Thread

import pytest

import pagemill
from pagemill import LLM, CapacityError, ConfigError, ModelError, RequestError, SamplingParams
from pagemill.base.clock import MonotonicClock
from pagemill.base.step import Executor, StepPlan, StepResult
from pagemill.build import Built
from pagemill.cache.manager import CacheManager
from pagemill.engine.engine import Engine
from pagemill.llm import RequestOutput
from tests.fixtures.tiny import tiny_llama

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = ["The capital of France is", "x", "Once upon a time there was a mill. " * 8, "1 2 3 4"]


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [choice.token_ids for output in outputs for choice in output.outputs]


def test_answers_come_in_the_order_of_the_prompts_and_equal_those_of_each_alone(llm: LLM) -> None:
    together = llm.generate(PROMPTS, GREEDY)
    assert [output.prompt for output in together] == PROMPTS
    assert tokens(together) == [tokens(llm.generate(prompt, GREEDY))[0] for prompt in PROMPTS]


def test_an_answer_tells_what_api_promises(llm: LLM) -> None:
    [output] = llm.generate("Hello", GREEDY)
    [choice] = output.outputs
    assert output.prompt_token_ids == llm.tokenizer.encode("Hello")
    assert choice.text == llm.tokenizer.decode(choice.token_ids)
    assert (choice.index, choice.finish_reason, choice.stop_reason, len(choice.token_ids)) == (0, "length", None, 12)
    assert (output.num_cached_tokens, output.error) == (0, None)
    assert output.receipt is not None
    assert output.receipt.num_computed_tokens == len(output.prompt_token_ids)
    timing = output.timing
    assert timing.first_token_s is not None
    assert timing.finished_s is not None
    assert timing.arrival_s <= timing.first_token_s <= timing.finished_s
    assert timing.ttft_s is not None
    assert timing.ttft_s >= 0
    assert output.tpot_s == pytest.approx((timing.finished_s - timing.first_token_s) / 11)


def test_token_ids_and_text_ask_the_same(llm: LLM) -> None:
    ids = llm.tokenizer.encode("Hello")
    by_text, by_ids, by_both, by_dict = llm.generate(
        ["Hello", {"prompt_token_ids": ids}, {"prompt": "Hello", "prompt_token_ids": ids}, {"prompt": "Hello"}], GREEDY
    )
    assert tokens([by_text]) == tokens([by_ids]) == tokens([by_both]) == tokens([by_dict])
    assert (by_ids.prompt, by_both.prompt) == (None, "Hello")


def test_no_prompts_give_no_answers(llm: LLM) -> None:
    assert llm.generate([], GREEDY) == []


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("", "prompt 1: the prompt is empty"),
        ({"prompt_token_ids": []}, "prompt 1: the prompt is empty"),
        ({"prompt_token_ids": [10**6]}, "prompt 1: the prompt's token 0 is 1000000; give ids from 0 to"),
        ({"prompt_token_ids": [1, -1]}, "prompt 1: the prompt's token 1 is -1"),
        ({"prompt_token_ids": [1.5]}, "prompt 1: the prompt's token 0 is 1.5"),
        ({"prompt_token_ids": "abc"}, 'prompt 1: "prompt_token_ids" is a str'),
        ({"prompt_tokens": [1]}, "prompt 1: a prompt has the keys"),
        ({}, "prompt 1: a prompt has the keys"),
        ({"prompt": 3}, 'prompt 1: "prompt" is a int'),
        (7, "prompt 1: a prompt is a int"),
        ([1, 2, 3], "prompt 1: a prompt is a list"),
        ("word " * 600, "prompt 1: the prompt has [0-9,]+ tokens and max_model_len is 512"),
    ],
)
def test_one_bad_prompt_is_named_before_anything_runs(llm: LLM, bad: object, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        llm.generate(["good", bad, "good"], GREEDY)  # type: ignore[list-item]
    assert llm.stats().num_steps == 0


def test_a_single_bad_prompt_has_no_index(llm: LLM) -> None:
    with pytest.raises(RequestError, match=r"^the prompt is empty"):
        llm.generate("", GREEDY)


@pytest.mark.parametrize("prompts", [3, None, b"bytes"])
def test_prompts_of_a_wrong_type_are_refused(llm: LLM, prompts: object) -> None:
    with pytest.raises(RequestError, match="prompts is a"):
        llm.generate(prompts, GREEDY)  # type: ignore[arg-type]


@pytest.mark.parametrize("messages", [None, 5, "hello", {"role": "user", "content": "x"}])
def test_messages_of_a_wrong_type_are_refused(llm: LLM, messages: object) -> None:
    with pytest.raises(RequestError, match=r"messages is a .*list of dicts"):
        llm.chat(messages, GREEDY)  # type: ignore[arg-type]


def test_parameters_may_differ_by_prompt(llm: LLM) -> None:
    first, second = llm.generate(["a", "b"], [replace(GREEDY, max_tokens=3), replace(GREEDY, max_tokens=5)])
    assert [len(each.outputs[0].token_ids) for each in (first, second)] == [3, 5]


def test_a_wrong_number_of_parameters_is_refused(llm: LLM) -> None:
    with pytest.raises(RequestError, match="2 sampling parameters for 3 prompts"):
        llm.generate(["a", "b", "c"], [GREEDY, GREEDY])
    with pytest.raises(RequestError, match="give SamplingParams"):
        llm.generate(["a"], {"temperature": 0})  # type: ignore[arg-type]


def test_choices_differ_and_their_logprobs_are_ranked(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, n=3, max_tokens=8, logprobs=2, seed=5, ignore_eos=True)
    [output] = llm.generate("Hello", params)
    assert [choice.index for choice in output.outputs] == [0, 1, 2]
    assert len({tuple(choice.token_ids) for choice in output.outputs}) > 1
    for choice in output.outputs:
        assert choice.logprobs is not None
        assert [next(iter(position)) for position in choice.logprobs] == choice.token_ids
        for token, position in zip(choice.token_ids, choice.logprobs, strict=True):
            assert {1, 2} <= {each.rank for each in position.values()}
            assert position[token].decoded_token == llm.tokenizer.decode([token], skip_special=False)
        total = math.fsum(each[token].logprob for token, each in zip(choice.token_ids, choice.logprobs, strict=True))
        assert choice.cumulative_logprob == pytest.approx(total)


def test_seeds_repeat_and_differ(llm: LLM) -> None:
    def sampled(seed: int) -> list[list[int]]:
        return tokens(llm.generate("Hello", SamplingParams(temperature=1.5, max_tokens=12, seed=seed, ignore_eos=True)))

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)


def test_a_stream_adds_up_to_the_answer(llm: LLM) -> None:
    [whole] = llm.generate(PROMPTS[0], GREEDY)
    deltas = list(llm.stream(PROMPTS[0], GREEDY))
    assert "".join(delta.text for delta in deltas) == whole.outputs[0].text
    assert [token for delta in deltas for token in delta.token_ids] == whole.outputs[0].token_ids
    assert [delta.finish_reason for delta in deltas[-2:]] == [None, "length"]


def test_a_stream_that_is_left_early_frees_its_blocks(llm: LLM) -> None:
    stream = llm.stream(PROMPTS[0], replace(GREEDY, max_tokens=100))
    next(stream)
    assert llm.stats().cache.num_active_blocks > 0
    stream.close()
    assert (llm.stats().num_running, llm.stats().cache.num_active_blocks) == (0, 0)


def test_streams_may_be_read_in_turns(llm: LLM) -> None:
    alone = tokens(llm.generate(PROMPTS[:2], GREEDY))
    first, second = llm.stream(PROMPTS[0], GREEDY), llm.stream(PROMPTS[1], GREEDY)
    pairs = list(zip(first, second, strict=True))
    assert [[token for pair in pairs for token in pair[i].token_ids] for i in (0, 1)] == alone


def test_threads_may_share_one_engine(llm: LLM) -> None:
    alone = tokens(llm.generate(PROMPTS, GREEDY))
    found: dict[int, list[list[int]]] = {}

    def work(number: int) -> None:
        found[number] = tokens(llm.generate(PROMPTS, GREEDY))

    workers = [Thread(target=work, args=(number,)) for number in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    assert found == {0: alone, 1: alone, 2: alone}


def test_progress_counts_requests_and_tokens(llm: LLM) -> None:
    seen: list[tuple[int, int, int]] = []
    llm.generate(PROMPTS, GREEDY, progress=lambda *counts: seen.append(counts))
    assert seen == sorted(seen)
    assert seen[-1] == (4, 4, 48)


def test_progress_on_stderr_stays_off_pipes_and_files(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate(PROMPTS, GREEDY, progress=True)
    assert capsys.readouterr() == ("", "")


def test_chat_renders_the_template_and_reads_its_special_tokens(llm: LLM) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    prompt = llm.chat_prompt(messages)
    assert "Hello" in prompt["prompt"]
    assert set(prompt["prompt_token_ids"]) & llm.tokenizer.special_ids
    [by_chat] = llm.chat(messages, GREEDY)
    assert tokens([by_chat]) == tokens(llm.generate(prompt, GREEDY))


def test_several_conversations_are_answered_in_order(llm: LLM) -> None:
    conversations = [[{"role": "user", "content": text}] for text in ("a", "b")]
    assert tokens(llm.chat(conversations, GREEDY)) == [tokens(llm.chat(each, GREEDY))[0] for each in conversations]


def test_a_malformed_conversation_is_refused_and_named(llm: LLM) -> None:
    good = [{"role": "user", "content": "a"}]
    with pytest.raises(RequestError, match="prompt 1: "):
        llm.chat([good, [{"role": "user"}]], GREEDY)
    with pytest.raises(RequestError):
        llm.chat([], GREEDY)


class FailingExecutor:
    """Runs steps until the `failing`-th, which raises; then goes on. Mutated by `run`."""

    def __init__(self, inner: Executor, failing: int, error: BaseException | None = None) -> None:
        self.inner, self.failing, self.num_steps = inner, failing, 0
        self.error = error or MemoryError("injected")

    def run(self, plan: StepPlan) -> StepResult:
        self.num_steps += 1
        if self.num_steps == self.failing:
            raise self.error
        return self.inner.run(plan)


def with_executor(built: Built, executor: Executor) -> LLM:
    """The same model, one sequence at a time, over another executor."""
    limits = replace(built.engine.limits, max_num_seqs=1)
    cache = CacheManager(built.num_blocks, built.kv_spec.block_size)
    tokenizer = built.tokenizer
    assert tokenizer is not None

    def decode(token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        return tokenizer.decode(token_ids, skip_special=skip_special_tokens)

    engine = Engine(executor, cache, limits, decode, MonotonicClock())
    return LLM.from_built(replace(built, engine=engine, executor=executor))


def test_a_request_that_fails_midway_harms_no_other(llm: LLM) -> None:
    good = tokens(llm.generate(PROMPTS[:3], GREEDY))
    failing = with_executor(llm.built, FailingExecutor(llm.built.executor, failing=15))
    first, second, third = failing.generate(PROMPTS[:3], GREEDY)
    assert (tokens([first]), tokens([third])) == ([good[0]], [good[2]])
    assert second.outputs[0].finish_reason == "error"
    assert isinstance(second.error, MemoryError)
    assert second.outputs[0].token_ids == good[1][:2]
    assert failing.stats().cache.num_active_blocks == 0


def test_a_stream_raises_its_own_error(llm: LLM) -> None:
    failing = with_executor(llm.built, FailingExecutor(llm.built.executor, failing=3))
    with pytest.raises(MemoryError, match="injected"):
        list(failing.stream("Hello", GREEDY))


def test_ctrl_c_within_a_step_leaks_nothing_and_the_engine_goes_on(llm: LLM) -> None:
    good = tokens(llm.generate(PROMPTS, GREEDY))
    stopped = with_executor(llm.built, FailingExecutor(llm.built.executor, failing=15, error=KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        stopped.generate(PROMPTS, GREEDY)
    assert (stopped.stats().num_running, stopped.stats().num_waiting) == (0, 0)
    assert stopped.stats().cache.num_free_blocks == stopped.stats().cache.num_blocks
    assert tokens(stopped.generate(PROMPTS, GREEDY)) == good


def test_ctrl_c_in_a_shared_step_takes_no_token_from_the_other_thread(tiny_model: Path) -> None:
    """The signal arrives while the native step runs for both: it is raised once the step's tokens are handed out."""
    expected: list[list[int]]
    with LLM(str(tiny_model)) as alone:
        expected = tokens(alone.generate(PROMPTS[0], GREEDY))
    with LLM(str(tiny_model)) as llm:
        other = llm.stream(PROMPTS[0], GREEDY)
        got = list(next(other).token_ids)
        run = llm.built.executor.run

        def interrupted(plan: StepPlan) -> StepResult:
            os.kill(os.getpid(), signal.SIGINT)
            return run(plan)

        llm.built.executor.run = interrupted  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS[1], GREEDY)
        llm.built.executor.run = run  # type: ignore[method-assign]
        for delta in other:
            got += delta.token_ids
        assert [got] == expected
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_closed_engine_says_so(tiny_model: Path) -> None:
    llm = LLM(str(tiny_model), kv_cache_memory_bytes="8MiB")
    stream = llm.stream("Hello", GREEDY)
    next(stream)
    llm.close()
    llm.close()
    with pytest.raises(RequestError, match="closed"):
        llm.generate("Hello", GREEDY)
    with pytest.raises(RequestError, match="closed"):
        next(stream)


def test_a_forked_process_is_told_to_make_its_own(tiny_model: Path) -> None:
    program = """
import os, sys
from pagemill import LLM, RequestError, SamplingParams
llm = LLM(sys.argv[1], kv_cache_memory_bytes="8MiB", num_threads=2)
llm.generate("x", SamplingParams(max_tokens=2))
if child := os.fork():
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
try:
    llm.generate("x", SamplingParams(max_tokens=2))
except RequestError as error:
    os._exit(7 if "before the process forked" in str(error) else 1)
"""
    arguments = [sys.executable, "-W", "ignore", "-c", program, str(tiny_model)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run(arguments, env=environment, timeout=60, check=False).returncode == 7


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("mode", ["none", "contiguous", "paged"])
def test_every_mode_and_chunk_size_gives_the_same_tokens(tiny_model: Path, llm: LLM, mode: str, chunk: int) -> None:
    expected = tokens(llm.generate(PROMPTS, GREEDY))
    options = {"kv_cache": mode, "max_num_batched_tokens": chunk, "kv_cache_memory_bytes": "4MiB"}
    with LLM(str(tiny_model), **options) as other:
        assert tokens(other.generate(PROMPTS, GREEDY)) == expected


def test_a_small_cache_preempts_and_gives_the_same_tokens(tiny_model: Path, llm: LLM) -> None:
    params = replace(GREEDY, max_tokens=60)
    expected = tokens(llm.generate(PROMPTS * 2, params))
    with LLM(str(tiny_model), max_model_len=400, kv_cache_memory_bytes=26 * llm.built.kv_spec.block_bytes) as small:
        assert tokens(small.generate(PROMPTS * 2, params)) == expected
        assert small.stats().num_preemptions > 0


def test_a_prompt_larger_than_the_context_names_the_option(tiny_model: Path) -> None:
    with LLM(str(tiny_model), max_model_len=16, kv_cache_memory_bytes="1MiB") as short:
        with pytest.raises(RequestError, match="raise max_model_len"):
            short.generate("word " * 20, GREEDY)
        [output] = short.generate("word", replace(GREEDY, max_tokens=1000))
        assert len(output.outputs[0].token_ids) == 16 - len(output.prompt_token_ids)


def test_too_little_memory_shows_the_arithmetic(tiny_model: Path) -> None:
    with pytest.raises(CapacityError, match="raise kv_cache_memory_bytes or lower max_model_len to"):
        LLM(str(tiny_model), kv_cache_memory_bytes="16KiB")


def test_more_context_than_the_model_has_is_refused(tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match=r"max_model_len is 1,000 and .* reaches 512"):
        LLM(str(tiny_model), max_model_len="1k")


def test_an_unknown_option_suggests_the_nearest(tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean max_num_seqs"):
        LLM(str(tiny_model), max_num_seq=3)


def test_a_model_that_is_nowhere_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nothing\.gguf"):
        LLM(str(tmp_path / "nothing.gguf"))


def test_a_model_without_a_vocabulary_takes_token_ids_only(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path, tokenizer=False)
    with LLM(str(path), kv_cache_memory_bytes="4MiB") as llm:
        [output] = llm.generate({"prompt_token_ids": [1, 2, 3]}, GREEDY)
        assert len(output.outputs[0].token_ids) == 12
        assert output.outputs[0].text == ""
        with pytest.raises(ModelError, match="prompt_token_ids"):
            llm.generate("text", GREEDY)


def test_the_package_lists_and_lends_its_public_names() -> None:
    assert set(pagemill.__all__) <= set(dir(pagemill))
    assert all(getattr(pagemill, name) is not None for name in pagemill.__all__)
    with pytest.raises(AttributeError, match="no attribute 'LMM'"):
        _ = pagemill.LMM  # type: ignore[attr-defined]
