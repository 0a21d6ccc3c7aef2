"""Tools in a conversation: how a model is told of them, how it is held to call one, and its calls found in a text that
arrives in pieces. Owns these forms; JSON schemas are compiled elsewhere. Standard library only.

The form is Hermes's (also of Qwen's and SmolLM2's templates): `<tool_call>{"name": …, "arguments": {…}}</tool_call>`,
several calls one after another. A list of calls within one pair of tags is read too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

OPEN, CLOSE = "<tool_call>", "</tool_call>"
MAX_CALL_CHARS = 2**18
FIRST_BODY_LINE = 4  # of the grammar of calls: the first function's, each with a line of its own
ARGUMENTS_AT = "#/properties/arguments"  # where a function's parameters stand in the schema of a call

# Keywords of a JSON schema whose values are data, and those whose keys are names.
_DATA = frozenset({"const", "enum", "default", "examples"})
_NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})

_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\S)')
_PREAMBLE = """You can call functions. Their signatures are within <tools></tools>:
<tools>
{tools}
</tools>
To call one, answer with a JSON object with its name and arguments within <tool_call></tool_call>:
<tool_call>
{{"name": "…", "arguments": {{…}}}}
</tool_call>"""


@dataclass(frozen=True, slots=True)
class CallPiece:
    """A piece of what was found. kind text: to be shown; name: call `index` begins, to the function `text`; arguments:
    the next piece of its arguments, JSON as the model wrote it."""

    kind: Literal["text", "name", "arguments"]
    text: str
    index: int = 0


class ToolCallParser:
    """Finds calls in one choice's text. Mutated by `push` and `finish`. num_calls: found so far.

    Arguments are handed on as they come where the name stands first, as models are taught to write it; otherwise with
    the end of the call. What looked like a call and is none is text.
    """

    def __init__(self) -> None:
        self.num_calls = 0
        self._inside = False
        self._held = ""  # outside: what may begin a tag; inside: the call so far
        self._arguments_at = -1  # inside: where the arguments begin, -1 before
        self._given = 0  # inside: arguments handed on so far end here
        self._scanner: _ValueScanner | None = None

    def push(self, text: str) -> list[CallPiece]:
        """What has become certain with more text."""
        self._held += text
        found: list[CallPiece] = []
        while True:
            before = (self._inside, len(self._held))
            if self._inside:
                self._read_call(found)
            else:
                self._read_text(found)
            if not self._held or (self._inside, len(self._held)) == before:
                return found

    def finish(self) -> list[CallPiece]:
        """The text has ended: a call without its closing tag counts if it is whole."""
        held, self._held = self._held, ""
        if not self._inside:
            return [CallPiece("text", held)] if held else []
        self._inside = False
        if self._scanner is not None:
            rest = self._scanner.take(held[self._given :])
            return [CallPiece("arguments", rest, self.num_calls - 1)] if rest else []
        return self._whole(held) or [CallPiece("text", OPEN + held)]

    def _read_text(self, found: list[CallPiece]) -> None:
        at = self._held.find(OPEN)
        if at >= 0:
            shown, self._held = self._held[:at], self._held[at + len(OPEN) :]
            self._inside, self._scanner, self._arguments_at, self._given = True, None, -1, 0
        else:
            keep = next((n for n in range(len(OPEN) - 1, 0, -1) if self._held.endswith(OPEN[:n])), 0)
            cut = len(self._held) - keep
            shown, self._held = self._held[:cut], self._held[cut:]
        if shown and not (self.num_calls and not shown.strip()):  # between calls there is only white space
            found.append(CallPiece("text", shown))

    def _read_call(self, found: list[CallPiece]) -> None:
        if self._scanner is None:
            head = _HEAD.match(self._held)
            name = None if head is None else _name(head[1])
            if head is not None and name is not None:
                self._scanner, self._given = _ValueScanner(), head.end()
                found.append(CallPiece("name", name, self.num_calls))
                self.num_calls += 1
        if self._scanner is not None:
            piece = self._scanner.take(self._held[self._given :])
            self._given += len(piece)
            if piece:
                found.append(CallPiece("arguments", piece, self.num_calls - 1))
            if not self._scanner.ended:
                self._held, self._given = self._held[self._given :], 0
                return
        end = self._held.find(CLOSE, self._given)
        if end < 0:
            if len(self._held) > MAX_CALL_CHARS:
                self._leave(len(self._held), found)
            return
        self._leave(end, found)
        self._held = self._held[len(CLOSE) :]

    def _leave(self, end: int, found: list[CallPiece]) -> None:
        """Out of a call whose text ends at `end`."""
        call, self._held = self._held[:end], self._held[end:]
        if self._scanner is None:
            found += self._whole(call) or [CallPiece("text", OPEN + call + CLOSE)]
        self._inside, self._scanner = False, None

    def _whole(self, text: str) -> list[CallPiece]:
        """A call, or a list of calls, that is there in whole; nothing where it is none."""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return []
        calls = value if isinstance(value, list) else [value]
        found: list[CallPiece] = []
        for each in calls:
            if not isinstance(each, dict) or not isinstance(each.get("name"), str):
                return []
            arguments = each.get("arguments", each.get("parameters", {}))
            found.append(CallPiece("name", each["name"], self.num_calls + len(found) // 2))
            written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            found.append(CallPiece("arguments", written, found[-1].index))
        self.num_calls += len(calls)
        return found


class _ValueScanner:
    """Finds where a JSON value ends. Mutated by `take`."""

    def __init__(self) -> None:
        self.ended = False
        self._depth = 0
        self._in_text = False
        self._escaped = False
        self._began = False

    def take(self, text: str) -> str:
        """The beginning of `text` that belongs to the value."""
        if self.ended:
            return ""
        for index, character in enumerate(text):
            if self._in_text:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._in_text = False
                    self.ended = not self._depth
            elif character == '"':
                self._in_text = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth < 0:  # a number or word ended with the object around it
                    self.ended = True
                    return text[:index]
                self.ended = not self._depth
            elif not self._depth and self._began and (character == "," or character.isspace()):
                self.ended = True
                return text[:index]
            self._began = True
            if self.ended:
                return text[: index + 1]
        return text


def describe_tools(tools: Sequence[Mapping[str, Any]]) -> str:
    """What a model is told of tools whose template has no place for them."""
    return _PREAMBLE.format(tools="\n".join(json.dumps(each, ensure_ascii=False) for each in tools))


def calls_grammar(functions: Sequence[Mapping[str, Any]], *, several: bool) -> str:
    """The Lark grammar (llguidance's dialect) of one call, or of several, to one of the functions
    ({"name", "parameters"})."""
    lines = ["start: call" + (' ("\\n" call)*' if several else ""), f'call: "{OPEN}\\n" body "\\n{CLOSE}"']
    lines.append("body: " + " | ".join(f"body{index}" for index in range(len(functions))))
    for index, each in enumerate(functions):
        schema = {
            "type": "object",
            "properties": {
                "name": {"const": each["name"]},
                "arguments": _placed(each.get("parameters") or {"type": "object"}, ARGUMENTS_AT),
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
            "x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "},
        }
        lines.append(f"body{index}: %json {json.dumps(schema, ensure_ascii=False)}")
    return "\n".join(lines)


def _placed(schema: Any, at: str, *, names: bool = False) -> Any:
    """A JSON schema as it reads at a place within another: its references to itself (`#/$defs/…`) begin there (RFC
    6901). Anchors, what is data and no schema, and what has an `$id`, to which its references lead, stay as they are.
    names: the keys are names of the caller's, not keywords."""
    if isinstance(schema, list):
        return [_placed(each, at) for each in schema]
    if not isinstance(schema, dict) or (not names and isinstance(schema.get("$id"), str) and schema["$id"][:1] != "#"):
        return schema
    made = {}
    for key, value in schema.items():
        if names:
            made[key] = _placed(value, at)
        elif key == "$ref" and isinstance(value, str) and (value == "#" or value.startswith("#/")):
            made[key] = at + value[1:]
        else:
            made[key] = value if key in _DATA else _placed(value, at, names=key in _NAMED)
    return made


def as_text(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages for a template that knows no tools: calls within the assistant's text, results as the user's."""
    made = []
    for message in messages:
        each = dict(message)
        calls = each.pop("tool_calls", None)
        if calls:
            written = "\n".join(f"{OPEN}\n{json.dumps(_function(call), ensure_ascii=False)}\n{CLOSE}" for call in calls)
            content = each.get("content") or ""
            each["content"] = [content, written] if isinstance(content, str) else [*content, written]
        if each.get("role") in ("tool", "function"):
            content = each.get("content") or ""
            parts = [content] if isinstance(content, str) else list(content)
            each = {"role": "user", "content": ["<tool_response>\n", *parts, "\n</tool_response>"]}
        made.append(each)
    return made


def with_objects(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages for a template that knows tools: arguments of calls as objects, as templates read them."""
    made = []
    for message in messages:
        each = dict(message)
        if each.get("tool_calls"):
            each["tool_calls"] = [{**call, "function": _function(call)} for call in each["tool_calls"]]
        made.append(each)
    return made


def _function(call: Any) -> dict[str, Any]:
    """Name and arguments of a call as clients send it back, whose arguments are JSON text."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        return {"name": "", "arguments": {}}
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        with suppress(ValueError, RecursionError):
            arguments = json.loads(arguments or "{}")
    return {**function, "arguments": arguments}


def _name(written: str) -> str | None:
    try:
        name = json.loads(written)
    except ValueError:
        return None
    return name if isinstance(name, str) else None
