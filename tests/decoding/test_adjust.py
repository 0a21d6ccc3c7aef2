"""Penalties, biases and grammars against what their formulas say; rows that ask for nothing keep their numbers."""

from __future__ import annotations

import re
from array import array
from collections import Counter
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pagemill.base.errors import RequestError
from pagemill.base.params import Grammar, SamplingParams
from pagemill.base.step import Sample, SampleFailure, SequenceStep
from pagemill.decoding import sampling
from pagemill.decoding.adjust import LogitAdjuster
from pagemill.decoding.grammar import GrammarCompiler
from pagemill.decoding.penalties import TokenCounts, penalize
from pagemill.decoding.step_sampler import BatchSampler, SpecificationSampler, StepSampler
from pagemill.kernels import _native
from pagemill.kernels.sampling import NativeSampler
from pagemill.kernels.target import available_targets
from pagemill.text.tokenizer import Tokenizer, build_tokenizer
from tests.text.vocabularies import byte_level

Logits = NDArray[np.float32]
VOCAB = 40


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return build_tokenizer(byte_level())


def step(seq_id: int, params: SamplingParams, history: list[int], num_generated: int = 0) -> SequenceStep:
    return SequenceStep(
        seq_id,
        history[-1:],
        len(history) - 1,
        (0,),
        True,
        params,
        seed=seq_id,
        num_generated=num_generated,
        history=array("i", history) if params.reads_history else (),
    )


def expected_row(row: Logits, params: SamplingParams, history: list[int], num_generated: int) -> Logits:
    """The formulas, one token at a time."""
    made = row.copy()
    for token, bias in params.logit_bias:
        if token < len(made):
            made[token] += np.float32(bias)
    repeat = np.float32(params.repetition_penalty)
    for token in set(history):
        made[token] = made[token] / repeat if made[token] > 0 else made[token] * repeat
    for token, count in Counter(history[len(history) - num_generated :]).items():
        made[token] -= np.float32(count) * np.float32(params.frequency_penalty)
        made[token] -= np.float32(params.presence_penalty)
    return made


def random_params(rng: np.random.Generator) -> SamplingParams:
    return SamplingParams(
        temperature=float(rng.choice([0, 1])),
        presence_penalty=float(rng.choice([0, 0.5, -2])),
        frequency_penalty=float(rng.choice([0, 1.25, -0.5])),
        repetition_penalty=float(rng.choice([1, 1.3, 0.5])),
        logit_bias={int(token): float(rng.normal()) for token in rng.integers(0, VOCAB + 5, rng.integers(0, 4))},  # type: ignore[arg-type]
        logprobs=(None, 3)[rng.integers(2)],
    )


def samplers() -> list[StepSampler]:
    model = _native.NativeModel(available_targets()[0], 1, 64, VOCAB, 8)
    return [SpecificationSampler(), BatchSampler(NativeSampler(model))]


def test_penalties_are_their_formulas() -> None:
    rng = np.random.default_rng(1)
    for _ in range(300):
        params = random_params(rng)
        history = rng.integers(0, VOCAB, rng.integers(1, 30)).tolist()
        num_generated = int(rng.integers(0, len(history)))
        row = rng.normal(0, 3, VOCAB).astype(np.float32)
        found = row.copy()
        counts = TokenCounts()
        counts.follow(array("i", history), num_generated)
        penalize(found, params, counts)
        assert np.array_equal(found, expected_row(row, params, history, num_generated))


def test_counts_grow_with_the_text_and_begin_anew_with_a_shorter_one() -> None:
    rng = np.random.default_rng(4)
    for _ in range(30):
        counts, prompt, generated = TokenCounts(), rng.integers(0, 200, rng.integers(1, 90)).tolist(), list[int]()
        for _ in range(120):
            if rng.random() < 0.05:
                generated = generated[: int(rng.integers(0, len(generated) + 1))]
            else:
                generated.append(int(rng.integers(0, 200)))
            counts.follow(array("i", prompt + generated), len(generated))
            expected = {**dict.fromkeys(prompt, 0), **Counter(generated)}
            assert dict(zip(counts.ids.tolist(), counts.counts.tolist(), strict=True)) == expected


