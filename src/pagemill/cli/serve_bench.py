"""`pagemill bench serve` in the terminal. Owns options, progress, Ctrl-C and printing; measuring is
`pagemill.bench`'s."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pagemill.base.config import EngineConfig, resolve_config
from pagemill.base.errors import ConfigError
from pagemill.base.units import parse_seconds
from pagemill.bench.peers_catalog import PAGEMILL
from pagemill.bench.peers_setup import SetupError
from pagemill.bench.report import file_stem, prepare_directory
from pagemill.bench.serve_contenders import (
    LLAMA,
    PEER,
    OwnServers,
    Places,
    find_llama,
    llama_contender,
    parse_places,
    usual_places,
)
from pagemill.bench.serve_figures import LoadFigures, Objective, quantile_ms
from pagemill.bench.serve_plot import draw_serve
from pagemill.bench.serve_report import Context, make_report, make_tables, remarks, title_of
from pagemill.bench.serve_run import Settings, measure
from pagemill.bench.serve_servers import Contender
from pagemill.bench.serve_workload import (
    TRACE,
    Session,
    Words,
    make_sessions,
    parse_workloads,
    plain_words,
    trace_sessions,
)
from pagemill.build import tokenizer_of
from pagemill.cli.bench import interrupts
from pagemill.cli.progress import byte_progress
from pagemill.cli.publish import publish
from pagemill.cli.terminal import note
from pagemill.models.checkpoint import Checkpoint, open_checkpoint
from pagemill.models.hub import resolve
from pagemill.planner.machine import kernel_threads, this_machine
from pagemill.simulator.trace import Trace, read_trace
from pagemill.text.tokenizer import Tokenizer

_INTERRUPTED = 130
_PIPE_WIDTH = 160
_QUICK_SCALE = 0.125
_KV_CACHE_BYTES = "1GiB"  # for each of Pagemill's servers, unless given
_SESSIONS_PER_S = 60  # more than any server here ends; a load that runs out is counted up to there
_WARM_SESSIONS = 40
_PROBE = 400
_MOST_SESSIONS = 200_000


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked. rate: sessions per second; None for users, or a trace. scale: of the workloads' lengths. longest:
    tokens of the longest request."""

    works: tuple[str, ...]
    duration_s: float
    users: int | None
    rate: float | None
    trace: Trace | None
    speed: float
    seed: int
    words: Words
    scale: float
    longest: int

    def sessions(self, work: str, run: int) -> list[Session]:
        """Those of one run; run -1 warms up."""
        if work == TRACE:
            return self._traced(run)
        count = _WARM_SESSIONS
        if run >= 0:
            a_second = _SESSIONS_PER_S if self.rate is None else 1.5 * self.rate
            count = min(_MOST_SESSIONS, 32 + (self.users or 0) + int(a_second * self.duration_s))
        made = make_sessions(work, self.words, count, seed=(self.seed, run), scale=self.scale, rate=self.rate)
        return [each for each in made if each.num_positions <= self.longest and each.at_s < self.duration_s]

    def _traced(self, run: int) -> list[Session]:
        assert self.trace is not None
        most = _WARM_SESSIONS if run < 0 else _MOST_SESSIONS
        return trace_sessions(
            self.trace,
            self.words,
            seed=(self.seed, run),
            speed=self.speed,
            duration_s=self.duration_s,
            longest=self.longest,
            most=most,
        )

    def describe(self) -> dict[str, Any]:
        """As the report's settings show it."""
        arrivals = "each user asks again when answered"
        if self.trace is not None:
            arrivals = f"{self.trace.name} × {self.speed:g}"
        elif self.rate is not None:
            arrivals = f"{self.rate:g} sessions/s (Poisson)"
        return {"arrivals": arrivals, "seed": self.seed, "scale": self.scale, "longest": self.longest}


