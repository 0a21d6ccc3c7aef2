"""From the measurement of `bench serve` to its report: rows, the comparison at the same time between tokens, tables.

Owns the JSON object and how it is shown; nothing is measured here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from pagemill.bench.machine import describe_machine
from pagemill.bench.peers_catalog import PAGEMILL
from pagemill.bench.report import Row, absence_remarks, machine_remarks, report_heading, rounded
from pagemill.bench.serve_figures import LoadFigures, quantile_ms
from pagemill.bench.serve_run import Measurement, Settings
from pagemill.bench.serve_servers import Contender
from pagemill.bench.serve_workload import DISTINCT, SHARED
from pagemill.kernels.target import choose_target

GOAL_USERS = 32
MOST_OTHERS = 0.1  # of all CPU time
GOALS = {DISTINCT: 3.0, SHARED: 5.0}
TOKENS, ITL_P95 = "tokens", "time between tokens, p95"
SAME_ITL, MOST = "at no longer p95 between tokens", "at its most"
BEST_WITHIN = "tokens in the best setting at no longer p95 between tokens than the peer"

# (name, unit, of a run's figures and the machine's cores); None where a run has no such figure.
_METRICS: tuple[tuple[str, str, Callable[[LoadFigures, int], float | None]], ...] = (
    (TOKENS, "tok/s", lambda run, cores: run.tokens_per_s),
    ("requests", "1/s", lambda run, cores: run.requests_per_s),
    ("first token, p50", "ms", lambda run, cores: quantile_ms(run.ttft_s, 0.5)),
    ("first token, p95", "ms", lambda run, cores: quantile_ms(run.ttft_s, 0.95)),
    ("first token, p99", "ms", lambda run, cores: quantile_ms(run.ttft_s, 0.99)),
    ("time between tokens, p50", "ms", lambda run, cores: quantile_ms(run.itl_s, 0.5)),
    (ITL_P95, "ms", lambda run, cores: quantile_ms(run.itl_s, 0.95)),
    ("time between tokens, p99", "ms", lambda run, cores: quantile_ms(run.itl_s, 0.99)),
    ("goodput", "1/s", lambda run, cores: run.good_per_s),
    ("good requests", "share", lambda run, cores: run.good_share),
    ("prompt tokens found", "share", lambda run, cores: run.hit_ratio),
    ("waiting at the end", "requests", lambda run, cores: float(run.num_waiting)),
    ("failed", "requests", lambda run, cores: float(run.num_failed)),
    ("sent late by", "ms", lambda run, cores: 1e3 * run.latest_s),
    ("CPU of the generator", "share", lambda run, cores: run.generator_s / (run.run_s * cores)),
    ("CPU of the server", "share", lambda run, cores: run.server_s / (run.run_s * cores)),
)
_SHOWN = (
    (TOKENS, "tok/s", ",.0f"),
    ("first token, p50", "TTFT p50", ",.0f"),
    ("first token, p95", "p95", ",.0f"),
    ("first token, p99", "p99", ",.0f"),
    ("time between tokens, p50", "ITL p50", ",.1f"),
    (ITL_P95, "p95", ",.1f"),
    ("time between tokens, p99", "p99", ",.1f"),
    ("goodput", "good/s", ".2f"),
    ("good requests", "good", ".0%"),
    ("prompt tokens found", "hits", ".0%"),
    ("waiting at the end", "wait", ",.0f"),
    ("CPU of the generator", "gen.", ".1%"),
)

_HOW_COMPARED = (
    f"{SAME_ITL}: all settings of Pagemill in the table had the peer's load, in turns with it. Those whose 95th "
    "percentile of the times between tokens (as clients saw them, median of the runs) was no longer than the peer's "
    "compare with it, and of these the one that gave most tokens per second is named. A target is what the server was "
    "told to keep to by --target-itl-ms; with @peer, nine tenths of the p95 in the peer's first run of the load"
)


@dataclass(frozen=True, slots=True)
class Context:
    """What a report tells beside the measurement. arguments: Pagemill's options as given. load: how sessions begin.
    absent: peer -> why it was not run."""

    model: str
    arguments: Mapping[str, str]
    load: Mapping[str, Any]
    absent: Mapping[str, str]
    quick: bool
    num_threads: int


def make_report(context: Context, settings: Settings, found: Measurement) -> dict[str, Any]:
    """The bench's JSON object, without the names of its files."""
    machine = describe_machine(choose_target(), context.num_threads) | {"cpu_shares": found.cpu_shares}
    works = [each for each in settings.works if any(work == each for work, _ in found.runs)]
    return {
        **report_heading("serve", machine),
        "settings": {
            "model": context.model,
            "pagemill": dict(context.arguments),
            "num_threads": context.num_threads,
            "num_runs": settings.num_runs,
            "duration_s": settings.duration_s,
            "warmup_s": settings.warmup_s,
            "users": settings.users,
            "slo_ttft_ms": 1e3 * settings.objective.ttft_s,
            "slo_itl_ms": 1e3 * settings.objective.itl_s,
            "quick": context.quick,
            **context.load,
        },
        "engines": [_engine(each, found) for each in dict.fromkeys((*found.starts, *found.failures))],
        "absent": dict(context.absent),
        "unheld": list(found.unheld),
        "interrupted": found.interrupted,
        "comparisons": [line for work in works for line in _comparisons(work, context, settings, found)],
        "rows": [row for work in works for row in _rows(work, found, machine["num_cores"])],
    }