def test_both_samplers_choose_from_adjusted_logits_and_report_the_raw_ones() -> None:
    rng = np.random.default_rng(2)
    for trial in range(60):
        logits = rng.normal(0, 3, (5, VOCAB)).astype(np.float32)
        rows, histories = [], []
        for seq_id in range(5):
            history = rng.integers(0, VOCAB, rng.integers(1, 30)).tolist()
            histories.append((history, int(rng.integers(0, len(history)))))
            rows.append(step(trial * 10 + seq_id, random_params(rng), *histories[-1]))
        adjusted = np.stack(
            [expected_row(row, each.params, *told) for row, each, told in zip(logits, rows, histories, strict=True)]
        )
        plain = [each._replace(params=SamplingParams(temperature=each.params.temperature)) for each in rows]
        best = np.argmax(adjusted, axis=1).astype(np.int32)
        chosen, _ = SpecificationSampler().choose(plain, adjusted, best)
        logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        for sampler in samplers():
            first = np.argmax(logits, axis=1).astype(np.int32)
            samples, failures = sampler.choose(rows, logits.copy(), first)
            assert not failures
            assert [each.token_id for each in samples] == [each.token_id for each in chosen]
            for sample, row, each in zip(samples, logprobs, rows, strict=True):
                if each.params.logprobs is not None:
                    assert sample.logprob is not None
                    assert sample.logprob.logprob == pytest.approx(float(row[sample.token_id]), abs=1e-4)
                    assert [top.token_id for top in sample.top] == np.argsort(-row, kind="stable")[:3].tolist()


