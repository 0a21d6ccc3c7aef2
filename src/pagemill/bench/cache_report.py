"""From the figures of `bench cache` to its report. Owns the JSON object, the terminal's tables and the remarks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from pagemill.bench.cache import GROUPS, Measurement
from pagemill.bench.cache_figures import Settings, Subject
from pagemill.bench.machine import describe_git, describe_machine, describe_versions, disturbance
from pagemill.bench.report import Row, timestamp
from pagemill.kernels.target import choose_target

_SHARES = ("share", "hit ratio", "ratio")


def make_report(subject: Subject | None, settings: Settings, found: Measurement) -> dict[str, Any]:
    """The bench's JSON object, without the names of its files."""
    built = None if subject is None else subject.built
    barriers = Row("barrier", "all", "ns", tuple(found.barriers_ns or (0.0,))).as_json()
    return {
        "bench": "cache",
        "date": timestamp(),
        "machine": describe_machine(choose_target(), 0 if built is None else built.num_threads)
        | {
            "barrier_ns": {name: barriers[name] for name in ("median", "p10", "p90", "samples")},
            "cpu_shares": disturbance(found.before, found.after),
        },
        "versions": describe_versions(),
        "git": describe_git(),
        "settings": {
            "model": None if built is None else built.config.model,
            "name": None if built is None else Path(built.config.model).name or built.spec.name,
            "kv_codec": None if built is None else built.kv_spec.codec,
            "cache_policy": None if built is None else built.config.cache_policy,
            "rows": list(settings.rows),
            "num_runs": settings.num_runs,
            "quick": settings.quick,
            "clock": "CPU time of the process" if settings.cpu_time else "wall",
            "trace": settings.trace,
            "lengths": settings.lengths,
            "seed": settings.seed,
        },
        "interrupted": found.interrupted,
        "rows": [each.as_json() for each in found.figures],
    }


def make_table(report: dict[str, Any], group: str) -> Table:
    """A group's rows: median, 10th to 90th percentile, goal, and whether it is met."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("work", "mode"):
        table.add_column(name)
    for name in ("median", "p10–p90", "goal"):
        table.add_column(name, justify="right")
    table.add_column("")
    before = ""
    for row in report["rows"]:
        if row["group"] != group:
            continue
        work = row["work"] if row["engine"] == "pagemill" else f"{row['engine']}: {row['work']}"
        spread = f"{_number(row, 'p10')}–{_number(row, 'p90')}" if len(row["samples"]) > 1 else ""
        table.add_row(
            "" if work == before else work,
            row["mode"],
            f"{_number(row, 'median')}{_unit(row)}",
            spread,
            _goal(row),
            {None: "", True: "met", False: "missed"}[row["met"]],
        )
        before = work
    return table


def sections(report: dict[str, Any]) -> list[tuple[str, list[Table]]]:
    """A title and a table for each group that has rows."""
    there = dict.fromkeys(row["group"] for row in report["rows"])
    return [(f"{name}: {GROUPS[name][1]}", [make_table(report, name)]) for name in there]


def remarks(report: dict[str, Any]) -> list[str]:
    """What the figures were measured on, one line each."""
    machine, settings = report["machine"], report["settings"]
    lines = []
    if settings["model"] is not None:
        lines.append(
            f"{settings['name']}, KV {settings['kv_codec']}; {machine['cpu']}, {machine['num_threads']} of "
            f"{machine['num_cores']} cores, {machine['target']}; barrier {machine['barrier_ns']['median']:,.0f} ns"
        )
    if settings["clock"] != "wall":
        lines.append("times are CPU time on one kernel thread: for ratios; on an idle machine two threads take less")
    if settings["quick"]:
        lines.append("quick: small sizes, so that goals do not apply to most rows")
    shares = machine["cpu_shares"]
    if shares is not None:
        lines.append(
            f"of all CPU time: this process {shares['own']:.0%}, other processes {shares['others']:.0%}, taken by the "
            f"hypervisor {shares['steal']:.1%}"
        )
    missed = [row for row in report["rows"] if row["met"] is False]
    judged = [row for row in report["rows"] if row["met"] is not None]
    lines.append(f"{len(judged) - len(missed)} of {len(judged)} goals met")
    if report["interrupted"]:
        lines.append("interrupted: what had been measured by then")
    return lines


def _goal(row: dict[str, Any]) -> str:
    if row["goal"] is None:
        return ""
    [(name, value)] = row["goal"].items()
    shown = f"{value:.2%}" if row["unit"] == "share" else f"{value:,.4g}"
    return f"{'≤' if name == 'at_most' else '≥'} {shown}"


def _number(row: dict[str, Any], name: str) -> str:
    value = row[name]
    if row["unit"] == "share":
        return f"{value:.2%}"
    if row["unit"] in _SHARES:
        return f"{value:.4f}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _unit(row: dict[str, Any]) -> str:
    if row["unit"] in _SHARES:
        return ""
    unit = {"us": "µs", "ms p99": "ms"}.get(row["unit"], row["unit"])
    return unit if unit == "×" else f" {unit}"
