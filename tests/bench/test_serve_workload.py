"""Sessions of `bench serve`: lengths, what is shared, arrivals and traces."""

from __future__ import annotations

import statistics
from itertools import pairwise

import pytest

from pagemill.base.errors import ConfigError
from pagemill.bench.serve_workload import (
    DISTINCT,
    SHARED,
    WORKLOADS,
    Words,
    make_sessions,
    parse_workloads,
    plain_words,
    trace_sessions,
)
from pagemill.build import tokenizer_of
from pagemill.models.checkpoint import open_checkpoint
from pagemill.simulator.trace import Request, Trace
from tests.fixtures.default_model import default_model_path
from tests.fixtures.tiny import tiny_llama

WORDS = Words(tuple(f" w{index}" for index in range(500)))


def length(text: str) -> int:
    return len(text.split())


@pytest.mark.parametrize("name", WORKLOADS)
def test_texts_have_the_length_that_is_said_and_a_seed_makes_them_again(name: str) -> None:
    made = make_sessions(name, WORDS, 40, seed=(1, 2))
    assert made == make_sessions(name, WORDS, 40, seed=(1, 2))
    assert made != make_sessions(name, WORDS, 40, seed=(1, 3))
    assert len(made) == 40
    for session in made:
        assert all(length(turn.text) == turn.num_tokens for turn in session.turns)
        asked = sum(turn.num_tokens + turn.max_tokens for turn in session.turns)
        assert session.num_positions > asked


def test_distinct_prompts_share_nothing_and_shared_ones_their_first_1024_tokens() -> None:
    distinct = {session.turns[0].text[:40] for session in make_sessions(DISTINCT, WORDS, 200, seed=(0,))}
    assert len(distinct) == 200
    texts = [session.turns[0].text.split() for session in make_sessions(SHARED, WORDS, 50, seed=(0,))]
    assert {tuple(words[:1024]) for words in texts} == {tuple(texts[0][:1024])}
    assert len({tuple(words[1024:]) for words in texts}) == 50
    assert {len(words) for words in texts} == {1056}


def test_scale_makes_everything_shorter() -> None:
    for name in WORKLOADS:
        longest = max(each.num_positions for each in make_sessions(name, WORDS, 50, seed=(0,)))
        small = max(each.num_positions for each in make_sessions(name, WORDS, 50, seed=(0,), scale=0.125))
        assert small < longest / 4


def test_rate_is_that_of_a_poisson_process() -> None:
    made = make_sessions(DISTINCT, WORDS, 2000, seed=(0,), scale=0.05, rate=50.0)
    gaps = [later.at_s - earlier.at_s for earlier, later in pairwise(made)]
    assert statistics.fmean(gaps) == pytest.approx(1 / 50, rel=0.1)
    assert statistics.stdev(gaps) == pytest.approx(1 / 50, rel=0.15)


def test_names_are_checked() -> None:
    assert parse_workloads("chat, distinct,chat") == ("chat", "distinct")
    assert parse_workloads("all") == tuple(WORKLOADS)
    with pytest.raises(ConfigError, match="did you mean agents"):
        parse_workloads("agent")
    with pytest.raises(ConfigError, match="empty"):
        parse_workloads(" , ")


def trace_of(*requests: Request, block_tokens: int = 512) -> Trace:
    return Trace("made up", block_tokens, requests)


def test_trace_keeps_what_is_shared_and_shrinks_blocks_and_answers() -> None:
    trace = trace_of(Request(0.0, 1024, 512, (1, 2)), Request(4.0, 1300, 320, (1, 3, 4)), Request(99.0, 512, 32, (9,)))
    made = trace_sessions(trace, WORDS, seed=(0,), speed=2.0, duration_s=10.0, longest=2000, most=10)
    assert [session.at_s for session in made] == [0.0, 2.0]
    first, second = (session.turns[0] for session in made)
    assert (length(first.text), first.num_tokens, first.max_tokens) == (32, 32, 16)
    assert (length(second.text), second.max_tokens) == (48, 10)
    assert first.text.split()[:16] == second.text.split()[:16]
    assert first.text.split()[16:32] != second.text.split()[16:32]


def test_trace_of_lengths_keeps_them_and_cuts_what_does_not_fit() -> None:
    trace = trace_of(Request(0.0, 100, 20, ()), Request(1.0, 9000, 900, ()), Request(2.0, 0, 0, ()), block_tokens=0)
    made = trace_sessions(trace, WORDS, seed=(0,), speed=1.0, duration_s=10.0, longest=400, most=10)
    assert [(each.turns[0].num_tokens, each.turns[0].max_tokens) for each in made] == [(100, 20), (258, 100), (1, 1)]
    assert all(each.num_positions <= 400 for each in made)
    long = trace_of(Request(0.0, 512 * 100, 512, tuple(range(100))))
    [cut] = trace_sessions(long, WORDS, seed=(0,), speed=1.0, duration_s=1.0, longest=300, most=1)
    assert cut.num_positions <= 300
    assert length(cut.turns[0].text) == cut.turns[0].num_tokens


def test_trace_without_a_request_in_time_is_refused() -> None:
    with pytest.raises(ConfigError, match="no request in its first 5 s"):
        trace_sessions(trace_of(), WORDS, seed=(0,), speed=1.0, duration_s=5.0, longest=100, most=1)


def test_small_vocabularies_give_letters(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tiny_llama(tmp_path_factory.mktemp("tiny"), format="gguf")
    tokenizer = tokenizer_of(open_checkpoint(path).vocab)
    assert tokenizer is not None
    assert plain_words(tokenizer).pieces == tuple("abcdefghijklmnopqrstuvwxyz")


@pytest.mark.model
def test_words_of_the_default_model_are_one_token_each_wherever_they_stand() -> None:
    tokenizer = tokenizer_of(open_checkpoint(default_model_path()).vocab)
    assert tokenizer is not None
    words = plain_words(tokenizer)
    assert len(words.pieces) > 2000
    [session] = make_sessions(DISTINCT, words, 1, seed=(0,))
    assert len(tokenizer.encode(session.turns[0].text)) == session.turns[0].num_tokens == 256
