"""`pagemill bench roofline` in the terminal. Owns progress, Ctrl-C and printing; measuring is `pagemill.bench`'s."""

from __future__ import annotations

from typing import Any

from pagemill.base.config import resolve_config
from pagemill.bench.report import file_stem, prepare_directory
from pagemill.bench.roofline import Settings, measure, open_subject
from pagemill.bench.roofline_plot import draw_roofline
from pagemill.bench.roofline_report import make_report, make_tables, remarks, title_of
from pagemill.cli.bench import interrupts
from pagemill.cli.options import refuse_unused
from pagemill.cli.publish import publish
from pagemill.cli.terminal import note

_INTERRUPTED = 130
_USED = (
    "model", "dtype", "weight_format", "kv_cache_dtype", "max_num_batched_tokens", "num_threads", "executor",
)  # fmt: skip


def roofline(*, rounds: int, quick: bool, output: str, as_json: bool, engine: dict[str, Any]) -> int:
    """Measure this machine and the native step; print tables or one JSON object, write JSON and plot to `output`.

    Returns 130 where Ctrl-C ended it; the rounds done by then are reported all the same.
    """
    settings = Settings(rounds, quick)
    refuse_unused(engine["arguments"], _USED, "this bench runs native steps of its own batches and contexts")
    config = resolve_config(engine["arguments"], file=engine["file"], origin="command line").config
    directory = prepare_directory(output)
    note(f"loading {config.model} …")
    subject = open_subject(config, settings)
    with interrupts() as interrupted:
        found = measure(subject, settings, _Told(), interrupted=interrupted)
    report = make_report(subject, settings, found)
    names = (report["settings"]["name"], report["settings"]["weight_format"], report["settings"]["kv_codec"])
    publish(
        report,
        directory / file_stem("roofline", *names, report["date"]),
        lambda: [(title_of(report), make_tables(report))],
        lambda: remarks(report),
        draw=draw_roofline,
        as_json=as_json,
    )
    return _INTERRUPTED if found.interrupted else 0


class _Told:
    """Progress as one line a round on stderr, off the clock."""

    def began(self, index: int, count: int) -> None:
        note(f"round {index} of {count} …")
