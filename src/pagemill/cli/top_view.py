"""What `pagemill top` draws, made of the figures alone. Owns lines, tables and bars; every fact stands there in words
and numbers, colour only leads the eye."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pagemill.base.units import format_bytes, format_seconds
from pagemill.cli.cache_remote_client import plain

NAMES: Final = {"ttft": "first token", "itl": "between tokens", "e2e": "whole answer", "queue": "in the queue"}
MOST_TENANTS: Final = 200

_BLANK: Final = "-"
_LABEL_WIDTH: Final = 14
_BAR_CELLS: Final = 10
MOST_SPARKS: Final = 8
NUM_LINES: Final = 17
_SPARKS: Final = ("▁▂▃▄▅▆▇█", "_.-=*#%@")
_BARS: Final = ("█▒░", "#=.")


def view(
    shown: Mapping[str, Any],
    *,
    history: Sequence[float] = (),
    ascii_only: bool = False,
    hint: str = "",
    num_tenants: int = MOST_TENANTS,
) -> RenderableType:
    """The whole picture. shown: as `Watch.look` tells it. history: generated tokens a second, oldest first. hint: what
    can be typed. num_tenants: at the most shown, the largest first. Without alarms and tenants it has NUM_LINES."""
    parts: list[RenderableType] = [_head(shown, hint), *_alarms(shown), _blank()]
    parts += [_requests(shown["requests"]), _tokens(shown["tokens"], history, ascii_only), _blank()]
    parts += [_latencies(shown["latency_s"], shown["window_s"]), _blank()]
    parts += [_cache(shown["kv"], ascii_only), _hits(shown["hits"], shown["kv"]), _misses(shown["misses"])]
    if shown["curve"]:
        parts += [_blank(), _curve(shown["curve"], shown["kv"])]
    if shown["tenants"] is not None:
        parts += [_blank(), _tenants(shown["tenants"], num_tenants)]
    return Group(*parts)


def _head(shown: Mapping[str, Any], hint: str) -> Text:
    status = plain(shown["status"])
    line = Text("pagemill top", style="bold", no_wrap=True, overflow="ellipsis")
    line.append(f" ({hint})" if hint else "", style="not bold dim")
    line.append(f"  {plain(shown['url'])}  {plain(shown['model'] or 'model not known')}  ", style="not bold")
    line.append(status, style="green" if status == "ready" else "bold yellow")
    return line


def _alarms(shown: Mapping[str, Any]) -> list[Text]:
    """What is wrong, each on a line of its own."""
    told = []
    if shown["error"] is not None:
        told.append(f"figures are {format_seconds(shown['stale_s'])} old: {plain(shown['error'])}")
    for name, what in (("leaked_blocks", "blocks leaked"), ("corrupt_blocks", "blocks found corrupt")):
        if shown["kv"][name]:
            told.append(f"{shown['kv'][name]:,} {what}: that is a bug; report it")
    return [Text(f"! {each}", style="bold red", no_wrap=True, overflow="ellipsis") for each in told]


def _requests(requests: Mapping[str, Any]) -> Text:
    ended, refused = requests["ended"], requests["refused"]
    line = _line("requests")
    line.append(f"{_count(requests['running'])} running", style="bold")
    waiting = requests["waiting"]
    line.append(f"   {_count(waiting)} waiting", style="yellow" if waiting else "")
    line.append(f"   {_count(sum(ended.values()) if ended else None)} ended")
    if requests["ended_per_s"] is not None:
        line.append(f" ({requests['ended_per_s']:.3g}/s)")
    for reason in ("error", "abort"):
        if ended.get(reason):
            line.append(f"   {ended[reason]:,} by {reason}", style="red" if reason == "error" else "")
    if requests["preemptions"]:
        line.append(f"   {requests['preemptions']:,} preempted")
    if refused:
        words = ", ".join(f"{plain(reason)} {count:,}" for reason, count in sorted(refused.items()))
        line.append(f"   {sum(refused.values()):,} refused ({words})", style="yellow")
    return line


def _tokens(tokens: Mapping[str, Any], history: Sequence[float], ascii_only: bool) -> Text:
    line = _line("tokens/s")
    line.append(f"in {_rate(tokens['prompt_per_s'])}", style="bold")
    line.append(f" ({_rate(tokens['cached_per_s'])} cached)   ")
    line.append(f"out {_rate(tokens['generated_per_s'])}  ", style="bold")
    line.append(_spark(history, ascii_only), style="cyan")
    line.append(f"   {_count(tokens['prompt'])} in, {_count(tokens['generated'])} out in all", style="dim")
    return line


def _latencies(latencies: Mapping[str, Any], window_s: float | None) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    recent = "lately" if window_s is None else f"in {window_s:.0f} s"
    table.add_column(Text("latency", style="bold"), min_width=_LABEL_WIDTH, no_wrap=True)
    for name in (recent, "p50", "p95", "p99", "in all", "p50", "p95", "p99"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, words in NAMES.items():
        cells = [_quantiles(latencies[name][when]) for when in ("recent", "since_start")]
        table.add_row(words, *cells[0], *cells[1])
    return table


def _quantiles(told: Mapping[str, Any] | None) -> list[str]:
    if told is None:
        return ["0", _BLANK, _BLANK, _BLANK]
    values = [told[name] for name in ("p50", "p95", "p99")]
    return [_short(told["count"]), *(_BLANK if each is None else format_seconds(each) for each in values)]


def _cache(kv: Mapping[str, Any], ascii_only: bool) -> Text:
    blocks, line = kv["blocks"], _line("KV cache")
    total = kv["total_blocks"] or sum(blocks.get(state, 0) for state in ("free", "active", "cached", "held"))
    used, cached = blocks.get("active"), blocks.get("cached")
    if not total or used is None or cached is None:
        line.append(f"{_percent(kv['usage'])} in use")
        return line
    line.append_text(_bar(used / total, cached / total, ascii_only))
    line.append(f" {_percent(used / total)} in use, {_percent(cached / total)} cached")
    if blocks.get("pinned"):
        line.append(f", {blocks['pinned']:,} blocks pinned")
    size = f" of {total * kv['block_tokens']:,} tokens" if kv["block_tokens"] else f" of {total:,} blocks"
    line.append(size)
    if kv["bytes"] is not None:
        line.append(f"; {format_bytes(kv['bytes'])}", style="dim")
    return line


def _hits(hits: Mapping[str, Any], kv: Mapping[str, Any]) -> Text:
    line = _line("hits")
    line.append(f"{_percent(hits['ratio'])}", style="bold")
    line.append(f" of {_count(hits['asked_tokens'])} prompt tokens")
    if hits["recent_ratio"] is not None:
        line.append(f", {_percent(hits['recent_ratio'])} lately")
    if kv["saved_prefill_s"]:
        line.append(f"; {format_seconds(kv['saved_prefill_s'])} spared")
    if kv["evictions"]:
        line.append(f"; {kv['evictions']:,} blocks evicted" + (f" by {plain(kv['policy'])}" if kv["policy"] else ""))
    return line


def _misses(misses: Mapping[str, int]) -> Text:
    line = _line("misses")
    told = sorted(((count, reason) for reason, count in misses.items() if count), reverse=True)
    line.append(", ".join(f"{plain(reason).replace('_', ' ')} {count:,}" for count, reason in told) or "none")
    return line


def _curve(curve: Sequence[Mapping[str, Any]], kv: Mapping[str, Any]) -> Table:
    """Sizes side by side, the expected hit ratio below each."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(min_width=_LABEL_WIDTH - 2, no_wrap=True)
    for _ in curve:
        table.add_column(justify="right", no_wrap=True)
    table.add_row(Text("with a cache of", style="bold"), *(plain(each["memory"]) for each in curve))
    table.add_row("expected hits", *(_percent(each["hit_ratio"]) for each in curve))
    return table


