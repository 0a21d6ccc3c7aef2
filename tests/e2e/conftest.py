from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pagemill import LLM
from tests.fixtures.tiny import tiny_llama


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama of two layers with a byte-level tokeniser and a chat template."""
    return tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def llm(tiny_model: Path) -> Iterator[LLM]:
    with LLM(str(tiny_model), kv_cache_memory_bytes="8MiB", max_num_seqs=8) as made:
        yield made
