"""How large a request may be, in every direction. Owns the numbers, their messages and the checks of a parsed body.

The checks are about size alone and come before any model work; what a field means is the schema's. Each limit has a
name in `Limits`, can be set by the operator, and is told in the error that it causes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Final

from pagemill.base.errors import ConfigError, RequestError
from pagemill.server.errors import TOO_LONG, FieldError

_CHARS_PER_TOKEN: Final = 16
_MAX_DIGITS: Final = 4300  # of a number, as Python has it
# A repetition, an escape, a class of characters (its first may be a bracket).
_ATOM: Final = re.compile(r"\{\s*\d*\s*(?:,\s*\d*\s*)?\}|\\.|\[\^?\]?(?:[^\]\\]|\\.)*+\]?", re.DOTALL | re.ASCII)
_REPEAT: Final = re.compile(r"\{\s*(\d*)\s*(?:,\s*(\d*)\s*)?\}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Limits:
    """The most of everything. Raises ConfigError for values below 1.

    max_body_bytes, max_header_bytes, max_headers, max_url_bytes: of an HTTP request. max_depth: brackets within
    brackets of its JSON. max_fields: names and elements in it. max_messages, max_parts: of a conversation, and of one
    message. max_prompts: in one request; max_choices: prompts times n. max_prompt_chars: of all prompts or messages
    together, before anything is tokenised. max_max_tokens: what max_tokens may ask for. max_stop_chars: of one stop.
    max_schema_bytes, max_schema_depth, max_regex_chars, max_regex_size, max_repeat: of what an answer must look like;
    max_regex_size is with its counted repetitions written out, max_repeat is of lengths in a schema. max_tools,
    max_tool_bytes: of tools, each. max_extra_bytes: of variables for the template, metadata and the like, each.
    header_timeout_s: until a TLS handshake is done, and then until a head has come whole. body_timeout_s: until a body
    has. write_timeout_s: until a client that reads too slowly has made room. max_connections: open at a time.
    """

    max_body_bytes: int = 8 * 2**20
    max_header_bytes: int = 32 * 2**10
    max_headers: int = 100
    max_url_bytes: int = 8 * 2**10
    max_depth: int = 64
    max_fields: int = 500_000
    max_messages: int = 2048
    max_parts: int = 256
    max_prompts: int = 256
    max_choices: int = 256
    max_n: int = 128
    max_prompt_chars: int = 4 * 2**20
    max_prompt_tokens: int = 2**20
    max_max_tokens: int = 2**20
    max_logprobs: int = 20
    max_stops: int = 16
    max_stop_chars: int = 1024
    max_logit_bias: int = 1024
    max_schema_bytes: int = 64 * 2**10
    max_schema_depth: int = 32
    max_regex_chars: int = 4096
    max_regex_size: int = 32_768
    max_repeat: int = 65_536
    max_tools: int = 128
    max_tool_bytes: int = 64 * 2**10
    max_extra_bytes: int = 16 * 2**10
    max_connections: int = 4096
    header_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    write_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            least = 0.001 if each.name.endswith("_s") else 1
            if isinstance(value, bool) or not isinstance(value, int | float) or not value >= least:
                raise ConfigError(f"{each.name} is {value!r}; give at least {least}")

    def for_model(self, max_model_len: int) -> Limits:
        """The same where prompts of a model with so long a context are the bound: a token holds rarely more than a few
        characters, so that a text of 16 times as many characters is refused without being tokenised."""
        return replace(
            self,
            max_prompt_chars=min(self.max_prompt_chars, max_model_len * _CHARS_PER_TOKEN),
            max_prompt_tokens=min(self.max_prompt_tokens, max_model_len),
        )


def check_commas(data: bytes, limits: Limits) -> None:
    """Raise RequestError for JSON text that cannot be within the limits, before it is parsed: of its commas no more
    stand in texts than half of their letters."""
    if data.count(b",") > limits.max_fields + limits.max_prompt_chars // 2:
        raise _too_many_fields(limits)


def _too_many_fields(limits: Limits) -> RequestError:
    return RequestError(f"the body holds more than {limits.max_fields:,} names and elements; send fewer")


def check_shape(body: object, limits: Limits) -> None:
    """Raise RequestError where parsed JSON is nested too deeply or holds too many names and elements."""
    level: list[Any] = [body]
    num_fields = 0
    for _ in range(limits.max_depth + 1):
        level = [each for each in level if isinstance(each, list | dict)]
        num_fields += sum(map(len, level))
        if num_fields > limits.max_fields:
            raise _too_many_fields(limits)
        if not level:
            return
        level = [part for each in level for part in (each.values() if isinstance(each, dict) else each)]
    raise RequestError(f"the body's JSON is nested more than {limits.max_depth} deep; make it flatter")


def check_request(body: Mapping[str, Any], limits: Limits) -> None:
    """Raise RequestError (400; 413 for prompts) where a field of a completion or a chat is too large, naming it.

    Fields of a wrong type pass: the schema tells.
    """
    _check_numbers(body, limits)
    _check_texts(body, limits)
    _check_format(body, limits)
    _check_tools(body, limits)
    if body.get("chat_template") is not None:
        raise _refused("chat_template", "a request may not bring a template; the operator gives one at the start")
    for name in ("chat_template_kwargs", "metadata", "cache", "prompt_cache_options", "vllm_xargs", "extra_body"):
        size = _size(body.get(name), limits.max_extra_bytes)
        _most(name, size, limits.max_extra_bytes, "bytes")


def _check_texts(body: Mapping[str, Any], limits: Limits) -> None:
    messages, num_chars = body.get("messages"), 0
    if isinstance(messages, list):
        _most("messages", len(messages), limits.max_messages, "messages")
        for index, message in enumerate(messages):
            content = message.get("content") if isinstance(message, Mapping) else None
            if isinstance(content, list):
                _most(f"messages.{index}.content", len(content), limits.max_parts, "parts")
            num_chars += sum(map(len, _strings(message)))
    prompt = body.get("prompt", body.get("input"))
    prompts = prompt if isinstance(prompt, list) else [prompt]
    if prompts and not isinstance(prompts[0], int):
        _most("prompt", len(prompts), limits.max_prompts, "prompts")
    else:
        prompts = [prompts]
    longest = 0
    for each in prompts:
        if isinstance(each, str):
            num_chars += len(each)
        elif isinstance(each, list):
            longest = max(longest, len(each))
    suffix = body.get("suffix")
    num_chars += len(suffix) if isinstance(suffix, str) else 0
    n = _number(body.get("n"))
    if n is not None and len(prompts) * n > limits.max_choices:
        told = f"{len(prompts):,} prompts with {n:.15g} choices each"
        raise _refused("n", f"{told}; give at most {limits.max_choices:,} in all (max_choices)")
    _most("n", len(prompts), limits.max_choices, "choices of all prompts together")
    many = max(1, len(prompts))
    if num_chars > limits.max_prompt_chars * many:
        raise FieldError(
            f"the prompt has {num_chars:,} characters, more than any {limits.max_prompt_chars * many:,} that fit the "
            "model; shorten it",
            param="messages" if isinstance(messages, list) else "prompt",
            status=413,
            code=TOO_LONG,
        )
    if longest > limits.max_prompt_tokens:
        raise FieldError(
            f"the prompt has {longest:,} tokens and at the most {limits.max_prompt_tokens:,} fit the model; shorten it",
            param="prompt",
            code=TOO_LONG,
        )


def _check_numbers(body: Mapping[str, Any], limits: Limits) -> None:
    for name, limit in (
        ("n", "max_n"),
        ("best_of", "max_n"),
        ("max_tokens", "max_max_tokens"),
        ("max_completion_tokens", "max_max_tokens"),
        ("min_tokens", "max_max_tokens"),
        ("logprobs", "max_logprobs"),
        ("top_logprobs", "max_logprobs"),
        ("prompt_logprobs", "max_logprobs"),
    ):
        value, most = _number(body.get(name)), getattr(limits, limit)
        if value is not None and value > most:
            told = f"{value:.15g}" if value < 10**15 else "huge"
            raise FieldError(f"{name} is {told}; give at most {most:,} ({limit})", param=name)
    stop = body.get("stop")
    stops = stop if isinstance(stop, list) else [stop]
    _most("stop", len(stops), limits.max_stops, "strings")
    for text in stops:
        if isinstance(text, str):
            _most("stop", len(text), limits.max_stop_chars, "characters in a string")
    for name, most in (("logit_bias", limits.max_logit_bias), ("stop_token_ids", limits.max_logit_bias)):
        value = body.get(name)
        if isinstance(value, list | dict):
            _most(name, len(value), most, "tokens")


def _check_format(body: Mapping[str, Any], limits: Limits) -> None:
    """Schemas, regular expressions and grammars, wherever a dialect puts them."""
    form = body.get("response_format")
    structured = body.get("structured_outputs")
    found: list[tuple[str, object]] = [
        (name, body.get(name)) for name in ("guided_json", "guided_regex", "guided_grammar", "guided_choice")
    ]
    for name, holder in (("response_format", form), ("structured_outputs", structured)):
        if isinstance(holder, Mapping):
            found += [(f"{name}.{key}", value) for key, value in holder.items()]
    for name, value in found:
        if isinstance(value, str) and "regex" in name:
            check_regex(value, limits, name)
        elif isinstance(value, str):
            _most(name, len(value), limits.max_schema_bytes, "characters")
            if name.endswith("json"):
                check_schema(_schema_of(value), limits, name)
        elif isinstance(value, Mapping | list):
            check_schema(value, limits, name)


def _schema_of(text: str) -> object:
    """A schema that comes as text; None where it is no JSON, which the compiler tells."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def check_schema(schema: object, limits: Limits, name: str = "schema") -> None:
    """Raise RequestError where a JSON schema is too large, too deep, or counts too far."""
    _most(name, _size(schema, limits.max_schema_bytes), limits.max_schema_bytes, "bytes")
    level = [schema]
    for _ in range(limits.max_schema_depth + 1):
        below: list[Any] = []
        for each in level:
            if isinstance(each, Mapping):
                _check_counts(each, limits, name)
                below += each.values()
            elif isinstance(each, list):
                below += each
        level = [each for each in below if isinstance(each, Mapping | list)]
        if not level:
            return
    said = f"{name} is nested more than {limits.max_schema_depth} deep; make it flatter"
    raise FieldError(said, param=_first_of(name))


