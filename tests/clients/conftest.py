"""Servers for clients: `pagemill serve` as a process, asked over its socket by libraries that know nothing of it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fixtures.default_model import default_model_path
from tests.fixtures.serve_process import ROOT, ServeProcess

# The clients' environment is not the server's.
PYTHON = os.environ.get("SERVER_PYTHON", sys.executable)
OPTIONS = ("--kv-cache-memory-bytes", "256MiB", "--max-num-seqs", "16")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    """The default model, open to this machine, as `pagemill serve` starts it."""
    place = tmp_path_factory.mktemp("server")
    with ServeProcess(
        place, str(default_model_path()), "--served-model-name", "smollm2-135m", *OPTIONS, python=PYTHON
    ) as made:
        yield made


@pytest.fixture(scope="session")
def url(server: ServeProcess) -> str:
    """The address that OpenAI's clients are given."""
    return f"{server.url}/v1"


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A file of keys, and the keys: alice and bob are tenants, slow may ask once a minute, metrics may not ask."""
    path = tmp_path_factory.mktemp("keys") / "keys.toml"
    wanted = {
        "alice": (),
        "bob": (),
        "slow": ("--requests-per-minute", "1"),
        "prometheus": ("--role", "metrics"),
    }
    made = {name: _add_key(path, name, *options) for name, options in wanted.items()}
    return path, made


@pytest.fixture(scope="session")
def guarded(keys: tuple[Path, dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    """The default model behind keys."""
    place = tmp_path_factory.mktemp("guarded")
    arguments = (str(default_model_path()), "--served-model-name", "smollm2-135m", "--keys", str(keys[0]), *OPTIONS)
    with ServeProcess(place, *arguments, python=PYTHON) as made:
        yield made


def _add_key(path: Path, name: str, *options: str) -> str:
    """What `pagemill keys add` prints."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    command = [PYTHON, "-m", "pagemill", "keys", "add", name, "--file", str(path), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    return next(word for word in done.stdout.split() if word.startswith("pm-"))


@pytest.fixture(autouse=True)
def _without_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
