"""What a request means: sampling parameters, what it asks of the cache, and which form its answer must have. Owns the
mapping from fields to `base/params.py`, whose own checks follow; answers nothing.

What the prompt cache is asked, by dialect:

* `cache_salt` narrows the namespace to requests with the same salt.
* `prompt_cache_key` is accepted and changes nothing: one engine finds every prefix whatever its key.
* `prompt_cache_options` / `prompt_cache_retention`: the prompt is retained for that long; mode explicit retains it up
  to the last breakpoint, and what follows is the first to leave.
* `cache` says it range by range, or goes past the cache, or drops the text in the end.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import orjson
from pydantic import BaseModel

from pagemill.base.errors import CapacityError, ConfigError, RequestError
from pagemill.base.params import (
    DEFAULT_MAX_TOKENS,
    MAX_LOGPROBS,
    CacheOptions,
    Grammar,
    GrammarKind,
    Retain,
    SamplingParams,
)
from pagemill.base.units import parse_seconds
from pagemill.server.errors import FieldError, about, named
from pagemill.server.schema import (
    ChatBody,
    ChatMessage,
    CompletionBody,
    GenerationBody,
    NamedTool,
    ResponseFormat,
    RetainRange,
)  # fmt: skip
from pagemill.text.conversation import BREAKPOINT_KEY
from pagemill.text.tool_calls import ARGUMENTS_AT, FIRST_BODY_LINE

_LOG: Final = logging.getLogger(__name__)
_JSON_OBJECT: Final = '{"type":"object"}'
# What a type of response_format brings.
_OF_TYPE: Final = {
    "text": None,
    "json_object": "schema",
    "json_schema": "json_schema",
    "regex": "regex",
    "grammar": "grammar",
}
_BREAKPOINT: Final = {"mode": "explicit"}
RETENTION_S: Final = {"in_memory": None, "in-memory": None, "24h": 86_400.0}
# Parameters that requests call otherwise than Python does; prompts and forms have several names.
_FIELDS: Final = {"retain": "cache", "salt": "cache_salt"}
_NAMING_MAX: Final = ("max_tokens", "min_tokens")  # whose errors may name max_tokens
KEPT, LEAVES_FIRST = 80, 0  # priorities

_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,39}", re.ASCII)
_MOST_REPORTED: Final = 200
_PART_FIELDS: Final = {"type", "text", BREAKPOINT_KEY}
_FOR_TEMPLATES: Final = (("messages",), ("tools",))

# A form of an answer: the field that asks for it, a grammar's kind, and its text, schema or list of texts.
_Form = tuple[str, GrammarKind, Any]

_TOOL_FAULT: Final = re.compile(r"the grammar cannot be used: at (\d+)\(\d+\): (?:failed to compile [^:]*: )?(.*)")

_reported: set[str] = set()


def check_fields(body: BaseModel, *, strict: bool) -> None:
    """Unknown fields, at any depth, are told once in the log; with `strict` they are refused. What is no name of a
    field may be anything, a prompt too: that there was one is told, and not which."""
    for place, name in _unknown_fields(body):
        path = ".".join((*place, name))
        if strict:
            raise FieldError(f"unknown field {path[:100]!r}; leave it out", param=(*place, name)[0][:100])
        where = ".".join((*(each for each in place if not each.isdigit()), name))
        told = f"the unknown field {where}" if _NAME.fullmatch(name) else "a field whose name is none"
        if told not in _reported and len(_reported) < _MOST_REPORTED:
            _reported.add(told)
            reads = "which the chat template alone may read" if place[:1] in _FOR_TEMPLATES else "which is ignored"
            _LOG.warning("requests bring %s, %s", told, reads)


def _unknown_fields(part: BaseModel, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Where they are, and their names."""
    for name in sorted(part.model_extra or ()):
        yield place, name
    for name, value in part.__dict__.items():
        if isinstance(value, BaseModel):
            yield from _unknown_fields(value, (*place, name))
        elif isinstance(value, list) and value and isinstance(value[0], BaseModel):
            for index, each in enumerate(value):
                yield from _unknown_fields(each, (*place, name, str(index)))
        elif name == "content" and isinstance(value, list):
            for index, each in enumerate(value):
                if isinstance(each, dict) and each.get("type") == "text":
                    for key in sorted(each.keys() - _PART_FIELDS):
                        yield (*place, name, str(index)), key


