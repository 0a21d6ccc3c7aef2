"""The plot of `bench cache`, as PNG and SVG, drawn from the report's JSON object. Needs matplotlib (extra `bench`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pagemill.bench.cache_streams import LATENCY_GOAL, THROUGHPUT_GOAL
from pagemill.bench.figures import FAINT, INK, STYLE, save_figure

_LINES = {8: "#1f6f8b", 32: "#c8553d"}
_OTHER = "#7a5195"
_STAGES = ("#495057", "#b8860b", "#1f6f8b", "#c8553d", "#7a5195", "#2f9e44")


def draw_cache(report: dict[str, Any], stem: Path) -> list[Path]:
    """Where a warm first token's time goes, and the time between tokens against throughput over the size of chunks; as
    many panels as the report has rows for. Files `stem`.png and .svg.

    Returns the files; none where matplotlib is missing. Raises ConfigError where they cannot be written.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return []
    stages = [row for row in report["rows"] if "stage" in row]
    chunks = [row for row in report["rows"] if "chunk" in row and row["unit"] == "ms p99"]
    panels = [each for each in ((_draw_stages, stages), (_draw_latency, chunks)) if each[1]]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.6 * len(panels), 4.6), layout="constrained")
        for axes, (draw, rows) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            draw(axes, rows)
        figure.suptitle(
            f"the cache of {report['settings']['name']}, KV {report['settings']['kv_codec']}",
            x=0.01,
            ha="left",
            fontweight="bold",
        )
        figure.supxlabel(_caption(report), x=0.01, ha="left", fontsize=8, color=FAINT)
        return save_figure(figure, stem)


def _draw_stages(axes: Any, rows: list[dict[str, Any]]) -> None:
    """A bar for each number of new tokens, made of its stages."""
    works = list(dict.fromkeys(row["work"] for row in rows))
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    left = [0.0] * len(works)
    for place, stage in enumerate(stages):
        values = [next(r["median"] for r in rows if (r["work"], r["stage"]) == (work, stage)) for work in works]
        values = [max(0.0, each) for each in values]
        axes.barh(works, values, left=left, color=_STAGES[place % len(_STAGES)], label=stage, height=0.5)
        left = [before + value for before, value in zip(left, values, strict=True)]
    for work, total in zip(works, left, strict=True):
        axes.annotate(f"{total:.3g} ms", (total, work), xytext=(4, 0), textcoords="offset points", va="center")
    axes.set_title("first token: where the time goes (ms)", loc="left", fontsize=10)
    axes.set_xlim(0, max(left) * 1.18)
    axes.set_ylim(-0.6, len(works) + 0.7)
    axes.grid(visible=False, axis="y")
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper right")


def _draw_latency(axes: Any, rows: list[dict[str, Any]]) -> None:
    """A line for each number of streams over throughput, a point for each size of chunks, a star for what is served."""
    for streams in sorted({row["streams"] for row in rows}):
        mine = [row for row in rows if row["streams"] == streams]
        fixed = sorted((row for row in mine if row["chunk"] is not None), key=lambda row: row["chunk"])
        colour = _LINES.get(streams, _OTHER)
        points = [(row["throughput_share"], row["p99_ratio"]) for row in fixed]
        axes.plot(*zip(*points, strict=True), "o-", color=colour, markersize=4, label=f"{streams} streams")
        for row, point in zip(fixed, points, strict=True):
            name = row["mode"].removeprefix("chunks of ")
            place = {"xytext": (-5, 5), "textcoords": "offset points", "ha": "right"}
            axes.annotate(name, point, fontsize=8, color=colour, **place)
        for row in mine:
            if row["chunk"] is None:
                at = (row["throughput_share"], row["p99_ratio"])
                axes.plot(*at, "*", color=colour, markersize=12, label=f"{streams} streams, {row['mode']}")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, place: f"{value:,g}")
    axes.axhline(LATENCY_GOAL, color=INK, linewidth=0.8, linestyle=":")
    axes.axvline(THROUGHPUT_GOAL, color=INK, linewidth=0.8, linestyle=":")
    axes.margins(0.1)
    axes.set_title("a long prompt arrives: p99 between tokens ÷ alone", loc="left", fontsize=10)
    axes.set_xlabel("throughput ÷ that of reading it at once; points: tokens of a step")
    axes.legend(frameon=False, fontsize=8)


def _caption(report: dict[str, Any]) -> str:
    machine, clock = report["machine"], report["settings"]["clock"]
    threads = "1 thread" if machine["num_threads"] == 1 else f"{machine['num_threads']} threads"
    times = "" if clock == "wall" else f" Times are {clock}."
    return f"{machine['cpu']}, {threads}, {machine['target']}. {report['date'][:10]}. Medians.{times}"
