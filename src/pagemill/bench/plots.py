"""Drawings of bench reports, as PNG and SVG. Needs matplotlib (extra `bench`); owns colours, sizes and type.

The pages are drawn from a report's JSON object, so that they can be drawn again from a stored one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pagemill.base.errors import ConfigError
from pagemill.bench.kvcache import WITH, WITHOUT
from pagemill.bench.kvcache_report import title_of

MISSING = "no plot: matplotlib is not installed; get it with `pip install 'pagemill[bench]'`"

_COLOURS = {WITHOUT: "#c8553d", WITH: "#1f6f8b"}
_INK, _FAINT = "#23272b", "#8a9299"
_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e7ea",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "svg.fonttype": "none",
    "svg.hashsalt": "pagemill",
}


def draw_kvcache(report: dict[str, Any], stem: Path) -> list[Path]:
    """Time per token against position, and time so far, with and without the cache: `stem`.png and .svg.

    Lines are medians over the runs, bands their 10th to 90th percentile. Returns the files; none where matplotlib is
    missing. Raises ConfigError where they cannot be written.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return []
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(10.5, 4.8), layout="constrained")
        per_token, so_far = figure.subplots(1, 2, width_ratios=(1.5, 1.0))
        _draw_per_token(per_token, report)
        _draw_so_far(so_far, report)
        figure.suptitle(title_of(report), x=0.01, ha="left", fontsize=11.5, fontweight="bold")
        figure.supxlabel(_caption(report), x=0.01, ha="left", fontsize=8, color=_FAINT)
        paths = [stem.with_name(stem.name + ending) for ending in (".png", ".svg")]
        for path in paths:
            try:
                figure.savefig(path, dpi=160, metadata={"Date": None} if path.suffix == ".svg" else None)
            except OSError as error:
                raise ConfigError(
                    f"the plot cannot be written to {path}: {error.strerror}; give another directory (--output)"
                ) from None
    return paths


def _draw_per_token(axes: Any, report: dict[str, Any]) -> None:
    axes.set_title("time per token", loc="left", fontsize=10)
    axes.set_xlabel("position in the context (tokens)")
    axes.set_ylabel("milliseconds")
    axes.set_yscale("log")
    for mode in (WITHOUT, WITH):
        curve = report["positions"][mode]
        x, median, low, high = (np.asarray(curve[name][1:]) for name in ("position", "median_ms", "p10_ms", "p90_ms"))
        if not len(x):
            continue
        axes.fill_between(x, low, high, color=_COLOURS[mode], alpha=0.18, linewidth=0)
        axes.plot(x, median, color=_COLOURS[mode], linewidth=1.6)
        axes.annotate(
            f"{mode} the cache",
            (x[len(x) // 2], float(np.max(_smooth(median)[len(x) // 4 : 3 * len(x) // 4 + 1]))),
            xytext=(0, 9),
            textcoords="offset points",
            ha="center",
            color=_COLOURS[mode],
            fontweight="bold",
        )
    axes.margins(x=0.02, y=0.12)
    axes.yaxis.set_major_formatter(lambda value, place: f"{value:g}")


def _draw_so_far(axes: Any, report: dict[str, Any]) -> None:
    axes.set_title("time so far", loc="left", fontsize=10)
    axes.set_xlabel("tokens generated")
    axes.set_ylabel("seconds")
    longest = 0
    for mode in (WITHOUT, WITH):
        total = np.cumsum(report["positions"][mode]["median_ms"]) / 1e3
        if not len(total):
            continue
        longest = max(longest, len(total))
        x = np.arange(1, len(total) + 1)
        axes.plot(x, total, color=_COLOURS[mode], linewidth=1.8, solid_capstyle="round")
        axes.plot(x[-1:], total[-1:], "o", color=_COLOURS[mode], markersize=4)
        axes.annotate(
            f"{total[-1]:.3g} s",
            (x[-1], total[-1]),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=_COLOURS[mode],
            fontweight="bold",
        )
    axes.set_xlim(0, longest * 1.2)
    axes.set_ylim(bottom=0)


def _smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """A running median of nine, so that one slow token does not place a label."""
    padded = np.pad(values, 4, mode="edge")
    return np.asarray(np.median(np.lib.stride_tricks.sliding_window_view(padded, 9), axis=-1))


def _caption(report: dict[str, Any]) -> str:
    machine = report["machine"]
    return (
        f"Medians over the runs, bands from the 10th to the 90th percentile. {machine['cpu']}, "
        f"{machine['num_threads']} threads, {machine['target']}. Pagemill {report['versions']['pagemill']}, "
        f"{report['date'][:10]}."
    )