def _tenants(tenants: Sequence[Mapping[str, Any]], most: int) -> Table:
    """Use by tenant, in tokens."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(Text("tenant", style="bold"), min_width=_LABEL_WIDTH - 2, no_wrap=True, overflow="ellipsis")
    for name in ("tokens kept", "in use", "cached", "pinned", "floor", "cap", "of cap"):
        table.add_column(name, justify="right", no_wrap=True)
    ranked = sorted(tenants, key=lambda each: (-each["kept"], each["tenant"]))
    for each in ranked[:most]:
        cap = each["cap"]
        table.add_row(
            Text(plain(each["tenant"])),
            *(f"{each[name]:,}" for name in ("kept", "active", "cached", "pinned", "floor")),
            _BLANK if cap is None else f"{cap:,}",
            _BLANK if not cap else _percent(each["kept"] / cap),
        )
    if len(ranked) > most:
        table.add_row(Text(f"and {len(ranked) - most:,} more", style="dim"))
    return table


def _bar(first: float, second: float, ascii_only: bool) -> Text:
    full, half, empty = _BARS[ascii_only]
    used = round(min(max(first, 0.0), 1.0) * _BAR_CELLS)
    cached = min(round(min(max(second, 0.0), 1.0) * _BAR_CELLS), _BAR_CELLS - used)
    bar = Text(full * used, style="green")
    bar.append(half * cached, style="cyan")
    bar.append(empty * (_BAR_CELLS - used - cached), style="dim")
    return bar


def _spark(history: Sequence[float], ascii_only: bool) -> str:
    marks = _SPARKS[ascii_only]
    most = max(history, default=0.0)
    if most <= 0:
        return ""
    return "".join(marks[min(int(each / most * len(marks)), len(marks) - 1)] for each in history[-MOST_SPARKS:])


def _line(label: str) -> Text:
    return Text.assemble((label.ljust(_LABEL_WIDTH), "bold"), no_wrap=True, overflow="ellipsis")


def _blank() -> Text:
    return Text("")


def _count(value: int | None) -> str:
    return _BLANK if value is None else f"{value:,}"


def _short(count: int) -> str:
    """A count in at the most six letters."""
    for unit in ("", "k", "M"):
        if count < 10_000:
            return f"{count:,}{unit}"
        count //= 1000
    return f"{count:,}G"


def _rate(value: float | None) -> str:
    return _BLANK if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _percent(value: float | None) -> str:
    return _BLANK if value is None else f"{value:.1%}"
