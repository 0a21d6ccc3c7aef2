"""`pagemill cache stats`: the cache of a running server, or of a trace replayed here. Owns asking and printing; the
object is `pagemill.engine.cache_stats`'s."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pagemill.base.errors import ConfigError
from pagemill.base.units import format_bytes, parse_count
from pagemill.bench.cache_curve import replayed_stats
from pagemill.cli.cache_remote_client import ADMIN_KEY_VARIABLE, ADMIN_URL_VARIABLE, Server, ServerError
from pagemill.cli.terminal import BOLD, note, paint, print_json
from pagemill.simulator.trace import read_trace
from pagemill.simulator.workload import GENERATORS, generate

ROUTE = "/admin/cache/stats"

_GENERATED_REQUESTS = 2000
_MOST_BLOCKS = 1 << 24
_PIPE_WIDTH = 100


def stats(*, trace: str | None, url: str | None, key: str | None, blocks: str, seed: int, as_json: bool) -> int:
    """Show what a server's cache holds and found, or what a cache of `blocks` blocks makes of a trace."""
    if trace is None and url is None:
        url = os.environ.get(ADMIN_URL_VARIABLE) or None
    if (trace is None) == (url is None):
        raise ConfigError(
            "give either a trace to replay or --url with a server's admin port, such as --url http://127.0.0.1:8001"
        )
    if url is not None:
        found = ask(url, key if key is not None else os.environ.get(ADMIN_KEY_VARIABLE))
        title = f"the cache of {url}"
    else:
        assert trace is not None
        found = replay(trace, blocks, seed)
        title = f"{found['trace']} replayed over {found['blocks']['total']:,} blocks"
    if as_json:
        print_json(found)
        return 0
    try:
        lines, shown = summary(found), tables(found)
    except (KeyError, TypeError, ValueError) as error:
        raise ServerError(f"{url} answers figures of another version ({error!r}); take --json to see them") from None
    print(paint(title, BOLD, sys.stdout))
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)
    for line in lines:
        console.print(Text(line))
    for heading, table in shown:
        console.print(Text(heading))
        console.print(table)
    return 0


def replay(trace: str, blocks: str, seed: int) -> dict[str, Any]:
    """The object for a trace, with the simulator's hit ratios beside the curve."""
    size = parse_count(blocks)
    if not 1 <= size <= _MOST_BLOCKS:
        raise ConfigError(f"--blocks is {blocks}; give a cache of 1 to {_MOST_BLOCKS:,} blocks")
    if trace in GENERATORS and not Path(trace).is_file():
        loaded = generate(trace, _GENERATED_REQUESTS, seed)
    else:
        loaded = read_trace(trace, seed=seed)
    return replayed_stats(loaded, size, note)


def ask(url: str, key: str | None) -> dict[str, Any]:
    """The object that a server answers with. key: the operator's, sent to this address alone. Raises ServerError."""
    server = Server(url, key)
    found = server.ask("GET", ROUTE)
    if "blocks" not in found:
        raise ServerError(
            f"{server.url}{ROUTE} answers something else than a cache's figures; is it a Pagemill server?"
        )
    return found


def summary(found: dict[str, Any]) -> list[str]:
    """What is told in words."""
    blocks, tokens = found["blocks"], found["tokens"]
    shared = f"prefix cache, {found['policy']}" if found["sharing"] else "nothing is shared"
    lines = [
        f"{found['mode']}, {shared}; {blocks['total']:,} blocks of {found['block_tokens']} tokens",
        f"{blocks['active']:,} in use by {found['sequences']:,} sequences, {blocks['cached']:,} cached, "
        f"{blocks['free']:,} free, {blocks['pinned']:,} pinned; {blocks['evicted']:,} evicted so far",
    ]
    if tokens["asked"]:
        lines.append(
            f"{tokens['hit']:,} of {tokens['asked']:,} prompt tokens were found in it ({tokens['hit_ratio']:.1%})"
        )
    else:
        lines.append("no prompt has been looked up yet")
    return lines


def _curve_columns(point: dict[str, Any]) -> dict[str, Callable[[dict[str, Any]], str]]:
    """Heading of each column -> what it shows of a point like this one."""
    columns: dict[str, Callable[[dict[str, Any]], str]] = {"blocks": lambda each: f"{each['blocks']:,}"}
    if "simulated" not in point:  # a trace's blocks are as long as the trace says, not as those of the replay
        columns["tokens"] = lambda each: f"{each['tokens']:,}"
    if "bytes" in point:
        columns["memory"] = lambda each: format_bytes(each["bytes"])
    columns["expected"] = lambda each: f"{each['hit_ratio']:.4f}"
    if "simulated" in point:
        columns["simulated"] = lambda each: f"{each['simulated']:.4f}"
    return columns


def tables(found: dict[str, Any]) -> list[tuple[str, Table]]:
    """The expected hit ratio by size, and the tenants, each under its heading."""
    made = []
    curve = found["curve"]
    if curve is not None and curve["recorded_blocks"]:
        heading = (
            f"expected hit ratio by size under lru: {curve['recorded_blocks']:,} blocks "
            f"looked up, {curve['sampled_share']:.1%} of all followed"
        )
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        columns = _curve_columns(curve["points"][0])
        for name in columns:
            table.add_column(name, justify="right")
        for each in curve["points"]:
            table.add_row(*(show(each) for show in columns.values()))
        made.append((heading, table))
    if found["tenants"]:
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("tenant")
        for name in ("used", "cached", "pinned", "floor", "cap"):
            table.add_column(name, justify="right")
        for each in found["tenants"]:
            counts = [f"{each[name]:,}" for name in ("used", "cached", "pinned", "floor")]
            table.add_row(Text(str(each["tenant"])), *counts, "" if each["cap"] is None else f"{each['cap']:,}")
        made.append(("tenants, in blocks", table))
    return made
