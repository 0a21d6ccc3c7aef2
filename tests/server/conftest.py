from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.fixtures.live_server import LiveServer
from tests.fixtures.tiny import tiny_llama


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama of two layers with a byte-level tokeniser and a chat template."""
    return tiny_llama(tmp_path_factory.mktemp("tiny"), context=1536)


@pytest.fixture(scope="session")
def live(tiny_model: Path) -> Iterator[LiveServer]:
    with LiveServer(str(tiny_model), max_num_seqs=8) as server:
        yield server


@pytest.fixture(scope="session")
def http(live: LiveServer) -> Iterator[httpx.Client]:
    with live.client() as client:
        yield client
