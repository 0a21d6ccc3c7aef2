"""`pagemill bench growth` in the terminal. Owns progress, Ctrl-C and printing; measuring is `pagemill.bench`'s."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from pagemill.base.config import resolve_config
from pagemill.bench.growth import Settings, measure, subjects
from pagemill.bench.growth_plot import draw_growth
from pagemill.bench.growth_report import make_report, make_tables, remarks, title_of
from pagemill.bench.plots import MISSING
from pagemill.bench.report import file_stem, prepare_directory, write_json
from pagemill.cli.bench import interrupts
from pagemill.cli.terminal import BOLD, note, paint, print_json

_INTERRUPTED = 130


def growth(*, rounds: int, quick: bool, output: str, as_json: bool, engine: dict[str, Any]) -> int:
    """Measure decoding by batch and context; print tables or one JSON object, write JSON and plots to `output`.

    Returns 130 where Ctrl-C ended it; what had been measured by then is reported all the same.
    """
    settings = Settings(rounds, quick)
    resolved = resolve_config(engine["arguments"], file=engine["file"], origin="command line")
    chosen = subjects(resolved.config, settings, model_given=resolved.origins["model"] != "default")
    directory = prepare_directory(output)
    with interrupts() as interrupted:
        found = measure(chosen, settings, _Told(), interrupted=interrupted)
    report = make_report(settings, found)
    if not report["rows"]:
        note("interrupted before anything was measured")
        return _INTERRUPTED
    name = file_stem("growth", *(each["name"] for each in report["models"][:1]), report["date"])
    _publish(report, directory / name, as_json=as_json)
    return _INTERRUPTED if found.interrupted else 0


def _publish(report: dict[str, Any], stem: Path, *, as_json: bool) -> None:
    plots = draw_growth(report, stem)
    paths = [stem.with_name(stem.name + ".json"), *plots]
    report["files"] = [str(path) for path in paths]
    write_json(paths[0], report)
    if as_json:
        print_json(report)
    else:
        tables = iter(make_tables(report))
        for model in report["models"]:
            print(paint(title_of(model), BOLD, sys.stdout))
            for _ in model["kv_bytes_per_token"]:
                Console(highlight=False).print(next(tables))
        for line in (*remarks(report), f"written: {', '.join(report['files'])}"):
            print(line)
    if not plots:
        note(MISSING)


class _Told:
    """Progress as one line a round on stderr, off the clock."""

    def loading(self, name: str) -> None:
        note(f"loading {name} …")

    def began(self, name: str, codec: str, index: int, count: int) -> None:
        note(f"{name}, KV {codec}: round {index} of {count} …")
