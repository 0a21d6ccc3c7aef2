"""The measurement of `pagemill bench serve`: every server is started once, and all get the same loads in turns.

Owns warm-up, order, the generator's process, and what happens to a server that fails: it is left out of what follows,
with the reason. Servers that are to keep to the peer's time between tokens are started when that is known, after its
first run of a workload, and get the rest of this workload's turns. Figures and reports are made elsewhere.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import pagemill
from pagemill.base.errors import ConfigError
from pagemill.bench.machine import CpuCounters, disturbance, read_counters
from pagemill.bench.peers_catalog import PAGEMILL
from pagemill.bench.serve_figures import LoadFigures, Objective, figures_of, quantile_ms
from pagemill.bench.serve_servers import Contender, Server, ServerError
from pagemill.bench.serve_workload import Session

MAX_RUNS = 1000
MAX_USERS = 4096
_GENERATOR = "pagemill.bench.serve_load"
_START_S = 300.0
_GRACE_S = 60.0
_POLL_S = 0.2
_SETTLE_S = 60.0
_IDLE_S = 0.4
_IDLE_SHARE = 0.1
_WARM_S = 2.0
_WARM_USERS = 4
_WARMUP_SHARE = 0.2
_MAX_WARMUP_S = 5.0
_QUOTED = 300
_OF_PEER = (
    0.9  # the peer's next run may be quicker, and what is between the server's step and the reader takes time too
)

# Sessions of a workload for a run: (workload, run) -> sessions. Run -1 warms up.
MakeSessions = Callable[[str, int], list[Session]]
# Servers that are to keep to so many milliseconds between tokens.
MakeHeld = Callable[[int], Sequence[Contender]]


@dataclass(frozen=True, slots=True)
class Settings:
    """works: workloads in their order. num_runs: of each on every server. users: who ask at the same time; None where
    sessions begin by the clock. Raises ConfigError for numbers that cannot be."""

    works: tuple[str, ...]
    num_runs: int
    duration_s: float
    users: int | None
    objective: Objective

    def __post_init__(self) -> None:
        if not 1 <= self.num_runs <= MAX_RUNS:
            raise ConfigError(f"--runs is {self.num_runs}; give a number from 1 to {MAX_RUNS:,}")
        if not 1 <= self.duration_s <= 86_400:
            raise ConfigError(f"--duration is {self.duration_s:g} s; give from 1 to 86,400")
        if self.users is not None and not 1 <= self.users <= MAX_USERS:
            raise ConfigError(f"--users is {self.users}; give a number from 1 to {MAX_USERS:,}")

    @property
    def warmup_s(self) -> float:
        """What of each run's beginning is not counted."""
        return min(_MAX_WARMUP_S, _WARMUP_SHARE * self.duration_s)


class Observer(Protocol):
    """Told how the measurement goes on."""

    def started(self, contender: Contender, seconds: float) -> None: ...

    def ended(self, work: str, run: int, contender: Contender, figures: LoadFigures) -> None: ...

    def failed(self, contender: Contender, reason: str) -> None: ...


@dataclass(slots=True)
class Measurement:
    """What was found. Mutated as runs end. runs: (work, contender) -> figures of each run. failures: why a server was
    left out, from then on. unheld: workloads in which no peer told a time between tokens to hold servers to."""

    runs: dict[tuple[str, Contender], list[LoadFigures]] = field(default_factory=dict)
    starts: dict[Contender, float] = field(default_factory=dict)
    failures: dict[Contender, str] = field(default_factory=dict)
    unheld: list[str] = field(default_factory=list)
    cpu_shares: dict[str, float] | None = None
    interrupted: bool = False


def measure(
    contenders: Sequence[Contender],
    settings: Settings,
    sessions: MakeSessions,
    observer: Observer,
    *,
    interrupted: Callable[[], bool] = lambda: False,
    held: MakeHeld | None = None,
) -> Measurement:
    """Run every workload on every server, A B A B, `num_runs` times; a run that is interrupted is not counted. held:
    servers of ours that keep to nine tenths of the peer's 95th percentile between tokens in a workload's first run."""
    with ExitStack() as stack:
        run = _Run(settings, sessions, observer, interrupted, stack)
        for contender in contenders:
            if not interrupted():
                run.start(contender)
        before = run.counters()
        for work in settings.works:
            more: list[Contender] = []
            for index in range(settings.num_runs):
                run.turns(work, index, list(run.servers))
                if not index and held is not None and not interrupted():
                    more = run.hold(work, held)
                    run.turns(work, index, more)
            run.end(more)
        run.found.cpu_shares = disturbance(before, run.counters())
        run.found.interrupted = interrupted()
        return run.found


