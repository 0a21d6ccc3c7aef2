from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pagemill.base.errors import ConfigError, ModelError
from pagemill.base.model_spec import VocabSpec
from pagemill.kernels.tensors import BLOCK_BYTES
from pagemill.models.random_init import INIT_STD, SHAPES, random_checkpoint, shape
from pagemill.models.registry import build_plan
from pagemill.models.weights import is_finite

SMALL = replace(SHAPES["gpt2-medium"], num_layers=2, hidden_dim=128, num_q_heads=2, num_kv_heads=2, ffn_dim=256)


def test_gpt2_medium_has_its_published_size() -> None:
    decls = build_plan(shape("gpt2-medium")).weights.values()
    assert sum(int(np.prod(decl.shape)) for decl in decls) == 354_823_168


def test_llama_1b_has_its_published_size() -> None:
    decls = build_plan(shape("llama-1b"), max_positions=1).weights.values()
    assert sum(int(np.prod(decl.shape)) for decl in decls) == 1_235_814_400


@pytest.mark.parametrize("weight_format", BLOCK_BYTES)
def test_matrices_have_the_standard_deviation_of_the_initialisation(weight_format: str) -> None:
    checkpoint = random_checkpoint(SMALL, seed=3, weight_format=weight_format)
    assert checkpoint.weight_format == weight_format
    values = checkpoint.tensors["embed"].dequantize()
    assert values.std() == pytest.approx(INIT_STD, rel=0.02)
    assert abs(values.mean()) < 0.15 * INIT_STD
    assert all(is_finite(tensor) for tensor in checkpoint.tensors.values())


def test_norms_are_one_and_biases_zero() -> None:
    tensors = random_checkpoint(SMALL).tensors
    assert (tensors["layers.1.mlp_norm.weight"].dequantize() == 1).all()
    assert (tensors["layers.1.mlp_norm.bias"].dequantize() == 0).all()
    assert (tensors["layers.0.qkv.bias"].dequantize() == 0).all()
    assert tensors["pos_embed"].dequantize().std() > 0


def test_seed_decides_the_bytes() -> None:
    first = random_checkpoint(SMALL, seed=1, weight_format="q4_1")
    assert first.digest == random_checkpoint(SMALL, seed=1, weight_format="q4_1").digest
    assert first.digest != random_checkpoint(SMALL, seed=2, weight_format="q4_1").digest


def test_tensors_are_those_of_the_plan_and_the_vocabulary_is_ids_only() -> None:
    checkpoint = random_checkpoint(SMALL, weight_format="bf16")
    declared = build_plan(SMALL).weights
    assert {handle: tensor.shape for handle, tensor in checkpoint.tensors.items()} == {
        handle: decl.shape for handle, decl in declared.items()
    }
    assert checkpoint.vocab == VocabSpec()
    assert checkpoint.source_format == "random"


def test_unknown_names_and_formats_are_refused_with_the_choices() -> None:
    with pytest.raises(ConfigError, match="choose one of gpt2-medium, llama-1b, smollm2-135m"):
        shape("gpt5")
    with pytest.raises(ConfigError, match="weight format 'q5_k' is unknown; choose one of f32"):
        random_checkpoint(SMALL, weight_format="q5_k")
    with pytest.raises(ConfigError, match="rows of 80 values cannot be q8_0"):
        random_checkpoint(replace(SMALL, hidden_dim=80, head_dim=40), weight_format="q8_0")
    with pytest.raises(ModelError, match="num_layers is 0"):
        random_checkpoint(replace(SMALL, num_layers=0))
