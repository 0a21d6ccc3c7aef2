"""R6: clients that leave, in every state that a request can be in, over a socket.

A trial stops the engine inside a step in which a victim is in the state that is asked for, has the client leave, waits
until the server has seen that, and lets the step end. Before a further step has ended the victim must hold no block.
Beside the victims others are answered all the time, and must be answered as if nothing had been. In the end nothing may
be left: blocks, sequences, streams, tasks of the loop, descriptors.
"""

from __future__ import annotations

import asyncio
import os
import random
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final
from unittest.mock import patch

from pagemill.base.step import StepPlan, StepResult
from pagemill.cli.serve import SWITCH_INTERVAL_S
from pagemill.engine.engine import Engine
from pagemill.engine.output import Delta
from pagemill.engine.request import Sequence
from pagemill.llm.engine_thread import Abort, Command
from pagemill.text.tokenizer import Tokenizer
from tests.fixtures.live_server import wait_until
from tests.trust.figures import Figure
from tests.trust.serving import FORMS, WITH_GRAMMAR, ask, connect, guarded_server, own_words, request_bytes, tiny_model

STATES: Final = (
    "body", "tokenising", "compiling", "entering", "queued", "prefill", "first token", "decode", "preempted",
    "last token", "unread", "any",
)  # fmt: skip
UNSEEN: Final = ("tokenising", "compiling", "entering")  # the server looks whether the client is there afterwards
UNSTOPPED: Final = ("body", "unread", "any")  # the engine goes on meanwhile
MAX_SEQS: Final = 4
SMALL: Final = {"max_model_len": 512, "kv_cache_memory_bytes": "96KiB"}  # where choices of one request preempt others
PER_SHARD: Final = 100
LATE_S: Final = 0.1
LATE_SHARE: Final = 0.01  # of those that leave; judged where times are
WAIT_S = 30.0  # for what must come
_NEIGHBOUR: Final = {"prompt": "A neighbour.", "max_tokens": 150, "temperature": 0, "ignore_eos": True}
_RESET: Final = struct.pack("ii", 1, 0)  # SO_LINGER: what is unsent is dropped, the other side gets a reset


@dataclass(frozen=True, slots=True)
class Trial:
    """One client that leaves. resets: by a reset in place of an end."""

    number: int
    state: str
    form: str
    stream: bool
    resets: bool

    @property
    def seed(self) -> int:
        """Of its request, by which the engine's sequences are known."""
        return 1_000_000 + self.number

    @property
    def request(self) -> bytes:
        """The whole request."""
        path, body = own_words(self.form, self.number)
        most = 6 if self.state in ("last token", "unread") else 300
        return request_bytes(
            path, {**body, "seed": self.seed, "temperature": 1, "max_tokens": most, "stream": self.stream}
        )


def forms_of(state: str) -> tuple[str, ...]:
    """Forms that come to a state."""
    if state == "compiling":
        return WITH_GRAMMAR
    if state == "preempted":
        return ("several", "batch", "ids")  # of several sequences, which grow
    return tuple(form for form in FORMS if state != "tokenising" or form != "ids")


def every_trial() -> list[Trial]:
    """Each state with each form, streaming and not, ends and resets in turns."""
    found: list[Trial] = []
    for state in STATES:
        for form in forms_of(state):
            for stream in (True, False):
                found.append(Trial(len(found), state, form, stream, resets=len(found) % 3 == 0))
    return found


def drawn_trials(seeds: range) -> list[Trial]:
    """A trial of each seed."""
    found = []
    for seed in seeds:
        draw = random.Random(seed)
        state = draw.choice(STATES)
        form = draw.choice(forms_of(state))
        found.append(Trial(1000 + seed, state, form, draw.random() < 0.5, draw.random() < 0.3))
    return found


@dataclass(slots=True)
class Left:
    """What became of one that left. Mutated by the engine's thread. num_steps: begun after its leaving was seen and
    before it held no block any more. holds: it still did then. request_ids: not ended yet. num_begun: when it was seen.
    """

    seen: threading.Event = field(default_factory=threading.Event)
    freed: threading.Event = field(default_factory=threading.Event)
    request_ids: set[str] = field(default_factory=set)
    num_begun: int | None = None
    num_steps: int = 0
    holds: bool = False
    freed_s: float = 0.0


