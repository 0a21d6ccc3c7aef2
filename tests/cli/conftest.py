from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.fixtures.tiny import tiny_llama


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of a random llama of two layers with a byte-level tokeniser and a chat template."""
    return str(tiny_llama(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No option of the person who runs the tests, and no terminal of theirs."""
    for name in list(os.environ):
        if name.startswith("PAGEMILL_") and name not in ("PAGEMILL_HOME", "PAGEMILL_THREADS"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("NO_COLOR", raising=False)


@pytest.fixture
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty model cache."""
    home = tmp_path / "home"
    monkeypatch.setenv("PAGEMILL_HOME", str(home))
    return home