def is_disturbed(found: Measurement) -> bool:
    """Whether other programs had so much of the machine that no goal can be judged: a peer whose threads wait for each
    other suffers far more than in proportion."""
    return found.cpu_shares is not None and found.cpu_shares["others"] > MOST_OTHERS


def _engine(contender: Contender, found: Measurement) -> dict[str, Any]:
    return {
        "engine": contender.engine,
        "mode": contender.mode,
        "command": list(contender.command),
        "fields": dict(contender.fields),
        "note": contender.note,
        "start_s": None if contender not in found.starts else rounded(found.starts[contender]),
        "failure": found.failures.get(contender),
    }


def _rows(work: str, found: Measurement, num_cores: int) -> list[dict[str, Any]]:
    rows = []
    for (name, contender), runs in found.runs.items():
        if name != work:
            continue
        for metric, unit, of in _METRICS:
            samples = tuple(value for run in runs if (value := of(run, num_cores)) is not None)
            if samples:
                row = Row(f"{work}: {metric}", contender.mode, unit, samples, contender.engine)
                rows.append({**row.as_json(), "workload": work, "metric": metric, **_setting(contender)})
        first, between = ([s for run in runs for s in side(run)] for side in (_ttft, _itl))
        rows[-1] |= {
            "all_first_token_ms": [rounded(1e3 * each) for each in first],
            "percentiles_between_tokens_ms": _percentiles(between),
            "num_between_tokens": len(between),
            "errors": sorted({error for run in runs for error in run.errors}),
        }
    runs_of = {contender: runs for (name, contender), runs in found.runs.items() if name == work}
    for peer in (each for each in runs_of if each.engine != PAGEMILL):
        best = _best(_within(runs_of, _p95(runs_of[peer])), runs_of)
        if best is not None:
            samples = tuple(run.tokens_per_s for run in runs_of[best])
            row = Row(f"{work}: {BEST_WITHIN}", best.mode, "tok/s", samples, best.engine)
            told = {"workload": work, "metric": BEST_WITHIN, "peer": peer.name}
            rows.append({**row.as_json(), **told, **_setting(best)})
    return rows


def _setting(contender: Contender) -> dict[str, int | None]:
    return {"at_once": contender.at_once, "target_itl_ms": contender.target_itl_ms}


def _ttft(run: LoadFigures) -> tuple[float, ...]:
    return run.ttft_s


def _itl(run: LoadFigures) -> tuple[float, ...]:
    return run.itl_s


def _percentiles(seconds: list[float]) -> list[float]:
    """Milliseconds at 0, 1 … 100 %, none without samples."""
    return [rounded(1e3 * float(each)) for each in np.percentile(seconds, range(101))] if seconds else []


def _p95(runs: list[LoadFigures]) -> float | None:
    values = [value for run in runs if (value := quantile_ms(run.itl_s, 0.95)) is not None]
    return float(np.median(values)) if values else None


