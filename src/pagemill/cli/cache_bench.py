"""`pagemill bench cache` in the terminal. Owns options, Ctrl-C and printing; measuring is `pagemill.bench`'s."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pagemill.base.config import EngineConfig, resolve_config
from pagemill.base.errors import ConfigError
from pagemill.bench.cache import measure, needs_model, parse_rows
from pagemill.bench.cache_figures import Settings, Subject
from pagemill.bench.cache_plot import draw_cache
from pagemill.bench.cache_report import make_report, remarks, sections
from pagemill.bench.cache_ttft import PeerSettings, weights_file
from pagemill.bench.report import file_stem, prepare_directory
from pagemill.build import Built, build
from pagemill.cli.bench import interrupts
from pagemill.cli.progress import byte_progress
from pagemill.cli.publish import publish
from pagemill.cli.terminal import note

_INTERRUPTED = 130
_PIPE_WIDTH = 120
_OWN = {
    "kv_cache": "this bench is about the paged cache",
    "enable_prefix_caching": "this bench turns sharing on and off where it compares",
    "max_num_seqs": "each row runs as many sequences as it is about",
    "kv_cache_memory_bytes": "each row takes the memory that it needs",
}


def cache(
    *,
    rows: str | None,
    num_runs: int,
    quick: bool,
    cpu_time: bool,
    trace: str | None,
    lengths: str | None,
    python_llama: str | None,
    environments: str,
    output: str,
    as_json: bool,
    engine: dict[str, Any],
) -> int:
    """Measure the cache in memory; print tables or one JSON object, write JSON and plots to `output`.

    Returns 130 where Ctrl-C ended it; the groups that were measured by then are reported all the same.
    """
    settings = Settings(parse_rows(rows), num_runs, quick, cpu_time, trace, lengths)
    for name, why in _OWN.items():
        if name in engine["arguments"]:
            raise ConfigError(f"--{name.replace('_', '-')}: {why}; leave the option out")
    for flag, path in (("--trace", trace), ("--lengths", lengths)):
        if path is not None and not Path(path).expanduser().is_file():
            raise ConfigError(f"{flag} {path}: there is no such file; give a trace, or leave the option out")
    arguments = engine["arguments"] | {"max_num_seqs": "1"}  # to begin with; each group makes engines of its own size
    if cpu_time:
        if engine["arguments"].get("num_threads", "1") != "1":
            raise ConfigError("--cpu-time counts one kernel thread; leave --num-threads out")
        arguments["num_threads"] = "1"
    resolved = resolve_config(arguments, file=engine["file"], origin="command line")
    directory = prepare_directory(output)
    subject = peer = None
    if needs_model(settings):
        built = _load(resolved.config)
        subject = Subject(built, settings)
        peer = PeerSettings(Path(environments).expanduser(), python_llama, weights_file(built.path))
    with interrupts() as interrupted:
        found = measure(subject, settings, peer, note, interrupted=interrupted)
    if not found.figures:
        note("interrupted before anything was measured")
        return _INTERRUPTED
    report = make_report(subject, settings, found)
    name = report["settings"]["name"]
    publish(
        report,
        directory / file_stem("cache", *([] if name is None else [name]), report["date"]),
        lambda: sections(report),
        lambda: remarks(report),
        draw=draw_cache if _is_drawn(report) else None,
        as_json=as_json,
        pipe_width=_PIPE_WIDTH,
    )
    return _INTERRUPTED if found.interrupted else 0


def _load(config: EngineConfig) -> Built:
    with byte_progress() as report_bytes:
        note(f"loading {config.model} …")
        return build(config, progress=report_bytes)


def _is_drawn(report: dict[str, Any]) -> bool:
    return any("chunk" in row or "stage" in row for row in report["rows"])
