"""transformers in float32, computed here and now, against the stored goldens and against both executors."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pagemill.execution.loader import load_executor
from pagemill.kernels.target import available_targets
from pagemill.models.checkpoint import open_checkpoint
from tests.fixtures.golden import VARIANTS, Golden, Variant
from tests.fixtures.greedy import num_blocks_for, run
from tests.fixtures.rope_cases import CASES, load_golden
from tests.fixtures.tiny import gpt2_config, llama_config, mistral_config, qwen2_config

pytest.importorskip("torch", reason="torch is not installed; `make parity` installs it")
pytest.importorskip("transformers", reason="transformers is not installed; `make parity` installs it")

from scripts.make_goldens import TOLERANCE as GOLDEN_TOLERANCE
from scripts.make_goldens import compute, difference, rope_of

pytestmark = pytest.mark.parity

TOLERANCE = 1e-4
EXECUTORS = ["reference", *(f"native-{target}" for target in available_targets())]

# Shapes and seeds that no stored golden has.
FRESH = {
    variant.name: variant
    for variant in (
        Variant("head-128", llama_config(hidden=128, q_heads=2, kv_heads=1, head_dim=128, vocab=131), seed=101),
        Variant("head-80", llama_config(hidden=96, q_heads=3, kv_heads=1, head_dim=80, vocab=100), seed=102),
        Variant("mha-tied", llama_config(q_heads=4, kv_heads=4, vocab=97, tie_word_embeddings=True), seed=103),
        Variant(
            "one-layer",
            llama_config(hidden=80, layers=1, q_heads=5, kv_heads=5, head_dim=32, ffn=72, vocab=64),
            seed=104,
        ),
        Variant("deep", llama_config(layers=6, q_heads=8, kv_heads=2, head_dim=32, vocab=128), seed=105),
        Variant("mistral", mistral_config(window=40, layers=3, vocab=120), seed=107),
        Variant("mistral-whole", mistral_config(window=None, vocab=110), seed=108),
        Variant("qwen2", qwen2_config(window=40, first=2, layers=4, vocab=120), seed=109),
        Variant("gpt2-heads-4", gpt2_config(hidden=96, heads=4, layers=3, ffn=200, vocab=111), seed=106),
    )
}


@cache
def live(name: str) -> Golden:
    return compute((VARIANTS | FRESH)[name])


@pytest.mark.parametrize("name", VARIANTS)
def test_stored_golden_is_what_transformers_computes(name: str) -> None:
    assert difference(Golden.load(name), live(name)) <= GOLDEN_TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_stored_rope_is_what_transformers_computes(name: str) -> None:
    for stored, computed in zip(load_golden(name), rope_of(CASES[name]), strict=True):
        np.testing.assert_allclose(stored, computed, rtol=0, atol=GOLDEN_TOLERANCE)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("name", FRESH)
def test_executor_agrees_with_transformers_on_fresh_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Any, name: str, executor: str
) -> None:
    kind, _, target = executor.partition("-")
    if target:
        monkeypatch.setenv("PAGEMILL_FORCE_TARGET", target)
    variant, expected = FRESH[name], live(name)
    runner = load_executor(
        open_checkpoint(variant.write_hf(tmp_path)),
        dtype="float32",
        kv_codec="f32",
        num_blocks=num_blocks_for(expected.prompts, variant.num_greedy, 16),
        executor=kind,
    )
    kept = [variant.positions(len(prompt)) for prompt in expected.prompts]
    logits, greedy = run(runner.model, expected.prompts, kept, variant.num_greedy)
    largest = max(float(np.abs(a - b).max()) for a, b in zip(logits, expected.logits, strict=True))
    record_property("max_abs_logit_difference", largest)
    assert largest <= TOLERANCE
    for answer, tokens in zip(greedy, expected.greedy, strict=True):
        np.testing.assert_array_equal(answer, tokens)
