"""`pagemill bench quality` in the terminal. Owns options, progress, Ctrl-C and printing; measuring is
`pagemill.bench`'s."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pagemill.base.config import resolve_config
from pagemill.base.errors import ConfigError
from pagemill.base.units import format_seconds
from pagemill.bench.quality import (
    Scores,
    Settings,
    measure,
    open_subject,
    total_tokens,
)
from pagemill.bench.quality_modes import parse_apart, parse_counts, parse_modes
from pagemill.bench.quality_peer import find_peer, measure_peer
from pagemill.bench.quality_report import make_report, make_tables, remarks, title_of
from pagemill.bench.quality_score import perplexity
from pagemill.bench.report import file_stem, prepare_directory
from pagemill.cli.bench import interrupts
from pagemill.cli.options import refuse_unused
from pagemill.cli.peer_options import ENVIRONMENTS
from pagemill.cli.progress import byte_progress
from pagemill.cli.publish import publish
from pagemill.cli.terminal import note

_REFRESH_S = 0.25
_LINE_S = 10.0
_INTERRUPTED = 130
_LISTS = ("dtype", "weight_format", "kv_cache_dtype")
_USED = ("model", "block_size", "num_threads", "executor", *_LISTS)


def quality(
    *,
    text: str | None,
    n_ctx: str,
    windows: str,
    apart: str,
    output: str,
    as_json: bool,
    engine: dict[str, Any],
    peer: str = "",
    python_llama: str | None = None,
    environments: str = ENVIRONMENTS,
) -> int:
    """Measure what weight formats and KV types cost; print a table or one JSON object, write the JSON to `output`.

    peer: llama.cpp beside our float32, "" where it is installed, "none" without it. Returns 130 where Ctrl-C ended it;
    the whole windows measured by then are reported all the same.
    """
    if text is None:
        raise ConfigError(
            "--text is missing: give a UTF-8 text file to predict, such as wiki.test.raw of WikiText-2 "
            "(wikitext-2-raw-v1); any other text will do to compare modes with each other"
        )
    arguments = dict(engine["arguments"])
    refuse_unused(arguments, _USED, "this bench runs windows of --n-ctx tokens one at a time")
    lists = {name: arguments.pop(name) for name in _LISTS if name in arguments}
    config = resolve_config(arguments, file=engine["file"], origin="command line").config
    named = "dtype" in lists or "weight_format" in lists
    modes = parse_modes(
        lists.get("dtype", ""),
        lists.get("kv_cache_dtype", config.kv_cache_dtype),
        lists.get("weight_format", "" if named else config.weights),
    )
    contexts, counts = parse_counts("--n-ctx", n_ctx), parse_counts("--windows", windows)
    settings = Settings(Path(text), (*modes, *parse_apart(apart)), contexts, counts)
    directory = prepare_directory(output)
    place = find_peer(peer, Path(environments).expanduser(), python_llama)
    with byte_progress() as report_bytes:
        subject = open_subject(
            config,
            settings,
            progress=report_bytes,
            loading=lambda mode: note(f"loading {config.model}: {mode.name} …"),
        )
    with interrupts() as interrupted:
        with _Display(total_tokens(subject, settings)) as display:
            found = measure(subject, settings, display, interrupted=interrupted)
        beside = measure_peer(subject, found, place, note, interrupted=interrupted)
    if not any(scores.num_windows for scores in found.scores):
        note("interrupted before a window was measured")
        return _INTERRUPTED
    if beside.absence is not None and as_json:
        note(beside.absence)
    _publish(make_report(subject, settings, found, beside), directory, as_json=as_json)
    return _INTERRUPTED if found.interrupted or beside.interrupted else 0


def _publish(report: dict[str, Any], directory: Path, *, as_json: bool) -> None:
    publish(
        report,
        directory / file_stem("quality", report["settings"]["name"], report["date"]),
        lambda: [(title_of(report), make_tables(report))],
        lambda: remarks(report),
        as_json=as_json,
    )


class _Display:
    """Progress with remaining time on stderr: a bar on a terminal, a line now and then elsewhere. Mutated as it goes.

    num_tokens: what all modes will run together.
    """

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens
        self._done = 0
        self._began_s = self._told_s = time.monotonic()
        self._bars: Progress | None = None
        if sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
            self._bars = Progress(*columns, console=Console(stderr=True), auto_refresh=False, transient=True)
            self._bars.add_task("first window", total=num_tokens)

    def __enter__(self) -> _Display:
        self._began_s = self._told_s = time.monotonic()
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def advanced(self, num_tokens: int) -> None:
        self._done += num_tokens
        if self._bars is not None:
            self._bars.advance(self._bars.task_ids[0], num_tokens)
            if self._is_due(_REFRESH_S):
                self._bars.refresh()

    def ended(self, scores: Scores, num_windows: int) -> None:
        text = f"n_ctx {scores.n_ctx:,}, window {scores.num_windows} of {num_windows}"
        if self._bars is not None:
            self._bars.update(self._bars.task_ids[0], description=text)
        elif self._is_due(_LINE_S):
            figures = " · ".join(
                f"{mode.weights}/{mode.kv} {perplexity(np.concatenate(nll)).value:.2f}"
                for mode, nll in scores.nll.items()
            )
            spent = time.monotonic() - self._began_s
            left = spent / self._done * (self._num_tokens - self._done)
            note(f"{text}: PPL {figures}; about {format_seconds(left)} left (Ctrl-C reports what is there by then)")

    def _is_due(self, interval_s: float) -> bool:
        now = time.monotonic()
        if now - self._told_s < interval_s:
            return False
        self._told_s = now
        return True