def serve(*, load: dict[str, Any], chosen: dict[str, Any], output: str, as_json: bool, engine: dict[str, Any]) -> int:
    """Measure servers under the same load; print tables or one JSON object, write JSON and plots to `output`.

    Returns 130 where Ctrl-C ended it, 1 where Pagemill itself failed; what was measured by then is reported.
    """
    arguments = dict(engine["arguments"])
    if "max_num_seqs" in arguments:
        raise ConfigError("--max-num-seqs: this bench runs a server for each number of --at-once; give that instead")
    config = resolve_config(arguments, file=engine["file"], origin="command line").config
    if config.target_itl_ms is not None:
        raise ConfigError("target_itl_ms: this bench runs servers with and without; give it with --at-once, as 8@25")
    if config.kv_cache_memory_bytes is None:
        arguments["kv_cache_memory_bytes"] = _KV_CACHE_BYTES
    settings = _settings(load)
    given = None if load["at_once"] is None else parse_places(load["at_once"])
    _check_places(given or (), config, chosen["peers"])
    trace = None if load["trace"] is None else read_trace(load["trace"], seed=load["seed"])
    if chosen["peers"] not in ("", "none", LLAMA):
        raise ConfigError(f"--peers is {chosen['peers']!r}; give {LLAMA} or none, or leave it out")
    directory = prepare_directory(output)
    with byte_progress(quiet=as_json) as report_bytes:
        checkpoint = open_checkpoint(resolve(config.model, progress=report_bytes))
    tokenizer = tokenizer_of(checkpoint.vocab)
    if tokenizer is None:
        raise ConfigError(f"{config.model} has no vocabulary, and prompts are sent as text; take another model")
    asked = _load(load, settings, trace, tokenizer, checkpoint, config)
    num_threads = kernel_threads(config, this_machine())
    others, absent = _peers(chosen, checkpoint, tokenizer, asked.longest, num_threads)
    with_peer = bool(others) and _can_bound(config)
    places = given or usual_places(settings.users, quick=load["quick"], with_peer=with_peer)
    own = OwnServers(config.model, arguments, engine["file"], places)
    with interrupts() as interrupted, _terminable():
        found = measure(
            [*own.plain(), *others],
            settings,
            lru_cache(1)(asked.sessions),
            _Told(),
            interrupted=interrupted,
            held=own.held if any(each.bound == PEER for each in places) else None,
        )
    if not found.runs:
        note("nothing was measured" + "".join(f"; {each.name} {why}" for each, why in found.failures.items()))
        return _INTERRUPTED if found.interrupted else 1
    name = Path(config.model).name
    context = Context(name, arguments, asked.describe(), absent, load["quick"], num_threads)
    report = make_report(context, settings, found)
    publish(
        report,
        directory / file_stem("serve", name, report["date"]),
        lambda: [(title_of(report), make_tables(report))],
        lambda: remarks(report),
        draw=draw_serve,
        as_json=as_json,
        pipe_width=_PIPE_WIDTH,
    )
    if found.interrupted:
        return _INTERRUPTED
    return int(any(each.engine == PAGEMILL for each in found.failures))


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the bench as an exception does, so that no server outlives it."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _settings(load: dict[str, Any]) -> Settings:
    quick, rate = load["quick"], load["rate"]
    by_clock = [flag for flag, given in (("--rate", rate), ("--trace", load["trace"])) if given is not None]
    if len(by_clock) > 1 or (by_clock and load["users"] is not None):
        said = " and ".join([*by_clock, *(["--users"] if load["users"] is not None else [])])
        raise ConfigError(f"{said} say differently when requests come; give one of them")
    if rate is not None and not 0 < rate <= 10_000:
        raise ConfigError(f"--rate is {rate:g}; give sessions per second, above 0 and up to 10,000")
    if not 0 < load["speed"] <= 1e6:
        raise ConfigError(f"--speed is {load['speed']:g}; give a number above 0")
    users = load["users"] if load["users"] is not None else (4 if quick else 32)
    return Settings(
        works=(TRACE,) if load["trace"] is not None else parse_workloads(load["workloads"]),
        num_runs=load["num_runs"] if load["num_runs"] is not None else (1 if quick else 3),
        duration_s=parse_seconds(load["duration"] if load["duration"] is not None else (2.0 if quick else 20.0)),
        users=None if by_clock else users,
        objective=Objective(parse_seconds(load["slo_ttft"]), parse_seconds(load["slo_itl"])),
    )


