"""`LLM`. Owns prompts in and answers out; scheduling is the engine's, wiring `build.py`'s."""

from __future__ import annotations

import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from threading import RLock, current_thread, main_thread
from types import TracebackType
from typing import Any

from pagemill.base.clock import Clock
from pagemill.base.config import EngineConfig, resolve_config
from pagemill.base.errors import ModelError, PagemillError, RequestError
from pagemill.base.params import DEFAULT_CACHE_OPTIONS, CacheOptions, SamplingParams
from pagemill.base.units import parse_bytes
from pagemill.build import Built, LoadProgress, build
from pagemill.engine.engine import EngineStats
from pagemill.engine.output import Delta
from pagemill.llm.control import CacheControl
from pagemill.llm.outputs import RequestOutput
from pagemill.llm.prompts import chat_prompt
from pagemill.llm.questions import (
    Answer,
    Prompt,
    Question,
    at_index,
    cache_options,
    draw_line,
    listed,
    params_of,
    read_prompt,
    whole_prompt,
)  # fmt: skip
from pagemill.llm.session import Session
from pagemill.text.remembered import RememberingEncoder
from pagemill.text.tokenizer import Tokenizer

Message = Mapping[str, Any]
Progress = Callable[[int, int, int], None]


class LLM:
    """One model, loaded and ready. Mutated by generating; may be shared by threads, which then take turns by steps.

    model: a name or a path; unset, what the environment, the file or the default says. options: fields of
    `pagemill.base.config.EngineConfig`, such as kv_cache_memory_bytes="1GiB"; unknown ones are refused.
    config_file: TOML file with such options. load_progress: called with (stage, bytes done, bytes in all or None)
    while the model is fetched. Raises ConfigError, ModelError or CapacityError, each saying what to do.

        with LLM("smollm2-135m") as llm:
            [answer] = llm.generate("The capital of France is", SamplingParams(max_tokens=16, temperature=0))
            answer.outputs[0].text
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        config_file: str | None = None,
        load_progress: LoadProgress | None = None,
        clock: Clock | None = None,
        **options: Any,
    ) -> None:
        arguments = options if model is None else {"model": model, **options}
        config = resolve_config(arguments, file=config_file).config
        self._attach(build(config, progress=load_progress, clock=clock))

    @classmethod
    def from_config(cls, config: EngineConfig, *, load_progress: LoadProgress | None = None) -> LLM:
        """An LLM of a configuration that is complete already; environment and files are not asked."""
        return cls.from_built(build(config, progress=load_progress))

    @classmethod
    def from_built(cls, built: Built) -> LLM:
        """An LLM around an engine that `build.py` has put together."""
        llm = cls.__new__(cls)
        llm._attach(built)
        return llm

    def _attach(self, built: Built) -> None:
        self._built: Built | None = built
        self._process_id = os.getpid()
        self._lock = RLock()
        self._inboxes: dict[str, deque[Delta]] = {}  # request id -> where its caller looks
        self._num_requests = 0

    @property
    def built(self) -> Built:
        """The engine's parts. Raises RequestError once closed, and in a forked process, where its threads are not."""
        if self._built is None:
            raise RequestError("this LLM is closed; make a new one", status=409)
        if os.getpid() != self._process_id:
            raise RequestError(
                "this LLM was made before the process forked, which leaves its kernel threads behind; make one in each "
                'process, or start processes by "spawn"',
                status=409,
            )
        return self._built

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokeniser. Raises ModelError where the model brings no vocabulary."""
        tokenizer = self.built.tokenizer
        if tokenizer is None:
            raise ModelError(f'{self.built.spec.name} brings no vocabulary; give {{"prompt_token_ids": [...]}}')
        return tokenizer

    def stats(self) -> EngineStats:
        """Counts of the engine: running, waiting, steps, tokens computed, cache."""
        with self._lock:
            return self.built.engine.stats()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: Progress | bool = False,
        cache: CacheOptions | bool = True,
        tenant: str | None = None,
        cache_salt: str | None = None,
    ) -> list[RequestOutput]:
        """Answer prompts, batched continuously. Returns one output for each, in order.

        prompts: a text, {"prompt": text} or {"prompt_token_ids": [...]}, or a list of these. params: for all, or one
        for each. progress: True draws a line on stderr where that is a terminal; a function is called with (requests
        finished, requests, tokens generated) after each step. cache: False goes past the prefix cache, which is neither
        read nor left anything; or CacheOptions. tenant: whose cache it is; tenants never share. cache_salt: narrows it
        to requests with the same salt.
        All prompts are checked before anything runs: a wrong one raises RequestError or CapacityError that names its
        index. A request that fails later ends with finish_reason "error" and harms no other.
        """
        options = cache_options(cache, tenant, cache_salt)
        return self._run(self._questions(listed(prompts), params, options), progress)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: Progress | bool = False,
        cache: CacheOptions | bool = True,
        tenant: str | None = None,
        cache_salt: str | None = None,
    ) -> list[RequestOutput]:
        """Answer a conversation, or each of a list of them, through the model's chat template.

        messages: [{"role": "user", "content": "…"}, …]. Raises ModelError where the model has no template, else as
        `generate` does.
        """
        if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
            raise RequestError(f"messages is a {type(messages).__name__}; give a list of dicts with role and content")
        several = bool(messages) and not isinstance(messages[0], Mapping)
        conversations: Sequence[Any] = messages if several else [messages]
        prompts = []
        for index, conversation in enumerate(conversations):
            try:
                prompts.append(self.chat_prompt(conversation))
            except RequestError as error:
                raise at_index(index, error) if several else error from None
        return self.generate(
            prompts, params, progress=progress, cache=cache, tenant=tenant, cache_salt=cache_salt
        )  # fmt: skip

    def session(
        self,
        system: str | None = None,
        *,
        cache: CacheOptions | bool = True,
        tenant: str | None = None,
        cache_salt: str | None = None,
    ) -> Session:
        """A conversation that can be forked, marked and taken back; its branches share what they have in common."""
        return Session(self, system, cache_options(cache, tenant, cache_salt))

    def resize_kv_cache(self, memory_bytes: int | str) -> None:
        """Give the KV cache this much memory ("512MiB"), requests alive. Less gives memory back to the system.

        Raises ConfigError for a size that is none, CapacityError where what runs and what is pinned needs more, or
        where there is no memory for the new cache beside the old one while contents are copied; nothing is lost then.
        """
        size = parse_bytes(memory_bytes)
        with self._lock:
            self.built.engine.resize_cache(self.built.kv_spec.blocks_in(size))

    @property
    def cache(self) -> CacheControl:
        """Tenants, pins and purges of the prefix cache."""
        return CacheControl(self.built.engine, self._lock, self._token_ids)

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        cache: CacheOptions | bool = True,
        tenant: str | None = None,
        cache_salt: str | None = None,
    ) -> Generator[Delta]:
        """Answer one prompt step by step: deltas with .text, .token_ids, .choice and .finish_reason.

        Leaving the iterator early aborts the request. Raises at the first step what `generate` raises, and the
        request's own error if it fails midway.
        """
        [question] = self._questions([prompt], params, cache_options(cache, tenant, cache_salt))
        inbox: deque[Delta] = deque()
        request_id = self._enter(question, inbox)
        num_open = question.params.n
        try:
            while num_open:
                self._pump(inbox)
                while inbox:
                    delta = inbox.popleft()
                    if delta.error is not None:
                        raise delta.error
                    yield delta
                    num_open -= delta.finished
        finally:
            self._leave(request_id)

    def chat_prompt(self, messages: Sequence[Message], encoder: RememberingEncoder | None = None) -> dict[str, Any]:
        """A conversation as a prompt for `generate` or `stream`. Control tokens are the template's; those in a message
        stay text. encoder: of this LLM's tokeniser, where a conversation brings its own."""
        prompt = chat_prompt(self.built.vocab, self.tokenizer, messages, encoder=encoder)
        return {"prompt": prompt.text, "prompt_token_ids": prompt.token_ids}

    def close(self) -> None:
        """Free weights and cache. Requests that still run are aborted; closing twice is no mistake."""
        with self._lock:
            if self._built is None:
                return
            for request_id in list(self._inboxes):
                self._leave(request_id)
            self._built = None

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _questions(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        options: CacheOptions,
    ) -> list[Question]:
        """Read and check every prompt; the first wrong one raises with its index, before anything runs."""
        built = self.built
        each = params_of(params, len(prompts))
        questions = []
        for index, (prompt, own) in enumerate(zip(prompts, each, strict=True)):
            try:
                question = read_prompt(built, prompt, own, whole_prompt(own, options))
                if own.grammar is not None:
                    built.grammars.check(own.grammar)
                built.engine.check_request(question.token_ids, own, question.options)
            except PagemillError as error:
                raise at_index(index, error) if len(prompts) > 1 else error from None
            questions.append(question)
        return questions

    def _token_ids(self, prompt: Prompt) -> list[int]:
        return read_prompt(self.built, prompt, SamplingParams(), DEFAULT_CACHE_OPTIONS).token_ids

    def _run(self, questions: list[Question], progress: Progress | bool) -> list[RequestOutput]:
        report = progress if callable(progress) else draw_line if progress and sys.stderr.isatty() else None
        inbox: deque[Delta] = deque()
        answers: dict[str, Answer] = {}
        num_tokens = num_finished = 0
        try:
            for question in questions:
                answers[self._enter(question, inbox)] = Answer(question)
            while num_finished < len(answers):
                self._pump(inbox)
                if not inbox:
                    continue
                while inbox:
                    delta = inbox.popleft()
                    answer = answers[delta.request_id]
                    answer.add(delta)
                    num_tokens += len(delta.token_ids)
                    num_finished += answer.num_open == 0
                if report is not None:
                    report(num_finished, len(answers), num_tokens)
        finally:
            for request_id in answers:
                self._leave(request_id)
        tokenizer = self.built.tokenizer
        return [answer.output(request_id, tokenizer) for request_id, answer in answers.items()]

    def _enter(self, question: Question, inbox: deque[Delta]) -> str:
        with self._lock:
            request_id = str(self._num_requests)
            self.built.engine.add_request(
                request_id, question.token_ids, question.params, cache=question.options
            )  # fmt: skip
            self._num_requests += 1
            self._inboxes[request_id] = inbox
            return request_id

    def _leave(self, request_id: str) -> None:
        with self._lock:
            if self._inboxes.pop(request_id, None) is not None and self._built is not None:
                self._built.engine.abort(request_id)

    def _pump(self, inbox: deque[Delta]) -> None:
        """One step, its deltas to whoever asked; none where another thread's step has filled `inbox` by now."""
        with self._lock:
            if inbox:
                return
            shared = any(other is not inbox for other in self._inboxes.values())
            with _interrupt_afterwards() if shared else nullcontext():
                for delta in self.built.engine.step():
                    asked = self._inboxes.get(delta.request_id)
                    if asked is not None:
                        asked.append(delta)


@contextmanager
def _interrupt_afterwards() -> Iterator[None]:
    """Hold Ctrl-C back until the block has ended: a step that others share must not lose their tokens."""
    default = signal.default_int_handler
    if current_thread() is not main_thread() or signal.getsignal(signal.SIGINT) is not default:
        yield
        return
    caught: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _frame: caught.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, default)
    if caught:
        raise KeyboardInterrupt
