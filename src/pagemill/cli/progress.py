"""Progress of long work on stderr: a bar on a terminal, one line at the start of each stage elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from pagemill.base.units import format_bytes
from pagemill.cli.terminal import note


class Report(Protocol):
    """Called as long work comes on. total_bytes: None where it is not known."""

    def __call__(self, stage: str, done_bytes: int, total_bytes: int | None) -> None: ...


@contextmanager
def byte_progress(*, quiet: bool = False) -> Iterator[Report]:
    """A callback that shows how far long work has come. quiet: nothing at all, for `--json`."""
    if quiet:
        yield _silent
    elif not sys.stderr.isatty():
        yield _announcer()
    else:
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(True), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
            yield _drawer(bars)


def _silent(stage: str, done_bytes: int, total_bytes: int | None) -> None:
    pass


def _announcer() -> Report:
    seen: set[str] = set()

    def announce(stage: str, done_bytes: int, total_bytes: int | None) -> None:
        if stage not in seen:
            seen.add(stage)
            note(f"{stage}{f' ({format_bytes(total_bytes)})' if total_bytes else ''} …")

    return announce


def _drawer(bars: Progress) -> Report:
    tasks: dict[str, TaskID] = {}

    def draw(stage: str, done_bytes: int, total_bytes: int | None) -> None:
        if stage not in tasks:
            tasks[stage] = bars.add_task(stage, total=total_bytes)
        bars.update(tasks[stage], completed=done_bytes, total=total_bytes)

    return draw
