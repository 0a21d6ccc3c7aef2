"""Where the time of a decode step goes: the engine's stages, timed from inside, for a number of streams at a time.

Owns the stop watch, the runs and the report. The stages are the engine's and the runner's own (`on_stage`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from pagemill.base.config import EngineConfig
from pagemill.base.errors import ConfigError
from pagemill.base.params import SamplingParams
from pagemill.bench.machine import barrier_ns, describe_git, describe_machine, describe_versions
from pagemill.bench.report import MISS, PASS, Row, timestamp
from pagemill.build import Built
from pagemill.execution.runner import Runner
from pagemill.kernels.target import choose_target

STAGES = ("schedule", "batch", "native", "sampling", "commit", "deltas", "rest")
STEP, PYTHON = "step", "all but native"
PROMPT_TOKENS = 4
WARM_STEPS = 4
# Goals for all but the native call, by the number of streams: the most microseconds, or the most of the step. They are
# judged for greedy steps, which is what they were set for.
GOALS: dict[int, dict[str, float]] = {1: {"median": 150.0}, 32: {"share": 0.05}, 256: {"share": 0.03}}

_GREEDY = SamplingParams(temperature=0.0, ignore_eos=True, seed=1)
_SAMPLED = SamplingParams(temperature=0.8, top_p=0.9, logprobs=5, ignore_eos=True, seed=1)


@dataclass(frozen=True, slots=True)
class Settings:
    """streams: how many sequences decode together, one run for each number. num_steps: steps that are timed.
    sampled: tokens are drawn with top-p and log-probabilities instead of greedily."""

    streams: tuple[int, ...]
    num_steps: int
    sampled: bool

    @property
    def max_model_len(self) -> int:
        """Positions that a stream needs."""
        return PROMPT_TOKENS + self.num_steps + 2 * WARM_STEPS


@dataclass(frozen=True, slots=True)
class Profile:
    """One number of streams. seconds: stage, STEP or PYTHON -> of each timed step."""

    num_streams: int
    seconds: dict[str, tuple[float, ...]]


class StageWatch:
    """Time of each stage of the step that runs. Mutated by `begin`, `reach` and `end`."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._began_s = 0.0
        self._ends: list[tuple[str, float]] = []

    def begin(self) -> None:
        """A step begins."""
        self._ends = []
        self._began_s = self._clock()

    def reach(self, stage: str) -> None:
        """`stage` ends here, and began where the one before it ended."""
        self._ends.append((stage, self._clock()))

    def end(self) -> dict[str, float]:
        """The step ends. Seconds of every stage, of the step, and of all but the native call."""
        self.reach("rest")
        spent = dict.fromkeys(STAGES, 0.0)
        last_s = self._began_s
        for stage, end_s in self._ends:
            spent[stage] += end_s - last_s
            last_s = end_s
        total_s = last_s - self._began_s
        return spent | {STEP: total_s, PYTHON: total_s - spent["native"]}


def parse_streams(text: str) -> tuple[int, ...]:
    """Numbers of streams from `1,32,256`. Raises ConfigError."""
    try:
        streams = tuple(int(each) for each in text.split(","))
    except ValueError:
        streams = ()
    if not streams or not all(1 <= each <= 65_536 for each in streams):
        raise ConfigError(f"--streams is {text!r}; give numbers of sequences from 1 to 65,536, as 1,32,256")
    return streams


def engine_options(settings: Settings, arguments: dict[str, Any]) -> dict[str, Any]:
    """Engine options under which all streams decode in one step; those given stand."""
    most = max(settings.streams)
    wanted: dict[str, Any] = {
        "max_num_seqs": most,
        "max_num_batched_tokens": max(512, most * PROMPT_TOKENS),
        "max_model_len": settings.max_model_len,
    }
    return wanted | arguments