class Watched:
    """A server whose steps can be stopped. Mutated by trials."""

    def __init__(self, model: str, **options: Any) -> None:
        fixed = {"max_num_seqs": MAX_SEQS, "max_num_batched_tokens": 48, "kv_cache_memory_bytes": "2MiB"}
        self.server = server = guarded_server(model, **{**fixed, **options})
        self.engine: Engine = server.llm.built.engine
        self._run = server.llm.built.executor.run
        self._check = server.llm.built.grammars.check
        self._armed: Trial | None = None
        self._reached, self._go = threading.Event(), threading.Event()
        self.met: Counter[str] = Counter()
        self.num_preemptions = 0
        self._left: Left | None = None
        self._victims: list[Sequence] = []
        self._num_seen = 0
        self._leaving: dict[str, Left] = {}
        server.call(lambda engine: setattr(server.llm.built.executor, "run", self._stopped_run))
        server.llm.built.grammars.check = self._stopped_check  # type: ignore[method-assign]
        self._send = server.llm._thread.send
        server.llm._thread.send = self._watched_send  # type: ignore[method-assign]
        self._abort = Engine.abort
        self._patch = patch.object(Engine, "abort", lambda engine, name: self._watched_abort(engine, name))
        self._patch.start()
        self._encode = Tokenizer.encode
        self._encode_patch = patch.object(
            Tokenizer, "encode", lambda *args, **named: self._watched_encode(*args, **named)
        )
        self._encode_patch.start()
        self._running: set[int] = set()  # seeds of victims that were seen in a step
        self._interval_s = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_INTERVAL_S)  # as the server's own process does
        self.expected = asyncio.run(ask(server.port, "/v1/completions", _NEIGHBOUR)).json["choices"][0]["text"]
        for path, body in FORMS.values():  # what is made at the first request of a kind stays
            asyncio.run(ask(server.port, path, {**body, "temperature": 1, "max_tokens": 2}))
        self._baseline = self._open_things()

    def _open_things(self) -> tuple[int, int]:
        async def tasks() -> int:
            return len(asyncio.all_tasks())

        return self.server.on_loop(tasks()), len(os.listdir("/proc/self/fd"))

    # On the engine's thread

    def _stopped_run(self, plan: StepPlan) -> StepResult:
        trial = self._armed
        self._running |= {each.request.seed or 0 for every in self.engine._unfinished.values() for each in every}
        if trial is not None and (met := self._state_of(trial, plan)):
            self._armed = None
            self.met[met] += 1
            self._stop()
        return self._run(plan)

    def _stop(self) -> None:
        self._reached.set()
        self._go.wait(WAIT_S)

    def _state_of(self, trial: Trial, plan: StepPlan) -> str:
        """The state to stop in, "" where it has not come to that; a later one where it was missed."""
        found = [each for every in self.engine._unfinished.values() for each in every]
        victims = [each for each in found if each.request.seed == trial.seed]
        if not victims:
            return ""
        self._victims = victims
        self._num_seen += 1
        if trial.state == "entering":
            return "entering"
        if self._num_seen == 1:  # that it has entered is told at this step's end
            return ""
        if trial.state == "preempted":
            waits = any(each.num_preemptions and each.seq_id not in self.engine.cache._sequences for each in victims)
            return "preempted" if waits else ""
        numbers = {each.seq_id for each in victims}
        rows = [each for each in plan.sequences if each.seq_id in numbers]
        if not rows:
            return "queued" if trial.state == "queued" and not any(each.rank for each in victims) else ""
        num_generated = max(each.num_generated for each in victims)
        if num_generated == 0:
            now = "first token" if any(each.sample for each in rows) else "prefill"
        else:
            now = "last token" if num_generated == victims[0].request.max_tokens - 1 else "decode"
        order = STATES.index
        wanted = order(now) >= order(trial.state) if trial.state != "decode" else num_generated >= 3
        return now if wanted else ""

    # On a worker thread

    def _stopped_check(self, grammar: Any) -> None:
        trial = self._armed
        if trial is not None and trial.state == "compiling":
            self._armed = None
            self.met["compiling"] += 1
            self._stop()
        self._check(grammar)

    def _watched_encode(self, tokenizer: Tokenizer, text: str, **options: Any) -> list[int]:
        trial = self._armed
        if trial is not None and trial.state == "tokenising" and f"{trial.number}: " in text:
            self._armed = None
            self.met["tokenising"] += 1
            self._stop()
        return self._encode(tokenizer, text, **options)

    # From the loop to the engine's thread

    def _watched_send(self, command: Command) -> None:
        """A client is known to have left when the word of it is on its way to the engine's thread."""
        left = self._left
        if not isinstance(command, Abort) or left is None:
            self._send(command)
            return
        left.request_ids |= set(command.request_ids)
        self._leaving |= dict.fromkeys(command.request_ids, left)
        self._send(command)
        left.num_begun = self.engine._num_steps
        left.seen.set()

    def _watched_abort(self, engine: Engine, request_id: str) -> list[Delta]:
        victims = list(engine._unfinished.get(request_id, ()))
        deltas = self._abort(engine, request_id)
        left = self._leaving.pop(request_id, None)
        if left is not None:
            if left.num_begun is not None:  # else it is ended before its word has come back
                left.num_steps = max(left.num_steps, engine._num_steps - left.num_begun)
            known = engine.cache._sequences
            left.holds = left.holds or any(each.seq_id in known or each.status != "finished" for each in victims)
            left.request_ids.discard(request_id)
            left.freed_s = time.monotonic()
            engine.cache.check()
            if not left.request_ids:
                left.freed.set()
        return deltas

    # The client

    def run(self, trial: Trial) -> tuple[str, bool]:
        """One trial. Returns what was wrong ("") and whether its blocks were free later than LATE_S and a step."""
        self._left = left = Left()
        self._victims, self._num_seen = [], 0
        self._reached.clear()
        self._go.clear()
        draw = random.Random(trial.seed)
        if trial.state not in UNSTOPPED:
            self._armed = trial
        try:
            with connect(self.server.port) as client:
                data = trial.request
                client.sendall(data[:-20] if trial.state == "body" else data)
                if trial.state == "any":
                    time.sleep(draw.choice((0.0, 0.001, 0.004, 0.016)))
                elif trial.state == "unread":
                    if not wait_until(lambda: self._has_answered(trial), WAIT_S):
                        return f"{trial} was not answered", False
                elif trial.state != "body" and not self._reached.wait(WAIT_S):
                    return f"{trial} never came to its state", False
                if trial.stream and trial.state in ("decode", "any") and draw.random() < 0.5:
                    client.recv(1024)
                if trial.resets:
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            gone_s = time.monotonic()
            if trial.state in UNSTOPPED:
                self.met[trial.state] += 1
                return self._wrong_after(trial), left.freed.is_set() and left.freed_s - gone_s > LATE_S
            if trial.state not in UNSEEN and not left.seen.wait(WAIT_S):
                return f"{trial}: its leaving was not seen", False
            self._go.set()
            if not left.freed.wait(WAIT_S):
                return f"{trial}: it was not ended", False
            if left.holds or left.num_steps > 1:
                return f"{trial}: {left.num_steps} steps later it held blocks: {left.holds}", False
            return "", left.freed_s - gone_s > LATE_S
        finally:
            self._armed = None
            self._go.set()

    def _has_answered(self, trial: Trial) -> bool:
        """Whether the engine has ended all that was asked; its client has read nothing."""

        def is_running(engine: Engine) -> bool:
            return any(each.request.seed == trial.seed for every in engine._unfinished.values() for each in every)

        return trial.seed in self._running and not self.server.call(is_running)

    def _wrong_after(self, trial: Trial) -> str:
        """Where nothing was stopped: soon nothing may be left of it."""

        def num_left(engine: Engine) -> int:
            engine.cache.check()
            return sum(
                each.request.seed == trial.seed for every in engine._unfinished.values() for each in every
            )  # fmt: skip

        most = len(self._neighbours)

        def is_gone() -> bool:
            return self.server.llm.num_open <= most and not self.server.call(num_left)

        return "" if wait_until(is_gone, WAIT_S) else f"{trial}: it goes on although its client has left"

    # Those beside it

    _neighbours: tuple[threading.Thread, ...] = ()

    @contextmanager
    def neighbours(self, count: int, told: Callable[[bool], None]) -> Generator[None]:
        """So many clients that ask the same again and again. told: whether each answer was the right one."""
        ended = threading.Event()

        def go_on() -> None:
            while not ended.is_set():
                reply = asyncio.run(ask(self.server.port, "/v1/completions", _NEIGHBOUR))
                told(reply.status == 200 and reply.json["choices"][0]["text"] == self.expected)

        self._neighbours = tuple(threading.Thread(target=go_on, daemon=True) for _ in range(count))
        for thread in self._neighbours:
            thread.start()
        try:
            yield
        finally:
            ended.set()
            for thread in self._neighbours:
                thread.join()

    def stop(self) -> None:
        """End the server."""
        self._patch.stop()
        self._encode_patch.stop()
        sys.setswitchinterval(self._interval_s)
        self.server.stop()

    def left_behind(self) -> list[str]:
        """What is still there although nobody is, in words."""
        stats = self.server.call(lambda engine: engine.stats())
        self.num_preemptions = stats.num_preemptions
        wait_until(lambda: self._open_things() == self._baseline, 5)
        cache, now = stats.cache, self._open_things()
        counts = {
            "active blocks": cache.num_active_blocks,
            "leaked blocks": cache.num_leaked_blocks,
            "sequences": cache.num_sequences,
            "rebuilds": cache.num_rebuilds,
            "requests": stats.num_running + stats.num_waiting + self.server.llm.num_open,
            "tasks": max(now[0] - self._baseline[0], 0),
            "descriptors": max(now[1] - self._baseline[1], 0),
        }
        self.server.call(lambda engine: engine.cache.verify())
        return [f"{number} {name} are left" for name, number in counts.items() if number]


