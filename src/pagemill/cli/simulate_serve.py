"""`pagemill simulate --serve`: a trace served by the engine over a cost model of this machine, in the terminal. Owns
options and the table; serving is `pagemill.simulator.serve`'s, measuring `pagemill.bench.step_cost`'s."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from pagemill.base.config import resolve_config
from pagemill.base.errors import ConfigError
from pagemill.bench.step_cost import TimedStep, describe_fit, load_step_cost, measure_step_cost, store_step_cost
from pagemill.build import build
from pagemill.cli.simulate import block_sizes, load_trace, policy_names, store_report
from pagemill.cli.terminal import BOLD, note, paint, print_json
from pagemill.kernels.policies import POLICIES
from pagemill.simulator.serve import ServeSettings, StepCost, check_pace, serve
from pagemill.simulator.trace import Trace

_USUAL_ERROR = 0.35  # of the model for a kind of step


def serve_trace(
    *,
    trace: str,
    policies: str,
    blocks: str,
    session_gap: str,
    seed: int,
    json_file: str | None,
    plot: str | None,
    manager: bool,
    served: dict[str, Any],
    as_json: bool,
) -> int:
    """Serve `trace` for each policy and size and print a table or one JSON object. served: `simulate_options.py`'s."""
    for flag, given in (("--plot", plot is not None), ("--manager", manager)):
        if given:
            raise ConfigError(f"{flag} belongs to hit curves, which --serve does not make; leave one of them out")
    pace, most_requests, streams, deadline_s, target_ms, cost_model = (
        served[name] for name in ("pace", "requests", "streams", "deadline", "target_itl_ms", "cost_model")
    )
    names, sizes = policy_names(policies), block_sizes(blocks)
    check_pace("--pace", pace)  # before steps are measured
    if most_requests < 1:
        raise ConfigError(f"--requests is {most_requests}; give at least 1")
    if deadline_s is not None and not 0 < deadline_s < 1e9:
        raise ConfigError(f"--deadline is {deadline_s:g}; give seconds above 0")
    if target_ms is not None and not 1 <= target_ms <= 100_000:
        raise ConfigError(f"--target-itl-ms is {target_ms:g}; give milliseconds from 1 to 100,000")
    loaded = load_trace(trace, session_gap, seed)
    loaded = Trace(loaded.name, loaded.block_tokens, loaded.requests[:most_requests])
    cost, timed = _cost(None if cost_model is None else Path(cost_model).expanduser())
    rows: list[dict[str, Any]] = []
    for size in sizes:
        for name in names:
            settings = ServeSettings(
                num_blocks=size,
                policy=name,
                max_num_seqs=streams,
                pace=pace,
                deadline_s=deadline_s,
                target_itl_s=None if target_ms is None else target_ms / 1e3,
                makers=POLICIES,
            )
            began_s = time.perf_counter()
            with _progress(f"{name}, {size:,} blocks") as report_requests:
                day = serve(loaded, cost, settings, report_requests)
            took_s = time.perf_counter() - began_s
            note(f"{name}, {size:,} blocks: {day.seconds:,.0f} s simulated in {took_s:.1f} s")
            rows.append({"policy": name, "blocks": size, "took_s": took_s, **day.describe()})
    report = {
        "trace": loaded.name,
        "num_requests": len(loaded.requests),
        "block_tokens": loaded.block_tokens,
        "seed": seed,
        "pace": pace,
        "streams": streams,
        "deadline_s": deadline_s,
        "target_itl_ms": target_ms,
        "cost_model": cost.describe() | {"fit": describe_fit(timed)},
        "rows": rows,
    }
    store_report(report, json_file)
    if as_json:
        print_json(report)
        return 0
    title = f"{loaded.name}: {len(loaded.requests):,} requests, {streams} streams, steps as of {cost.source}"
    print(paint(title, BOLD, sys.stdout))
    print(_told_of(timed))
    Console(highlight=False).print(_table(rows))
    return 0


def _told_of(timed: Sequence[TimedStep]) -> str:
    """How well the cost model fits, in a line."""
    fit = describe_fit(timed)
    if fit is None:
        return "cost model: its file does not say what it was fitted to"
    error = fit["relative_error"]
    return (
        f"cost model: off by {error['p50']:.0%} (median), {error['p90']:.0%} (p90) and {error['max']:.0%} (most) of "
        f"the {len(timed)} kinds of steps that it was fitted to"
    )


def _cost(path: Path | None) -> tuple[StepCost, list[TimedStep]]:
    """The model in the file, or one that is measured now (and kept there), and the steps that it was fitted to."""
    if path is not None and path.is_file():
        return load_step_cost(path)
    if path is not None and not path.parent.is_dir():
        raise ConfigError(f"{path} cannot be written: its directory is not there; give another --cost-model")
    config = resolve_config({}).config
    note(f"measuring steps of {config.model} …")
    cost, timed = measure_step_cost(build(replace(config, enable_prefix_caching="off")))
    if path is not None:
        store_step_cost(path, cost, timed)
    fit = describe_fit(timed)
    is_disturbed = fit is not None and fit["relative_error"]["max"] > _USUAL_ERROR
    note(f"cost model: {json.dumps(cost.describe())}{'; measure again when the machine is quiet' * is_disturbed}")
    return cost, timed


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar of requests that ended, on a terminal."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bars:
        task = bars.add_task(what, total=None)
        yield lambda done, count: bars.update(task, completed=done, total=count)


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("blocks", "policy", "done", "lost", "hits", "TTFT s", "p99", "ITL ms", "p99", "tok/s"):
        table.add_column(name, justify="left" if name == "policy" else "right")
    for row in rows:
        table.add_row(
            f"{row['blocks']:,}",
            row["policy"],
            f"{row['num_finished']:,}",
            f"{row['num_refused'] + row['num_too_large'] + row['num_failed']:,}",
            f"{row['token_hit_ratio']:.3f}",
            f"{row['ttft_s']['p50']:,.2f}",
            f"{row['ttft_s']['p99']:,.2f}",
            f"{1e3 * row['itl_s']['p50']:,.1f}",
            f"{1e3 * row['itl_s']['p99']:,.1f}",
            f"{row['generated_tokens_per_s']:,.0f}",
        )
    return table