def measure(built: Built, settings: Settings, num_streams: int) -> Profile:
    """Decode `num_streams` sequences together and time every step in which all of them get a token.

    Raises ConfigError where the engine cannot run so many at once.
    """
    engine, runner = built.engine, built.executor
    assert isinstance(runner, Runner)
    chosen = _SAMPLED if settings.sampled else _GREEDY
    params = replace(chosen, max_tokens=settings.num_steps + WARM_STEPS + 2)
    watch = StageWatch()
    for index in range(num_streams):
        prompt = [(17 + 31 * index + 7 * i) % built.spec.vocab_size for i in range(PROMPT_TOKENS)]
        engine.add_request(f"stream {index}", prompt, params)
    steps: list[dict[str, float]] = []
    engine.on_stage = runner.on_stage = watch.reach
    try:
        while engine.has_unfinished:
            watch.begin()
            deltas = engine.step()
            spent = watch.end()
            failed = next((delta.error for delta in deltas if delta.error is not None), None)
            if failed is not None:
                raise failed
            if len(deltas) == num_streams and not any(delta.finished for delta in deltas):
                steps.append(spent)
    finally:
        engine.on_stage = runner.on_stage = None
        for index in range(num_streams):
            engine.abort(f"stream {index}")
    steps = steps[WARM_STEPS : WARM_STEPS + settings.num_steps]
    if not steps:
        raise ConfigError(
            f"{num_streams} streams never decoded in one step; raise max_num_seqs, max_num_batched_tokens or "
            "kv_cache_memory_bytes, or give fewer streams"
        )
    return Profile(num_streams, {name: tuple(step[name] for step in steps) for name in (*STAGES, STEP, PYTHON)})


def make_report(built: Built, config: EngineConfig, settings: Settings, profiles: list[Profile]) -> dict[str, Any]:
    """One JSON object: a row for each number of streams and stage, in microseconds, with p99 and the share of the
    step's median; with GOALS and the verdict in the rows that have one."""
    rows = []
    for profile in profiles:
        step = Row("", STEP, "us", tuple(1e6 * s for s in profile.seconds[STEP])).median
        for stage, seconds in profile.seconds.items():
            row = Row(streams_text(profile.num_streams), stage, "us", tuple(1e6 * s for s in seconds))
            found = row.as_json() | {"p99": row.quantile(0.99), "share": row.median / step}
            goal = GOALS.get(profile.num_streams) if stage == PYTHON and not settings.sampled else None
            rows.append(found | {"goal": goal, "verdict": None if goal is None else _verdict(found, goal)})
    return {
        "bench": "step",
        "date": timestamp(),
        "machine": describe_machine(choose_target(), built.num_threads),
        "versions": describe_versions(),
        "git": describe_git(),
        "settings": {
            "model": config.model,
            "name": Path(config.model).name or built.spec.name,
            "streams": list(settings.streams),
            "num_steps": settings.num_steps,
            "sampling": "temperature 0.8, top-p 0.9, 5 logprobs" if settings.sampled else "greedy",
            "prompt_tokens": PROMPT_TOKENS,
        },
        "barrier_ns": barrier_ns(built.num_threads),
        "rows": rows,
    }


def streams_text(num_streams: int) -> str:
    """A number of streams in words."""
    return f"{num_streams} stream{'' if num_streams == 1 else 's'}"


def _verdict(row: dict[str, Any], goal: dict[str, float]) -> str:
    return PASS if all(row[name] <= limit for name, limit in goal.items()) else MISS


def make_table(report: dict[str, Any]) -> Table:
    """Stages down, numbers of streams across: median, p99 and share of the step; last goals and verdicts, if any."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("stage")
    names = list(dict.fromkeys(row["work"] for row in report["rows"]))
    for name in names:
        table.add_column(f"{name}\nµs", justify="right")
        table.add_column("\np99", justify="right")
        table.add_column("\nshare", justify="right")
    for stage in (*STAGES, PYTHON, STEP):
        cells = []
        for name in names:
            row = next(row for row in report["rows"] if row["work"] == name and row["mode"] == stage)
            cells += [f"{row['median']:,.0f}", f"{row['p99']:,.0f}", f"{row['share']:.1%}"]
        table.add_row(stage, *cells, end_section=stage in (STAGES[-1], STEP))
    by_name = {row["work"]: row for row in report["rows"] if row["mode"] == PYTHON}
    if any(row["goal"] is not None for row in by_name.values()):
        table.add_row(f"goal for {PYTHON}", *(cell for name in names for cell in _goal_cells(by_name[name])))
    return table


def _goal_cells(row: dict[str, Any]) -> tuple[str, str, str]:
    """The goal under the figure that it bounds, and the verdict beside it."""
    goal = row["goal"] or {}
    if "median" in goal:
        return f"≤ {goal['median']:,.0f}", row["verdict"], ""
    return ("", row["verdict"], f"≤ {goal['share']:.0%}") if goal else ("", "", "")
