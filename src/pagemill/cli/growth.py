"""`pagemill bench growth` in the terminal. Owns progress, Ctrl-C and printing; measuring is `pagemill.bench`'s."""

from __future__ import annotations

from typing import Any

from pagemill.base.config import resolve_config
from pagemill.bench.growth import Settings, measure, subjects
from pagemill.bench.growth_plot import draw_growth
from pagemill.bench.growth_report import make_report, make_tables, remarks, title_of
from pagemill.bench.report import file_stem, prepare_directory
from pagemill.cli.bench import interrupts
from pagemill.cli.options import refuse_unused
from pagemill.cli.publish import Section, publish
from pagemill.cli.terminal import note

_INTERRUPTED = 130
_USED = ("model", "dtype", "weight_format", "kv_cache_dtype", "num_threads", "executor")


def growth(*, rounds: int, quick: bool, output: str, as_json: bool, engine: dict[str, Any]) -> int:
    """Measure decoding by batch and context; print tables or one JSON object, write JSON and plots to `output`.

    Returns 130 where Ctrl-C ended it; what had been measured by then is reported all the same.
    """
    settings = Settings(rounds, quick)
    refuse_unused(engine["arguments"], _USED, "this bench runs native steps of its own batches and contexts")
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
    publish(
        report,
        directory / name,
        lambda: _sections(report),
        lambda: remarks(report),
        draw=draw_growth,
        as_json=as_json,
    )
    return _INTERRUPTED if found.interrupted else 0


def _sections(report: dict[str, Any]) -> list[Section]:
    """A title for each model, and under it a table for each KV codec."""
    tables = iter(make_tables(report))
    return [(title_of(model), [next(tables) for _ in model["kv_bytes_per_token"]]) for model in report["models"]]


class _Told:
    """Progress as one line a round on stderr, off the clock."""

    def loading(self, name: str) -> None:
        note(f"loading {name} …")

    def began(self, name: str, codec: str, index: int, count: int) -> None:
        note(f"{name}, KV {codec}: round {index} of {count} …")
