"""Text, stops, logprobs and reasons to finish, token by token."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagemill.base.params import SamplingParams
from pagemill.base.step import Sample, TokenLogprob
from pagemill.engine.output import Delta, Output
from pagemill.engine.request import Marks, Request, Sequence
from tests.fixtures.fake_executor import decode_bytes

EOS = 300


def sequence(params: SamplingParams, max_tokens: int) -> Sequence:
    own = () if params.ignore_eos else (EOS,)
    prompt = array("i", [1, 2, 3])
    request = Request("r", prompt, params, 0, max_tokens, (*own, *params.stop_token_ids), arrival_s=1.0)
    return Sequence(1, request, 0, array("i", prompt), Marks(1.0, scheduled_s=2.0))


def push(tokens: Iterable[int], max_tokens: int = 100, **params: object) -> list[Delta]:
    """Deltas of tokens pushed one by one until one of them ends the choice."""
    output = Output(decode_bytes)
    choice = sequence(SamplingParams(**params), max_tokens)  # type: ignore[arg-type]
    output.open(choice)
    deltas: list[Delta] = []
    for step, token in enumerate(tokens):
        deltas.append(output.delta(choice, Sample(1, token), choice.num_generated + 1, 3.0 + step))
        if deltas[-1].finished:
            break
    return deltas


def text(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def test_each_token_is_a_delta_with_its_text() -> None:
    deltas = push(b"abc")
    assert [delta.text for delta in deltas] == ["a", "b", "c"]
    assert [delta.token_ids for delta in deltas] == [(97,), (98,), (99,)]
    assert not any(delta.finished for delta in deltas)


def test_character_cut_by_tokens_is_never_shown_in_part() -> None:
    assert [delta.text for delta in push("é€😀".encode())] == ["", "é", "", "", "€", "", "", "", "😀"]


def test_unfinished_character_is_replaced_at_the_end_only() -> None:
    deltas = push(b"a\xf0\x9f\x98", max_tokens=4)
    assert [delta.text for delta in deltas] == ["a", "", "", "\ufffd"]
    assert deltas[-1].finish_reason == "length"


def test_end_of_text_stops_without_a_text_of_its_own() -> None:
    deltas = push([*b"hi", EOS, *b"more"], skip_special_tokens=False)
    assert text(deltas) == "hi"
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", None)
    assert deltas[-1].token_ids == (EOS,)


def test_ignored_end_of_text_does_not_stop() -> None:
    deltas = push([*b"hi", EOS, *b"m"], max_tokens=4, ignore_eos=True)
    assert text(deltas) == "him"
    assert deltas[-1].finish_reason == "length"


def test_stop_id_of_the_request_is_the_reason() -> None:
    deltas = push(b"hi!more", stop_token_ids=(ord("!"),))
    assert text(deltas) == "hi"
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", ord("!"))


def test_stop_id_is_shown_where_stops_are_included() -> None:
    deltas = push(b"hi!more", stop_token_ids=(ord("!"),), include_stop_str_in_output=True)
    assert text(deltas) == "hi!"


def test_stop_string_across_tokens_is_cut_and_never_shown() -> None:
    deltas = push(b"one END two", stop=("END",))
    assert text(deltas) == "one "
    assert [delta.text for delta in deltas] == ["o", "n", "e", " ", "", "", ""]
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", "END")
    assert len(deltas) == 7


def test_included_stop_string_ends_the_text() -> None:
    assert text(push(b"one END two", stop=("END",), include_stop_str_in_output=True)) == "one END"


def test_held_back_text_comes_when_it_is_no_stop() -> None:
    deltas = push(b"ENTER", stop=("END",))
    assert [delta.text for delta in deltas] == ["", "", "ENT", "", "ER"]


@pytest.mark.parametrize("include", [False, True])
def test_held_back_text_precedes_the_end_whatever_ends_it(include: bool) -> None:
    by_length = push(b"abEN", max_tokens=4, stop=("END",))
    assert text(by_length) == "abEN"
    assert by_length[-1].finish_reason == "length"
    by_id = push(b"abEN!", stop=("END",), stop_token_ids=(ord("!"),), include_stop_str_in_output=include)
    assert text(by_id) == ("abEN!" if include else "abEN")
    assert by_id[-1].stop_reason == ord("!")


def test_stop_string_on_the_last_token_is_a_stop_and_no_length() -> None:
    deltas = push(b"abEND", max_tokens=5, stop=("END",))
    assert (text(deltas), deltas[-1].finish_reason) == ("ab", "stop")


def test_stop_string_before_min_tokens_does_not_stop() -> None:
    deltas = push(b"a.b.c.", stop=(".",), min_tokens=5, max_tokens=50)
    assert text(deltas) == "a.b.c"
    assert len(deltas) == 6


def test_marks_tell_the_first_token_and_the_end() -> None:
    deltas = push(b"abc", max_tokens=3)
    assert deltas[0].marks == Marks(1.0, 2.0, 3.0, None)
    assert deltas[1].marks == Marks(1.0, 2.0, 3.0, None)
    assert deltas[2].marks == Marks(1.0, 2.0, 3.0, 5.0)


def test_logprobs_come_only_where_asked_for() -> None:
    logprob = TokenLogprob(97, -0.25, 1)
    for params, expected in ((SamplingParams(logprobs=1), 1), (SamplingParams(logprobs=0), 1), (SamplingParams(), 0)):
        output = Output(decode_bytes)
        choice = sequence(params, 10)
        output.open(choice)
        delta = output.delta(choice, Sample(1, 97, logprob, (logprob,)), 1, 3.0)
        assert len(delta.logprobs) == expected
        assert all(entry.sampled == logprob for entry in delta.logprobs)


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=40), stops=st.lists(st.text("ab€", min_size=1, max_size=3), max_size=3))
def test_deltas_join_to_the_text_that_a_slow_reader_sees(data: bytes, stops: list[str]) -> None:
    deltas = push(data, max_tokens=max(1, len(data)), stop=tuple(stops))
    whole = data.decode("utf-8", "replace")
    ends = [(whole.find(stop) + len(stop), whole.find(stop)) for stop in stops if stop in whole]
    expected = whole[: min(ends)[1]] if ends else whole
    assert text(deltas) == expected
    if data:
        assert deltas[-1].finish_reason == ("stop" if ends else "length")
