"""From the runs of `bench kvcache` to its report: rows, curves by position, the published figure beside them.

Owns the JSON object and the terminal's table; nothing is measured here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from pagemill.base.units import format_seconds
from pagemill.bench.generation import Generation
from pagemill.bench.kvcache import DEFAULT_PROMPT, WEIGHTS_SEED, WITH, WITHOUT, Measurement, Reading, Settings, Subject
from pagemill.bench.machine import describe_git, describe_machine, describe_versions, disturbance
from pagemill.bench.report import Row, rounded, timestamp
from pagemill.kernels.target import choose_target

PUBLISHED: dict[str, Any] = {
    "source": "published",
    "model": "GPT-2 medium",
    "hardware": "a GPU",
    "prompt": DEFAULT_PROMPT,
    "num_tokens": 1000,
    "num_runs": 5,
    "unit": "s",
    "with": {"mean": 21.7, "std": 0.5},
    "without": {"mean": 107.0, "std": 2.0, "more_than": True},
}
RATIO = "without / with"

_FIRST = "first token"
_TAIL_TOKENS = 16
_MODES = (WITH, WITHOUT)


def make_report(subject: Subject, settings: Settings, found: Measurement) -> dict[str, Any]:
    """The bench's JSON object, without the names of its files. Times in the units that stand beside them."""
    built = subject.built
    target = choose_target() if built.config.executor == "native" else built.config.executor
    barriers = Row("barrier", "all", "ns", tuple(run.barrier_ns for run in found.runs)).as_json()
    machine = describe_machine(target, built.num_threads) | {
        "barrier_ns": {name: barriers[name] for name in ("median", "p10", "p90", "samples")},
        "cpu_shares": disturbance(found.before, found.after),
    }
    report: dict[str, Any] = {
        "bench": "kvcache",
        "date": timestamp(),
        "machine": machine,
        "versions": describe_versions(),
        "git": describe_git(),
        "settings": _settings(subject, settings),
        "interrupted": found.interrupted,
        "rows": [row.as_json() for row in make_rows(found, settings.num_tokens)],
        "positions": curves(found, len(subject.prompt)),
        "runs": [_run_json(run) for run in found.runs],
        "token_ids": max((run.token_ids for run in found.runs), key=len),
    }
    if built.spec.name == "gpt2-medium":
        report["published"] = PUBLISHED
    return report


def make_rows(found: Measurement, num_tokens: int) -> list[Row]:
    """The figures, each with and without the cache, and the ratio of each run without it to those with it right before
    and right after.

    After an interruption the runs are compared over the longest beginning that each mode has reached.
    """
    reached = [max(len(run.seconds) for run in found.of(mode)) for mode in _MODES if found.of(mode)]
    count = min(num_tokens, *reached) if len(reached) > 1 else reached[0]
    runs = {mode: [run for run in found.of(mode) if len(run.seconds) >= count] for mode in _MODES}
    rows = []
    for work, unit, figure in _works(count):
        samples = {mode: tuple(figure(run) for run in runs[mode]) for mode in _MODES}
        rows += [Row(work, mode, unit, samples[mode]) for mode in _MODES if samples[mode]]
        beside = [samples[WITH][index : index + 2] for index in range(len(samples[WITHOUT]))]
        ratios = tuple(
            without / float(np.mean(near)) for without, near in zip(samples[WITHOUT], beside, strict=True) if near
        )
        if ratios and work != _FIRST:
            rows.append(Row(work, RATIO, "×", ratios))
    return rows + _reading_rows(found)


def _works(count: int) -> list[tuple[str, str, Callable[[Generation], float]]]:
    """(what, unit, figure of a run) over the first `count` tokens of each run."""
    works: list[tuple[str, str, Callable[[Generation], float]]] = [
        (f"generate {count:,} tokens", "s", lambda run: run.total_s(count)),
        (_FIRST, "ms", lambda run: 1e3 * run.seconds[0]),
    ]
    if count > 1:
        tail = min(_TAIL_TOKENS, count - 1)
        works += [
            ("time per token", "ms", lambda run: 1e3 * float(np.mean(run.seconds[1:count]))),
            (f"time per token, last {tail}", "ms", lambda run: 1e3 * float(np.mean(run.seconds[count - tail : count]))),
        ]
    return works


def _reading_rows(found: Measurement) -> list[Row]:
    """How fast histories of up to nine lengths are read: as a prompt with the cache, as recomputation without. They
    should be alike, else the comparison would be with a slow baseline."""
    work, runs = f"read {found.num_prefill:,} tokens", [run for run in found.readings if run]
    figures: tuple[tuple[str, str, Callable[[Reading], float]], ...] = (
        (WITH, "tok/s", lambda each: each.num_tokens / each.with_s),
        (WITHOUT, "tok/s", lambda each: each.num_tokens / each.without_s),
        (RATIO, "×", lambda each: each.with_s / each.without_s),
    )
    return [
        Row(work, mode, unit, tuple(float(np.median([figure(each) for each in run])) for run in runs))
        for mode, unit, figure in figures
        if runs
    ]