def sampling_of(body: GenerationBody, *, max_tokens: int | None, logprobs: int | None, priority: int) -> SamplingParams:
    """The sampling parameters of a request. Raises RequestError for values out of range."""
    given = {
        "n": body.n,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "min_p": body.min_p,
        "min_tokens": body.min_tokens,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "repetition_penalty": body.repetition_penalty,
    }
    return SamplingParams(
        **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]
        seed=None if body.seed is None else body.seed % 2**64,
        max_tokens=max_tokens,
        stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=body.ignore_eos,
        logprobs=logprobs,
        include_stop_str_in_output=body.include_stop_str_in_output,
        skip_special_tokens=body.skip_special_tokens,
        logit_bias=_biases(body.logit_bias),
        prompt_logprobs=body.prompt_logprobs,
        grammar=grammar_of(body),
        priority=priority,
        deadline_s=body.deadline_s,
    )


def completion_sampling(body: CompletionBody, priority: int) -> SamplingParams:
    """Of a completion. An echo with logprobs asks for those of the prompt too."""
    if body.suffix:
        raise FieldError("suffix is not supported: this model goes on from a prompt; leave it out", param="suffix")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise FieldError("best_of is not supported beyond n; leave it out", param="best_of")
    if body.echo and body.logprobs is not None and body.prompt_logprobs is None:
        body = body.model_copy(update={"prompt_logprobs": body.logprobs})
    max_tokens = body.max_tokens if "max_tokens" in body.model_fields_set else DEFAULT_MAX_TOKENS
    if body.echo and max_tokens == 0:  # a token is generated all the same, and left out of the answer
        max_tokens = 1
    return sampling_of(body, max_tokens=max_tokens, logprobs=body.logprobs, priority=priority)


def chat_sampling(body: ChatBody, priority: int) -> SamplingParams:
    """Of a chat completion."""
    if body.top_logprobs is not None and not body.logprobs:
        raise FieldError("top_logprobs needs logprobs to be true; set it", param="top_logprobs")
    if body.top_logprobs is not None and not 0 <= body.top_logprobs <= MAX_LOGPROBS:
        raise FieldError(f"top_logprobs is {body.top_logprobs}; give 0 to {MAX_LOGPROBS}", param="top_logprobs")
    max_tokens = body.max_tokens
    if body.max_completion_tokens is not None:
        max_tokens = body.max_completion_tokens
        if max_tokens < 1:
            raise FieldError(
                f"max_completion_tokens is {max_tokens}; give at least 1, or leave it out for no limit",
                param="max_completion_tokens",
            )
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    try:
        return sampling_of(body, max_tokens=max_tokens, logprobs=logprobs, priority=priority)
    except RequestError as error:
        raise _renamed_max(error, body) from None


def _renamed_max(error: RequestError | CapacityError, body: ChatBody) -> RequestError | CapacityError:
    """The error in the words of max_completion_tokens, where that was given instead of max_tokens and may be named."""
    if error.param not in _NAMING_MAX or body.max_completion_tokens is None:
        return error
    wanted = "max_completion_tokens"
    param = wanted if error.param == "max_tokens" else error.param
    return FieldError(str(error).replace("max_tokens", wanted), param=param)


def check_biases(params: SamplingParams, facts: Mapping[str, Any]) -> None:
    """Raise FieldError for a bias of an id beyond the model's vocabulary. facts: of the loaded model."""
    size = facts["vocab_size"]
    wrong = next((token for token, _ in params.logit_bias if token >= size), None)
    if wrong is not None:
        raise FieldError(f"logit_bias names token {wrong}; give ids from 0 to {size - 1:,}", param="logit_bias")


