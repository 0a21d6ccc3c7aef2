"""Calls found in a text that arrives in pieces: whole, cut anywhere, broken, and none at all."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagemill.text.tool_calls import ToolCallParser, as_text, calls_grammar, describe_tools, with_objects

ONE = '<tool_call>\n{"name": "f", "arguments": {"a": [1, {"b": "}\\"<"}], "c": null}}\n</tool_call>'
LISTED = '<tool_call>[{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {}}]</tool_call>'
SWAPPED = '<tool_call>{"arguments": {"x": 1}, "name": "f"}</tool_call>'


def read(text: str, cuts: list[int] | None = None) -> tuple[str, list[tuple[str, str]]]:
    """Text and calls (name, arguments) of a text that comes in pieces."""
    parser = ToolCallParser()
    places = sorted({0, len(text), *(cut for cut in cuts or () if cut < len(text))})
    pieces = []
    for begin, end in pairwise(places):
        pieces += parser.push(text[begin:end])
    pieces += parser.finish()
    shown, calls = "", list[list[str]]()
    for piece in pieces:
        if piece.kind == "text":
            shown += piece.text
        elif piece.kind == "name":
            assert piece.index == len(calls)
            calls.append([piece.text, ""])
        else:
            assert piece.index == len(calls) - 1
            calls[piece.index][1] += piece.text
    assert parser.num_calls == len(calls)
    return shown, [(name, arguments) for name, arguments in calls]


@pytest.mark.parametrize(
    ("text", "shown", "calls"),
    [
        (ONE, "", [("f", {"a": [1, {"b": '}"<'}], "c": None})]),
        (f"I will call.\n{ONE}", "I will call.\n", [("f", {"a": [1, {"b": '}"<'}], "c": None})]),
        (f"{ONE}\n{ONE}", "", [("f", {"a": [1, {"b": '}"<'}], "c": None})] * 2),
        (LISTED, "", [("f", {"x": 1}), ("g", {})]),
        (SWAPPED, "", [("f", {"x": 1})]),
        ('<tool_call>{"name": "f", "parameters": {"x": 1}}</tool_call>', "", [("f", {"x": 1})]),
        ('<tool_call>{"name": "f", "arguments": {"x": 1}}', "", [("f", {"x": 1})]),
        ('<tool_call>{"name": "f"}</tool_call>', "", [("f", {})]),
        ('<tool_call>{"name": "f", "arguments": 5}</tool_call>', "", [("f", 5)]),
        ("no calls here < at all <tool_ca", "no calls here < at all <tool_ca", []),
        ("<tool_call>not JSON</tool_call>", "<tool_call>not JSON</tool_call>", []),
        ("<tool_call>[1, 2]</tool_call>", "<tool_call>[1, 2]</tool_call>", []),
        ('<tool_call>{"name": 5}', '<tool_call>{"name": 5}', []),
        ("", "", []),
    ],
)
def test_calls_are_found_wherever_the_text_is_cut(text: str, shown: str, calls: list[tuple[str, Any]]) -> None:
    for cuts in ([], [5], list(range(len(text))), list(range(0, len(text), 3))):
        found, made = read(text, cuts)
        assert found == shown
        assert [(name, json.loads(arguments)) for name, arguments in made] == calls


@given(st.text(alphabet='<tool_ca/>{}[]":,name argumets\\x', max_size=80), st.lists(st.integers(0, 80), max_size=8))
@settings(max_examples=300, deadline=None)
def test_any_text_gives_the_same_in_any_pieces(text: str, cuts: list[int]) -> None:
    assert read(text, cuts) == read(text)


@given(st.text(max_size=60).filter(lambda text: "<" not in text), st.lists(st.integers(0, 60), max_size=8))
@settings(max_examples=100, deadline=None)
def test_a_text_without_tags_comes_through(text: str, cuts: list[int]) -> None:
    assert read(text, cuts) == (text, [])


def test_arguments_are_handed_on_while_they_are_written() -> None:
    parser = ToolCallParser()
    assert [each.kind for each in parser.push('<tool_call>{"name": "f", "arguments": {"a"')] == ["name", "arguments"]
    [piece] = parser.push(": 1")
    assert (piece.kind, piece.text) == ("arguments", ": 1")


def test_a_call_without_end_is_given_up() -> None:
    parser = ToolCallParser()
    parser.push("<tool_call>")
    shown = "".join(each.text for _ in range(30) for each in parser.push("x" * 10_000))
    assert len(shown) > 250_000


def test_tools_are_told_and_demanded_by_their_names() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}, {"type": "function", "function": {"name": "g"}}]
    assert '"name": "f"' in describe_tools(tools)
    grammar = calls_grammar([each["function"] for each in tools], several=True)  # type: ignore[misc]
    assert '{"const": "f"}' in grammar
    assert '{"const": "g"}' in grammar


def test_histories_are_written_for_templates_with_and_without_tools() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    history = [
        {"role": "assistant", "content": "So.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "done"},
    ]
    assistant, tool = as_text(history)
    assert assistant["content"] == ["So.", '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>']
    assert tool["role"] == "user"
    assert with_objects(history)[0]["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    broken = [{**history[0], "tool_calls": [{"function": {"name": "f", "arguments": "{"}}, 5]}]
    assert len(with_objects([{**broken[0], "tool_calls": [broken[0]["tool_calls"][0]]}])) == 1
    assert as_text(broken)[0]["role"] == "assistant"
