"""The plots of `bench growth`, as PNG and SVG, drawn from the report's JSON object. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pagemill.bench.figures import FAINT, STYLE, save_figure
from pagemill.bench.growth_report import title_of
from pagemill.bench.report import file_stem

_MAP = "viridis"
_LINES = {"bf16": "--", "int8": "-"}
_OTHER_LINE = ":"


def draw_growth(report: dict[str, Any], stem: Path) -> list[Path]:
    """Two panels for each model: a step's time over the context, one line a batch; tokens per second over the batch,
    one line a context. Files `stem`-MODEL.png and .svg.

    Returns the files; none where matplotlib is missing. Raises ConfigError where they cannot be written.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return []
    paths: list[Path] = []
    for model in report["models"]:
        rows = [each for each in report["rows"] if each["model"] == model["name"]]
        if not rows:
            continue
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=(11, 4.9), layout="constrained")
            by_context, by_batch = figure.subplots(1, 2)
            _draw_family(matplotlib, by_context, rows, across="context", line="num_seqs", up="best_s", scale=1e3)
            by_context.set_title("milliseconds of a step", loc="left", fontsize=10)
            by_context.set_xlabel("context (tokens)")
            by_context.legend(title="streams", fontsize=8, title_fontsize=8, frameon=False, ncols=2)
            _draw_family(matplotlib, by_batch, rows, across="num_seqs", line="context", up="best_tok_s", scale=1.0)
            by_batch.set_title("tokens per second, all streams", loc="left", fontsize=10)
            by_batch.set_xlabel("streams")
            by_batch.legend(title="context", fontsize=8, title_fontsize=8, frameon=False)
            figure.suptitle(title_of(model), x=0.01, ha="left", fontsize=11.5, fontweight="bold")
            figure.supxlabel(_caption(report, model), x=0.01, ha="left", fontsize=8, color=FAINT)
            paths += save_figure(figure, stem.with_name(file_stem(stem.name, model["name"])))
    return paths


def _draw_family(
    matplotlib: Any, axes: Any, rows: list[dict[str, Any]], *, across: str, line: str, up: str, scale: float
) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    members = sorted({row[line] for row in rows})
    for place, member in enumerate(members):
        colour = matplotlib.colormaps[_MAP](0.9 * place / max(1, len(members) - 1))
        for codec in dict.fromkeys(row["codec"] for row in rows):
            curve = sorted(
                (row[across], row[up] * scale) for row in rows if row[line] == member and row["codec"] == codec
            )
            if curve:
                solid = codec == rows[-1]["codec"]
                axes.plot(
                    *zip(*curve, strict=True),
                    _LINES.get(codec, _OTHER_LINE),
                    color=colour,
                    marker="o",
                    markersize=3,
                    linewidth=1.3,
                    label=f"{member:,}" if solid else None,
                )
    ticks = sorted({row[across] for row in rows})
    axes.set_xticks(ticks, [f"{each:,}" for each in ticks])
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axes.yaxis.set_major_formatter(lambda value, place: f"{value:,g}")


def _caption(report: dict[str, Any], model: dict[str, Any]) -> str:
    machine = report["machine"]
    codecs = [f"{'dashed' if _LINES.get(each) == '--' else 'solid'}: KV {each}" for each in model["kv_bytes_per_token"]]
    return (
        f"{', '.join(codecs)}. Fastest sample. {machine['cpu']}, {machine['num_threads']} threads, "
        f"{machine['target']}. {report['date'][:10]}"
    )
