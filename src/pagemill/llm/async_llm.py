"""`AsyncLLM`: one engine for an asyncio program. Owns who waits for which deltas; the engine and its thread are in
`engine_thread.py`, and what a caller must not do twice (tokenising, templates, schemas) runs on worker threads.

    event loop                     | engine thread
    open() -> Enter -------------->| add_request
    RequestStream.next() <- Batch -| step, one batch each
    close() -> Abort ------------->| before the next step
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Final, TypeVar

from pagemill.base.clock import Clock, MonotonicClock
from pagemill.base.config import EngineConfig, resolve_config
from pagemill.base.errors import PagemillError, RequestError
from pagemill.base.params import CacheOptions, SamplingParams
from pagemill.build import Built, LoadProgress, build
from pagemill.engine.engine import Engine, EngineStats
from pagemill.engine.output import Delta
from pagemill.engine.request import Marks
from pagemill.llm.engine_thread import Abort, Batch, Call, EngineThread, Enter, Entrant
from pagemill.llm.outputs import RequestOutput
from pagemill.llm.prompts import chat_prompt, text_of
from pagemill.llm.questions import Answer, Prompt, Question, cache_options, read_prompt, whole_prompt
from pagemill.text.conversation import PromptTokens
from pagemill.text.tokenizer import Tokenizer

NUM_WORKERS = 2

_LOG: Final = logging.getLogger(__name__)

# What is asked in one request: token ids, parameters, and whose cache.
Ask = tuple[Sequence[int], SamplingParams, CacheOptions]
_T = TypeVar("_T")


class RequestStream:
    """The deltas of requests that were opened together. Mutated by the loop's callbacks, `next` and `close`.

    request_ids: in the order they were asked; each delta names its own.
    """

    __slots__ = ("_close", "_deltas", "_num_open", "_open", "_waiter", "request_ids")

    def __init__(self, asks: Mapping[str, Ask], close: Callable[[Sequence[str]], None]) -> None:
        self.request_ids = tuple(asks)
        self._open = {request_id: set(range(ask[1].n)) for request_id, ask in asks.items()}
        self._num_open = sum(map(len, self._open.values()))
        self._deltas: list[Delta] = []
        self._waiter: asyncio.Future[None] | None = None
        self._close = close

    @property
    def finished(self) -> bool:
        """True where every choice has ended and its last delta was taken."""
        return not self._num_open and not self._deltas

    def has_ended(self, request_id: str) -> bool:
        """True where every choice of one request has ended."""
        return not self._open[request_id]

    def push(self, delta: Delta) -> None:
        """Add what came; wakes who waits."""
        self._deltas.append(delta)
        if delta.finish_reason is not None:
            self._num_open -= 1
            self._open[delta.request_id].discard(delta.choice)
        self._wake()

    def fail(self, error: Exception) -> None:
        """What came cannot be told: all that is open ends with the error. Wakes who waits."""
        marks = Marks(0.0)
        for request_id, choices in self._open.items():
            for choice in sorted(choices):
                last = Delta(request_id, choice, (), "", marks, finish_reason="error", error=error)
                self._deltas.append(last)
            choices.clear()
        self._num_open = 0
        self._wake()

    async def next(self) -> list[Delta]:
        """All deltas since the last call, at least one; none once everything has ended."""
        while not self._deltas and self._num_open:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        taken, self._deltas = self._deltas, []
        return taken

    def close(self) -> None:
        """Leave: what still runs is aborted and its blocks are free before the next step. Closing twice is nothing."""
        self._deltas = []
        self._close([request_id for request_id, choices in self._open.items() if choices])
        self._num_open = 0
        self._wake()

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


def _ready_for_texts(built: Built) -> Built:
    """An engine whose first text is encoded as soon as any other: loading takes the longer, no request does."""
    if built.tokenizer is not None:
        built.tokenizer.prepare()
    return built


class AsyncLLM:
    """One model for an asyncio program, which begins to load when it is made. Mutated by generating.

    Arguments as of `LLM`. One event loop may use it. `generate` and all else wait until the model is loaded; errors of
    loading are raised there.

        llm = AsyncLLM("smollm2-135m")
        async for output in llm.generate("The capital of France is", SamplingParams(max_tokens=16), "request-1"):
            output.outputs[0].text  # so far
        llm.shutdown()
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
        clock = clock or MonotonicClock()
        self._attach(lambda: build(config, progress=load_progress, clock=clock), clock)

    @classmethod
    def from_config(cls, config: EngineConfig, *, load_progress: LoadProgress | None = None) -> AsyncLLM:
        """An AsyncLLM of a configuration that is complete already; environment and files are not asked."""
        clock = MonotonicClock()
        return cls.from_maker(lambda: build(config, progress=load_progress, clock=clock), clock)

    @classmethod
    def from_built(cls, built: Built) -> AsyncLLM:
        """An AsyncLLM around an engine that is put together already and that nobody else steps."""
        return cls.from_maker(lambda: built)

    @classmethod
    def from_maker(cls, make: Callable[[], Built], clock: Clock | None = None) -> AsyncLLM:
        """An AsyncLLM whose engine `make` builds, on the engine's thread. clock: the engine's, where it is known:
        requests arrive when they are opened, else when the engine takes them."""
        llm = cls.__new__(cls)
        llm._attach(make, clock)
        return llm

    def _attach(self, make: Callable[[], Built], clock: Clock | None) -> None:
        self._clock = clock
        self.observe: Callable[[Sequence[Delta]], None] | None = None
        self.leaving: Callable[[Sequence[str]], None] | None = None  # told of requests that are left before their end
        self._loop: asyncio.AbstractEventLoop | None = None
        self._streams: dict[str, RequestStream] = {}
        self._tickets: dict[int, asyncio.Future[None]] = {}
        self._calls: set[Future[Any]] = set()
        self._names: dict[str, RequestStream] = {}
        self._numbers = itertools.count()
        self._fatal: Exception | None = None
        self._workers = ThreadPoolExecutor(NUM_WORKERS, thread_name_prefix="pagemill-text")
        self._thread = EngineThread(lambda: _ready_for_texts(make()), self._deliver)
        self._thread.start()

    # What is known

    @property
    def status(self) -> str:
        """loading, ready or failed."""
        loaded = self._thread.built
        if self._fatal is not None or (loaded.done() and loaded.exception() is not None):
            return "failed"
        return "ready" if loaded.done() else "loading"

    @property
    def is_stopped(self) -> bool:
        """True once the engine's thread has ended."""
        return self._thread.is_stopped

    @property
    def built(self) -> Built:
        """The engine's parts, once loaded. Raises PagemillError before."""
        if not self._thread.built.done():
            raise PagemillError("the model is still being loaded; await ready() first")
        return self._thread.built.result()

    @property
    def facts(self) -> dict[str, Any]:
        """What is known of the model, once loaded: name, max_model_len, vocab_size, kv_cache_tokens, chat_template, and
        the ids of its control tokens (bos_token_id …; None where it has none)."""
        if self.status != "ready":
            return {}
        built = self.built
        return {
            "name": built.spec.name,
            "max_model_len": built.max_model_len,
            "vocab_size": built.spec.vocab_size,
            "kv_cache_tokens": built.num_blocks * built.kv_spec.block_size,
            "has_chat_template": built.vocab.chat_template is not None,
            "chat_template": built.vocab.chat_template,
            "bos_token_id": built.vocab.bos_id,
            "eos_token_id": built.vocab.eos_id,
            "pad_token_id": built.vocab.pad_id,
            "unk_token_id": built.vocab.unk_id,
        }

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return len(self._streams)

    async def ready(self) -> Built:
        """Wait until the model is loaded. Raises what loading raised."""
        self._bind()
        return await asyncio.shield(asyncio.wrap_future(self._thread.built))

    # Requests

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        cache: CacheOptions | bool = True,
        tenant: str | None = None,
        cache_salt: str | None = None,
    ) -> AsyncGenerator[RequestOutput]:
        """Answer one prompt: the answer so far, each time that it has grown; leaving the iterator aborts it.

        prompt and the rest as in `LLM.generate`; request_id: a name of the caller's own, for `abort`. Raises what
        `LLM.generate` raises, at the first step, and the request's own error if it fails midway.
        """
        built = await self.ready()
        self._check_alive()
        own = SamplingParams() if params is None else params
        options = cache_options(cache, tenant, cache_salt)
        question = await self.work(lambda: read_prompt(built, prompt, own, options))
        if request_id is not None and request_id in self._names:
            raise RequestError(f"request id {request_id!r} is in use; give each request its own", status=409)
        stream = await self.open([(question.token_ids, own, options)])
        name = stream.request_ids[0] if request_id is None else request_id
        if name in self._names:  # given twice at a time
            stream.close()
            raise RequestError(f"request id {name!r} is in use; give each request its own", status=409)
        self._names[name] = stream
        answer = Answer(Question(question.text, question.token_ids, own, options))
        try:
            while not stream.finished:
                for delta in await stream.next():
                    if delta.error is not None:
                        raise delta.error
                    answer.add(delta)
                if answer.choices and any(each.last is not None for each in answer.choices):
                    yield answer.output(name, built.tokenizer)
        finally:
            self._names.pop(name, None)
            stream.close()

    async def abort(self, request_id: str) -> None:
        """End a request of `generate`, which then tells finish_reason "abort"; nothing where it is unknown."""
        stream = self._names.get(request_id)
        if stream is not None:
            self._thread.send(Abort(stream.request_ids))

    async def open(self, asks: Sequence[Ask]) -> RequestStream:
        """Let requests in, all or none of them. Raises what is wrong with one of them (RequestError, CapacityError),
        before anything runs. Grammars are compiled first, off the loop."""
        built = await self.ready()
        self._check_alive()
        arrival_s = None if self._clock is None else self._clock.now()
        for _, params, _ in asks:
            if params.grammar is not None:
                await self.work(partial(built.grammars.check, params.grammar))
        named = {f"r{next(self._numbers)}": (ids, own, whole_prompt(own, options)) for ids, own, options in asks}
        stream = RequestStream(named, self._leave)
        ticket = next(self._numbers)
        assert self._loop is not None
        reply = self._loop.create_future()
        self._tickets[ticket] = reply
        self._streams |= dict.fromkeys(named, stream)
        try:
            self._thread.send(Enter(ticket, tuple(Entrant(key, *ask, arrival_s) for key, ask in named.items())))
            await reply
        except asyncio.CancelledError:
            self._leave(stream.request_ids)
            raise
        except Exception:  # none of them has entered
            for request_id in stream.request_ids:
                self._streams.pop(request_id, None)
            raise
        finally:
            self._tickets.pop(ticket, None)
        return stream

    def _leave(self, request_ids: Sequence[str]) -> None:
        gone = tuple(each for each in request_ids if self._streams.pop(each, None) is not None)
        if gone:
            if self.leaving is not None:
                _tell(self.leaving, gone)
            self._thread.send(Abort(gone))

    # Between steps, and beside them

    async def call(self, function: Callable[[Engine], _T]) -> _T:
        """What `function` returns for the engine, called on its thread between two steps."""
        await self.ready()
        self._check_alive()
        reply: Future[_T] = Future()
        self._calls.add(reply)
        reply.add_done_callback(self._calls.discard)
        self._thread.send(Call(function, reply))
        return await asyncio.wrap_future(reply)

    async def stats(self) -> EngineStats:
        """Counts of the engine."""
        return await self.call(lambda engine: engine.stats())

    async def work(self, function: Callable[[], _T]) -> _T:
        """What `function` returns, called on a worker thread."""
        self._check_alive()
        return await asyncio.get_running_loop().run_in_executor(self._workers, function)

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokeniser. Raises RequestError where the model brings no vocabulary."""
        tokenizer = self.built.tokenizer
        if tokenizer is None:
            raise RequestError(f"{self.built.spec.name} brings no vocabulary; give token ids")
        return tokenizer

    async def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Token ids of a text, control tokens included. Raises RequestError for what is no text."""
        tokenizer = self.tokenizer
        return await self.work(lambda: tokenizer.encode(text, add_special=add_special))

    async def decode(self, token_ids: Sequence[int], *, skip_special: bool = False) -> str:
        """Text of token ids. Raises RequestError for negative ones."""
        tokenizer = self.tokenizer
        return await self.work(lambda: tokenizer.decode(token_ids, skip_special=skip_special))

    def token(self, token_id: int) -> tuple[str, bytes]:
        """One token as text and as bytes."""
        tokenizer = self.built.tokenizer
        return text_of(token_id, tokenizer), b"" if tokenizer is None else tokenizer.token_bytes(token_id)

    async def chat_tokens(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        template: str | None = None,
        variables: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> PromptTokens:
        """A conversation as ids, through the model's template or the one given. Raises as `LLM.chat` does."""
        built, tokenizer = self.built, self.tokenizer
        return await self.work(
            lambda: chat_prompt(
                built.vocab,
                tokenizer,
                messages,
                tools=tools,
                template=template,
                variables=variables,
                add_generation_prompt=add_generation_prompt,
            )
        )

    def shutdown(self, timeout_s: float | None = None) -> None:
        """Abort what runs and end the threads. Shutting down twice is nothing."""
        self._fatal = self._fatal or PagemillError("this AsyncLLM was shut down; make a new one")
        self._thread.stop(timeout_s)
        self._workers.shutdown(wait=False, cancel_futures=True)

    # From the engine's thread

    def _bind(self) -> None:
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
        elif self._loop is not loop:
            raise PagemillError("this AsyncLLM belongs to another event loop; make one in each loop")

    def _check_alive(self) -> None:
        if self._fatal is not None:
            raise PagemillError(f"the engine has ended: {self._fatal}") from None

    def _deliver(self, batch: Batch) -> None:
        """On the engine's thread: one wake-up of the loop for all that a step brought."""
        loop = self._loop
        if loop is None:
            self._fatal = self._fatal or batch.fatal
            return
        try:
            loop.call_soon_threadsafe(self._receive, batch)
        except RuntimeError:  # the loop is closed: nobody waits any more
            self._fatal = self._fatal or batch.fatal

    def _receive(self, batch: Batch) -> None:
        if self.observe is not None and batch.deltas:
            _tell(self.observe, batch.deltas)
        for ticket, error in batch.replies:
            reply = self._tickets.get(ticket)
            if reply is not None and not reply.done():
                reply.set_result(None) if error is None else reply.set_exception(error)
        streams = self._streams
        for delta in batch.deltas:
            stream = streams.get(delta.request_id)
            if stream is None:
                continue
            try:
                stream.push(delta)
                if delta.finish_reason is not None and stream.has_ended(delta.request_id):
                    del streams[delta.request_id]
            except Exception as error:
                self._break_off(stream, error)
        if batch.fatal is not None:
            self._end(batch.fatal)

    def _break_off(self, stream: RequestStream, error: Exception) -> None:
        """What came of a stream's requests cannot be handed on: they end, and nobody else."""
        _LOG.error("an answer could not be delivered: %s", type(error).__name__, exc_info=error)
        for request_id in stream.request_ids:
            self._streams.pop(request_id, None)
        self._thread.send(Abort(stream.request_ids))
        stream.fail(error)

    def _end(self, error: Exception) -> None:
        self._fatal = self._fatal or error
        for reply in self._tickets.values():
            if not reply.done():
                reply.set_exception(PagemillError(f"the engine has ended: {error}"))
        for call in list(self._calls):
            if call.set_running_or_notify_cancel():
                call.set_exception(PagemillError(f"the engine has ended: {error}"))


def _tell(observer: Callable[[Sequence[Any]], None], what: Sequence[Any]) -> None:
    """Tell an observer; what fails in it is logged and harms no request."""
    try:
        observer(what)
    except Exception:
        _LOG.exception("an observer failed")