def rows_with_reports(rng: np.random.Generator, grammar: Grammar, first_id: int) -> list[SequenceStep]:
    """Rows of every kind of adjustment, greedy and drawn, some of which report nothing or are not adjusted."""
    kinds: list[dict[str, Any]] = [
        {"presence_penalty": 1.5},
        {"repetition_penalty": 1.4, "top_p": 0.9},
        {"logit_bias": ((3, 6.0), (9, -2.0)), "top_k": 20},
        {"grammar": grammar},
        {"frequency_penalty": 0.5, "grammar": grammar, "min_p": 0.01},
        {},
    ]
    rows = []
    for place in rng.permutation(2 * len(kinds)).tolist():
        params = SamplingParams(
            temperature=float(place % 2), logprobs=(0, 1, 5, 20, None)[rng.integers(5)], **kinds[place // 2]
        )
        history = rng.integers(0, 256, rng.integers(2, 30)).tolist()
        num_generated = int(rng.integers(0, 2 if params.grammar else len(history)))  # some leave their grammar
        forbid = tuple(rng.integers(0, 256, 4).tolist()) if rng.random() < 0.3 else ()
        rows.append(step(first_id + place, params, history, num_generated)._replace(forbid=forbid))
    return rows


def logits_with_extremes(rng: np.random.Generator, num_rows: int, vocab: int) -> Logits:
    """Rows with ties; now and then one of -inf alone, with several +inf or with NaN."""
    logits = np.round(rng.normal(0, 3, (num_rows, vocab)) * 4).astype(np.float32) / 4
    if rng.random() < 0.3:
        logits[rng.integers(num_rows)] = -np.inf
    for value in (np.inf, np.nan):
        if rng.random() < 0.3:
            logits[rng.integers(num_rows), rng.integers(0, vocab, 2)] = value
    return logits


@pytest.mark.parametrize("target", available_targets())
def test_adjusted_rows_report_natively_what_the_specification_does(
    tokenizer: Tokenizer, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal to the last bit, in company and alone, and without the specification's weights and sorts."""
    vocab = tokenizer.vocab_size + 3
    native = NativeSampler(_native.NativeModel(target, 2, 64, vocab, 8))
    grammars = GrammarCompiler(tokenizer)
    rng = np.random.default_rng(6)
    for trial in range(25):
        rows = rows_with_reports(rng, Grammar("regex", "[a-z]+"), trial * 100)
        logits = logits_with_extremes(rng, len(rows), vocab)
        best = np.argmax(logits, axis=1).astype(np.int32)
        expected = SpecificationSampler(LogitAdjuster(grammars)).choose(rows, logits, best)
        together, alone = (BatchSampler(native, LogitAdjuster(grammars)) for _ in range(2))
        with monkeypatch.context() as slow:
            for owner, name in ((sampling, "weigh"), (np, "argsort"), (np, "sort"), (np, "partition")):
                slow.setattr(owner, name, _refuse)
            assert together.choose(rows, logits.copy(), best.copy()) == expected
            for index, row in enumerate(rows):
                found = alone.choose([row], logits[index : index + 1].copy(), best[index : index + 1].copy())
                assert found == tuple(tuple(x for x in each if x.seq_id == row.seq_id) for each in expected)


def _refuse(*_arguments: object, **_options: object) -> None:
    raise AssertionError("the specification's way was taken")


def test_rows_that_ask_for_nothing_are_not_touched_by_their_neighbours() -> None:
    rng = np.random.default_rng(3)
    logits = rng.normal(0, 3, (3, VOCAB)).astype(np.float32)
    best = np.argmax(logits, axis=1).astype(np.int32)
    plain, biased = SamplingParams(temperature=0), SamplingParams(temperature=0, logit_bias=((7, 100.0),))
    for sampler in samplers():
        samples, _ = sampler.choose(
            [step(1, plain, [1]), step(2, biased, [1]), step(3, plain, [1])], logits.copy(), best.copy()
        )
        assert [each.token_id for each in samples] == [int(best[0]), 7, int(best[2])]


def test_a_row_of_nan_fails_as_without_penalties() -> None:
    logits = np.full((1, VOCAB), np.nan, np.float32)
    for sampler in samplers():
        params = SamplingParams(presence_penalty=1)
        _, [failure] = sampler.choose([step(1, params, [1])], logits.copy(), np.zeros(1, np.int32))
        assert "NaN" in failure.reason


# ---- grammars


def run(
    tokenizer: Tokenizer, grammar: Grammar, seed: int, *, most: int = 200, replay: bool = False
) -> tuple[str, SampleFailure | None]:
    """Text drawn from flat logits within a grammar, until the model's end of text. replay: a new adjuster each step, as
    after a preemption whose state was dropped."""
    grammars = GrammarCompiler(tokenizer)
    rng = np.random.default_rng(seed)
    history, generated = [1], 0
    sampler = SpecificationSampler(LogitAdjuster(grammars))
    params = SamplingParams(temperature=1, grammar=grammar, max_tokens=most)
    while generated < most:
        if replay:
            sampler = SpecificationSampler(LogitAdjuster(grammars))
        logits = rng.normal(0, 1, (1, tokenizer.vocab_size + 3)).astype(np.float32)
        row = step(seed, params, history, generated)
        samples, failures = sampler.choose([row], logits, np.argmax(logits, axis=1).astype(np.int32))
        if failures:
            return tokenizer.decode(history[1:]), failures[0]
        [chosen] = samples
        assert isinstance(chosen, Sample)
        if chosen.token_id in tokenizer.stop_ids:
            break
        history.append(chosen.token_id)
        generated += 1
    return tokenizer.decode(history[1:]), None


@pytest.mark.parametrize("replay", [False, True])
def test_text_stays_within_a_regular_expression(tokenizer: Tokenizer, replay: bool) -> None:
    for seed in range(5):
        text, failure = run(tokenizer, Grammar("regex", "(ab|cd){1,3}-[0-9]{2}"), seed, replay=replay)
        assert failure is None
        assert re.fullmatch("(ab|cd){1,3}-[0-9]{2}", text)


def test_a_state_goes_back_where_a_sample_was_lost(tokenizer: Tokenizer) -> None:
    state = GrammarCompiler(tokenizer).state(Grammar("regex", "ab"))
    a, b = tokenizer.encode("a")[0], tokenizer.encode("b")[0]
    state.follow([a, b])
    state.follow([a])
    assert state.allowed()[b]
    assert not state.allowed()[a]


def test_text_that_a_grammar_does_not_allow_is_refused(tokenizer: Tokenizer) -> None:
    state = GrammarCompiler(tokenizer).state(Grammar("regex", "ab"))
    with pytest.raises(RequestError, match="cannot go on"):
        state.follow(tokenizer.encode("b"))


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar("regex", "("),
        Grammar("json_schema", "{"),
        Grammar("json_schema", '{"type": "nonsense"}'),
        Grammar("json_schema", '{"$ref": "#/nowhere"}'),
        Grammar("lark", "start"),
        Grammar("lark", "begin: A"),
    ],
)
def test_grammars_that_are_wrong_are_told(tokenizer: Tokenizer, grammar: Grammar) -> None:
    with pytest.raises(RequestError, match=f"the {grammar.noun} cannot be used"):
        GrammarCompiler(tokenizer).check(grammar)


def test_models_without_vocabulary_or_end_follow_no_grammar() -> None:
    with pytest.raises(RequestError, match="no vocabulary"):
        GrammarCompiler(None).check(Grammar("regex", "a"))


@pytest.mark.parametrize(("kind", "text"), [("xml", "a"), ("regex", ""), ("regex", "a" * 300_000), ("regex", 5)])
def test_a_grammar_checks_its_fields(kind: Any, text: Any) -> None:
    with pytest.raises(RequestError):
        Grammar(kind, text)


def test_compiled_grammars_are_bounded_in_number(tokenizer: Tokenizer) -> None:
    grammars = GrammarCompiler(tokenizer)
    for index in range(80):
        grammars.check(Grammar("regex", f"a{index}"))
    assert len(grammars._kept) == 64
