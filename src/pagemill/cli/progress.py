"""Progress of long work on stderr: a bar on a terminal, one line at the start of each stage elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Protocol

from pagemill.base.units import format_bytes
from pagemill.cli.terminal import note

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


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
        with ExitStack() as stack:
            yield _drawer(stack)


def _silent(stage: str, done_bytes: int, total_bytes: int | None) -> None:
    pass


def _announcer() -> Report:
    seen: set[str] = set()

    def announce(stage: str, done_bytes: int, total_bytes: int | None) -> None:
        if stage not in seen:
            seen.add(stage)
            note(f"{stage}{f' ({format_bytes(total_bytes)})' if total_bytes else ''} …")

    return announce


def _bars() -> Progress:
    # Loaded with the first report: a model that is on this machine already makes none.
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(True), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)


def _drawer(stack: ExitStack) -> Report:
    """A report that draws bars from its first call until `stack` is closed."""
    bars: Progress | None = None
    tasks: dict[str, TaskID] = {}

    def draw(stage: str, done_bytes: int, total_bytes: int | None) -> None:
        nonlocal bars
        if bars is None:
            bars = stack.enter_context(_bars())
        if stage not in tasks:
            tasks[stage] = bars.add_task(stage, total=total_bytes)
        bars.update(tasks[stage], completed=done_bytes, total=total_bytes)

    return draw