def _check_places(places: tuple[Places, ...], config: EngineConfig, peers: str) -> None:
    """Raise ConfigError where these settings cannot be run."""
    bounds = [each.bound for each in places if each.bound is not None]
    if PEER in bounds and peers == "none":
        raise ConfigError(
            "--at-once asks for the peer's time between tokens, and --peers none leaves the peer out; give milliseconds"
            ", as 8@25"
        )
    if bounds and not _can_bound(config):
        raise ConfigError(
            "--at-once asks for a time between tokens, which goes neither with mixed_step_percent nor with kv_cache "
            "none; leave one of them out"
        )


def _can_bound(config: EngineConfig) -> bool:
    return config.mixed_step_percent is None and config.kv_cache != "none"


def _load(
    load: dict[str, Any],
    settings: Settings,
    trace: Trace | None,
    tokenizer: Tokenizer,
    checkpoint: Checkpoint,
    config: EngineConfig,
) -> Load:
    """Lengths that fit the model: workloads are scaled down where they would not."""
    limit = min(config.max_model_len or checkpoint.spec.context_length, checkpoint.spec.context_length)
    words, scale = plain_words(tokenizer), _QUICK_SCALE if load["quick"] else 1.0
    longest = limit
    if trace is None:
        for _ in range(8):
            probes = (make_sessions(each, words, _PROBE, seed=(load["seed"],), scale=scale) for each in settings.works)
            longest = max(session.num_positions for sessions in probes for session in sessions)
            if longest <= limit:
                break
            scale *= 0.9 * limit / longest
        if longest > limit:
            raise ConfigError(
                f"{config.model} reaches {limit:,} tokens, too few for these workloads; take another model"
            )
    given = (settings.works, settings.duration_s, settings.users, load["rate"], trace, load["speed"], load["seed"])
    return Load(*given, words=words, scale=scale, longest=longest)


def _peers(
    chosen: dict[str, Any], checkpoint: Checkpoint, tokenizer: Tokenizer, longest: int, num_threads: int
) -> tuple[list[Contender], dict[str, str]]:
    """The peer's server, and why it cannot be had."""
    if chosen["peers"] == "none":
        return [], {LLAMA: "left out by --peers none"}
    root, install = Path(chosen["environments"]).expanduser(), chosen["peers"] == LLAMA
    try:
        environment = find_llama(root, chosen["python_llama"], checkpoint, install=install, tell=note)
        return [
            llama_contender(
                environment,
                checkpoint,
                tokenizer,
                root,
                longest=longest,
                num_threads=num_threads,
                install=install or chosen["python_llama"] is not None,
                tell=note,
            )
        ], {}
    except SetupError as error:
        note(f"{LLAMA} is left out: {error}")
        return [], {LLAMA: str(error)}


class _Told:
    """Progress as lines on stderr: a run takes seconds to minutes."""

    def started(self, contender: Contender, seconds: float) -> None:
        note(f"{contender.name}: ready in {seconds:.1f} s")

    def ended(self, work: str, run: int, contender: Contender, figures: LoadFigures) -> None:
        first, between = quantile_ms(figures.ttft_s, 0.95), quantile_ms(figures.itl_s, 0.95)
        note(
            f"{work}, run {run + 1}: {contender.name} {figures.tokens_per_s:,.0f} tok/s, p95 of first tokens "
            f"{'–' if first is None else format(first, ',.0f')} ms, between tokens "
            f"{'–' if between is None else format(between, ',.1f')} ms"
        )

    def failed(self, contender: Contender, reason: str) -> None:
        note(f"{contender.name} {reason}; left out from here on")
