"""The servers of `pagemill bench serve` and their settings: Pagemill's own, and llama-cpp-python's where it can be had.

llama-cpp-python's server answers one request at a time and keeps the others waiting; its best settings here are weights
in Q4_0, 2,048 tokens a batch, logits of the last token alone, and no request that interrupts another. It keeps the
last prompt's keys and values, so that a prefix shared with it is not read again. Its server needs packages that its
library does not; they are put beside the peers' environments (`llama.cpp-server/`), which stay as they are.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pagemill
from pagemill.base.errors import ConfigError
from pagemill.bench.peers_catalog import PAGEMILL, PEERS, Form
from pagemill.bench.peers_setup import Environment, SetupError, Tell, find_environment, form_path, set_up
from pagemill.bench.serve_servers import Contender
from pagemill.models.checkpoint import Checkpoint
from pagemill.text.tokenizer import Tokenizer

LLAMA = "llama.cpp"
LLAMA_WEIGHTS = "Q4_0"
PEER: Literal["peer"] = "peer"

_PLACES = re.compile(r"(\d{1,9})(?:@(\d{1,9}|peer))?", re.ASCII)
_PACKAGES = "llama.cpp-server"
_MODULE = "llama_cpp.server"
_IMPORT_S = 180.0
_INSTALL_S = 600.0
_SERVER_REQUIREMENTS = (
    "import importlib.metadata\n"
    "for line in importlib.metadata.requires('llama-cpp-python') or []:\n"
    "    need, _, extra = line.partition(';')\n"
    "    if 'extra ==' in extra and '\"server\"' in extra: print(need.strip())\n"
)
_ASKS = {"temperature": 0, "stream": True}


@dataclass(frozen=True, slots=True)
class Places:
    """A setting of Pagemill's server. at_once: its max_num_seqs. bound: its target_itl_ms; "peer" for one that follows
    from the peer's own time between tokens, None for none."""

    at_once: int
    bound: int | Literal["peer"] | None = None


def parse_places(text: str) -> tuple[Places, ...]:
    """Settings from `--at-once`: numbers of sequences with commas between them, each with `@` and milliseconds or
    `@peer` behind it where it is to keep to a time between tokens. Raises ConfigError."""
    found = []
    for part in text.split(","):
        match = _PLACES.fullmatch(part.strip())
        bound = None if match is None or match[2] is None else PEER if match[2] == PEER else int(match[2])
        if match is None or not 1 <= int(match[1]) <= 65_536 or (isinstance(bound, int) and not 1 <= bound <= 100_000):
            raise ConfigError(
                f"--at-once is {text!r}; give numbers from 1 to 65,536 with commas between them, as 32,8,4; behind one "
                "that is to keep to a time between tokens, the milliseconds or the peer's: 32,8@25,8@peer"
            )
        found.append(Places(int(match[1]), bound))
    return tuple(dict.fromkeys(found))


def usual_places(users: int | None, *, quick: bool, with_peer: bool) -> tuple[Places, ...]:
    """Settings where none are given: as many at once as users, and fewer; beside a peer both held to its time too."""
    most = users or 32
    if quick:
        return (Places(most),)
    numbers = sorted({most, *(each for each in ((8,) if with_peer else (8, 4)) if each < most)}, reverse=True)
    bounds: tuple[Literal["peer"] | None, ...] = (None, PEER) if with_peer else (None,)
    return tuple(Places(each, bound) for bound in bounds for each in numbers)


@dataclass(frozen=True, slots=True)
class OwnServers:
    """Pagemill's servers. arguments: engine options as typed; file: with more of them, None for none."""

    model: str
    arguments: Mapping[str, str]
    file: str | None
    places: tuple[Places, ...]

    def plain(self) -> list[Contender]:
        """Those whose settings are known before anything is measured."""
        return [self._server(each.at_once, each.bound) for each in self.places if each.bound != PEER]

    def held(self, target_itl_ms: int) -> list[Contender]:
        """Those that keep to a time that follows from the peer's, but for such as are there already."""
        numbers = [each.at_once for each in self.places if each.bound == PEER]
        return [self._server(each, target_itl_ms) for each in numbers if Places(each, target_itl_ms) not in self.places]

    def _server(self, at_once: int, target_itl_ms: int | None) -> Contender:
        return pagemill_contender(self.model, self.arguments, self.file, at_once, target_itl_ms)


