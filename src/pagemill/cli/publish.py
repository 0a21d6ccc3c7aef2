"""A bench's report on its way out: its plots and its JSON to a directory, its tables or the same JSON to stdout."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pagemill.bench.figures import MISSING
from pagemill.bench.report import write_json
from pagemill.cli.terminal import BOLD, note, paint, print_json

# A title and the tables under it.
Section = tuple[str, Iterable[Table]]


def publish(
    report: dict[str, Any],
    stem: Path,
    sections: Callable[[], Iterable[Section]],
    remarks: Callable[[], Iterable[str]],
    *,
    draw: Callable[[dict[str, Any], Path], list[Path]] | None = None,
    as_json: bool,
    pipe_width: int = 80,
) -> None:
    """Write `stem`.json and what `draw` makes; print the sections and remarks, or the JSON object and nothing else.

    pipe_width: columns of tables that go to no terminal. Adds "files" to the report. Raises ConfigError where a file
    cannot be written.
    """
    plots = [] if draw is None else draw(report, stem)
    paths = [stem.with_name(stem.name + ".json"), *plots]
    report["files"] = [str(path) for path in paths]
    write_json(paths[0], report)
    if as_json:
        print_json(report)
    else:
        console = Console(highlight=False, width=None if sys.stdout.isatty() else pipe_width)
        for title, tables in sections():
            print(paint(title, BOLD, sys.stdout))
            for table in tables:
                console.print(table)
        for line in (*remarks(), f"written: {', '.join(report['files'])}"):
            print(line)
    if draw is not None and not plots:
        note(MISSING)
