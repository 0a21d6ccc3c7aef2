"""From the measurement of `bench peers` to its report: rows with ratios to the best peer, warnings, tables.

Owns the JSON object and how it is shown; nothing is measured here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from pagemill.bench.machine import describe_machine
from pagemill.bench.peers_catalog import (
    KNOWN,
    KNOWN_FROM,
    KNOWN_MODEL,
    KNOWN_SHARE,
    KNOWN_THREADS,
    PAGEMILL,
    Contestant,
)
from pagemill.bench.peers_run import Measured, Measurement, Settings
from pagemill.bench.peers_worker import Loaded
from pagemill.bench.report import Row, absence_remarks, machine_remarks, report_heading, rounded
from pagemill.kernels.target import choose_target


@dataclass(frozen=True, slots=True)
class Context:
    """What a report tells beside the measurement. absent: peer -> why it was not run. pagemill: our engine's options
    as given. model, weight_format: of the checkpoint."""

    model: str
    weight_format: str
    pagemill: Mapping[str, Any]
    absent: Mapping[str, str]


def make_report(context: Context, settings: Settings, found: Measurement) -> dict[str, Any]:
    """The bench's JSON object, without the names of its files."""
    machine = describe_machine(choose_target(), settings.num_threads) | {"cpu_shares": found.cpu_shares}
    return {
        **report_heading("peers", machine),
        "settings": {
            "model": context.model,
            "weight_format": context.weight_format,
            "pagemill": dict(context.pagemill),
            "num_runs": settings.num_runs,
            "num_threads": settings.num_threads,
            "timeout_s": settings.timeout_s,
            "seed": settings.seed,
            "known": f"{KNOWN_FROM}; a warning below {KNOWN_SHARE:.0%}",
        },
        "engines": [_engine(each, found) for each in dict.fromkeys((*found.loads, *found.failures))],
        "absent": dict(context.absent),
        "interrupted": found.interrupted,
        "rows": [row for measured in found.rows for row in _rows(measured, settings, context)],
    }


def _engine(contestant: Contestant, found: Measurement) -> dict[str, Any]:
    entry = engine_entry(contestant, found.loads.get(contestant), found.failures.get(contestant))
    return {"engine": contestant.engine, "mode": contestant.mode, "model": Path(contestant.model).name, **entry}


def engine_entry(contestant: Contestant, loaded: Loaded | None, failure: str | None) -> dict[str, Any]:
    """Where an engine came from, what it says of itself, and why it was left out if it was."""
    return {
        "python": contestant.command[0],
        "note": contestant.note,
        "versions": None if loaded is None else loaded.versions,
        "load_s": None if loaded is None else rounded(loaded.seconds),
        "failure": failure,
    }


def _rows(measured: Measured, settings: Settings, context: Context) -> list[dict[str, Any]]:
    work = measured.work
    best = best_peer(measured)
    barriers = Row(work.name, "", "ns", tuple(measured.barriers)).as_json() if measured.barriers else None
    rows = []
    for contestant, samples in measured.samples.items():
        row = Row(work.name, contestant.mode, work.unit, tuple(samples), contestant.engine)
        known = None
        if settings.num_threads == KNOWN_THREADS and KNOWN_MODEL in context.model.lower():
            known = KNOWN.get((contestant.engine, contestant.mode), {}).get(work.name)
        ratio = None if best is None else _ratio(measured, contestant, best)
        ours = contestant.engine == PAGEMILL
        rows.append(
            {
                **row.as_json(),
                "kind": work.kind,
                "num_streams": work.num_streams,
                "num_prompt_tokens": work.num_prompt_tokens,
                "num_tokens": work.num_tokens,
                "alternative": measured.alternatives.get(contestant),
                "best_peer": None if best is None else {"engine": best.engine, "mode": best.mode},
                "ratio": ratio,
                "goal": work.goal if ours else None,
                "floor": work.floor if ours else None,
                "verdict": _verdict(work.goal, work.floor, ratio) if ours else None,
                "known": None if known is None else list(known),
                "below_known": known is not None and row.median < KNOWN_SHARE * known[0],
                "barrier_ns": None if barriers is None else {key: barriers[key] for key in ("median", "samples")},
                "cpu_shares": measured.cpu_shares,
            }
        )
    return rows


