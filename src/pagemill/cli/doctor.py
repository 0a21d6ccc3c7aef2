"""`pagemill doctor`: what this machine can do, what is wrong and how to mend it. Owns the list of checks."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pagemill import __version__
from pagemill.base.config import EngineConfig
from pagemill.base.errors import PagemillError
from pagemill.base.model_spec import ModelSpec, RopeSpec
from pagemill.base.params import SamplingParams
from pagemill.base.units import format_bytes
from pagemill.cli.terminal import print_json
from pagemill.models.hub import list_models, models_dir
from pagemill.models.random_init import random_checkpoint
from pagemill.planner.machine import kernel_threads, this_machine

try:
    from pagemill.build import assemble
    from pagemill.kernels import _native, target
    from pagemill.llm import LLM
except ImportError as error:  # what doctor is for
    _NATIVE_ERROR: str | None = str(error)
else:
    _NATIVE_ERROR = None

_NUM_CHECKED_TOKENS = 24
_MIN_FREE_BYTES = 2**29
_REBUILD = "rebuild with `pip install .` in the checkout (needs g++ and cmake)"


@dataclass(frozen=True, slots=True)
class Finding:
    """One check. status: "ok", "warning" (works, worse than it could) or "wrong". fix: what to do, empty when ok."""

    name: str
    status: str
    found: str
    fix: str = ""


def run(*, as_json: bool) -> int:
    """Run every check and print what was found. Returns 2 where something is wrong."""
    findings = [_checked(name, check) for name, check in CHECKS.items()]
    wrong = any(each.status == "wrong" for each in findings)
    if as_json:
        print_json({"version": __version__, "ok": not wrong, "checks": [asdict(each) for each in findings]})
    else:
        _print(findings)
    return 2 if wrong else 0


def _checked(name: str, check: Callable[[], Finding]) -> Finding:
    """The check's finding; a named error is one as well."""
    try:
        return check()
    except PagemillError as error:
        return Finding(name, "wrong", type(error).__name__, str(error))


def _python() -> Finding:
    return Finding("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _processor() -> Finding:
    machine = this_machine()
    model = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    used = kernel_threads(EngineConfig(), machine)
    found = f"{model}, {machine.num_cores} cores for this process, {used} kernel threads"
    if used > machine.num_cores:
        return Finding("processor", "warning", found, f"set PAGEMILL_THREADS to {machine.num_cores} or less")
    return Finding("processor", "ok", found)


def _native_core() -> Finding:
    if _NATIVE_ERROR is not None:
        compiler = shutil.which("g++") or shutil.which("c++")
        fix = _REBUILD if compiler else "install a C++ compiler (g++ 12 or later), then " + _REBUILD
        return Finding("native core", "wrong", _NATIVE_ERROR, fix)
    chosen, available, built = target.choose_target(), target.available_targets(), target.built_targets()
    found = f"{chosen} (can run: {', '.join(available)}; built: {', '.join(built)})"
    if chosen != available[0]:
        return Finding("native core", "warning", found, "unset PAGEMILL_FORCE_TARGET for the fastest one")
    return Finding("native core", "ok", found)


def _barrier() -> Finding:
    if _NATIVE_ERROR is not None:
        return Finding("barrier", "wrong", "no native core", _REBUILD)
    used = kernel_threads(EngineConfig(), this_machine())
    return Finding("barrier", "ok", f"{_native.barrier_ns(used):.0f} ns with {used} threads")


def _memory() -> Finding:
    machine = this_machine()
    found = f"{format_bytes(machine.free_bytes)} free of {format_bytes(machine.total_bytes)}"
    if machine.free_bytes < _MIN_FREE_BYTES:
        return Finding("memory", "warning", found, "close other programs, or set a small kv_cache_memory_bytes")
    return Finding("memory", "ok", found)


def _cache_directory() -> Finding:
    directory = models_dir()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(b"x")
    except OSError as error:
        fix = "make it writable, or set PAGEMILL_HOME to a directory that is"
        return Finding("model directory", "wrong", f"{directory}: {error.strerror}", fix)
    free = shutil.disk_usage(directory).free
    return Finding("model directory", "ok", f"{directory}, {format_bytes(free)} free")


def _model() -> Finding:
    name = EngineConfig().model
    for each in list_models():
        if each.name == name:
            return Finding("default model", "ok", f"{name}, {format_bytes(each.bytes)}")
    return Finding("default model", "warning", f"{name} is not here yet", f"run `pagemill models pull {name}`")


def _self_check() -> Finding:
    """The native core and the reference must choose the same tokens of a small random model, alone and in a batch."""
    if _NATIVE_ERROR is not None:
        return Finding("self-check", "wrong", "no native core", _REBUILD)
    spec = ModelSpec(
        family="llama", name="self-check", num_layers=2, hidden_dim=96, num_q_heads=3, num_kv_heads=1, head_dim=32,
        ffn_dim=160, vocab_size=256, context_length=128, norm_eps=1e-5, rope=RopeSpec(10_000.0, 32), tied_head=False,
    )  # fmt: skip
    checkpoint = random_checkpoint(spec, seed=1, weight_format="f32")
    prompts = [{"prompt_token_ids": list(range(start, start + 5 + 12 * start))} for start in (1, 2, 3)]
    params = SamplingParams(temperature=0, max_tokens=_NUM_CHECKED_TOKENS, ignore_eos=True)
    answers = []
    for executor in ("native", "reference"):
        config = EngineConfig(dtype="float32", executor=executor, max_num_seqs=4, kv_cache_memory_bytes=2**22)
        with LLM.from_built(assemble(config, checkpoint, None)) as llm:
            answers.append([out.outputs[0].token_ids for out in llm.generate(prompts, params)])
    if answers[0] != answers[1]:
        return Finding("self-check", "wrong", "native core and reference disagree", f"report this; then {_REBUILD}")
    num_tokens = sum(len(each) for each in answers[0])
    return Finding("self-check", "ok", f"native core and reference agree on {num_tokens} tokens of a random model")


CHECKS: dict[str, Callable[[], Finding]] = {
    "python": _python,
    "processor": _processor,
    "native core": _native_core,
    "barrier": _barrier,
    "memory": _memory,
    "model directory": _cache_directory,
    "default model": _model,
    "self-check": _self_check,
}

_STYLES = {"ok": "green", "warning": "yellow", "wrong": "red"}


def _print(findings: list[Finding]) -> None:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for each in findings:
        table.add_row(f"[{_STYLES[each.status]}]{each.status}", each.name, each.found)
        if each.fix:
            table.add_row("", "", f"→ {each.fix}")
    Console(highlight=False).print(table)
    if os.environ.get("PAGEMILL_FORCE_TARGET"):
        print(f"PAGEMILL_FORCE_TARGET={os.environ['PAGEMILL_FORCE_TARGET']}")
