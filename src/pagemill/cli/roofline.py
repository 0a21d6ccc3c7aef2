"""`pagemill bench roofline` in the terminal. Owns progress, Ctrl-C and printing; measuring is `pagemill.bench`'s."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from pagemill.base.config import resolve_config
from pagemill.bench.plots import MISSING
from pagemill.bench.report import file_stem, prepare_directory, write_json
from pagemill.bench.roofline import Settings, measure, open_subject
from pagemill.bench.roofline_plot import draw_roofline
from pagemill.bench.roofline_report import make_report, make_tables, remarks, title_of
from pagemill.cli.bench import interrupts
from pagemill.cli.terminal import BOLD, note, paint, print_json

_INTERRUPTED = 130


def roofline(*, rounds: int, quick: bool, output: str, as_json: bool, engine: dict[str, Any]) -> int:
    """Measure this machine and the native step; print tables or one JSON object, write JSON and plot to `output`.

    Returns 130 where Ctrl-C ended it; the rounds done by then are reported all the same.
    """
    settings = Settings(rounds, quick)
    config = resolve_config(engine["arguments"], file=engine["file"], origin="command line").config
    directory = prepare_directory(output)
    note(f"loading {config.model} …")
    subject = open_subject(config, settings)
    with interrupts() as interrupted:
        found = measure(subject, settings, _Told(), interrupted=interrupted)
    report = make_report(subject, settings, found)
    names = (report["settings"]["name"], report["settings"]["weight_format"], report["settings"]["kv_codec"])
    _publish(report, directory / file_stem("roofline", *names, report["date"]), as_json=as_json)
    return _INTERRUPTED if found.interrupted else 0


def _publish(report: dict[str, Any], stem: Path, *, as_json: bool) -> None:
    plots = draw_roofline(report, stem)
    paths = [stem.with_name(stem.name + ".json"), *plots]
    report["files"] = [str(path) for path in paths]
    write_json(paths[0], report)
    if as_json:
        print_json(report)
    else:
        print(paint(title_of(report), BOLD, sys.stdout))
        for table in make_tables(report):
            Console(highlight=False).print(table)
        for line in (*remarks(report), f"written: {stem}.{{{','.join(path.suffix[1:] for path in paths)}}}"):
            print(line)
    if not plots:
        note(MISSING)


class _Told:
    """Progress as one line a round on stderr, off the clock."""

    def began(self, index: int, count: int) -> None:
        note(f"round {index} of {count} …")
