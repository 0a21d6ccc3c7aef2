"""Prompts as callers write them, checked, and the answers as they grow. Owns shapes and messages, runs nothing."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pagemill.base.errors import CapacityError, PagemillError, RequestError
from pagemill.base.params import DEFAULT_CACHE_OPTIONS, CacheOptions, SamplingParams
from pagemill.base.step import TokenLogprob
from pagemill.engine.output import Delta

Prompt = str | Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt that has been read and checked, with its parameters. options: what it asks of the prefix cache."""

    text: str | None
    token_ids: list[int]
    params: SamplingParams
    options: CacheOptions = DEFAULT_CACHE_OPTIONS


@dataclass(slots=True)
class Choice:
    """Deltas of one choice put together. Mutated by `add`."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[tuple[TokenLogprob, ...]] = field(default_factory=list)
    last: Delta | None = None

    def add(self, delta: Delta) -> None:
        self.text.append(delta.text)
        self.token_ids += delta.token_ids
        self.logprobs += [(each.sampled, *each.top) for each in delta.logprobs]
        self.last = delta


class Answer:
    """The choices of one question as they grow. Mutated by `add`. num_open: choices that have not finished."""

    __slots__ = ("choices", "num_open", "question")

    def __init__(self, question: Question) -> None:
        self.question = question
        self.choices = [Choice() for _ in range(question.params.n)]
        self.num_open = question.params.n

    def add(self, delta: Delta) -> None:
        self.choices[delta.choice].add(delta)
        self.num_open -= delta.finished


def listed(prompts: object) -> Sequence[Any]:
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes):
        raise RequestError(f"prompts is a {type(prompts).__name__}; give a text, a dict or a list of these")
    return prompts


def params_of(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> Sequence[SamplingParams]:
    if params is None:
        return [SamplingParams()] * count
    if isinstance(params, SamplingParams):
        return [params] * count
    if not isinstance(params, Sequence) or not all(isinstance(each, SamplingParams) for each in params):
        raise RequestError(f"params is {type(params).__name__}; give SamplingParams, or a list of them")
    if len(params) != count:
        raise RequestError(f"{len(params)} sampling parameters for {count} prompts; give one, or one for each prompt")
    return params


def at_index(index: int, error: PagemillError) -> PagemillError:
    """The same error, saying which prompt of several it is about."""
    message = f"prompt {index}: {error}"
    if isinstance(error, RequestError):
        return RequestError(message, status=error.status)
    if isinstance(error, CapacityError):
        return CapacityError(message, retry_after_s=error.retry_after_s)
    return type(error)(message)


def draw_line(num_finished: int, num_requests: int, num_tokens: int) -> None:
    end = "\n" if num_finished == num_requests else ""
    sys.stderr.write(f"\r{num_finished}/{num_requests} requests, {num_tokens:,} tokens{end}")
    sys.stderr.flush()


def cache_options(cache: object, tenant: str | None, cache_salt: str | None) -> CacheOptions:
    """What `cache`, `tenant` and `cache_salt` of a call ask of the prefix cache. Raises RequestError where they
    contradict or are of a wrong type."""
    if isinstance(cache, CacheOptions):
        if tenant is not None or cache_salt is not None:
            raise RequestError("give tenant and cache_salt within CacheOptions, or beside cache=True, not both")
        return cache
    if not isinstance(cache, bool):
        raise RequestError(f"cache is {cache!r}; give True, False or CacheOptions")
    if cache and tenant is None and cache_salt is None:
        return DEFAULT_CACHE_OPTIONS
    name = DEFAULT_CACHE_OPTIONS.tenant if tenant is None else tenant
    return CacheOptions(tenant=name, salt=cache_salt, bypass=not cache)
