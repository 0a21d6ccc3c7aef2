"""The bar chart of `bench peers`, as PNG and SVG, drawn from the report's JSON object. Needs matplotlib (extra
`bench`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pagemill.bench.figures import FAINT, INK, STYLE, save_figure
from pagemill.bench.peers_catalog import PAGEMILL
from pagemill.bench.peers_report import title_of

_OURS, _BEST, _OTHERS = "#1f6f8b", "#c8553d", "#b9c0c6"


def draw_peers(report: dict[str, Any], stem: Path) -> list[Path]:
    """Medians of all engines, one panel for each row, lines from the 10th to the 90th percentile: `stem`.png and .svg.

    Returns the files; none where matplotlib is missing. Raises ConfigError where they cannot be written.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return []
    names = list(dict.fromkeys(row["work"] for row in report["rows"]))
    engines = list(dict.fromkeys((row["engine"], row["mode"]) for row in report["rows"]))
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 0.9 + lines * (0.9 + 0.26 * len(engines))), layout="constrained")
        axes = figure.subplots(lines, columns, squeeze=False, sharey=True).ravel()
        for panel, name in zip(axes, names, strict=False):
            _draw_row(panel, [row for row in report["rows"] if row["work"] == name], engines)
        for panel in axes[len(names) :]:
            panel.set_axis_off()
        figure.suptitle(title_of(report), x=0.01, ha="left", fontsize=11.5, fontweight="bold")
        machine = report["machine"]
        caption = f"Medians of {report['settings']['num_runs']} interleaved runs, lines p10 to p90. {machine['cpu']}. "
        figure.supxlabel(caption + report["date"][:10], x=0.01, ha="left", fontsize=8, color=FAINT)
        return save_figure(figure, stem)


def _draw_row(axes: Any, rows: list[dict[str, Any]], engines: list[tuple[str, str]]) -> None:
    by_engine = {(row["engine"], row["mode"]): row for row in rows}
    axes.set_title(f"{rows[0]['work']} ({rows[0]['unit']})", loc="left", fontsize=10)
    axes.set_yticks(range(len(engines)), [" ".join(each) for each in engines])
    if not axes.yaxis_inverted():
        axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    top = max(row["p90"] for row in rows)
    for place, engine in enumerate(engines):
        row = by_engine.get(engine)
        if row is None:
            axes.annotate(
                "not measured",
                (0, place),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                color=FAINT,
                fontsize=8.5,
            )
            continue
        best = row["best_peer"] is not None and engine == (row["best_peer"]["engine"], row["best_peer"]["mode"])
        colour = _OURS if engine[0] == PAGEMILL else _BEST if best else _OTHERS
        axes.barh(place, row["median"], color=colour, height=0.66)
        axes.plot((row["p10"], row["p90"]), (place, place), color=INK, linewidth=1)
        text = f"{row['median']:.3g}" if row["unit"] == "s" else f"{row['median']:,.0f}"
        if engine[0] == PAGEMILL and row["ratio"] is not None:
            text += f"  {row['ratio']['median']:.2f}×"
        axes.annotate(
            text,
            (max(row["median"], row["p90"]), place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
        )
    axes.set_xlim(0, 1.3 * top)
