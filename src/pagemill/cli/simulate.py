"""`pagemill simulate`: hit curves of eviction policies over a trace, in the terminal. Owns options, table and plot;
replaying is `pagemill.simulator`'s."""

from __future__ import annotations

import gc
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pagemill.base.clock import MonotonicClock
from pagemill.base.errors import ConfigError
from pagemill.base.units import parse_count, parse_seconds
from pagemill.bench.figures import MISSING
from pagemill.bench.simulate_plot import draw_hit_curves
from pagemill.cache.policies.registry import make_policy
from pagemill.cli.terminal import BOLD, note, paint, print_json
from pagemill.kernels.policies import POLICIES
from pagemill.simulator.curves import AllocationRow, HitRow, allocation, hit_curves
from pagemill.simulator.trace import Trace, read_trace
from pagemill.simulator.workload import GENERATORS, generate

_GENERATED_REQUESTS = 10_000
_MOST_BLOCKS = 1 << 24


def run(
    *,
    trace: str,
    policies: str,
    blocks: str,
    session_gap: str,
    seed: int,
    json_file: str | None,
    plot: str | None,
    manager: bool,
    as_json: bool,
) -> int:
    """Replay `trace` (a file, or a generated load's name) and print a table or one JSON object."""
    names = policy_names(policies)
    sizes = block_sizes(blocks)
    gap_s = parse_seconds(session_gap)
    for flag, name in (("--output", json_file), ("--plot", plot)):
        if name is not None and not Path(name).expanduser().parent.is_dir():
            raise ConfigError(f"{name} cannot be written: its directory is not there; give another {flag}")
    if plot is not None and Path(plot).suffix not in (".png", ".svg"):
        raise ConfigError(f"--plot {plot}: a plot is a .png or an .svg; name one")
    loaded = load_trace(trace, session_gap, seed)
    if not any(each.blocks for each in loaded.requests):
        if loaded.block_tokens:
            raise ConfigError(f"{loaded.name}: no request has a block, so there is nothing to hit; give another trace")
        if plot is not None:
            raise ConfigError(f"--plot: {loaded.name} has lengths only and gives no hit curve; leave --plot out")
        note(f"{loaded.name} has lengths only and gives no hit curve: --policy and --blocks are of no use here")
        return _publish_allocation(allocation(loaded), json_file, as_json=as_json)
    gc.collect()
    gc.freeze()  # the trace stays: collections need not look at it, as the server's need not at the model
    try:
        rows = hit_curves(loaded, names, sizes, MonotonicClock(), note, manager=manager, makers=POLICIES)
    finally:
        gc.unfreeze()
    report = {
        "trace": loaded.name,
        "num_requests": len(loaded.requests),
        "num_accesses": loaded.num_accesses,
        "num_distinct_blocks": loaded.num_distinct,
        "seed": seed,
        "manager": manager,
        "session_gap_s": gap_s,
        "rows": [asdict(each) for each in rows],
    }
    store_report(report, json_file)
    if plot is not None and not draw_hit_curves(rows, Path(plot).expanduser()):
        note(MISSING)
    if as_json:
        print_json(report)
        return 0
    title = (
        f"{loaded.name}: {len(loaded.requests):,} requests, {loaded.num_accesses:,} blocks, ideal {rows[0].ideal:.4f}"
    )
    print(paint(title, BOLD, sys.stdout))
    Console(highlight=False).print(_table(rows))
    return 0


def policy_names(text: str) -> list[str]:
    """Names of policies from `lru,gittins`. Raises ConfigError."""
    names = list(dict.fromkeys(each.strip() for each in text.split(",") if each.strip()))
    if not names:
        raise ConfigError("--policy names no policy; give some, such as lru,gittins")
    for each in names:
        make_policy(each, 1, POLICIES)
    return names


def block_sizes(text: str) -> list[int]:
    """Sizes of a cache in blocks from `1000,10k`, the smallest first. Raises ConfigError."""
    sizes = sorted({parse_count(each) for each in text.split(",") if each.strip()})
    if not sizes or sizes[0] < 1 or sizes[-1] > _MOST_BLOCKS:
        raise ConfigError(
            f"--blocks {text!r}: give sizes of the cache in blocks from 1 to {_MOST_BLOCKS:,}, such as 1000,10000"
        )
    return sizes


def load_trace(trace: str, session_gap: str, seed: int) -> Trace:
    """The trace in a file, or a generated load of that name. Raises ConfigError."""
    if trace in GENERATORS and not Path(trace).is_file():
        return generate(trace, _GENERATED_REQUESTS, seed)
    return read_trace(trace, session_gap_s=parse_seconds(session_gap), seed=seed)


def store_report(report: dict[str, Any], json_file: str | None) -> None:
    """Write a report as JSON where a file is named. Raises ConfigError where that is not possible."""
    if json_file is None:
        return
    try:
        Path(json_file).expanduser().write_text(json.dumps(report, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{json_file} cannot be written: {error.strerror}; give another --output") from None


def _table(rows: list[HitRow]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("blocks", justify="right")
    policies = list(dict.fromkeys(each.policy for each in rows))
    for name in [*policies, "optimum"]:
        table.add_column(name, justify="right")
    for size in dict.fromkeys(each.blocks for each in rows):
        here = {each.policy: each for each in rows if each.blocks == size}
        cells = [f"{here[name].block_hit_ratio:.4f}" for name in policies]
        table.add_row(f"{size:,}", *cells, f"{here[policies[0]].optimum:.4f}")
    return table


def _publish_allocation(row: AllocationRow, json_file: str | None, *, as_json: bool) -> int:
    report = {"trace": row.trace, "allocation": asdict(row)}
    store_report(report, json_file)
    if as_json:
        print_json(report)
    else:
        print(
            f"{row.trace}: lengths only. {row.concurrency} sequences at once, blocks of {row.block_tokens} tokens, "
            f"{row.num_steps:,} steps: {row.unused_mean:.2%} of allocated positions unused, p99 {row.unused_p99:.2%}"
        )
    return 0