def pagemill_contender(
    model: str, arguments: Mapping[str, str], file: str | None, at_once: int, target_itl_ms: int | None = None
) -> Contender:
    """Pagemill's server. arguments: engine options as typed. at_once: its max_num_seqs."""
    options = {**arguments, "max_num_seqs": str(at_once)}
    mode = f"{at_once} at once"
    if target_itl_ms is not None:
        options["target_itl_ms"] = str(target_itl_ms)
        mode = f"{mode}, target {target_itl_ms} ms"
    options.pop("model", None)
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    given = [] if file is None else ["--config", file]
    command = (sys.executable, "-m", "pagemill", "serve", model, "--port", "0", *flags, *given)
    source = str(Path(pagemill.__file__).parents[1])
    path = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))
    fields = {**_ASKS, "ignore_eos": True, "stream_options": {"include_usage": True}}
    return Contender(PAGEMILL, mode, command, fields, path, at_once, target_itl_ms)


def find_llama(root: Path, python: str | None, checkpoint: Checkpoint, *, install: bool, tell: Tell) -> Environment:
    """An environment of llama-cpp-python. install: set it up where it is missing. Raises SetupError, and ConfigError
    where the Python that is given has none."""
    if checkpoint.source_format != "gguf":
        raise SetupError(f"its weights are made from a GGUF file, and {checkpoint.path} is none")
    [peer] = [each for each in PEERS if each.name == LLAMA]
    found = find_environment(peer, root, python)
    if found is not None:
        return found
    if not install:
        raise SetupError(f"not set up in {root}; --peers {LLAMA} does it")
    return set_up(peer, root, tell, checkpoint.path)


def llama_contender(
    environment: Environment,
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    root: Path,
    *,
    longest: int,
    num_threads: int,
    install: bool,
    tell: Tell,
) -> Contender:
    """llama-cpp-python's server in its best settings. longest: tokens of the longest request. Raises SetupError."""
    packages = _server_packages(environment.python, root, install=install, tell=tell)
    weights = form_path(Form(LLAMA_WEIGHTS, LLAMA_WEIGHTS), checkpoint.path, checkpoint.weight_format, root, tell)
    options = {
        "model": str(weights),
        "host": "127.0.0.1",
        "port": "0",
        "n_ctx": str(-(-longest // 256) * 256),
        "n_batch": "2048",
        "n_ubatch": "512",
        "n_threads": str(num_threads),
        "n_threads_batch": str(num_threads),
        "logits_all": "false",
        "interrupt_requests": "false",
        "disable_ping_events": "true",
        "verbose": "false",
    }
    flags = [part for name, value in options.items() for part in (f"--{name}", value)]
    stops = {str(each): -100.0 for each in sorted(tokenizer.stop_ids)}
    fields = {**_ASKS, "repeat_penalty": 1.0, "logit_bias": stops, "logit_bias_type": "input_ids"}
    command = (str(environment.python), "-m", _MODULE, *flags)
    note = "; ".join(filter(None, ("llama-cpp-python's server answers one request at a time", environment.note)))
    return Contender(LLAMA, LLAMA_WEIGHTS, command, fields, packages, note=note)


def _server_packages(python: Path, root: Path, *, install: bool, tell: Tell) -> str | None:
    """PYTHONPATH with which the server's packages are found, None where the environment has them itself."""
    directory = root / _PACKAGES
    for path in (None, str(directory)):
        if _run([str(python), "-c", f"import {_MODULE}.app"], path, _IMPORT_S) is not None:
            return path
    if not install:
        raise SetupError(f"its server's packages are missing; --peers {LLAMA} puts them into {directory}")
    listed = _run([str(python), "-c", _SERVER_REQUIREMENTS], None, _IMPORT_S)
    if not listed:
        raise SetupError(f"{python} does not tell what its server needs; give another with --python-llama")
    tell(f"installing what llama-cpp-python's server needs into {directory}")
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--target", str(directory)]
    if _run([*pip, "--upgrade", *listed.split("\n")], None, _INSTALL_S) is None:
        raise SetupError(f"its server's packages cannot be installed into {directory}; try: {' '.join(pip)} …")
    if _run([str(python), "-c", f"import {_MODULE}.app"], str(directory), _IMPORT_S) is None:
        raise SetupError(f"its server's packages were installed into {directory} and do not work")
    return str(directory)


def _run(command: list[str], path: str | None, timeout_s: float) -> str | None:
    """What a command printed, None where it failed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = path
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            timeout=timeout_s,
            env=environment,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