def _comparisons(work: str, context: Context, settings: Settings, found: Measurement) -> list[dict[str, Any]]:
    """Tokens per second against each peer: in the setting that gives most without a longer p95 between tokens than the
    peer's, and in the one that gives most."""
    runs = {contender: each for (name, contender), each in found.runs.items() if name == work}
    ours = [each for each in runs if each.engine == PAGEMILL]
    lines = []
    for peer in (each for each in runs if each.engine != PAGEMILL):
        limit = _p95(runs[peer])
        within = _within(runs, limit)
        for name, among in ((SAME_ITL, within), (MOST, ours)):
            best = _best(among, runs)
            full = name == SAME_ITL and settings.users == GOAL_USERS and not context.quick and not is_disturbed(found)
            goal = GOALS.get(work) if full else None
            ratio = None if best is None else _ratio(runs[best], runs[peer])
            lines.append(
                {
                    "workload": work,
                    "compared": name,
                    "peer": {"engine": peer.engine, **_figures(peer, runs)},
                    "pagemill": None if best is None else _figures(best, runs),
                    "among": [{**_figures(each, runs), "is_within": each in within} for each in ours],
                    "ratio": ratio,
                    "goal": goal,
                    "met": None if goal is None else ratio is not None and ratio["median"] >= goal,
                }
            )
    return lines


def _within(runs: Mapping[Contender, list[LoadFigures]], limit: float | None) -> list[Contender]:
    """Settings of ours whose p95 between tokens is no longer than that (in milliseconds)."""
    ours = [each for each in runs if each.engine == PAGEMILL]
    return [each for each in ours if limit is not None and (_p95(runs[each]) or np.inf) <= limit]


def _best(among: list[Contender], runs: Mapping[Contender, list[LoadFigures]]) -> Contender | None:
    """The one that gives most tokens per second."""
    return max(among, key=lambda each: _median_tokens(runs[each]), default=None)


def _figures(contender: Contender, runs: Mapping[Contender, list[LoadFigures]]) -> dict[str, Any]:
    own = runs[contender]
    return {"mode": contender.mode, "itl_p95_ms": _p95(own), "tokens_per_s": rounded(_median_tokens(own))}


def _median_tokens(runs: list[LoadFigures]) -> float:
    return float(np.median([run.tokens_per_s for run in runs]))


def _ratio(ours: list[LoadFigures], theirs: list[LoadFigures]) -> dict[str, float] | None:
    """Of the medians, and the lowest and highest over the rounds that both have; None where the peer gave nothing."""
    rounds = [a.tokens_per_s / b.tokens_per_s for a, b in zip(ours, theirs, strict=False) if b.tokens_per_s]
    if not rounds or not _median_tokens(theirs):
        return None
    median = _median_tokens(ours) / _median_tokens(theirs)
    return {"median": rounded(median), "lowest": rounded(min(rounds)), "highest": rounded(max(rounds))}


def title_of(report: Mapping[str, Any]) -> str:
    """Model and load in one line."""
    settings = report["settings"]
    users = settings["users"]
    load = f"{users} users" if users else settings["arrivals"]
    return f"{settings['model']}, {settings['num_threads']} threads, {load}, {settings['duration_s']:g} s a run"


def make_tables(report: Mapping[str, Any]) -> list[Table]:
    """One table for each workload: medians over the runs, milliseconds; below, what compares at the same time between
    tokens."""
    tables = []
    for work in dict.fromkeys(row["workload"] for row in report["rows"]):
        table = Table(box=SIMPLE_HEAD, pad_edge=False, title=f"{work}, ms", title_justify="left", title_style="bold")
        table.add_column("server", no_wrap=True)
        same = [each for each in report["comparisons"] if (each["workload"], each["compared"]) == (work, SAME_ITL)]
        for heading in (*(heading for _, heading, _ in _SHOWN), *(f"÷ {each['peer']['engine']}" for each in same)):
            table.add_column(heading, justify="right")
        rows = {
            (row["engine"], row["mode"], row["metric"]): row["median"]
            for row in report["rows"]
            if row["workload"] == work
        }
        cells = {server: _cells(server, rows, same) for server in dict.fromkeys(key[:2] for key in rows)}
        for server, own in cells.items():
            table.add_row(" ".join(server), *own)
        for each in same:
            peer, best = each["peer"], each["pagemill"]
            if peer["itl_p95_ms"] is None:
                continue
            table.add_section()
            named = "none" if best is None else best["mode"]
            label = f"p95 within {peer['engine']}'s {peer['itl_p95_ms']:.1f} ms: {named}"
            table.add_row(label, *([] if best is None else cells[PAGEMILL, best["mode"]]))
        tables.append(table)
    return tables