def _check_counts(schema: Mapping[str, Any], limits: Limits, name: str) -> None:
    for key in ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"):
        value = schema.get(key)
        if isinstance(value, int | float) and value > limits.max_repeat:
            raise _refused(name, f"{key} is above {limits.max_repeat:,}; give less, or leave it out")
    pattern, named = schema.get("pattern"), schema.get("patternProperties")
    if isinstance(pattern, str):
        check_regex(pattern, limits, f"{name}: pattern")
    for each in named if isinstance(named, Mapping) else ():
        check_regex(each, limits, f"{name}: patternProperties")


def check_regex(pattern: str, limits: Limits, name: str = "regex") -> None:
    """Raise RequestError where a regular expression is too long, as it is or with its repetitions written out."""
    _most(name, len(pattern), limits.max_regex_chars, "characters")
    groups, atom, at = [0], 0, 0  # atoms of each open group; those of the last one
    while at < len(pattern):
        piece = _ATOM.match(pattern, at)
        at = at + 1 if piece is None else piece.end()
        text = pattern[at - 1] if piece is None else piece[0]
        if text == "(":
            groups.append(0)
            atom = 0
        elif text == ")" and len(groups) > 1:
            atom = groups.pop()
            groups[-1] += atom
        elif (counts := _counts(text)) is not None:
            groups[-1] += atom * (max(counts, 1) - 1)
            atom *= max(counts, 1)
        elif text not in "*+?|":
            atom = 1
            groups[-1] += 1
        if sum(groups) > limits.max_regex_size:
            raise _refused(
                name,
                f"with its repetitions {{m,n}} written out it has more than {limits.max_regex_size:,} characters; "
                "count less, or use * and +",
            )