def curves(found: Measurement, num_prompt: int) -> dict[str, dict[str, list[float]]]:
    """Time per token by position, over the runs that reached it: mode -> position (tokens before it), median_ms,
    p10_ms, p90_ms. The first token, which reads the prompt, is the first entry."""
    result = {}
    for mode in _MODES:
        runs = found.of(mode)
        longest = max((len(run.seconds) for run in runs), default=0)
        at = [[1e3 * run.seconds[i] for run in runs if len(run.seconds) > i] for i in range(longest)]
        result[mode] = {
            "position": [float(num_prompt + i) for i in range(longest)],
            "median_ms": [rounded(float(np.median(each))) for each in at],
            "p10_ms": [rounded(float(np.quantile(each, 0.1))) for each in at],
            "p90_ms": [rounded(float(np.quantile(each, 0.9))) for each in at],
        }
    return result


def _settings(subject: Subject, settings: Settings) -> dict[str, Any]:
    built = subject.built
    return {
        "model": built.config.model,
        "name": subject.name,
        "weights": f"random, seed {WEIGHTS_SEED}" if subject.random else "checkpoint",
        "dtype": subject.dtype,
        "kv_codec": built.kv_spec.codec,
        "num_tokens": settings.num_tokens,
        "num_runs": settings.num_runs,
        "num_runs_without": settings.num_runs_without,
        "prompt": settings.prompt or DEFAULT_PROMPT,
        "prompt_token_ids": list(subject.prompt),
        "sampling": "greedy, past any end of text",
        "modes": {WITH: "paged", WITHOUT: "none"},
        "seed": built.config.seed,
        "engine": asdict(built.config),
    }


def _run_json(run: Generation) -> dict[str, Any]:
    return {
        "mode": run.mode,
        "complete": run.complete,
        "total_s": rounded(run.total_s()),
        "barrier_ns": rounded(run.barrier_ns),
        "token_s": [rounded(each) for each in run.seconds],
    }


def make_table(report: dict[str, Any]) -> Table:
    """The report as a table for people: mean ± standard deviation, ratios, the published figure where it applies."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("mean ± std. deviation", no_wrap=True)
    for heading in ("without the cache", "with the cache", "ratio"):
        table.add_column(heading, justify="right")
    works: dict[str, dict[str, dict[str, Any]]] = {}
    for row in report["rows"]:
        works.setdefault(row["work"], {})[row["mode"]] = row
    for work, by_mode in works.items():
        ratio = by_mode.get(RATIO)
        table.add_row(
            work,
            *(_figure(by_mode.get(mode)) for mode in (WITHOUT, WITH)),
            f"{ratio['median']:.3g}×" if ratio else "",
        )
    if "published" in report:
        known = report["published"]
        without, with_ = known["without"], known["with"]
        table.add_section()
        table.add_row(
            f"{known['source']}: {known['model']},\n"
            f"{known['num_tokens']:,} tokens, {known['num_runs']} runs, {known['hardware']}",
            f"> {without['mean']:g} ± {without['std']:g} s",
            f"{with_['mean']:g} ± {with_['std']:g} s",
            f"> {without['mean'] / with_['mean']:.1f}×",
        )
    return table


def title_of(report: dict[str, Any]) -> str:
    """Model, formats and amounts in one line."""
    settings = report["settings"]
    weights = "random weights, " if settings["weights"] != "checkpoint" else ""
    dtype = "weights as stored" if settings["dtype"] == "checkpoint" else settings["dtype"]
    return (
        f"{settings['name']} ({weights}{dtype}, KV {settings['kv_codec']}): "
        f"{len(settings['prompt_token_ids'])} + {settings['num_tokens']:,} tokens, "
        f"{settings['num_runs']} + {settings['num_runs_without']} runs"
    )


def remarks(report: dict[str, Any]) -> list[str]:
    """What the figures were measured on, one line each."""
    machine = report["machine"]
    barrier = machine["barrier_ns"]["median"]
    lines = [
        f"{machine['cpu']}, {machine['num_threads']} of {machine['num_cores']} cores, {machine['target']}; "
        f"barrier {barrier:,.0f} ns"
    ]
    shares = machine["cpu_shares"]
    if shares is not None:
        lines.append(
            f"of all CPU time: this process {shares['own']:.0%}, other processes {shares['others']:.0%}, taken by the "
            f"hypervisor {shares['steal']:.1%}"
        )
    for run in report["runs"]:
        if not run["complete"]:
            done = len(run["token_s"])
            lines.append(
                f"interrupted: a run {run['mode']} the cache ended at token {done:,} of "
                f"{report['settings']['num_tokens']:,} after {format_seconds(run['total_s'])}"
            )
    return lines


def _figure(row: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    mean, std = row["mean"], row["std"]
    places = 0 if mean >= 100 else 1 if mean >= 10 else 2 if mean >= 1 else 3
    spread = "" if std is None else f" ± {std:,.{places}f}"
    return f"{mean:,.{places}f}{spread} {row['unit']}"
