"""Both executors against stored logits and greedy tokens of transformers in float32."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from pagemill.execution.loader import load_executor
from pagemill.kernels.target import available_targets
from pagemill.models.checkpoint import open_checkpoint
from tests.fixtures.golden import PROMPT_LENGTHS, VARIANTS, Golden
from tests.fixtures.greedy import num_blocks_for, run

TOLERANCE = 1e-4
BLOCK_SIZE = 16
EXECUTORS = ["reference", *(f"native-{target}" for target in available_targets())]


@cache
def golden(name: str) -> Golden:
    return Golden.load(name)


@pytest.mark.parametrize("name", VARIANTS)
def test_weights_drawn_from_the_seed_are_those_of_the_golden(name: str) -> None:
    assert VARIANTS[name].weights_sha256 == golden(name).weights_sha256
    assert tuple(len(prompt) for prompt in golden(name).prompts) == PROMPT_LENGTHS
    for stored, drawn in zip(golden(name).prompts, VARIANTS[name].prompts(), strict=True):
        np.testing.assert_array_equal(stored, drawn)


@pytest.mark.parametrize("file", ["directory", "gguf"])
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_greedy_tokens_are_those_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, executor: str, file: str
) -> None:
    kind, _, target = executor.partition("-")
    if target:
        monkeypatch.setenv("PAGEMILL_FORCE_TARGET", target)
    variant, expected = VARIANTS[name], golden(name)
    path = variant.write_hf(tmp_path) if file == "directory" else variant.write_gguf(tmp_path)
    runner = load_executor(
        open_checkpoint(path),
        dtype="float32",
        kv_codec="f32",
        block_size=BLOCK_SIZE,
        num_blocks=num_blocks_for(expected.prompts, variant.num_greedy, BLOCK_SIZE),
        executor=kind,
    )
    kept = [variant.positions(len(prompt)) for prompt in expected.prompts]
    logits, greedy = run(runner.model, expected.prompts, kept, variant.num_greedy)
    for ours, theirs in zip(logits, expected.logits, strict=True):
        assert np.abs(ours - theirs).max() <= TOLERANCE
    for prompt, answer, tokens in zip(expected.prompts, greedy, expected.greedy, strict=True):
        np.testing.assert_array_equal(answer, tokens, err_msg=f"prompt of {len(prompt)} tokens")