def run_all(watched: Watched, trials: Iterable[Trial], told: list[bool]) -> Generator[tuple[str, bool]]:
    """What was wrong with each trial, and whether it was freed late; `told` is what those beside it got."""
    by_load: dict[int, list[Trial]] = {}
    for trial in trials:
        by_load.setdefault(MAX_SEQS + 1 if trial.state == "queued" else 1, []).append(trial)
    for num_neighbours, several in by_load.items():
        with watched.neighbours(num_neighbours, told.append):
            yield from map(watched.run, several)


def count(model: str, trials: Iterable[Trial], *, timed: bool = False) -> list[Figure]:
    """Trials: what was not freed within a step or left behind; and what others got meanwhile. timed: judged are times
    too: of all that leave no more than LATE_SHARE may be freed late (the 99th percentile). Trials that ask for a small
    cache have a server of their own."""
    wrong: list[str] = []
    told: list[bool] = []
    times: list[bool] = []
    met: Counter[str] = Counter()
    by_server: dict[bool, list[Trial]] = {}
    for trial in trials:
        by_server.setdefault(trial.state == "preempted", []).append(trial)
    for is_small, several in by_server.items():
        watched = Watched(model, **(SMALL if is_small else {}))
        try:
            for what, late in run_all(watched, several, told):
                wrong += [what] if what else []
                times.append(late)
            wrong += watched.left_behind()
        finally:
            watched.stop()
        met += watched.met
        met["preemptions"] += watched.num_preemptions
    num_late, most_late = sum(times), max(1, round(LATE_SHARE * len(times)))
    if timed and num_late > most_late:
        wrong.append(f"{num_late} of {len(times)} were freed more than {LATE_S} s later, {most_late} at the most")
    also = {f"left at {state}": met[state] for state in STATES} | {"preemptions": met["preemptions"]}
    also |= {f"freed more than {1000 * LATE_S:.0f} ms later": num_late} if timed else {}
    return [
        Figure(
            "R6",
            "held blocks for more than a step, or left something",
            len(wrong),
            len(times),
            "disconnects",
            also,
            wrong,
        ),
        Figure("R6", "others changed", told.count(False), len(told), "answers beside those that left"),
    ]


def shard(number: int) -> list[Figure]:
    """A part of the release size: every state with every form first, then drawn ones."""
    trials = every_trial() if number == 0 else drawn_trials(range(PER_SHARD * number, PER_SHARD * (number + 1)))
    with tiny_model() as model:
        return count(model, trials, timed=True)