class _Run:
    """Servers while they are measured. Mutated by `start` and `load`."""

    def __init__(
        self,
        settings: Settings,
        sessions: MakeSessions,
        observer: Observer,
        interrupted: Callable[[], bool],
        stack: ExitStack,
    ) -> None:
        self.settings, self.sessions, self.observer = settings, sessions, observer
        self.interrupted, self.stack = interrupted, stack
        self.found = Measurement()
        self.servers: dict[Contender, Server] = {}
        self.ended_s = 0.0  # CPU time of processes that are no more

    def counters(self) -> CpuCounters | None:
        """Of the machine, with the servers' and the generators' time counted as ours."""
        return read_counters(beside_s=self.ended_s + sum(each.cpu_s() for each in self.servers.values()))

    def start(self, contender: Contender) -> None:
        """Start a server and ask it a little, so that its first run meets no first times."""
        began_s = time.monotonic()
        try:
            server = self.servers[contender] = self.stack.enter_context(Server(contender))
            server.wait(_START_S, self.interrupted)
            self.found.starts[contender] = time.monotonic() - began_s
            warm = self.sessions(self.settings.works[0], -1)
            told = self._generate(server, [replace(each, at_s=0.0) for each in warm], _WARM_S, _WARM_USERS)
            self.ended_s += 0.0 if told is None else float(told["cpu_s"])
            self._settle(server)
        except ServerError as error:
            if not self.interrupted():
                self._fail(contender, str(error))
            return
        self.observer.started(contender, self.found.starts[contender])

    def turns(self, work: str, index: int, contenders: Sequence[Contender]) -> None:
        """One run of each of these servers, as far as they are there."""
        for contender in contenders:
            if contender in self.servers and not self.interrupted():
                self.load(work, index, contender)

    def hold(self, work: str, held: MakeHeld) -> list[Contender]:
        """Start servers that keep to the peer's time between tokens."""
        times = [
            time_ms
            for (name, contender), runs in self.found.runs.items()
            if name == work and contender.engine != PAGEMILL
            if (time_ms := quantile_ms(runs[0].itl_s, 0.95)) is not None
        ]
        if not times:
            self.found.unheld.append(work)
            return []
        contenders = list(held(max(int(_OF_PEER * min(times)), 1)))
        for contender in contenders:
            if not self.interrupted():
                self.start(contender)
        return contenders

    def end(self, contenders: Sequence[Contender]) -> None:
        """End servers that are not needed any more."""
        for contender in contenders:
            self._close(contender)

    def load(self, work: str, index: int, contender: Contender) -> None:
        """One run of one server."""
        server = self.servers[contender]
        before_s = server.cpu_s()
        try:
            told = self._generate(server, self.sessions(work, index), self.settings.duration_s, self.settings.users)
            server.check()
            if told is None:
                return
            self.ended_s += told["cpu_s"]
            figures = figures_of(told, self.settings.warmup_s, self.settings.objective, server.cpu_s() - before_s)
            self._settle(server)
            if not figures.ttft_s and figures.errors:
                raise ServerError(f"answered nothing: {figures.errors[0]}")
        except ServerError as error:
            self._fail(contender, str(error))
            return
        self.found.runs.setdefault((work, contender), []).append(figures)
        self.observer.ended(work, index, contender, figures)

    def _settle(self, server: Server) -> None:
        """Wait until the server has left off what was cut, so that it takes nothing from the run of another."""
        end_s = time.monotonic() + _SETTLE_S
        before_s = server.cpu_s()
        while time.monotonic() < end_s and not self.interrupted():
            time.sleep(_IDLE_S)
            now_s = server.cpu_s()
            if now_s - before_s < _IDLE_SHARE * _IDLE_S:
                return
            before_s = now_s

    def _fail(self, contender: Contender, reason: str) -> None:
        self._close(contender)
        self.found.failures[contender] = reason
        self.observer.failed(contender, reason)

    def _close(self, contender: Contender) -> None:
        server = self.servers.pop(contender, None)
        if server is not None:
            self.ended_s += server.cpu_s()
            server.close()

    def _generate(
        self, server: Server, sessions: Sequence[Session], duration_s: float, users: int | None
    ) -> dict[str, Any] | None:
        """What the generator noted; None where the run was interrupted. Raises ServerError where it ends without."""
        plan = {
            "host": server.host,
            "port": server.port,
            "fields": dict(server.contender.fields),
            "duration_s": duration_s,
            "users": users or 0,
            "spread_s": self.settings.warmup_s / 2,
            "sessions": [_as_plan(each) for each in sessions],
        }
        source = str(Path(pagemill.__file__).parents[1])
        path = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))
        with tempfile.TemporaryFile() as given:
            given.write(json.dumps(plan).encode())
            given.seek(0)
            with subprocess.Popen(
                [sys.executable, "-m", _GENERATOR],
                stdin=given,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": path},
                start_new_session=True,
            ) as process:
                try:
                    out, errors = self._talk(process, duration_s + _GRACE_S)
                except BaseException:
                    process.kill()
                    raise
        if self.interrupted():
            return None
        if process.returncode:
            last = errors.decode(errors="replace").strip().rpartition("\n")[2]
            raise ServerError(f"was not measured: the generator ended with code {process.returncode}: {last[:_QUOTED]}")
        told: dict[str, Any] = json.loads(out)
        return told

    def _talk(self, process: subprocess.Popen[bytes], timeout_s: float) -> tuple[bytes, bytes]:
        end_s = time.monotonic() + timeout_s
        while True:
            with suppress(subprocess.TimeoutExpired):
                return process.communicate(timeout=_POLL_S)
            if self.interrupted() or time.monotonic() > end_s:
                process.kill()
                return process.communicate()


def _as_plan(session: Session) -> dict[str, Any]:
    turns = [{"text": each.text, "max_tokens": each.max_tokens, "think_s": each.think_s} for each in session.turns]
    return {"at_s": session.at_s, "turns": turns}
