"""`pagemill bench peers` in the terminal. Owns options, progress, Ctrl-C and printing; measuring is
`pagemill.bench`'s."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pagemill
from pagemill.base.config import EngineConfig, resolve_config
from pagemill.base.errors import ConfigError
from pagemill.bench.peers_catalog import (
    PAGEMILL,
    PEERS,
    QUICK_WORKS,
    SCRIPTS,
    SHIPPED,
    WORKS,
    Contestant,
    Form,
    Peer,
    Work,
    choose,
    usual_forms,
)
from pagemill.bench.peers_mode import find_accuracy, resolve_mode
from pagemill.bench.peers_plot import draw_peers
from pagemill.bench.peers_report import Context, make_report, make_tables, remarks, title_of
from pagemill.bench.peers_run import Settings, measure
from pagemill.bench.peers_setup import Environment, SetupError, find_environment, form_path, set_up
from pagemill.bench.peers_worker import Loaded
from pagemill.bench.report import file_stem, prepare_directory
from pagemill.cli.bench import interrupts
from pagemill.cli.progress import byte_progress
from pagemill.cli.publish import publish
from pagemill.cli.terminal import note
from pagemill.models.checkpoint import Checkpoint, open_checkpoint
from pagemill.models.hub import resolve
from pagemill.planner.machine import kernel_threads, this_machine

_INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Asked:
    """Which peers to run. names: of --peers, empty for those that are installed. pythons: peer -> the Python given."""

    names: tuple[str, ...]
    pythons: dict[str, str]
    environments: Path


def peers(
    *,
    names: str,
    pythons: dict[str, str],
    environments: str,
    runs: int,
    rows: str,
    quick: bool,
    timeout: float,
    output: str,
    as_json: bool,
    engine: dict[str, Any],
) -> int:
    """Measure Pagemill and other engines in one interleaved run; print tables or one JSON object, write JSON and plots
    to `output`.

    Returns 130 where Ctrl-C ended it, 1 where Pagemill itself or every peer failed; what was measured by then is
    reported.
    """
    asked = Asked(
        tuple(each.strip() for each in names.split(",") if each.strip()), pythons, Path(environments).expanduser()
    )
    chosen = choose(asked.names)
    idle = [name for name in pythons if chosen and name not in {peer.name for peer in chosen}]
    if idle:
        raise ConfigError(f"a Python is given for {', '.join(idle)}, which --peers does not name; add it there")
    arguments = dict(engine["arguments"])
    configs = _configs(arguments, engine["file"])
    config = configs[0]
    works = _works(rows, QUICK_WORKS if quick else WORKS)
    directory = prepare_directory(output)
    with byte_progress(quiet=as_json) as report_bytes:
        checkpoint = open_checkpoint(resolve(config.model, progress=report_bytes))
    _check_lengths(checkpoint, works)
    settings = Settings(works, runs, kernel_threads(config, this_machine()), timeout, checkpoint.spec.vocab_size)
    given = {name: value for name, value in arguments.items() if name not in ("model", "num_threads")}
    if engine["file"] is not None:
        given["config_file"] = str(engine["file"])
    ours = [_pagemill(each, checkpoint, given) for each in configs]
    others, absent = _contestants(asked, chosen, checkpoint)
    if not others:
        raise ConfigError(
            "no peer can be run: "
            + "; ".join(f"{name}: {why}" for name, why in absent.items())
            + "; name some with --peers to have them set up"
        )
    with interrupts() as interrupted:
        found = measure([*ours, *others], settings, _Told(), interrupted=interrupted)
    if not any(row.samples for row in found.rows):
        why_not = "every peer failed, and nothing was measured" if found.without_peers else "nothing was measured"
        note(why_not + "".join(f"; {each.name} {why}" for each, why in found.failures.items()))
        return _INTERRUPTED if found.interrupted else 1
    name = Path(config.model).name
    resolved = {side.mode: resolve_mode(each, checkpoint) for side, each in zip(ours, configs, strict=True)}
    described = {mode: (each, find_accuracy(directory, name, each)) for mode, each in resolved.items()}
    context = Context(name, checkpoint.weight_format, given, absent, described)
    _publish(make_report(context, settings, found), directory, as_json=as_json)
    if found.interrupted:
        return _INTERRUPTED
    return int(found.without_peers or any(each in found.failures for each in ours))


def _configs(arguments: dict[str, Any], file: str | None) -> list[EngineConfig]:
    """One configuration for each of the listed dtypes and weight formats, which are taken out of `arguments`."""
    if "enable_prefix_caching" in arguments:
        raise ConfigError(
            "--enable-prefix-caching: prompts are all distinct here and every engine runs without; leave it out"
        )
    lists = {name: arguments.pop(name, "") for name in ("dtype", "weight_format")}
    modes = [{name: each.strip()} for name, text in lists.items() for each in text.split(",") if each.strip()]
    configs: dict[str, EngineConfig] = {}
    for mode in modes or [{}]:
        config = resolve_config({**arguments, **mode}, file=file, origin="command line").config
        configs.setdefault(config.weights, config)  # float32 and f32 are one
    return list(configs.values())


def _works(rows: str, works: tuple[Work, ...]) -> tuple[Work, ...]:
    """The works whose names begin with one of the names in a list. Raises ConfigError for a name that none has."""
    wanted = [each.strip() for each in rows.split(",") if each.strip()]
    for each in wanted:
        if not any(work.name.startswith(each) for work in works):
            raise ConfigError(f"--rows: no row is called {each!r}; there are {', '.join(work.name for work in works)}")
    return tuple(work for work in works if not wanted or any(work.name.startswith(each) for each in wanted))


def _check_lengths(checkpoint: Checkpoint, works: tuple[Work, ...]) -> None:
    longest = max(work.num_positions for work in works)
    if longest > checkpoint.spec.context_length:
        raise ConfigError(
            f"{checkpoint.spec.name} reaches {checkpoint.spec.context_length:,} tokens and a row needs {longest:,}; "
            "take another model, or --quick"
        )


def _pagemill(config: EngineConfig, checkpoint: Checkpoint, given: dict[str, Any]) -> Contestant:
    weights = {"dtype": config.dtype, "weight_format": config.weight_format}
    mode = config.dtype if config.weight_format == "auto" else config.weight_format
    command = (sys.executable, str(SCRIPTS / "run_pagemill.py"))
    source = str(Path(pagemill.__file__).parents[1])
    path = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))
    return Contestant(PAGEMILL, mode, command, str(checkpoint.path), {**given, **weights}, python_path=path)


def _contestants(
    asked: Asked, chosen: dict[Peer, tuple[Form, ...]], checkpoint: Checkpoint
) -> tuple[list[Contestant], dict[str, str]]:
    """The peers that can be run, and why the others cannot."""
    found: list[Contestant] = []
    absent: dict[str, str] = {}
    for peer in PEERS:
        if chosen and peer not in chosen:
            continue
        environment = find_environment(peer, asked.environments, asked.pythons.get(peer.name))
        try:
            if checkpoint.source_format != "gguf":
                raise SetupError(f"its weights are made from a GGUF file, and {checkpoint.path} is none; give one")
            if environment is None and not chosen:
                raise SetupError(f"not set up in {asked.environments}; --peers {peer.name} does it")
            if environment is None:
                environment = set_up(peer, asked.environments, note, checkpoint.path)
        except SetupError as error:
            absent[peer.name] = str(error)
            note(f"{peer.name} cannot be had: {error}")
            continue
        for form in chosen.get(peer) or usual_forms(peer):
            try:
                found.append(_contestant(peer, form, environment, checkpoint, asked.environments))
            except SetupError as error:
                absent[f"{peer.name} {form.mode}"] = str(error)
                note(f"{peer.name} {form.mode} cannot be had: {error}")
    unique = {(each.engine, each.mode): each for each in found}  # the shipped form may be one of the others
    return list(unique.values()), absent


def _contestant(peer: Peer, form: Form, environment: Environment, checkpoint: Checkpoint, root: Path) -> Contestant:
    model_format = checkpoint.weight_format
    path = form_path(form, checkpoint.path, model_format, root, note)
    mode = model_format.upper() if form.weights == SHIPPED else form.mode
    command = (str(environment.python), str(SCRIPTS / peer.script))
    return Contestant(peer.name, mode, command, str(path), dict(form.options), environment.note)


def _publish(report: dict[str, Any], directory: Path, *, as_json: bool) -> None:
    publish(
        report,
        directory / file_stem("peers", report["settings"]["model"], report["date"]),
        lambda: [(title_of(report), make_tables(report))],
        lambda: remarks(report),
        draw=draw_peers,
        as_json=as_json,
    )


class _Told:
    """Progress as lines on stderr: a row takes from seconds to minutes, and every sample is one line."""

    def loaded(self, contestant: Contestant, loaded: Loaded) -> None:
        note(f"{contestant.name}: loaded in {loaded.seconds:.1f} s")

    def began(self, work: Work) -> None:
        note(f"{work.name}: warming up …")

    def sampled(self, contestant: Contestant, work: Work, index: int, value: float) -> None:
        figure = f"{value:.3g}" if work.unit == "s" else f"{value:,.0f}"
        note(f"{work.name}, run {index + 1}: {contestant.name} {figure} {work.unit}")

    def failed(self, contestant: Contestant, reason: str) -> None:
        note(f"{contestant.name} {reason}; left out from here on")
