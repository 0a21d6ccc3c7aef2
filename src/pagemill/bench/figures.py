"""How the benches' plots look and where they are written. What is drawn is each plot's own file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pagemill.base.errors import ConfigError

MISSING = "no plot: matplotlib is not installed; get it with `pip install '.[bench]'` in a checkout"
INK, FAINT = "#23272b", "#8a9299"
STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e7ea",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.fonttype": "none",
    "svg.hashsalt": "pagemill",
}


def save_figure(figure: Any, stem: Path) -> list[Path]:
    """Write `stem`.png and `stem`.svg. Raises ConfigError where they cannot be written."""
    paths = [stem.with_name(stem.name + ending) for ending in (".png", ".svg")]
    write_figure(figure, paths, "give another directory (--output)")
    return paths


def write_figure(figure: Any, paths: Iterable[Path], mend: str) -> None:
    """Write a figure in the format of each path's ending. Raises ConfigError that ends in `mend`."""
    for path in paths:
        try:
            figure.savefig(path, dpi=160, metadata={"Date": None} if path.suffix == ".svg" else None)
        except OSError as error:
            raise ConfigError(f"the plot cannot be written to {path}: {error.strerror}; {mend}") from None