def check_breakpoints(messages: Sequence[ChatMessage]) -> None:
    """Raise FieldError for a content part whose `prompt_cache_breakpoint` is neither OpenAI's object nor null."""
    for index, message in enumerate(messages):
        for place, part in enumerate(message.content if isinstance(message.content, list) else ()):
            given = part.get(BREAKPOINT_KEY) if isinstance(part, Mapping) else None
            if given is not None and given != _BREAKPOINT:
                raise FieldError(
                    f"messages.{index}.content.{place}.{BREAKPOINT_KEY} is not known; give {_dumped(_BREAKPOINT)}, or "
                    "leave it out",
                    param="messages",
                )


def grammar_of(body: GenerationBody) -> Grammar | None:
    """The form that the answer must have. Raises FieldError where two are asked for, or one is not said or empty."""
    forms = _forms_of(body)
    if len(forms) > 1:
        fields = {field for field, _, _ in forms}
        raise FieldError(
            "several forms are asked of one answer; give one of response_format and structured_outputs",
            param=fields.pop() if len(fields) == 1 else None,
        )
    for field, kind, given in forms:
        with about(field):
            return Grammar(kind, _text_of(given))
    return None


def fault_of(error: Exception, body: GenerationBody) -> Exception:
    """An error of the engine as that of the field that it is about, where the engine calls it otherwise. A form that
    nothing can fit, and that is found out while the answer is made, is a wrong value as well."""
    if not isinstance(error, RequestError | CapacityError):
        return error
    if error.param == "prompt":
        return named(error, "messages" if isinstance(body, ChatBody) else "prompt")
    if isinstance(body, ChatBody) and isinstance(renamed := _renamed_max(error, body), FieldError):
        return renamed
    if error.param != "grammar":
        return named(error, _FIELDS.get(error.param or "", error.param))
    forms = _forms_of(body)
    if forms:
        return FieldError(str(error), param=forms[0][0])
    return FieldError(_fault_of_tools(str(error), body), param="tools")  # a call is demanded, in a form that they give


def _fault_of_tools(message: str, body: GenerationBody) -> str:
    """What is wrong of the grammar that is made of tools, without telling that grammar."""
    found = _TOOL_FAULT.match(message)
    if found is None or not isinstance(body, ChatBody):
        why = message.partition(": ")[2].partition("\n")[0]
        return f"tools: no call can be made that fits the functions' parameters: {why}"
    wanted = body.tool_choice.function.name if isinstance(body.tool_choice, NamedTool) else None
    demanded = [
        (index, each.function.name)
        for index, each in enumerate(body.tools or ())
        if wanted in (None, each.function.name)
    ]
    index, name = demanded[int(found[1]) - FIRST_BODY_LINE]
    fault = found[2].replace(ARGUMENTS_AT[1:], "")
    return f"tools.{index}.function.parameters of {name[:60]!r} cannot be used: {fault[:300]}; mend this schema"


def _forms_of(body: GenerationBody) -> list[_Form]:
    own, field = body.structured_outputs, "structured_outputs"
    forms: list[_Form] = [
        ("guided_json", "json_schema", body.guided_json),
        ("guided_regex", "regex", body.guided_regex),
        ("guided_choice", "lark", body.guided_choice),
        ("guided_grammar", "lark", body.guided_grammar),
    ]
    if own is not None:
        asked: list[_Form] = [
            (field, "json_schema", _JSON_OBJECT if own.json_object else None),
            (field, "json_schema", own.json_),
            (field, "regex", own.regex),
            (field, "lark", own.choice),
            (field, "lark", own.grammar),
        ]
        if all(each[2] is None for each in asked):
            raise FieldError(f"{field} names no form; give json, regex, choice, grammar or json_object", param=field)
        forms += asked
    given = [] if body.response_format is None else _of_format(body.response_format)
    return given + [each for each in forms if each[2] is not None]


