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
from pagemill.planner.machine import Processors, kernel_threads, processors, this_machine

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
# Two threads on two cores multiply twice as fast as one; on one core little faster than one.
_SHARED_CORE_RATIO = 1.4
_RATE_SAMPLES = 40
_FIRST_AVX512 = "avx512"
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
    found = f"{model}, {_counted(machine.num_cores, 'core')} for this process, {_counted(used, 'kernel thread')}"
    if used > machine.num_cores:
        return Finding("processor", "warning", found, f"set PAGEMILL_THREADS to {machine.num_cores} or less")
    return Finding("processor", "ok", found)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _cores() -> Finding:
    """Logical CPUs that the machine has and this process does not get, and a CPU quota below the kernel threads."""
    seen, threads = processors(), kernel_threads(EngineConfig(), this_machine())
    found = f"{seen.num_allowed} of {seen.num_present} logical CPUs"
    if seen.quota is not None:
        found += f", a CPU quota of {seen.quota:g}"
    fixes = []
    if seen.num_online < seen.num_present:
        number = seen.num_present - seen.num_online
        fixes.append(f"{number} switched off: as root, write 1 to /sys/devices/system/cpu/cpuN/online")
    if seen.num_allowed < seen.num_online:
        number = seen.num_online - seen.num_allowed
        fixes.append(f"{number} hidden from this process: start it without taskset, numactl or --cpuset-cpus")
    if seen.quota is not None and seen.quota < threads:
        fixes.append(
            f"the quota stops {threads} threads for a part of every period: raise it (--cpus, cpu.max), or set "
            f"PAGEMILL_THREADS to {max(1, int(seen.quota))}"
        )
    return Finding("cores", "warning" if fixes else "ok", found, "; ".join(fixes))


def _core_sharing() -> Finding:
    """Logical CPUs that share one core, by the system's account, else by how two threads multiply."""
    name, seen = "core sharing", processors()
    if seen.siblings:
        return _shared_cores(seen)
    if seen.num_allowed < 2:
        return Finding(name, "ok", "one logical CPU")
    if _NATIVE_ERROR is not None:
        return Finding(name, "wrong", "no native core", _REBUILD)
    gain = _thread_gain()
    found = f"two threads multiply {gain:.1f} times as fast as one"
    if gain >= _SHARED_CORE_RATIO:
        return Finding(name, "ok", found)
    return Finding(
        name,
        "warning",
        found,
        "logical CPUs share a core, or other programs keep one busy: stop those and look again, else set "
        f"PAGEMILL_THREADS to {max(1, seen.num_allowed // 2)} and compare speeds",
    )


def _shared_cores(seen: Processors) -> Finding:
    threads = kernel_threads(EngineConfig(), this_machine())
    groups = ", ".join("+".join(str(cpu) for cpu in group) for group in seen.siblings)
    found = f"CPUs {groups} share a core; {seen.num_cores} cores, {threads} kernel threads"
    if threads <= seen.num_cores:
        return Finding("core sharing", "ok", found)
    fix = f"set PAGEMILL_THREADS to {seen.num_cores}, one thread a core, and compare speeds"
    return Finding("core sharing", "warning", found, fix)


def _thread_gain() -> float:
    """How many times as fast two threads multiply as one (f32; the fastest of many short samples of each)."""
    one, two = (_native.multiply_add_rate(target.choose_target(), 0, each, _RATE_SAMPLES) for each in (1, 2))
    return two / one


def _huge_pages() -> Finding:
    """Weights and KV cache are asked for in huge pages (madvise)."""
    word = processors().huge_pages
    if word in ("always", "madvise"):
        return Finding("huge pages", "ok", f"transparent huge pages: {word}")
    found = f"transparent huge pages: {word or 'not in this kernel'}"
    fix = "as root: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled (weights are read some 5 % faster)"
    return Finding("huge pages", "warning", found, fix)


def _native_core() -> Finding:
    if _NATIVE_ERROR is not None:
        compiler = shutil.which("g++") or shutil.which("c++")
        fix = _REBUILD if compiler else "install a C++ compiler (g++ 12 or later), then " + _REBUILD
        return Finding("native core", "wrong", _NATIVE_ERROR, fix)
    chosen, available, built = target.choose_target(), target.available_targets(), target.built_targets()
    found = f"{chosen} (can run: {', '.join(available)}; built: {', '.join(built)})"
    if forced := os.environ.get("PAGEMILL_FORCE_TARGET", "").strip():
        fix = f"unset PAGEMILL_FORCE_TARGET; the fastest here is {available[0]}"
        return Finding("native core", "warning", f"{found}; forced: {forced}", fix)
    if _FIRST_AVX512 not in available and _FIRST_AVX512 in built:
        fix = "no AVX-512 with VNNI here, or a virtual machine hides it: with it products are several times faster"
        return Finding("native core", "warning", found, fix)
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
    machine = this_machine()
    num_threads = min(kernel_threads(EngineConfig(), machine), machine.num_cores)
    for executor in ("native", "reference"):
        config = EngineConfig(
            dtype="float32",
            executor=executor,
            max_num_seqs=4,
            kv_cache_memory_bytes=2**22,
            num_threads=num_threads,
        )
        with LLM.from_built(assemble(config, checkpoint, None)) as llm:
            answers.append([out.outputs[0].token_ids for out in llm.generate(prompts, params)])
    if answers[0] != answers[1]:
        return Finding("self-check", "wrong", "native core and reference disagree", f"report this; then {_REBUILD}")
    num_tokens = sum(len(each) for each in answers[0])
    return Finding("self-check", "ok", f"native core and reference agree on {num_tokens} tokens of a random model")


CHECKS: dict[str, Callable[[], Finding]] = {
    "python": _python,
    "processor": _processor,
    "cores": _cores,
    "core sharing": _core_sharing,
    "native core": _native_core,
    "barrier": _barrier,
    "huge pages": _huge_pages,
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