def best_peer(measured: Measured) -> Contestant | None:
    """The peer with the best median of a row, None where none has one."""
    peers = {each: float(np.median(found)) for each, found in measured.samples.items() if each.engine != PAGEMILL}
    if not peers:
        return None
    return (min if measured.work.kind == "start" else max)(peers, key=lambda each: peers[each])


def _ratio(measured: Measured, contestant: Contestant, best: Contestant) -> dict[str, Any]:
    """How many times faster than the best peer: of the medians, and the spread over the rounds that both have."""
    work, ours, theirs = measured.work, measured.samples[contestant], measured.samples[best]
    rounds = [work.times_faster(a, b) for a, b in zip(ours, theirs, strict=False)]
    return {
        "median": rounded(work.times_faster(float(np.median(ours)), float(np.median(theirs)))),
        "p10": rounded(float(np.quantile(rounds, 0.1))),
        "p90": rounded(float(np.quantile(rounds, 0.9))),
    }


def _verdict(goal: float | None, floor: float | None, ratio: Mapping[str, float] | None) -> str | None:
    if ratio is None or goal is None or floor is None:
        return None
    return "goal" if ratio["median"] >= goal else "floor" if ratio["median"] >= floor else "below"


def title_of(report: dict[str, Any]) -> str:
    """Model and settings in one line."""
    settings = report["settings"]
    return f"{settings['model']} ({settings['weight_format']}), {settings['num_threads']} threads"


def make_tables(report: dict[str, Any]) -> list[Table]:
    """One table for each row of work: median, p10 to p90, times faster than the best peer, figure seen elsewhere."""
    tables = []
    for name in dict.fromkeys(row["work"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["work"] == name]
        barrier = rows[0]["barrier_ns"]
        beside = "" if barrier is None else f", barrier {barrier['median']:,.0f} ns"
        title = f"{name}, {rows[0]['unit']}{beside}"
        table = Table(box=SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left", title_style="bold")
        table.add_column("engine")
        for heading in ("median", "p10–p90", "÷ best", "p10–p90", "seen"):
            table.add_column(heading, justify="right")
        for row in sorted(rows, key=lambda each: each["median"], reverse=rows[0]["kind"] != "start"):
            table.add_row(*_cells(row))
        tables.append(table)
    return tables


def _cells(row: dict[str, Any]) -> list[str]:
    ratio, known = row["ratio"], row["known"]
    form = ".3g" if row["unit"] == "s" else ",.0f"
    return [
        f"{row['engine']} {row['mode']}",
        f"{row['median']:{form}}",
        f"{row['p10']:{form}}–{row['p90']:{form}}",
        "" if ratio is None else f"{ratio['median']:.2f}",
        "" if ratio is None else f"{ratio['p10']:.2f}–{ratio['p90']:.2f}",
        "" if known is None else "–".join(f"{each:,.0f}" for each in dict.fromkeys(known)),
    ]


def remarks(report: dict[str, Any]) -> list[str]:
    """Verdicts, warnings, what could not be had or failed, and the machine, one line each."""
    lines = []
    for row in report["rows"]:
        if row["verdict"] is not None:
            said = {
                "goal": "at or above the goal",
                "floor": "above the floor, below the goal",
                "below": "below the floor",
            }
            lines.append(
                f"{row['work']}: {row['engine']} {row['mode']} is {row['ratio']['median']:.2f}× the best peer, "
                f"{said[row['verdict']]} (goal {row['goal']:g}×, floor {row['floor']:g}×)"
            )
    for row in report["rows"]:
        if row["below_known"]:
            share = row["median"] / row["known"][0]
            lines.append(
                f"warning: {row['engine']} {row['mode']}, {row['work']}: {row['median']:,.0f} is {share:.0%} of "
                f"{row['known'][0]:,.0f} ({KNOWN_FROM}); on an idle machine of that kind it would be mis-set"
            )
    for each in report["engines"]:
        if each["note"]:
            lines.append(f"{each['engine']} {each['mode']}: {each['note']}")
        if each["failure"] is not None:
            lines.append(f"failed: {each['engine']} {each['mode']} {each['failure']}")
    lines += absence_remarks(report)
    if report["interrupted"]:
        lines.append("interrupted: rows that are missing or short were not measured to the end")
    return lines + machine_remarks(report["machine"])