def _cells(
    server: tuple[str, str], rows: Mapping[tuple[str, str, str], float], same: list[Mapping[str, Any]]
) -> list[str]:
    """A server's figures, and its tokens over each peer's."""
    found = [(rows.get((*server, metric)), form) for metric, _, form in _SHOWN]
    tokens = rows.get((*server, TOKENS), 0.0)
    ratios = [
        f"{tokens / each['peer']['tokens_per_s']:.1f}" if server[0] == PAGEMILL and each["peer"]["tokens_per_s"] else ""
        for each in same
    ]
    return [*("" if value is None else f"{value:{form}}" for value, form in found), *ratios]


def remarks(report: Mapping[str, Any]) -> list[str]:
    """Comparisons, what failed or could not be had, definitions and the machine, one line each."""
    settings = report["settings"]
    lines = [_said(each) for each in report["comparisons"]]
    if report["comparisons"]:
        lines.append(_HOW_COMPARED)
    lines += [f"{each}: no peer told a time between tokens that ours could be held to" for each in report["unheld"]]
    lines.append(
        f"good: first token within {settings['slo_ttft_ms']:,g} ms, 95 of 100 times between tokens within "
        f"{settings['slo_itl_ms']:,g} ms; wait: requests without a token at the end; gen.: the load generator's "
        "share of all cores"
    )
    for row in report["rows"]:
        lines += [f"failed requests of {row['engine']} {row['mode']}: {each}" for each in row.get("errors", ())]
    for each in report["engines"]:
        if each["note"]:
            lines.append(f"{each['engine']}: {each['note']}")
        if each["failure"] is not None:
            lines.append(f"failed: {each['engine']} {each['mode']} {each['failure']}")
    lines += absence_remarks(report)
    if settings["quick"]:
        lines.append("quick: sizes are small; goals are not judged")
    if report["interrupted"]:
        lines.append("interrupted: what is missing was not measured")
    shares = report["machine"]["cpu_shares"]
    if shares is not None and shares["others"] > MOST_OTHERS:
        lines.append("disturbed: other programs had much of the machine; ratios mean little, goals are not judged")
    return lines + machine_remarks(report["machine"])


def _said(line: Mapping[str, Any]) -> str:
    peer, ours, ratio = line["peer"], line["pagemill"], line["ratio"]
    beside = f"{peer['engine']} {peer['mode']}"
    if peer["itl_p95_ms"] is None:
        return (
            f"{line['workload']}, {line['compared']}: {beside} delivered too little to compare with; take a longer run"
        )
    if ours is None:
        limit = f"{peer['itl_p95_ms']:.1f} ms"
        missed = "" if line["goal"] is None else f", goal {line['goal']:g}× missed"
        return f"{line['workload']}: no setting of Pagemill stays within the {limit} between tokens of {beside}{missed}"
    if ratio is None:
        return f"{line['workload']}, {line['compared']}: {beside} delivered nothing in the window"
    goal = ""
    if line["goal"] is not None:
        goal = f", goal {line['goal']:g}× {'met' if line['met'] else 'missed'}"
    times = " against ".join(
        "–" if each["itl_p95_ms"] is None else f"{each['itl_p95_ms']:.1f}" for each in (ours, peer)
    )
    return (
        f"{line['workload']}, {line['compared']}: {ratio['median']:.2f}× the tokens of {beside} "
        f"({ratio['lowest']:.2f}–{ratio['highest']:.2f}), {ours['mode']}, p95 {times} ms{goal}"
    )
