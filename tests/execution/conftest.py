"""Starts of one model after the other, for the tests of packed weights."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from pagemill.execution import loader
from pagemill.kernels.tensors import Tensor
from pagemill.models.checkpoint import open_checkpoint
from tests.fixtures.greedy import run
from tests.fixtures.packed_starts import Start, Starter
from tests.fixtures.tiny import tiny_llama

PROMPTS = [np.arange(10, 30, dtype=np.int32), np.arange(200, 207, dtype=np.int32)]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PAGEMILL_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def start(home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Starter:
    """Load a model and run it, packed weights kept in a home of its own where they are not beside the model."""
    asked: list[str] = []
    original = loader.ConvertedWeights.__getitem__

    def spied(self: loader.ConvertedWeights, handle: str) -> Tensor:
        tensor = original(self, handle)
        asked.extend([handle] * (len(tensor.shape) == 2))
        return tensor

    monkeypatch.setattr(loader.ConvertedWeights, "__getitem__", spied)

    def begin(path: Path, cache: str = "auto", check_values: bool = True, **options: object) -> Start:
        asked.clear()
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            runner = loader.load_executor(
                open_checkpoint(path, check_values=check_values),
                num_blocks=8,
                packed_weights_cache=cache,
                **options,  # type: ignore[arg-type]
            )
        num_converted, notices = len(asked), [record.getMessage() for record in caplog.records]
        logits, _ = run(runner.model, PROMPTS, [[0, 19], [6]], 3)
        return Start(logits, num_converted, notices)

    return begin


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_llama(tmp_path / "models", format="gguf", weight_format="q4_1")
