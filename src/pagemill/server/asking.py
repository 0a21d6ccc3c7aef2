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
from collections.abc import Mapping, Sequence
from typing import Any, Final

import orjson

from pagemill.base.errors import ConfigError
from pagemill.base.params import CacheOptions, Grammar, Retain, SamplingParams
from pagemill.base.units import parse_seconds
from pagemill.server.errors import FieldError
from pagemill.server.schema import ChatBody, ChatMessage, CompletionBody, GenerationBody, RetainRange
from pagemill.text.conversation import BREAKPOINT_KEY

_LOG: Final = logging.getLogger(__name__)
_JSON_OBJECT: Final = '{"type":"object"}'
_BREAKPOINT: Final = {"mode": "explicit"}
RETENTION_S: Final = {"in_memory": None, "in-memory": None, "24h": 86_400.0}
KEPT, LEAVES_FIRST = 80, 0  # priorities

_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,39}", re.ASCII)
_MOST_REPORTED: Final = 200

_reported: set[str] = set()


def check_fields(body: Any, *, strict: bool) -> None:
    """Unknown fields are told once in the log; with `strict` they are refused. What is no name of a field may be
    anything, a prompt too: that there was one is told, and not which."""
    unknown = sorted(body.model_extra or ())
    if not unknown:
        return
    if strict:
        raise FieldError(f"unknown field {unknown[0][:100]!r}; leave it out", param=unknown[0][:100])
    for name in unknown:
        told = f"the unknown field {name}" if _NAME.fullmatch(name) else "a field whose name is none"
        if told not in _reported and len(_reported) < _MOST_REPORTED:
            _reported.add(told)
            _LOG.warning("requests bring %s, which is ignored", told)


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
    max_tokens = body.max_tokens
    if body.echo and max_tokens == 0:  # a token is generated all the same, and left out of the answer
        max_tokens = 1
    return sampling_of(body, max_tokens=max_tokens, logprobs=body.logprobs, priority=priority)


def chat_sampling(body: ChatBody, priority: int) -> SamplingParams:
    """Of a chat completion."""
    if body.top_logprobs is not None and not body.logprobs:
        raise FieldError("top_logprobs needs logprobs to be true; set it", param="top_logprobs")
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return sampling_of(body, max_tokens=max_tokens, logprobs=logprobs, priority=priority)


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
    """The form that the answer must have. Raises FieldError where two are asked for, or one is not said."""
    found = [each for each in (_of_format(body), *_of_structured(body)) if each is not None]
    if len(found) > 1:
        raise FieldError("several forms are asked of one answer; give one of response_format and structured_outputs")
    return found[0] if found else None


def _of_format(body: GenerationBody) -> Grammar | None:
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return Grammar("json_schema", _JSON_OBJECT)
    if wanted.type == "json_schema":
        if wanted.json_schema is None or wanted.json_schema.schema_ is None:
            raise FieldError("response_format json_schema needs json_schema.schema", param="response_format")
        return Grammar("json_schema", _dumped(wanted.json_schema.schema_))
    text = wanted.regex if wanted.type == "regex" else wanted.grammar
    if not text:
        raise FieldError(f"response_format {wanted.type} needs the field {wanted.type!r}", param="response_format")
    return Grammar("regex" if wanted.type == "regex" else "lark", text)


def _of_structured(body: GenerationBody) -> list[Grammar | None]:
    own = body.structured_outputs
    every = [(body.guided_json, body.guided_regex, body.guided_choice, body.guided_grammar)]
    found: list[Grammar | None] = []
    if own is not None:
        every.append((own.json_, own.regex, own.choice, own.grammar))
        found.append(Grammar("json_schema", _JSON_OBJECT) if own.json_object else None)
    for schema, regex, choice, grammar in every:
        if schema is not None:
            found.append(Grammar("json_schema", schema if isinstance(schema, str) else _dumped(schema)))
        if regex is not None:
            found.append(Grammar("regex", regex))
        if choice:
            found.append(Grammar("lark", "start: " + " | ".join(_dumped(each) for each in choice)))
        if grammar is not None:
            found.append(Grammar("lark", grammar))
    return found


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
        retain += [Retain(0, end, KEPT, ttl_s)] if end else []
        if explicit and end < num_prompt_tokens:
            retain.append(Retain(end, num_prompt_tokens, LEAVES_FIRST))
    bypass = own is not None and own.bypass
    return CacheOptions(tenant=tenant, salt=body.cache_salt, bypass=bypass, retain=tuple(retain))


def _retained(each: RetainRange, num_prompt_tokens: int) -> Retain:
    ttl_s = None if each.ttl is None else _seconds(each.ttl, "cache.retain.ttl")
    return Retain(each.start, num_prompt_tokens if each.to is None else each.to, each.priority, ttl_s)


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
        raise FieldError(f"a schema cannot be read: {error}", param="response_format") from None
