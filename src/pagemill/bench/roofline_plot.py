"""The roofline plot, as PNG and SVG, drawn from the report's JSON object. Needs matplotlib (extra `bench`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pagemill.base.units import format_bytes
from pagemill.bench.figures import FAINT, INK, STYLE, save_figure
from pagemill.bench.roofline_peaks import ARITHMETICS, MEMORY, NEAR
from pagemill.bench.roofline_report import title_of

_COLOURS = {"prefill": "#c8553d", "decode": "#1f6f8b"}
_READING = {NEAR: "reading as much as the weights", MEMORY: "reading memory"}
_CLOSE = 1.12  # roofs nearer than this share a label


def draw_roofline(report: dict[str, Any], stem: Path) -> list[Path]:
    """Roofs of all threads and one point for each row, both axes logarithmic: `stem`.png and .svg.

    Across: multiply-adds for each byte read; up: multiply-adds per second. Returns the files; none where matplotlib is
    missing. Raises ConfigError where they cannot be written.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return []
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.5, 6.0), layout="constrained")
        axes = figure.subplots()
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("multiply-adds for each byte read")
        axes.set_title("10⁹ multiply-adds per second", loc="left", fontsize=10)
        _draw(axes, report)
        axes.xaxis.set_major_formatter(lambda value, place: f"{value:,g}")
        axes.yaxis.set_major_formatter(lambda value, place: f"{value:,g}")
        figure.suptitle(title_of(report), x=0.01, ha="left", fontsize=11.5, fontweight="bold")
        machine = report["machine"]
        caption = (
            f"Lines: the most that {machine['num_threads']} threads reached. Points: native steps, fastest sample, "
            f"dash above: its limit. {machine['cpu']}, {machine['target']}. {report['date'][:10]}"
        )
        figure.supxlabel(caption, x=0.01, ha="left", fontsize=8, color=FAINT)
        return save_figure(figure, stem)


def _draw(axes: Any, report: dict[str, Any]) -> None:
    threads = report["machine"]["num_threads"]
    known = [each for each in report["peaks"] if each["threads"] == threads]
    peaks = {each["what"]: each["rate"] / 1e9 for each in known}
    sizes = {each["what"]: each["bytes"] for each in known if "bytes" in each}
    used = {name for row in report["rows"] for name in row["multiply_adds"]}
    roofs = {name: peaks[name] for name in ARITHMETICS if name in peaks}
    points = [_point(row) for row in report["rows"]]
    low = min(x for x, _ in points) / 2.5
    high = max(x for x, _ in points) * 6
    top = max(roofs.values())
    for name, rate in roofs.items():
        busy = name in used
        corner = rate / peaks[NEAR]
        axes.plot([corner, high], [rate, rate], color=INK, linewidth=1.4 if busy else 0.8, alpha=1 if busy else 0.45)
    _label_roofs(axes, roofs, used, high)
    for name, style in ((NEAR, "-"), (MEMORY, "--")):
        end = min(high, top / peaks[name])
        axes.plot([low, end], [low * peaks[name], end * peaks[name]], style, color=INK, linewidth=1.2)
    _label_slopes(axes, peaks, sizes)
    for row, (x, y) in zip(report["rows"], points, strict=True):
        colour = _COLOURS[row["phase"]]
        limit = y / row["share"]
        axes.plot([x, x], [y, limit], color=colour, linewidth=0.8, alpha=0.4)
        axes.plot(x, limit, "_", color=colour, markersize=9)
        axes.plot(x, y, "o", color=colour, markersize=6)
        axes.annotate(
            f"{row['work']}  {row['share']:.0%}",
            (x, y),
            xytext=(5, -7),
            textcoords="offset points",
            rotation=-35,
            rotation_mode="anchor",
            va="top",
            color=colour,
            fontsize=8.5,
            fontweight="bold",
        )
    axes.set_xlim(low, high)
    axes.set_ylim(min(low * min(peaks[NEAR], peaks[MEMORY]), min(y for _, y in points)) / 4.5, top * 2.2)


def _point(row: dict[str, Any]) -> tuple[float, float]:
    """(multiply-adds for each byte, 10⁹ multiply-adds per second) of a row."""
    number = sum(row["multiply_adds"].values())
    return number / (row["weight_bytes"] + row["kv_bytes"]), number / row["best_s"] / 1e9


def _label_roofs(axes: Any, roofs: dict[str, float], used: set[str], right: float) -> None:
    groups: list[tuple[float, list[str]]] = []
    for name, rate in sorted(roofs.items(), key=lambda item: item[1]):
        if groups and rate < groups[-1][0] * _CLOSE:
            groups[-1][1].append(name)
        else:
            groups.append((rate, [name]))
    for rate, names in groups:
        axes.annotate(
            f"{', '.join(ARITHMETICS[name] for name in names)}  {rate:,.0f}",
            (right, rate),
            xytext=(-4, 3),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color=INK if used & set(names) else FAINT,
        )


def _label_slopes(axes: Any, peaks: dict[str, float], sizes: dict[str, int]) -> None:
    """In the upper left corner, which the slopes leave free."""
    for place, (name, style) in enumerate(((NEAR, "solid line"), (MEMORY, "dashed"))):
        axes.annotate(
            f"{style}: {_READING[name]} ({format_bytes(sizes[name])}), {peaks[name]:.1f} GB/s",
            (0.015, 0.97 - 0.045 * place),
            xycoords="axes fraction",
            va="top",
            fontsize=8.5,
            color=INK,
        )
