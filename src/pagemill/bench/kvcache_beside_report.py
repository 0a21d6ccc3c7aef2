"""From the runs of `bench kvcache --beside` to its report: rows with how many times faster than the faster of the
peer's, and the table. Owns the JSON object and how it is shown; nothing is measured here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from pagemill.bench.kvcache import DEFAULT_PROMPT, WEIGHTS_SEED, WITH, Subject
from pagemill.bench.kvcache_beside import TRANSFORMERS, WARM_UP_TOKENS, Measurement, Series, Settings
from pagemill.bench.machine import describe_machine
from pagemill.bench.peers_catalog import PAGEMILL, Contestant
from pagemill.bench.peers_report import engine_entry
from pagemill.bench.report import Row, absence_remarks, machine_remarks, report_heading, rounded
from pagemill.kernels.target import choose_target

# With the cache, against the faster of transformers' kinds of weights with its own.
GOAL = 4.0
GOAL_MODEL = "gpt2-medium"


def make_report(
    subjects: Sequence[Subject], settings: Settings, found: Measurement, absent: Mapping[str, str]
) -> dict[str, Any]:
    """The bench's JSON object, without the names of its files. absent: peer -> why it was not run."""
    first = subjects[0]
    spec, executor = first.built.spec, first.built.config.executor
    target = choose_target() if executor == "native" else executor
    barriers = Row("barrier", "all", "ns", tuple(found.barriers)).as_json()
    machine = describe_machine(target, settings.num_threads) | {
        "barrier_ns": {name: barriers[name] for name in ("median", "p10", "p90", "samples")},
        "cpu_shares": found.cpu_shares,
    }
    return {
        **report_heading("kvcache-beside", machine),
        "settings": {
            "model": first.built.config.model,
            "name": first.name,
            "beside": TRANSFORMERS,
            "weights": f"random, seed {WEIGHTS_SEED}" if first.random else "checkpoint",
            "num_tokens": settings.own.num_tokens,
            "num_runs": settings.own.num_runs,
            "num_runs_without": settings.num_runs_without,
            "num_threads": settings.num_threads,
            "warm_up_tokens": min(WARM_UP_TOKENS, settings.own.num_tokens),
            "timeout_s": settings.timeout_s,
            "prompt": settings.own.prompt or DEFAULT_PROMPT,
            "prompt_token_ids": list(first.prompt),
            "sampling": "greedy, past any end of text",
            "engines": [
                {"dtype": each.dtype, "kv_codec": each.built.kv_spec.codec, "engine": asdict(each.built.config)}
                for each in subjects
            ],
        },
        "peers": [_peer(each, found) for each in dict.fromkeys((*found.loads, *found.failures))],
        "absent": dict(absent),
        "interrupted": found.interrupted,
        "rows": _rows(found.series, settings.own.num_tokens, GOAL if spec.name == GOAL_MODEL else None),
    }


def _peer(contestant: Contestant, found: Measurement) -> dict[str, Any]:
    entry = engine_entry(contestant, found.loads.get(contestant), found.failures.get(contestant))
    config = contestant.options["config"]
    return {"engine": contestant.engine, "dtype": contestant.mode, "config": config, **entry}


def _rows(series: Sequence[Series], num_tokens: int, goal: float | None) -> list[dict[str, Any]]:
    measured = [each for each in series if each.samples]
    rows = []
    for each in measured:
        peers = [other for other in measured if other.engine != PAGEMILL and other.cache == each.cache]
        fastest = min(peers, key=lambda other: float(np.median(other.samples)), default=None)
        mode = f"{each.dtype} {each.cache} cache"
        row = Row(f"generate {num_tokens:,} tokens", mode, "s", tuple(each.samples), each.engine)
        wanted = goal if each.engine == PAGEMILL and each.cache == WITH else None
        ratio = None if fastest is None else _ratio(each, fastest)
        rows.append(
            {
                **row.as_json(),
                "dtype": each.dtype,
                "cache": each.cache,
                "fastest_peer": None if fastest is None else {"engine": fastest.engine, "dtype": fastest.dtype},
                "ratio": ratio,
                "goal": wanted,
                "reached": None if wanted is None or ratio is None else ratio["median"] >= wanted,
            }
        )
    return rows


def _ratio(series: Series, fastest: Series) -> dict[str, float]:
    """How many times faster than the fastest peer: of the medians, and the spread over the rounds that both have."""
    rounds = [theirs / ours for ours, theirs in zip(series.samples, fastest.samples, strict=False)]
    return {
        "median": rounded(float(np.median(fastest.samples)) / float(np.median(series.samples))),
        "p10": rounded(float(np.quantile(rounds, 0.1))),
        "p90": rounded(float(np.quantile(rounds, 0.9))),
    }


def title_of(report: dict[str, Any]) -> str:
    """Model and amounts in one line."""
    settings = report["settings"]
    weights = "random weights, " if settings["weights"] != "checkpoint" else ""
    return (
        f"{settings['name']} ({weights}{settings['num_threads']} threads): "
        f"{len(settings['prompt_token_ids'])} + {settings['num_tokens']:,} tokens, beside {settings['beside']}"
    )


def make_table(report: dict[str, Any]) -> Table:
    """The rows, with the cache and then without, the fastest first: median, p10 to p90, and how many times faster than
    the fastest of the peer's rows with the same cache."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("engine", no_wrap=True)
    for heading in ("cache", "median s", "p10–p90", "÷ best", "p10–p90"):
        table.add_column(heading, justify="right", no_wrap=True)
    rows = report["rows"]
    for cache in dict.fromkeys(row["cache"] for row in rows):
        for row in sorted((each for each in rows if each["cache"] == cache), key=lambda each: float(each["median"])):
            ratio = row["ratio"]
            table.add_row(
                f"{row['engine']} {row['dtype']}",
                cache,
                _figure(row["median"]),
                f"{_figure(row['p10'])}–{_figure(row['p90'])}",
                "" if ratio is None else f"{_figure(ratio['median'])}×",
                "" if ratio is None else f"{_figure(ratio['p10'])}–{_figure(ratio['p90'])}",
            )
        table.add_section()
    return table


def _figure(value: float) -> str:
    """Short enough for a column, whatever its size."""
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3}f}"


def remarks(report: dict[str, Any]) -> list[str]:
    """Whether the goal is reached, what could not be had or failed, and the machine, one line each."""
    lines = []
    for row in report["rows"]:
        if row["reached"] is not None:
            peer = row["fastest_peer"]
            lines.append(
                f"{row['engine']} {row['dtype']} with the cache is {row['ratio']['median']:.2f}× as fast as "
                f"{peer['engine']} {peer['dtype']}, {'at or above' if row['reached'] else 'below'} the goal of "
                f"{row['goal']:g}×"
            )
    for each in report["peers"]:
        if each["versions"] is not None:
            said = ", ".join(f"{name} {version}" for name, version in each["versions"].items())
            lines.append(f"{each['engine']} {each['dtype']}: {said}")
        if each["failure"] is not None:
            lines.append(f"failed: {each['engine']} {each['dtype']} {each['failure']}")
    lines += absence_remarks(report)
    if report["interrupted"]:
        lines.append("interrupted: rows that are missing or short were not measured to the end")
    barrier = report["machine"]["barrier_ns"]["median"]
    return [*lines, *machine_remarks(report["machine"]), f"barrier {barrier:,.0f} ns"]
