"""The thread that owns an engine: it loads the model, then steps while there is work. Owns the way in (a queue of
frozen values) and the way out (one batch a step); what the batches mean to callers is `async_llm.py`'s."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, Final

from pagemill.base.errors import PagemillError
from pagemill.base.params import CacheOptions, SamplingParams
from pagemill.build import Built
from pagemill.engine.engine import Engine
from pagemill.engine.output import Delta
from pagemill.engine.request import Marks

_LOG: Final = logging.getLogger(__name__)
IDLE_WAIT_S = 0.005  # where requests wait and none can run


@dataclass(frozen=True, slots=True)
class Entrant:
    """One request on its way in."""

    request_id: str
    token_ids: Sequence[int]
    params: SamplingParams
    cache: CacheOptions
    arrival_s: float | None = None


@dataclass(frozen=True, slots=True)
class Enter:
    """Requests that enter together or not at all. ticket: names the reply."""

    ticket: int
    entrants: tuple[Entrant, ...]


@dataclass(frozen=True, slots=True)
class Abort:
    """End requests in whatever state."""

    request_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Call:
    """Do something between two steps, such as asking for counts."""

    function: Callable[[Engine], Any]
    reply: Future[Any]


@dataclass(frozen=True, slots=True)
class Stop:
    """End the thread; what runs is aborted."""


Command = Enter | Abort | Call | Stop


@dataclass(slots=True)
class Batch:
    """What one turn of the loop has to tell, filled by the loop and then handed on. replies: ticket -> None where the
    requests entered, else why not. fatal: the engine cannot go on."""

    deltas: list[Delta] = field(default_factory=list)
    replies: list[tuple[int, Exception | None]] = field(default_factory=list)
    fatal: Exception | None = None

    def __bool__(self) -> bool:
        return bool(self.deltas or self.replies or self.fatal)


class EngineThread:
    """Runs one engine. Mutated by its own thread; other threads call `send` and read `built`.

    make: builds or loads the engine, on this thread. deliver: takes each batch, on this thread; must not block.
    """

    def __init__(self, make: Callable[[], Built], deliver: Callable[[Batch], None]) -> None:
        self.built: Future[Built] = Future()
        self._make = make
        self._deliver = deliver
        self._inbox: SimpleQueue[Command] = SimpleQueue()
        self._held: Command | None = None
        self._open: dict[str, int] = {}  # request id -> choices that have not ended
        self._thread = Thread(target=self._run, name="pagemill-engine", daemon=True)

    def start(self) -> None:
        """Begin to load."""
        self._thread.start()

    def send(self, command: Command) -> None:
        """Queue a command; the next turn of the loop, one step away at the most, takes it."""
        self._inbox.put(command)

    def stop(self, timeout_s: float | None = None) -> None:
        """Abort what runs and end the thread."""
        self._inbox.put(Stop())
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    @property
    def is_stopped(self) -> bool:
        """True once the thread has ended."""
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            built = self._make()
        except BaseException as error:
            self.built.set_exception(error)
            self._refuse_all(error)
            return
        self.built.set_result(built)
        engine = built.engine
        fatal: Exception | None = None
        stopped = False
        while not stopped and fatal is None:
            batch = Batch()
            idle = False
            try:
                stopped = self._take_commands(engine, batch)
                if not stopped and engine.has_unfinished:
                    idle = self._step(engine, batch)
            except Exception as error:  # even failing cleanly has failed
                fatal = batch.fatal = error
            if batch:
                self._hand_on(batch)
            if idle:
                self._wait()
        self._refuse_all(fatal or PagemillError("the engine was stopped"))

    def _take_commands(self, engine: Engine, batch: Batch) -> bool:
        """All commands that wait; sleeps for one where nothing else is to be done. True where the thread is to end."""
        block = not engine.has_unfinished
        while True:
            held, self._held = self._held, None
            try:
                command = held or self._inbox.get(block=block)
            except Empty:
                return False
            block = False
            if isinstance(command, Enter):
                try:
                    error = self._enter(engine, command, batch)
                except Exception as failure:
                    error = failure
                batch.replies.append((command.ticket, error))
            elif isinstance(command, Abort):
                self._abort(engine, command.request_ids, batch)
            elif isinstance(command, Call):
                self._call(engine, command)
            else:
                self._abort(engine, list(self._open), batch)
                return True

    def _enter(self, engine: Engine, command: Enter, batch: Batch) -> Exception | None:
        entered: list[str] = []
        try:
            for each in command.entrants:
                engine.add_request(
                    each.request_id, each.token_ids, each.params, arrival_s=each.arrival_s, cache=each.cache
                )  # fmt: skip
                entered.append(each.request_id)
        except Exception as error:
            self._abort(engine, entered, batch)
            return error
        self._open |= {each.request_id: each.params.n for each in command.entrants}
        return None

    def _abort(self, engine: Engine, request_ids: Sequence[str], batch: Batch) -> None:
        """End requests, by force where it cannot be done otherwise: the thread ends for none of them."""
        for request_id in request_ids:
            try:
                batch.deltas += engine.abort(request_id)
            except Exception as error:
                _LOG.error("a request could not be aborted: %s", type(error).__name__, exc_info=error)
                batch.deltas += engine.discard(request_id, error)

    def _call(self, engine: Engine, command: Call) -> None:
        if not command.reply.set_running_or_notify_cancel():
            return
        try:
            command.reply.set_result(command.function(engine))
        except Exception as error:
            command.reply.set_exception(error)

    def _step(self, engine: Engine, batch: Batch) -> bool:
        """One step. True where it could run nothing. A step that fails as a whole fails what it was for."""
        try:
            deltas = engine.step()
        except Exception as error:
            failed = Batch()
            self._abort(engine, list(self._open), failed)
            batch.deltas += [each._replace(finish_reason="error", error=error) for each in failed.deltas]
            return False
        batch.deltas += deltas
        return not deltas and not engine.stats().num_running

    def _hand_on(self, batch: Batch) -> None:
        for delta in batch.deltas:
            if delta.finish_reason is not None:
                left = self._open.get(delta.request_id, 0) - 1
                if left > 0:
                    self._open[delta.request_id] = left
                else:
                    self._open.pop(delta.request_id, None)
        self._deliver(batch)

    def _wait(self) -> None:
        """Sleep until a command comes, or for a moment."""
        with suppress(Empty):
            self._held = self._inbox.get(timeout=IDLE_WAIT_S)

    def _refuse_all(self, error: BaseException) -> None:
        """End what is open; who has sent a command that nobody will take learns it from `fatal`."""
        reason = error if isinstance(error, Exception) else PagemillError(f"the engine ended: {error!r}")
        marks = Marks(0.0)
        batch = Batch(fatal=reason)
        for request_id, num_open in self._open.items():
            for choice in range(num_open):
                batch.deltas.append(Delta(request_id, choice, (), "", marks, finish_reason="error", error=reason))
        self._open.clear()
        self._deliver(batch)
