"""`pagemill bench kvcache` beside another engine. Owns which of the two comparisons runs, the options of this one,
progress as lines and printing; measuring is `pagemill.bench`'s."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pagemill.base.config import EngineConfig, resolve_config
from pagemill.base.errors import ConfigError
from pagemill.base.units import format_seconds
from pagemill.bench import kvcache as own
from pagemill.bench.kvcache import Subject, open_subject
from pagemill.bench.kvcache_beside import (
    TRANSFORMERS,
    WARM_UP_TOKENS,
    Series,
    Settings,
    contestants,
    measure,
    peer_config,
)
from pagemill.bench.kvcache_beside_report import make_report, make_table, remarks, title_of
from pagemill.bench.peers_catalog import Contestant
from pagemill.bench.peers_worker import Loaded
from pagemill.bench.report import file_stem, prepare_directory
from pagemill.cli import bench
from pagemill.cli.bench import interrupts, paged_arguments
from pagemill.cli.progress import byte_progress
from pagemill.cli.publish import publish
from pagemill.cli.terminal import note
from pagemill.planner.machine import kernel_threads, this_machine

_INTERRUPTED = 130


def kvcache(
    *,
    num_tokens: int,
    num_runs: int,
    num_runs_without: int | None,
    prompt: str | None,
    beside: dict[str, Any],
    output: str,
    as_json: bool,
    engine: dict[str, Any],
) -> int:
    """Generate with and without the cache; beside["name"]: the engine to run in turns with ours, None for none.

    Returns 130 where Ctrl-C ended it; what had been measured by then is reported all the same.
    """
    if beside["name"] is None:
        if beside["python"] is not None:
            raise ConfigError("--python-transformers is for --beside transformers; add it, or leave the option out")
        return bench.kvcache(
            num_tokens=num_tokens,
            num_runs=num_runs,
            num_runs_without=num_runs_without,
            prompt=prompt,
            output=output,
            as_json=as_json,
            engine=engine,
        )
    if beside["name"] != TRANSFORMERS:
        raise ConfigError(f"--beside is {beside['name'][:60]!r}; give {TRANSFORMERS}, or leave the option out")
    configs = _configs(engine)
    num_threads = kernel_threads(configs[0], this_machine())
    runs = own.Settings(num_tokens, num_runs, 1, prompt)
    settings = Settings(runs, num_runs_without or 0, num_threads, beside["timeout"])
    return _compare(configs, settings, beside, output, as_json=as_json)


def _configs(engine: dict[str, Any]) -> list[EngineConfig]:
    """One for each name of --dtype, which may hold several with commas between them."""
    arguments = paged_arguments(engine)
    names = [each.strip() for each in arguments.pop("dtype", "").split(",") if each.strip()]
    configs: dict[str, EngineConfig] = {}
    for mode in [{"dtype": each} for each in names] or [{}]:
        config = resolve_config({**arguments, **mode}, file=engine["file"], origin="command line").config
        configs.setdefault(config.weights, config)  # float32 and f32 are one
    return list(configs.values())


def _compare(
    configs: list[EngineConfig], settings: Settings, beside: dict[str, Any], output: str, *, as_json: bool
) -> int:
    directory = prepare_directory(output)
    subjects: list[Subject] = []
    with ExitStack() as stack:
        for config in configs:
            with byte_progress() as report_bytes:
                note(f"loading {config.model} ({config.weights}) …")
                subject = open_subject(config, settings.own, progress=report_bytes)
            for llm in subject.engines.values():
                stack.enter_context(llm)
            peer_config(subject.built.spec)  # a model that has no peer is refused before another one is loaded
            subjects.append(subject)
        spec, root = subjects[0].built.spec, Path(beside["environments"]).expanduser()
        peers, absent = contestants(spec, root, beside["python"], note)
        for name, why in absent.items():
            note(f"{name} cannot be had: {why}")
        with interrupts() as interrupted:
            found = measure(subjects, peers, settings, _Told(), interrupted=interrupted)
        if not any(each.samples for each in found.series):
            note("interrupted before anything was measured")
            return _INTERRUPTED
        report = make_report(subjects, settings, found, absent)
    publish(
        report,
        directory
        / file_stem("kvcache-beside", report["settings"]["name"], str(settings.own.num_tokens), report["date"]),
        lambda: [(title_of(report), [make_table(report)])],
        lambda: remarks(report),
        as_json=as_json,
    )
    return _INTERRUPTED if found.interrupted else 0


class _Told:
    """Progress as lines on stderr: a sample takes from seconds to minutes, and each is one line."""

    def loaded(self, contestant: Contestant, loaded: Loaded) -> None:
        note(f"{contestant.name}: made in {loaded.seconds:.1f} s")

    def warming(self, engine: str, dtype: str) -> None:
        note(f"{engine} {dtype}: warming up with {WARM_UP_TOKENS} tokens …")

    def sampled(self, series: Series, index: int) -> None:
        took = format_seconds(series.samples[-1])
        note(f"run {index + 1}: {series.engine} {series.dtype} {series.cache} the cache: {took}")

    def failed(self, contestant: Contestant, reason: str) -> None:
        note(f"{contestant.name} is left out from here on: it {reason}")
