"""Drawings of bench reports, as PNG and SVG. Needs matplotlib (extra `bench`); owns colours, sizes and type.

The pages are drawn from a report's JSON object, so that they can be drawn again from a stored one.
"""

from __future__ import annotations

import math
import statistics
from itertools import accumulate, zip_longest
from pathlib import Path
from typing import Any

from pagemill.bench.figures import FAINT, STYLE, save_figure
from pagemill.bench.kvcache import WITH, WITHOUT
from pagemill.bench.kvcache_report import title_of

_COLOURS = {WITHOUT: "#c8553d", WITH: "#1f6f8b"}


def draw_kvcache(report: dict[str, Any], stem: Path) -> list[Path]:
    """Time per token against position, and time so far, with and without the cache: `stem`.png and .svg.

    Left: medians over the runs, bands their 10th to 90th percentile; right: means. Returns the files; none where
    matplotlib is missing. Raises ConfigError where they cannot be written.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
    except ImportError:
        return []
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.5, 4.8), layout="constrained")
        per_token, so_far = figure.subplots(1, 2, width_ratios=(1.5, 1.0))
        _draw_per_token(per_token, report)
        _draw_so_far(so_far, report)
        per_token.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        per_token.yaxis.set_minor_formatter(NullFormatter())
        per_token.yaxis.set_major_formatter(lambda value, place: f"{value:,g}")
        so_far.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        figure.suptitle(title_of(report), x=0.01, ha="left", fontsize=11.5, fontweight="bold")
        figure.supxlabel(_caption(report), x=0.01, ha="left", fontsize=8, color=FAINT)
        return save_figure(figure, stem)


def _draw_per_token(axes: Any, report: dict[str, Any]) -> None:
    axes.set_title("time per token (ms)", loc="left", fontsize=10)
    axes.set_xlabel("position in the context (tokens)")
    axes.set_yscale("log")
    first, last = math.inf, 0.0
    for mode in (WITHOUT, WITH):
        curve = report["positions"][mode]
        x, median, low, high = (curve[name][1:] for name in ("position", "median_ms", "p10_ms", "p90_ms"))
        if not x:
            continue
        first, last = min(first, x[0]), max(last, x[-1])
        axes.fill_between(x, low, high, color=_COLOURS[mode], alpha=0.18, linewidth=0)
        axes.plot(x, median, color=_COLOURS[mode], linewidth=1.6)
        _label(axes, x[-1], statistics.median(median[-9:]), f"{mode}\nthe cache", _COLOURS[mode])
    if last > first:
        axes.set_xlim(first - 0.02 * (last - first), last + 0.19 * (last - first))
    axes.margins(y=0.08)


def _draw_so_far(axes: Any, report: dict[str, Any]) -> None:
    axes.set_title("total time (s)", loc="left", fontsize=10)
    axes.set_xlabel("tokens generated")
    longest = 0
    for mode in (WITHOUT, WITH):
        times = zip_longest(*(run["token_s"] for run in report["runs"] if run["mode"] == mode))
        total = list(accumulate(statistics.fmean(each for each in at if each is not None) for at in times))
        if not total:
            continue
        longest = max(longest, len(total))
        axes.plot(range(1, len(total) + 1), total, color=_COLOURS[mode], linewidth=1.8)
        axes.plot(len(total), total[-1], "o", color=_COLOURS[mode], markersize=4)
        _label(axes, len(total), total[-1], f"{total[-1]:.3g} s", _COLOURS[mode])
    axes.set_xlim(0, longest * 1.24)
    axes.set_ylim(bottom=0)


def _label(axes: Any, x: float, y: float, text: str, colour: str) -> None:
    """Text to the right of a curve's end."""
    axes.annotate(
        text,
        (x, y),
        xytext=(7, 0),
        textcoords="offset points",
        va="center",
        color=colour,
        fontweight="bold",
        fontsize=9,
        annotation_clip=False,
    )


def _caption(report: dict[str, Any]) -> str:
    machine = report["machine"]
    return (
        f"Left: median of the runs, band from the 10th to the 90th percentile; right: their mean. {machine['cpu']}, "
        f"{machine['num_threads']} threads, {machine['target']}. Pagemill {report['versions']['pagemill']}, "
        f"{report['date'][:10]}."
    )
