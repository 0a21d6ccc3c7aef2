"""Log-probabilities of prompts: the arithmetic, and that chunks, batches and preemption change nothing."""

from __future__ import annotations

from array import array
from pathlib import Path

import numpy as np
import pytest

from pagemill import LLM, SamplingParams
from pagemill.base.step import SequenceStep
from pagemill.decoding import prompt_logprobs
from pagemill.decoding.prompt_logprobs import PromptReports, num_positions, pieces
from tests.fixtures.tiny import tiny_llama

WANTED = SamplingParams(temperature=0, prompt_logprobs=2)


def row(seq_id: int, prompt: list[int], start: int, count: int, params: SamplingParams = WANTED) -> SequenceStep:
    sample = start + count == len(prompt)
    return SequenceStep(
        seq_id, prompt[start : start + count], start, (0,), sample, params, 0, history=array("i", prompt)
    )


def test_values_and_ranks_are_those_of_the_softmax() -> None:
    rng = np.random.default_rng(1)
    logits = np.round(rng.normal(0, 2, (5, 30)), 1).astype(np.float32)  # rounded: ties
    prompt = rng.integers(0, 30, 6).tolist()
    reports = PromptReports()
    reports.take([row(1, prompt, 0, 6)], logits, np.argmax(logits, axis=1).astype(np.int32))
    found = reports.finish(1)
    assert len(found) == 5
    for values, token, position in zip(logits.astype(np.float64), prompt[1:], found, strict=True):
        logprobs = values - np.log(np.exp(values).sum())
        order = np.argsort(-values, kind="stable").tolist()
        assert position.sampled.token_id == token
        assert position.sampled.logprob == pytest.approx(logprobs[token], abs=1e-5)
        assert position.sampled.rank == order.index(token) + 1
        assert [each.token_id for each in position.top] == order[:2]
    assert reports.finish(1) == ()


def test_the_last_position_has_no_successor() -> None:
    assert num_positions(row(1, [1, 2, 3, 4], 0, 4)) == 3
    assert num_positions(row(1, [1, 2, 3, 4], 0, 2)) == 2
    assert num_positions(row(1, [1, 2, 3, 4], 3, 1)) == 0
    assert num_positions(row(1, [1], 0, 1)) == 0


def test_further_choices_and_generated_tokens_report_nothing() -> None:
    assert num_positions(row(1, [1, 2, 3], 0, 3)._replace(choice=1)) == 0
    assert num_positions(row(1, [1, 2, 3], 0, 3)._replace(num_generated=1)) == 0
    assert num_positions(row(1, [1, 2, 3], 0, 3, SamplingParams())) == 0


def test_rounds_hold_few_positions_and_every_token_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_logprobs, "MOST_ROWS", 8)
    prompt = list(range(21))
    plain = row(3, prompt, 0, 5, SamplingParams())
    steps = [row(1, prompt, 0, 21), plain, row(2, prompt, 10, 3)]
    rounds = pieces(steps)
    assert all(sum(map(num_positions, each)) <= 8 for each in rounds)
    for step in steps:
        mine = [each for steps_of in rounds for each in steps_of if each.seq_id == step.seq_id]
        assert [token for each in mine for token in each.token_ids] == list(step.token_ids)
        assert [each.sample for each in mine] == [False] * (len(mine) - 1) + [step.sample]
    assert plain in rounds[-1]


def test_prompts_that_were_left_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_logprobs, "MOST_PROMPTS", 2)
    reports = PromptReports()
    logits = np.zeros((2, 4), np.float32)
    for seq_id in range(5):
        reports.take([row(seq_id, [1, 2, 3, 1], 0, 2)], logits, np.zeros(2, np.int32))
    assert [len(reports.finish(seq_id)) for seq_id in range(5)] == [0, 0, 0, 2, 2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("tiny"))


def test_chunks_neighbours_and_the_cache_change_nothing(model: Path) -> None:
    prompt = "The same prompt, read in chunks or in whole, alone or beside others. " * 3
    found = []
    for budget in (512, 7):
        options = {"kv_cache_memory_bytes": "8MiB", "packed_weights_cache": "off", "max_num_batched_tokens": budget}
        with LLM(str(model), max_num_seqs=4, **options) as llm:
            llm.generate(prompt, SamplingParams(max_tokens=1, temperature=0))  # now in the cache
            wanted = SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=1)
            outputs = llm.generate(
                ["other", prompt, "x"], [SamplingParams(max_tokens=9, temperature=0), wanted, wanted]
            )
            assert outputs[0].prompt_logprobs is None
            assert outputs[1].num_cached_tokens == 0
            assert [len(each.prompt_token_ids) for each in outputs[1:]] == [
                len(each.prompt_logprobs or []) for each in outputs[1:]
            ]
            found.append([each.prompt_logprobs for each in outputs[1:]])
    assert found[0] == found[1]
    assert found[0][0] is not None
    assert found[0][0][0] is None


def test_what_was_generated_is_scored_alike_as_a_prompt(model: Path) -> None:
    with LLM(str(model), kv_cache_memory_bytes="8MiB", packed_weights_cache="off") as llm:
        [made] = llm.generate("Hello", SamplingParams(temperature=0, max_tokens=20, logprobs=1, ignore_eos=True))
        ids = made.prompt_token_ids + made.outputs[0].token_ids
        [scored] = llm.generate({"prompt_token_ids": ids}, SamplingParams(max_tokens=1, prompt_logprobs=1))
        assert scored.prompt_logprobs is not None
        again = scored.prompt_logprobs[len(made.prompt_token_ids) :]
        for position, known, token in zip(
            again, made.outputs[0].logprobs or [], made.outputs[0].token_ids, strict=True
        ):
            assert position is not None
            assert position[token].logprob == pytest.approx(known[token].logprob, abs=1e-5)
            assert position[token].rank == known[token].rank == 1
