"""`pagemill bench step` in the terminal. Owns options and printing; measuring is `pagemill.bench.step_profile`'s."""

from __future__ import annotations

from typing import Any

from pagemill.base.config import resolve_config
from pagemill.base.errors import ConfigError
from pagemill.bench.report import file_stem, prepare_directory
from pagemill.bench.step_profile import (
    Settings,
    engine_options,
    make_report,
    make_table,
    measure,
    parse_streams,
    streams_text,
)
from pagemill.build import build
from pagemill.cli.bench import interrupts
from pagemill.cli.progress import byte_progress
from pagemill.cli.publish import publish
from pagemill.cli.terminal import note

_INTERRUPTED = 130
_COLUMNS = 30  # for the stages, and for each number of streams


def step(*, streams: str, num_steps: int, sampled: bool, output: str, as_json: bool, engine: dict[str, Any]) -> int:
    """Profile decode steps; print a table or one JSON object, write the JSON to `output`.

    Returns 130 where Ctrl-C ended it; the numbers of streams that were measured by then are reported all the same.
    """
    if num_steps < 1:
        raise ConfigError(f"--steps is {num_steps}; give at least 1")
    settings = Settings(parse_streams(streams), num_steps, sampled)
    arguments = engine_options(settings, engine["arguments"])
    config = resolve_config(arguments, file=engine["file"], origin="command line").config
    if config.executor != "native":
        raise ConfigError("executor is reference, which has no native step to tell the rest from; leave it at native")
    directory = prepare_directory(output)
    with byte_progress() as report_bytes:
        note(f"loading {config.model} …")
        built = build(config, progress=report_bytes)
    profiles = []
    with interrupts() as interrupted:
        for num_streams in settings.streams:
            if interrupted():
                break
            note(f"{streams_text(num_streams)} …")
            profiles.append(measure(built, settings, num_streams))
        stopped = interrupted()
    if not profiles:
        note("interrupted before anything was measured")
        return _INTERRUPTED
    report = make_report(built, config, settings, profiles)
    how = "top-p and logprobs" if sampled else "greedy"
    publish(
        report,
        directory / file_stem("step", report["settings"]["name"], report["date"]),
        lambda: [(f"decode steps of {report['settings']['name']}, {how}", [make_table(report)])],
        lambda: [f"barrier {report['barrier_ns']:,.0f} ns"],
        as_json=as_json,
        pipe_width=_COLUMNS * (1 + len(settings.streams)),
    )
    return _INTERRUPTED if stopped else 0