def _of_format(wanted: ResponseFormat) -> list[_Form]:
    field = "response_format"
    own = _OF_TYPE[wanted.type]
    for name in ("json_schema", "schema", "regex", "grammar"):
        if name != own and getattr(wanted, "schema_" if name == "schema" else name) is not None:
            remedy = "give the type that you mean" if own is None else f"it takes {own}"
            raise FieldError(f"response_format is of type {wanted.type} and brings {name}; {remedy}", param=field)
    if wanted.type == "text":
        return []
    if wanted.type == "json_object":
        return [(field, "json_schema", _JSON_OBJECT if wanted.schema_ is None else wanted.schema_)]
    if wanted.type == "json_schema":
        if wanted.json_schema is None or wanted.json_schema.schema_ is None:
            raise FieldError("response_format json_schema needs json_schema.schema", param=field)
        return [(field, "json_schema", wanted.json_schema.schema_)]
    text = wanted.regex if wanted.type == "regex" else wanted.grammar
    if not text:
        raise FieldError(f"response_format {wanted.type} needs the field {wanted.type!r}", param=field)
    return [(field, "regex" if wanted.type == "regex" else "lark", text)]


def _text_of(given: Any) -> str:
    """What is given as text: a schema as JSON, a list of texts as a grammar of these and no other."""
    if isinstance(given, list):
        if not given:
            raise RequestError("there is no text to choose; give at least one")
        return "start: " + " | ".join(map(_dumped, given))
    return given if isinstance(given, str) else _dumped(given)


def cache_of(
    body: GenerationBody, tenant: str, num_prompt_tokens: int, breakpoints: tuple[int, ...] = ()
) -> CacheOptions:
    """What the request asks of the prefix cache, for a prompt of so many tokens. Raises RequestError for ranges outside
    it and for times that are none."""
    own = body.cache
    retain = [_retained(each, num_prompt_tokens) for each in (own.retain if own is not None else ())]
    options = body.prompt_cache_options
    ttl_s = RETENTION_S[body.prompt_cache_retention] if body.prompt_cache_retention else None
    if options is not None and options.ttl is not None:
        ttl_s = _seconds(options.ttl, "prompt_cache_options.ttl")
    explicit = options is not None and options.mode == "explicit"
    end = num_prompt_tokens
    if breakpoints:
        end = breakpoints[-1]
    elif explicit:
        end = 0
    if not retain and (ttl_s is not None or explicit or breakpoints):
        with about("prompt_cache_options"):
            retain += [Retain(0, end, KEPT, ttl_s)] if end else []
        if explicit and end < num_prompt_tokens:
            retain.append(Retain(end, num_prompt_tokens, LEAVES_FIRST))
    bypass = own is not None and own.bypass
    return CacheOptions(tenant=tenant, salt=body.cache_salt, bypass=bypass, retain=tuple(retain))


def _retained(each: RetainRange, num_prompt_tokens: int) -> Retain:
    ttl_s = None if each.ttl is None else _seconds(each.ttl, "cache.retain.ttl")
    end = num_prompt_tokens if each.to is None else each.to
    with about("cache"):
        return Retain(each.start, end, each.priority, ttl_s)


def _seconds(value: str | float, param: str) -> float:
    try:
        return parse_seconds(value)
    except ConfigError as error:
        raise FieldError(f"{param}: {error}", param=param) from None


def _biases(given: dict[str, float] | None) -> tuple[tuple[int, float], ...]:
    try:
        return tuple((int(token), value) for token, value in (given or {}).items())
    except ValueError:
        raise FieldError("logit_bias names something that is no token id; give ids", param="logit_bias") from None


def _dumped(value: Any) -> str:
    try:
        return orjson.dumps(value).decode()
    except (orjson.JSONEncodeError, RecursionError) as error:
        raise RequestError(f"a schema cannot be read: {error}") from None
