"""The plot of `simulate`: hit curves, as PNG or SVG. Needs matplotlib (extra `bench`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pagemill.bench.figures import FAINT, INK, STYLE, write_figure
from pagemill.simulator.curves import HitRow

_COLOURS = ("#1f6f8b", "#c8553d", "#7a5195", "#2f9e44", "#b8860b", "#d6336c", "#495057")


def draw_hit_curves(rows: Sequence[HitRow], path: Path) -> bool:
    """Block hit ratios over cache sizes, with the optimum and the cache that never evicts, as the path's ending says.

    False where matplotlib is missing. Raises ConfigError where the file cannot be written.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return False
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.5, 4.8), layout="constrained")
        axes = figure.subplots()
        axes.set_xscale("log")
        axes.set_xlabel("cache (blocks)")
        axes.set_title(f"block hit ratio, {rows[0].trace}", loc="left", color=INK)
        policies = list(dict.fromkeys(each.policy for each in rows))
        sizes = sorted({each.blocks for each in rows})
        axes.set_xticks(sizes, labels=[f"{each:,}" for each in sizes])
        axes.minorticks_off()
        for at, name in enumerate(policies):
            mine = [each for each in rows if each.policy == name]
            colour = _COLOURS[at % len(_COLOURS)]
            # Later curves are thinner, so that those beneath are seen where they agree.
            width, size = max(3.6 - 0.5 * at, 1.2), max(8.0 - at, 3.5)
            ratios = [e.block_hit_ratio for e in mine]
            axes.plot(
                [e.blocks for e in mine], ratios, "o-", color=colour, label=name, linewidth=width, markersize=size
            )
        bounds = [each for each in rows if each.policy == policies[0]]
        axes.plot([e.blocks for e in bounds], [e.optimum for e in bounds], "--", color=FAINT, label="optimum")
        axes.axhline(rows[0].ideal, color=FAINT, linewidth=0.8, linestyle=":", label="never evicts")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)
        write_figure(figure, [path], "give another --plot")
    return True