def _counts(text: str) -> int | None:
    """The larger number of a repetition {m,n}; None for anything else."""
    match = _REPEAT.fullmatch(text)
    numbers = [each for each in match.groups() if each] if match is not None else []
    return max(int(each[:9]) for each in numbers) if numbers else None


def _check_tools(body: Mapping[str, Any], limits: Limits) -> None:
    for name in ("tools", "functions"):
        tools = body.get(name)
        if not isinstance(tools, list):
            continue
        _most(name, len(tools), limits.max_tools, "tools")
        for index, tool in enumerate(tools):
            _most(f"{name}.{index}", _size(tool, limits.max_tool_bytes), limits.max_tool_bytes, "bytes")
            check_schema(tool, limits, f"{name}.{index}")


def _number(value: object) -> float | None:
    """A number in each form that the schema takes for one, texts included; None for anything else."""
    if isinstance(value, str) and len(value) > _MAX_DIGITS:
        return math.inf
    try:
        return float(value) if isinstance(value, int | float | str) else None
    except ValueError:
        return None
    except OverflowError:
        return math.inf


def _refused(place: str, said: str) -> FieldError:
    """What is wrong in a place of the body: a field, or within one, as tools.0 or guided_json: pattern."""
    return FieldError(f"{place}: {said}", param=_first_of(place))


def _first_of(place: str) -> str:
    return place.partition(":")[0].partition(".")[0]


def _most(name: str, count: int, most: int, what: str) -> None:
    if count > most:
        raise _refused(name, f"{count:,} {what}; give at most {most:,}")


def _size(value: object, most: int) -> int:
    """About how many bytes a value has as JSON; stops counting once it is more than `most`."""
    size = 0
    stack = [value]
    while stack and size <= most:
        each = stack.pop()
        size += 2
        if isinstance(each, str):
            size += len(each)
        elif isinstance(each, Mapping):
            size += sum(len(key) + 4 for key in each)
            stack += each.values()
        elif isinstance(each, list):
            size += len(each)
            stack += each
        elif each is not None:
            size += 4
    return size if value is not None else 0


def _strings(value: object) -> Iterator[str]:
    """Every text within a message."""
    stack = [value]
    while stack:
        each = stack.pop()
        if isinstance(each, str):
            yield each
        elif isinstance(each, Mapping):
            stack += each.values()
        elif isinstance(each, list):
            stack += each
