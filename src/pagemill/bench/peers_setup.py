"""Environments of the peers and their forms of the weights: found, set up, or a reason why they cannot be had.

Owns what lies in the directory of environments: one virtual environment for each peer with a log of pip beside it, and
`models/` with weights in other forms. Whatever fails here is told and harms no other peer.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pagemill.base.errors import ConfigError
from pagemill.base.units import format_bytes
from pagemill.bench.peers_catalog import SAFETENSORS, SCRIPTS, SHIPPED, Form, Peer
from pagemill.bench.peers_worker import Worker, WorkerError
from pagemill.models.store import hash_file

Tell = Callable[[str], None]

_CHECK_S = 180.0
_INSTALL_S = 3600.0
_REMAKE_S = 1800.0
_SMOKE_S = 300.0
_NOTE_NAME = "pagemill-peer.json"
_IMPORTED = "pagemill: imported"
# GGML's options and the processor flags (/proc/cpuinfo) that each needs.
_GGML_FLAGS: dict[str, tuple[str, ...]] = {
    "GGML_SSE42": ("sse4_2",),
    "GGML_AVX": ("avx",),
    "GGML_AVX2": ("avx2",),
    "GGML_BMI2": ("bmi2",),
    "GGML_FMA": ("fma",),
    "GGML_F16C": ("f16c",),
    "GGML_AVX512": ("avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"),
    "GGML_AVX512_VBMI": ("avx512vbmi",),
    "GGML_AVX512_VNNI": ("avx512_vnni",),
    "GGML_AVX512_BF16": ("avx512_bf16",),
}
_NATIVE = "-DGGML_NATIVE=ON"
_REQUIRES = (
    "import importlib.metadata, sys\n"
    "for line in importlib.metadata.requires(sys.argv[1]) or []:\n"
    "    if 'extra ==' not in line.replace('extra==', 'extra =='): print(line)\n"
)


class SetupError(Exception):
    """Why a peer, or a form of its weights, cannot be had on this machine."""


@dataclass(frozen=True, slots=True)
class Environment:
    """A Python that can import a peer. note: what must be known of how the peer was built."""

    python: Path
    note: str = ""


def find_environment(peer: Peer, root: Path, given: str | None) -> Environment | None:
    """The peer's environment: the one given, else the one below `root`; None where there is none that works.

    Raises ConfigError where the given one does not work.
    """
    if given is not None:
        python = Path(given).expanduser()
        if not _imports(python, peer.module):
            raise ConfigError(
                f"{given} cannot import {peer.module}; give a Python that has {peer.requirements[0]}, or leave the "
                "option out to have an environment set up"
            )
        return Environment(python)
    python = _python_of(root / peer.name)
    return Environment(python, _read_note(root / peer.name)) if _imports(python, peer.module) else None


def set_up(peer: Peer, root: Path, tell: Tell, smoke_model: Path | None = None) -> Environment:
    """Make the peer's environment below `root`. smoke_model: a GGUF file that a peer built here must run.

    Raises SetupError: no room, no package, no build, no time.
    """
    directory, log = root / peer.name, root / f"{peer.name}.log"
    try:
        root.mkdir(parents=True, exist_ok=True)
        free_bytes = shutil.disk_usage(root).free
        if free_bytes < peer.disk_bytes:
            raise SetupError(
                f"an environment takes about {format_bytes(peer.disk_bytes)} and {root} has "
                f"{format_bytes(free_bytes)} free; free some room or give --environments another directory"
            )
        if directory.exists():
            _remove(directory)
        tell(f"setting up {peer.name} in {directory} (log: {log})")
        log.write_bytes(b"")
        _run([sys.executable, "-m", "venv", str(directory)], log, _INSTALL_S)
        note = _install(peer, directory, log, tell, smoke_model)
        (directory / _NOTE_NAME).write_text(json.dumps({"note": note}) + "\n", encoding="utf-8")
    except OSError as error:
        raise SetupError(f"{root} cannot be written: {error.strerror}; give --environments another directory") from None
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    return Environment(_python_of(directory), note)


def form_path(form: Form, model: Path, model_format: str, root: Path, tell: Tell) -> Path:
    """The weights of `model`, a GGUF file of `model_format`, in the form that a peer reads; made where it is missing.

    Kept below `root`, keyed by the file's content. Raises SetupError.
    """
    if form.weights in (SHIPPED, model_format.upper()):
        return model
    try:
        directory = root / "models" / hash_file(model)[:16]
        ending = "" if form.weights == SAFETENSORS else ".gguf"
        path = directory / f"{model.name.partition('.')[0]}.{form.weights}{ending}"
        if path.exists():
            return path
        directory.mkdir(parents=True, exist_ok=True)
        partial = directory / f".partial-{os.getpid()}{ending}"
        tell(f"making {form.weights} weights of {model.name}")
        log = directory / "remake.log"
        log.write_bytes(b"")
        try:
            script = str(SCRIPTS / "remake_weights.py")
            _run([str(_gguf_python(root, tell)), script, str(model), form.weights, str(partial)], log, _REMAKE_S)
            partial.replace(path)
        finally:
            _remove(partial)
        return path
    except OSError as error:
        raise SetupError(f"{form.weights} weights cannot be made below {root}: {error.strerror or error}") from None


def explicit_flags(cpuinfo: str) -> str:
    """CMAKE_ARGS that build llama.cpp for this processor without asking the compiler, which on some virtual machines
    takes AMX for usable that the kernel does not permit. cpuinfo: text of /proc/cpuinfo."""
    line = next((each for each in cpuinfo.splitlines() if each.startswith("flags")), "")
    flags = set(line.partition(":")[2].split())
    switches = (f"-D{name}={'ON' if flags >= set(needed) else 'OFF'}" for name, needed in _GGML_FLAGS.items())
    return " ".join(("-DGGML_NATIVE=OFF", *switches))


def _install(peer: Peer, directory: Path, log: Path, tell: Tell, smoke_model: Path | None) -> str:
    """Fill an empty environment. Returns what must be known of the build."""
    if peer.without:
        _pip(directory, ["--no-deps", *peer.requirements], log)
        package = peer.requirements[0].partition("==")[0]
        listed = _run([str(_python_of(directory)), "-c", _REQUIRES, package], log, _CHECK_S).splitlines()
        left_out = tuple(f"{name}{end}" for name in (*peer.without, "torch") for end in ("=", " ", "<", ">", ";", "!"))
        wanted = [line for line in listed if not f"{line};".startswith(left_out)]
        pins = [each for each in peer.requirements if not each.startswith(package + "==")]
        _pip(directory, [*wanted, *pins], log)
    elif not peer.from_sdist:
        _pip(directory, list(peer.requirements), log)
    else:
        return _build(peer, directory, log, tell, smoke_model)
    _check(peer, directory, log)
    return ""


def _build(peer: Peer, directory: Path, log: Path, tell: Tell, smoke_model: Path | None) -> str:
    """Build from the sdist for this very processor, and again with explicit flags where the result dies of an illegal
    instruction."""
    source = ["--no-cache-dir", "--no-binary", peer.requirements[0].partition("==")[0]]
    tell(f"building {peer.name} (about 10 minutes on 2 cores)")
    _pip(directory, [*source, *peer.requirements], log, {"CMAKE_ARGS": _NATIVE})
    _check(peer, directory, log)
    if smoke_model is None or _survives(peer, directory, smoke_model):
        return f"CMAKE_ARGS={_NATIVE}"
    flags = explicit_flags(Path("/proc/cpuinfo").read_text())
    tell(f"{peer.name} built with {_NATIVE} dies of an illegal instruction; building again with {flags}")
    _pip(directory, [*source, "--no-deps", "--force-reinstall", *peer.requirements], log, {"CMAKE_ARGS": flags})
    if not _survives(peer, directory, smoke_model):
        raise SetupError(f"it dies of an illegal instruction, built with {_NATIVE} and with {flags}")
    return f"CMAKE_ARGS={flags} ({_NATIVE} dies of an illegal instruction here)"


def _survives(peer: Peer, directory: Path, model: Path) -> bool:
    """False where it dies of an illegal instruction. Raises SetupError for any other failure."""
    command = (str(_python_of(directory)), str(SCRIPTS / peer.script))
    try:
        with Worker(command, timeout_s=_SMOKE_S) as worker:
            worker.load(str(model), 2, {})
            worker.generate([[1, 2, 3, 4] * 16], 4)
    except WorkerError as error:
        if error.ended_by == signal.SIGILL:
            return False
        raise SetupError(f"a first request failed: it {error}") from None
    return True


def _check(peer: Peer, directory: Path, log: Path) -> None:
    if not _imports(_python_of(directory), peer.module):
        raise SetupError(f"it was installed and cannot be imported; see {log}")


def _gguf_python(root: Path, tell: Tell) -> Path:
    """A Python that has the package gguf: our own, else one in an environment of its own."""
    if _imports(Path(sys.executable), "gguf"):
        return Path(sys.executable)
    writer = Peer("gguf", "gguf", "", ("gguf>=0.10",), (), 300_000_000)
    return (find_environment(writer, root, None) or set_up(writer, root, tell)).python


def _python_of(directory: Path) -> Path:
    return directory / "bin" / "python"


def _imports(python: Path, module: str) -> bool:
    """Whether a program is a Python that imports the module: it must say so, since any program may end with code 0."""
    try:
        done = subprocess.run(
            [str(python), "-c", f"import {module}\nprint()\nprint({_IMPORTED!r})"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=_CHECK_S,
            env=_plain_environment(),
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0 and _IMPORTED.encode() in done.stdout.splitlines()


def _plain_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def _read_note(directory: Path) -> str:
    try:
        return str(json.loads((directory / _NOTE_NAME).read_text(encoding="utf-8"))["note"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _pip(directory: Path, arguments: list[str], log: Path, variables: dict[str, str] | None = None) -> None:
    pip = [str(_python_of(directory)), "-m", "pip", "--disable-pip-version-check", "install", *arguments]
    _run(pip, log, _INSTALL_S, variables)


def _run(command: Sequence[str], log: Path, timeout_s: float, variables: dict[str, str] | None = None) -> str:
    """Run to the end; both streams go to `log`, and what it printed is returned. Raises SetupError."""
    begin = log.stat().st_size
    with log.open("ab") as stream:
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                timeout=timeout_s,
                env=_plain_environment() | (variables or {}),
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise SetupError(f"it took more than {timeout_s:,.0f} s; see {log}") from None
    with log.open("rb") as stream:
        stream.seek(begin)
        said = stream.read().decode(errors="replace")
    if done.returncode:
        last = next((line for line in reversed(said.splitlines()) if line.strip()), "")
        raise SetupError(f"{Path(command[0]).name} ended with code {done.returncode}: {last.strip()[:200]}; see {log}")
    return said
