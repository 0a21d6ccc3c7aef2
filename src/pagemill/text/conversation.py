"""From messages as clients send them to token ids, so that nothing a client wrote is read as a control token. Owns the
shapes of content, the marks that survive a template, and the places where a cache should be able to begin again; the
template itself is rendered in `chat.py`. Standard library only.

A control token spelt out in a message (`<|im_end|>`) would end the message for the model. Such a spelling is broken by
a mark before the template sees it; afterwards the rendering is cut at the control tokens that the template wrote, and
what is between them is encoded as plain text, without the marks:

    template's  | client's text, marks taken out | template's
    <|im_start|>  user\\nsay <|im_end|> to me       <|im_end|>
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from pagemill.base.errors import RequestError

# Characters that Unicode keeps for such inner use ("noncharacters").
_MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
BREAKPOINT_KEY = "prompt_cache_breakpoint"


class Vocabulary(Protocol):
    """What is asked of a tokeniser."""

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class Marked:
    """Messages whose content is text, with marks. shield: breaks control tokens, None where none is spelt out.
    breakpoint: stands where the client said that the prompt may be cut, None where it did not."""

    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] = ()
    shield: str | None = None
    breakpoint: str | None = None


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """A prompt as ids. text: its rendering. breakpoints: lengths in tokens of the beginnings that the client named."""

    token_ids: list[int]
    text: str
    breakpoints: tuple[int, ...] = field(default=())


def mark_messages(
    messages: Sequence[Mapping[str, Any]],
    special_texts: Sequence[str],
    tools: Sequence[Mapping[str, Any]] = (),
) -> Marked:
    """Messages with text for content: parts joined, no content as an empty text, breakpoints and control tokens marked.

    messages: content is a text, None, or a list of {"type": "text", "text": …}; others are refused. special_texts: of
    the vocabulary's control tokens. Raises RequestError for other shapes.
    """
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise RequestError(f"message {index} is {type(message).__name__}; give an object with role and content")
    texts = "".join(_texts_of([messages, tools]))
    free = [mark for mark in _MARKS if mark not in texts]
    if len(free) < 2:
        raise RequestError("the messages hold the noncharacters U+FDD0 to U+FDEF; leave them out")
    shield_mark, breakpoint_mark = free[:2]
    found = False
    made = []
    for index, message in enumerate(messages):
        content, has_breakpoint = _joined(index, message, breakpoint_mark)
        found = found or has_breakpoint
        made.append({**message, "content": content})
    own_tools = [dict(each) for each in tools]
    joined = _without("\0".join(_texts_of([made, own_tools])), breakpoint_mark)
    spelt = [each for each in special_texts if len(each) > 1 and each in joined]
    if spelt:
        for message in made:  # a spelling must not come together where a breakpoint is taken out
            message["content"] = message["content"].replace(breakpoint_mark, breakpoint_mark + shield_mark)
        made = [_shielded(each, spelt, shield_mark) for each in made]
        own_tools = [_shielded(each, spelt, shield_mark) for each in own_tools]
    shield = shield_mark if spelt else None
    return Marked(tuple(made), tuple(own_tools), shield, breakpoint_mark if found else None)


def encode_marked(text: str, marked: Marked, tokenizer: Vocabulary, special_texts: Mapping[str, int]) -> PromptTokens:
    """The ids of a rendering, marks taken out. special_texts: text -> id of control tokens."""
    plain = _without(text, marked.shield, marked.breakpoint)
    if marked.shield is None:
        token_ids = tokenizer.encode(plain, add_special=False)
    else:
        token_ids = _encode_shielded(_without(text, marked.breakpoint), marked.shield, tokenizer, special_texts)
    if marked.breakpoint is None:
        return PromptTokens(token_ids, plain)
    lengths = []
    begins = text.split(marked.breakpoint)
    for count in range(1, len(begins)):
        begin = "".join(begins[:count])
        if marked.shield is None:
            ids = tokenizer.encode(begin, add_special=False)
        else:
            ids = _encode_shielded(begin, marked.shield, tokenizer, special_texts)
        lengths.append(_num_alike(ids, token_ids))
    return PromptTokens(token_ids, plain, tuple(sorted({each for each in lengths if each})))


def _encode_shielded(text: str, shield: str, tokenizer: Vocabulary, special_texts: Mapping[str, int]) -> list[int]:
    """Control tokens of the template as such, all between them as plain text."""
    longest_first = sorted(special_texts, key=len, reverse=True)
    pieces = re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text)
    token_ids: list[int] = []
    for piece in pieces:
        if piece in special_texts:
            token_ids.append(special_texts[piece])
        elif piece:
            plain = piece.replace(shield, "")
            token_ids += tokenizer.encode(plain, add_special=False, parse_special=False)
    return token_ids


def _joined(index: int, message: Mapping[str, Any], breakpoint_mark: str) -> tuple[str, bool]:
    """The content as one text, and whether a breakpoint is in it."""
    if "content" not in message and not message.get("tool_calls"):
        raise RequestError(f"message {index} has no 'content'; give an object with role and content")
    content = message.get("content")
    if content is None and not message.get("tool_calls"):
        raise RequestError(f"'content' of message {index} is null; give text")
    if content is None or isinstance(content, str):
        return content or "", False
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise RequestError(f"'content' of message {index} is {type(content).__name__}; give text or a list of parts")
    pieces, found = [], False
    for part in content:
        if isinstance(part, str):
            pieces.append(part)
            continue
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part.get("text") if isinstance(part, Mapping) else None
        if kind not in ("text", "input_text", "output_text") or not isinstance(text, str):
            raise RequestError(
                f"message {index} has a content part of type {str(kind)[:40]!r}; this model reads text: give "
                '{"type": "text", "text": …}'
            )
        pieces.append(text)
        if part.get(BREAKPOINT_KEY):
            pieces.append(breakpoint_mark)
            found = True
    return "".join(pieces), found


def _texts_of(value: Any) -> list[str]:
    """Every text within, keys included."""
    found: list[str] = []
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, str):
            found.append(each)
        elif isinstance(each, Mapping):
            waiting += each.keys()
            waiting += each.values()
        elif isinstance(each, list | tuple):
            waiting += each
    return found


def _shielded(value: Any, spelt: Sequence[str], shield: str) -> Any:
    """The same with a mark behind the first character of each control token spelt out."""
    if isinstance(value, str):
        for special in spelt:
            value = value.replace(special, special[0] + shield + special[1:])
        return value
    if isinstance(value, Mapping):
        return {_shielded(key, spelt, shield): _shielded(each, spelt, shield) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_shielded(each, spelt, shield) for each in value]
    return value


def _without(text: str, *marks: str | None) -> str:
    for mark in marks:
        if mark is not None:
            text = text.replace(mark, "")
    return text


def _num_alike(ids: Sequence[int], others: Sequence[int]) -> int:
    """Length of the longest common beginning."""
    for index, (one, other) in enumerate(zip(ids, others, strict=False)):
        if one != other:
            return index
    return min(len(ids), len(others))
