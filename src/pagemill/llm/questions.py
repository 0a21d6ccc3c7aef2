"""Prompts as callers write them, checked, and the answers as they grow. Owns shapes and messages, runs nothing."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pagemill.base.errors import CapacityError, LengthError, ModelError, PagemillError, RequestError
from pagemill.base.params import DEFAULT_CACHE_OPTIONS, CacheOptions, SamplingParams
from pagemill.base.step import PositionLogprobs
from pagemill.build import Built
from pagemill.engine.output import Delta
from pagemill.llm.outputs import CompletionOutput, Logprob, RequestOutput, Timing
from pagemill.llm.prompts import text_of
from pagemill.text.tokenizer import Tokenizer

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
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    prompt_logprobs: tuple[PositionLogprobs, ...] = ()
    last: Delta | None = None

    def add(self, delta: Delta) -> None:
        self.text.append(delta.text)
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        self.prompt_logprobs = self.prompt_logprobs or delta.prompt_logprobs
        self.last = delta

    def output(self, index: int, params: SamplingParams, tokenizer: Tokenizer | None) -> CompletionOutput:
        """The choice so far."""
        last, wanted = self.last, params.logprobs is not None
        return CompletionOutput(
            index=index,
            text="".join(self.text),
            token_ids=self.token_ids,
            logprobs=[named(each, tokenizer) for each in self.logprobs] if wanted else None,
            cumulative_logprob=sum(each.sampled.logprob for each in self.logprobs) if wanted else None,
            finish_reason=None if last is None else last.finish_reason,
            stop_reason=None if last is None else last.stop_reason,
        )


def named(position: PositionLogprobs, tokenizer: Tokenizer | None) -> dict[int, Logprob]:
    """One position by token id, with texts; the token that stands there comes first."""
    every = (position.sampled, *position.top)
    return {each.token_id: Logprob(each.logprob, each.rank, text_of(each.token_id, tokenizer)) for each in every}


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

    def output(self, request_id: str, tokenizer: Tokenizer | None) -> RequestOutput:
        """The answer so far."""
        question = self.question
        lasts = [each.last for each in self.choices if each.last is not None]
        marks = [last.marks for last in lasts]
        ended = next((last for last in lasts if last.receipt is not None), lasts[0])
        prompt = next((each.prompt_logprobs for each in self.choices if each.prompt_logprobs), ())
        return RequestOutput(
            request_id=request_id,
            prompt=question.text,
            prompt_token_ids=question.token_ids,
            outputs=[each.output(index, question.params, tokenizer) for index, each in enumerate(self.choices)],
            timing=Timing(
                arrival_s=marks[0].arrival_s,
                scheduled_s=min((m.scheduled_s for m in marks if m.scheduled_s is not None), default=None),
                first_token_s=min((m.first_token_s for m in marks if m.first_token_s is not None), default=None),
                finished_s=max((m.finished_s for m in marks if m.finished_s is not None), default=None),
            ),
            num_cached_tokens=ended.num_cached_tokens,
            receipt=ended.receipt,
            error=next((last.error for last in lasts if last.error is not None), None),
            prompt_logprobs=None
            if question.params.prompt_logprobs is None
            else [None, *(named(each, tokenizer) for each in prompt)],
        )


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
        again = LengthError if isinstance(error, LengthError) else RequestError
        return again(message, status=error.status, param=error.param)
    if isinstance(error, CapacityError):
        return CapacityError(message, retry_after_s=error.retry_after_s, param=error.param)
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


def read_prompt(built: Built, prompt: object, params: SamplingParams, options: CacheOptions) -> Question:
    """A prompt as token ids. Raises RequestError for other shapes, and ModelError for text without a vocabulary."""
    if isinstance(prompt, str):
        return Question(prompt, _tokenizer(built).encode(prompt), params, options)
    if not isinstance(prompt, Mapping):
        raise RequestError(
            f'a prompt is a {type(prompt).__name__}; give a text or {{"prompt_token_ids": [...]}} for token ids'
        )
    unknown = prompt.keys() - {"prompt", "prompt_token_ids"}
    if unknown or not prompt:
        raise RequestError(f'a prompt has the keys {sorted(prompt)}; give "prompt" or "prompt_token_ids"')
    text = prompt.get("prompt")
    if text is not None and not isinstance(text, str):
        raise RequestError(f'"prompt" is a {type(text).__name__}; give text')
    if "prompt_token_ids" not in prompt:
        return Question(text, _tokenizer(built).encode(text or ""), params, options)
    token_ids = prompt["prompt_token_ids"]
    if isinstance(token_ids, str | bytes) or not isinstance(token_ids, Sequence):
        raise RequestError(f'"prompt_token_ids" is a {type(token_ids).__name__}; give a list of token ids')
    return Question(text, list(token_ids), params, options)


def _tokenizer(built: Built) -> Tokenizer:
    if built.tokenizer is None:
        raise ModelError(f'{built.spec.name} brings no vocabulary; give {{"prompt_token_ids": [...]}}')
    return built.tokenizer


def whole_prompt(params: SamplingParams, options: CacheOptions) -> CacheOptions:
    """The options, past the cache where log-probabilities of the prompt need every position computed."""
    return options if params.prompt_logprobs is None or options.bypass else replace(options, bypass=True)
