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
from pagemill.bench.peers_mode import accuracy_line, mode_line
from pagemill.bench.peers_run import Measured, Measurement, Settings
from pagemill.bench.peers_worker import Loaded
from pagemill.bench.report import Row, absence_remarks, machine_remarks, report_heading, rounded
from pagemill.kernels.target import choose_target


@dataclass(frozen=True, slots=True)
class Context:
    """What a report tells beside the measurement. absent: peer -> why it was not run. pagemill: our engine's options
    as given. model, weight_format: of the checkpoint. modes: our mode -> what it resolved to (`resolve_mode`) and its
    accuracy (`find_accuracy`)."""

    model: str
    weight_format: str
    pagemill: Mapping[str, Any]
    absent: Mapping[str, str]
    modes: Mapping[str, tuple[dict[str, Any], dict[str, Any] | None]]


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
            "known_skipped": _known_skipped(context.model, settings.num_threads),
        },
        "engines": [_engine(each, found, context) for each in dict.fromkeys((*found.loads, *found.failures))],
        "absent": dict(context.absent),
        "interrupted": found.interrupted,
        "without_peers": found.without_peers,
        "rows": [row for measured in found.rows for row in _rows(measured, settings, context)],
    }


def _known_skipped(model: str, num_threads: int) -> str | None:
    """Why the figures seen elsewhere are not compared with; None where they are."""
    if KNOWN_MODEL in model.lower() and num_threads == KNOWN_THREADS:
        return None
    return f"they are of {KNOWN_MODEL} with {KNOWN_THREADS} threads, and this is {model} with {num_threads}"


def _engine(contestant: Contestant, found: Measurement, context: Context) -> dict[str, Any]:
    entry = engine_entry(contestant, found.loads.get(contestant), found.failures.get(contestant))
    names = {"engine": contestant.engine, "mode": contestant.mode, "model": Path(contestant.model).name}
    if contestant.engine != PAGEMILL:
        return names | entry
    resolved, accuracy = context.modes[contestant.mode]
    return names | entry | {"resolved": resolved, "accuracy": accuracy}


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
    best, goal_peer = best_peer(measured), best_peer(measured, work.goal_peer)
    barriers = Row(work.name, "", "ns", tuple(measured.barriers)).as_json() if measured.barriers else None
    rows = []
    for contestant, samples in measured.samples.items():
        row = Row(work.name, contestant.mode, work.unit, tuple(samples), contestant.engine)
        known = None
        if _known_skipped(context.model, settings.num_threads) is None:
            known = KNOWN.get((contestant.engine, contestant.mode), {}).get(work.name)
        speed = None if known is None else work.times_faster(row.median, (max if work.kind == "start" else min)(known))
        ours = contestant.engine == PAGEMILL
        goal_ratio = _ratio(measured, contestant, goal_peer) if ours and work.goal is not None else None
        rows.append(
            {
                **row.as_json(),
                "kind": work.kind,
                "num_streams": work.num_streams,
                "num_prompt_tokens": work.num_prompt_tokens,
                "num_tokens": work.num_tokens,
                "alternative": measured.alternatives.get(contestant),
                "best_peer": _names(best),
                "ratio": _ratio(measured, contestant, best),
                "goal": work.goal if ours else None,
                "floor": work.floor if ours else None,
                "goal_peer": None if goal_ratio is None else _names(goal_peer),
                "goal_ratio": goal_ratio,
                "verdict": _verdict(work.goal, work.floor, goal_ratio),
                "known": None if known is None else list(known),
                "share_of_known": None if speed is None else rounded(speed),
                "below_known": speed is not None and speed < KNOWN_SHARE,
                "barrier_ns": None if barriers is None else {key: barriers[key] for key in ("median", "samples")},
                "cpu_shares": measured.cpu_shares,
            }
        )
    return rows


def _names(peer: Contestant | None) -> dict[str, str] | None:
    return None if peer is None else {"engine": peer.engine, "mode": peer.mode}


def best_peer(measured: Measured, engine: str | None = None) -> Contestant | None:
    """The peer with the best median of a row, None where none has one. engine: the only one looked at, if given."""
    peers = {
        each: float(np.median(found))
        for each, found in measured.samples.items()
        if each.engine != PAGEMILL and engine in (None, each.engine)
    }
    if not peers:
        return None
    return (min if measured.work.kind == "start" else max)(peers, key=lambda each: peers[each])


