"""The drawing of `bench serve`, as PNG and SVG, from the report's JSON object. Needs matplotlib (extra `bench`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pagemill.bench.figures import FAINT, STYLE, save_figure
from pagemill.bench.peers_catalog import PAGEMILL
from pagemill.bench.serve_report import ITL_P95, TOKENS, title_of

_OURS, _THEIRS = "#1f6f8b", "#c8553d"
_LINE = 0.06  # of the axis that a name is high


def draw_serve(report: dict[str, Any], stem: Path) -> list[Path]:
    """Tokens per second over the 95th percentile of the time between tokens, one panel for each workload, a point for
    each run: `stem`.png and .svg. Settings with a target are hollow; a dashed line stands at a peer's time.

    Returns the files; none where matplotlib is missing. Raises ConfigError where they cannot be written.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return []
    works = list(dict.fromkeys(row["workload"] for row in report["rows"]))
    columns = min(3, len(works))
    lines = -(-len(works) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.5 + 3.4 * columns, 1.1 + 3.1 * lines), layout="constrained")
        panels = figure.subplots(lines, columns, squeeze=False).ravel()
        for panel, work in zip(panels, works, strict=False):
            _draw_work(panel, work, [row for row in report["rows"] if row["workload"] == work])
        for panel in panels[len(works) :]:
            panel.set_axis_off()
        figure.suptitle(title_of(report), x=0.01, ha="left", fontsize=11.5, fontweight="bold")
        caption = f"Further up and left is better. {report['machine']['cpu']}. {report['date'][:10]}"
        figure.supxlabel(caption, x=0.01, ha="left", fontsize=8, color=FAINT)
        return save_figure(figure, stem)


def _draw_work(axes: Any, work: str, rows: list[dict[str, Any]]) -> None:
    axes.set_title(f"{work}: tok/s over p95 between tokens (ms)", loc="left", fontsize=10)
    samples = {(row["engine"], row["mode"], row["metric"]): row for row in rows}
    middle = max((row["median"] for row in rows if row["metric"] == ITL_P95), default=0.0) / 2
    highest = max((row["median"] for row in rows if row["metric"] == TOKENS), default=0.0)
    ours: list[tuple[float, float]] = []
    named: list[tuple[float, float]] = []
    for engine, mode in dict.fromkeys((row["engine"], row["mode"]) for row in rows):
        tokens, itl = (samples.get((engine, mode, metric)) for metric in (TOKENS, ITL_P95))
        if itl is None or tokens is None:
            continue
        colour = _OURS if engine == PAGEMILL else _THEIRS
        pairs = list(zip(itl["samples"], tokens["samples"], strict=False))
        face = colour if itl["target_itl_ms"] is None else "none"
        axes.plot(*zip(*pairs, strict=True), "o", color=colour, markerfacecolor=face, markersize=4, alpha=0.7)
        text = mode if engine == PAGEMILL else engine
        place = (itl["median"], tokens["median"])
        side, offset = ("right", -6) if place[0] > middle else ("left", 6)
        near = any(abs(x - place[0]) < middle and abs(y - place[1]) < highest * _LINE for x, y in named)
        above = -11 if near else 4
        axes.annotate(
            text, place, xytext=(offset, above), textcoords="offset points", ha=side, color=colour, fontsize=8.5
        )
        named.append(place)
        if engine != PAGEMILL:
            axes.axvline(place[0], color=colour, linewidth=0.8, linestyle="--", alpha=0.5)
        elif itl["target_itl_ms"] is None:
            ours.append(place)
    if len(ours) > 1:
        axes.plot(*zip(*sorted(ours), strict=True), color=_OURS, linewidth=1, alpha=0.5)
    axes.margins(x=0.15, y=0.15)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
