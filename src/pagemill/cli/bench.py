"""`pagemill bench`: benches in the terminal. Owns progress, Ctrl-C and printing; measuring is `pagemill.bench`'s."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pagemill.base.config import resolve_config
from pagemill.base.errors import ConfigError
from pagemill.base.units import format_seconds
from pagemill.bench.generation import Estimate, Generation
from pagemill.bench.kvcache import WITH, WITHOUT, Settings, measure, open_subject
from pagemill.bench.kvcache_report import make_report, make_table, remarks, title_of
from pagemill.bench.plots import draw_kvcache
from pagemill.bench.report import file_stem, prepare_directory
from pagemill.cli.progress import byte_progress
from pagemill.cli.publish import publish
from pagemill.cli.terminal import note

_REFRESH_S = 0.25
_INTERRUPTED = 130


def paged_arguments(engine: dict[str, Any]) -> dict[str, str]:
    """Options of the engine with the cache, which is also run without. Raises ConfigError where they name a mode."""
    if "kv_cache" in engine["arguments"]:
        raise ConfigError("--kv-cache: this bench runs both paged and none to compare them; leave the option out")
    return {"max_num_seqs": "1", **engine["arguments"], "kv_cache": "paged"}


def kvcache(
    *,
    num_tokens: int,
    num_runs: int,
    num_runs_without: int | None,
    prompt: str | None,
    output: str,
    as_json: bool,
    engine: dict[str, Any],
) -> int:
    """Generate with and without the cache; print a table or one JSON object, write JSON and plots to `output`.

    Returns 130 where Ctrl-C ended it; what had been measured by then is reported all the same.
    """
    arguments = paged_arguments(engine)
    settings = Settings(num_tokens, num_runs, num_runs if num_runs_without is None else num_runs_without, prompt)
    config = resolve_config(arguments, file=engine["file"], origin="command line").config
    directory = prepare_directory(output)
    with byte_progress() as report_bytes:
        note(f"loading {config.model} …")
        subject = open_subject(config, settings, progress=report_bytes)
    with ExitStack() as stack:
        for llm in subject.engines.values():
            stack.enter_context(llm)
        with interrupts() as interrupted, _Display(settings) as display:
            found = measure(subject, settings, display, interrupted=interrupted)
        if not found.runs:
            note("interrupted before anything was measured")
            return _INTERRUPTED
        report = make_report(subject, settings, found)
    _publish(report, directory, as_json=as_json)
    return _INTERRUPTED if found.interrupted else 0


def _publish(report: dict[str, Any], directory: Path, *, as_json: bool) -> None:
    settings = report["settings"]
    name = file_stem("kvcache", settings["name"], settings["dtype"], str(settings["num_tokens"]), report["date"])
    publish(
        report,
        directory / name,
        lambda: [(title_of(report), [make_table(report)])],
        lambda: remarks(report),
        draw=draw_kvcache,
        as_json=as_json,
    )


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into an answer, so that no step is cut; the second one ends the program as usual."""
    seen: list[int] = []

    def handle(number: int, frame: object) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGINT, before)


class _Display:
    """Progress with remaining time on stderr. Mutated as runs go on.

    A bar on a terminal, a line for each run elsewhere. Drawn between tokens, by the thread that measures and off its
    clock, so that it takes nothing from the figures.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._bars: Progress | None = None
        self._drawn_s = 0.0
        if sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
            self._bars = Progress(*columns, console=Console(stderr=True), auto_refresh=False, transient=True)

    def __enter__(self) -> _Display:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def estimated(self, total_s: float, estimates: dict[str, Estimate]) -> None:
        one = {mode: format_seconds(each.total_s) for mode, each in estimates.items()}
        self._say(
            f"a run takes about {one[WITH]} with the cache and {one[WITHOUT]} without; all of it about "
            f"{format_seconds(total_s)} (Ctrl-C reports what is there by then)"
        )
        if self._bars is not None:
            self._bars.add_task("", total=total_s)

    def began(self, mode: str, index: int, count: int) -> None:
        if self._bars is not None:
            self._bars.update(self._bars.task_ids[0], description=f"{mode} the cache, run {index} of {count}")

    def advanced(self, expected_s: float) -> None:
        if self._bars is None:
            return
        self._bars.advance(self._bars.task_ids[0], expected_s)
        now = time.monotonic()
        if now - self._drawn_s > _REFRESH_S:
            self._drawn_s = now
            self._bars.refresh()

    def ended(self, run: Generation) -> None:
        done = len(run.seconds)
        self._say(f"{run.mode:>7} the cache: {done:,} tokens in {format_seconds(run.total_s())}")

    def _say(self, text: str) -> None:
        if self._bars is not None:
            self._bars.console.print(text, style="dim", highlight=False)
        else:
            note(text)