def _ratio(measured: Measured, contestant: Contestant, best: Contestant | None) -> dict[str, Any] | None:
    """How many times faster than a peer: of the medians, and the spread over the rounds that both have."""
    if best is None:
        return None
    work, ours, theirs = measured.work, measured.samples[contestant], measured.samples[best]
    rounds = [work.times_faster(a, b) for a, b in zip(ours, theirs, strict=False)]
    return {
        "median": rounded(work.times_faster(float(np.median(ours)), float(np.median(theirs)))),
        "p10": rounded(float(np.quantile(rounds, 0.1))),
        "p90": rounded(float(np.quantile(rounds, 0.9))),
    }


def _verdict(goal: float | None, floor: float | None, ratio: Mapping[str, float] | None) -> str | None:
    """goal, floor or below; below the goal where there is no floor. None where nothing is wanted or compared with."""
    if ratio is None or goal is None:
        return None
    if ratio["median"] >= goal:
        return "goal"
    return "floor" if floor is not None and ratio["median"] >= floor else "below"


def title_of(report: dict[str, Any]) -> str:
    """Model and settings in one line."""
    settings, threads = report["settings"], report["settings"]["num_threads"]
    return f"{settings['model']} ({settings['weight_format']}), {threads} thread{'' if threads == 1 else 's'}"


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
        "" if known is None else "–".join(f"{each:{form}}" for each in dict.fromkeys(known)),
    ]


def remarks(report: dict[str, Any]) -> list[str]:
    """Modes, accuracy, verdicts, warnings, what could not be had or failed, and the machine, one line each."""
    lines = _mode_lines(report)
    lines += [_verdict_line(row) for row in report["rows"] if row["verdict"] is not None]
    lines += [_warning(row) for row in report["rows"] if row["below_known"]]
    if report["settings"]["known_skipped"] is not None:
        lines.append(f"no check against figures seen elsewhere: {report['settings']['known_skipped']}")
    for each in report["engines"]:
        if each["note"]:
            lines.append(f"{each['engine']} {each['mode']}: {each['note']}")
        if each["failure"] is not None:
            lines.append(f"failed: {each['engine']} {each['mode']} {each['failure']}")
    lines += absence_remarks(report)
    if report["without_peers"]:
        lines.append("stopped: every peer has failed; rows that are missing or short were not measured")
    if report["interrupted"]:
        lines.append("interrupted: rows that are missing or short were not measured to the end")
    return lines + machine_remarks(report["machine"])


def _mode_lines(report: dict[str, Any]) -> list[str]:
    lines = []
    for each in report["engines"]:
        if each["engine"] == PAGEMILL:
            name, resolved = f"{each['engine']} {each['mode']}", each["resolved"]
            lines.append(mode_line(name, resolved))
            lines.append(accuracy_line(name, resolved, each["accuracy"]))
    return lines


def _verdict_line(row: dict[str, Any]) -> str:
    above = "above the floor, below the goal"
    below = "below the goal" if row["floor"] is None else "below the floor"
    said = {"goal": "at or above the goal", "floor": above, "below": below}[row["verdict"]]
    peer = " ".join(row["goal_peer"].values())
    if row["goal_peer"] == row["best_peer"]:
        peer = f"the best peer, {peer}"
    wanted = f"goal {row['goal']:g}×" + ("" if row["floor"] is None else f", floor {row['floor']:g}×")
    return (
        f"{row['work']}: {row['engine']} {row['mode']} is {row['goal_ratio']['median']:.2f}× {peer}, {said} ({wanted})"
    )


def _warning(row: dict[str, Any]) -> str:
    share, seen = row["share_of_known"], row["known"]
    said = f"{row['median']:,.0f} is {share:.0%} of {min(seen):,.0f}"
    if row["unit"] == "s":
        said = f"{row['median']:.3g} s is {share:.0%} of the speed of {max(seen):.3g} s"
    return (
        f"warning: {row['engine']} {row['mode']}, {row['work']}: {said} ({KNOWN_FROM}); on an idle machine of that "
        "kind it would be mis-set"
    )
