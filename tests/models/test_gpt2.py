from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pagemill.base.errors import ModelError
from pagemill.base.model_spec import ModelSpec
from pagemill.kernels.ops import Activation, Attention, Embed, Head, Norm, Slice
from pagemill.models import gpt2
from pagemill.models.config_json import ConfigFile
from pagemill.models.gguf import open_gguf
from tests.fixtures.tiny import gpt2_config, gpt2_weights, write_gguf


def spec_of(**changes: Any) -> ModelSpec:
    """The spec of a tiny config.json with changes; None removes a key."""
    config = {key: value for key, value in (gpt2_config() | changes).items() if value is not None}
    return gpt2.spec_from_config(ConfigFile("config.json", config), "tiny")


def test_layer_is_that_of_the_paper() -> None:
    plan = gpt2.build(spec_of(n_layer=1))
    assert [type(op).__name__ for op in plan.ops] == [
        "Embed",
        *("Norm", "Linear", "Slice", "Slice", "Slice", "WriteKV", "Attention", "Linear", "Residual"),
        *("Norm", "Linear", "Activation", "Linear", "Residual"),
        *("Norm", "Head"),
    ]
    assert plan.ops[0] == Embed("x", "embed", positions="pos_embed")
    assert [(op.dst, op.start, op.stop) for op in plan.ops if isinstance(op, Slice)] == [
        ("q", 0, 64),
        ("k", 64, 128),
        ("v", 128, 192),
    ]
    assert {op.kind for op in plan.ops if isinstance(op, Norm)} == {"layer"}
    assert next(op for op in plan.ops if isinstance(op, Activation)).kind == "gelu_tanh"
    assert next(op for op in plan.ops if isinstance(op, Attention)).scale == 32**-0.5
    assert plan.constants == {}


def test_plan_names_every_weight_that_its_ops_use() -> None:
    plan = gpt2.build(spec_of(tie_word_embeddings=False))
    used = {"embed", "pos_embed"}
    for op in plan.ops:
        used |= {getattr(op, field) for field in ("weight", "bias") if getattr(op, field, None) is not None}
    assert used == set(plan.weights)
    assert plan.weights["layers.0.qkv"].shape == (192, 64)
    assert plan.weights["layers.0.proj"].shape == (64, 256)
    assert plan.weights["pos_embed"].shape == (512, 64)


def test_head_is_tied_unless_said_otherwise() -> None:
    assert gpt2.build(spec_of(tie_word_embeddings=None)).ops[-1] == Head("h", "embed")
    assert gpt2.build(spec_of(tie_word_embeddings=False)).ops[-1] == Head("h", "head")


def test_sizes_left_out_are_those_of_gpt2() -> None:
    spec = gpt2.spec_from_config(ConfigFile("config.json", {"model_type": "gpt2"}), "gpt2")
    assert (spec.num_layers, spec.hidden_dim, spec.num_q_heads, spec.head_dim) == (12, 768, 12, 64)
    assert (spec.ffn_dim, spec.vocab_size, spec.context_length, spec.norm_eps) == (3072, 50257, 1024, 1e-5)


def test_positions_never_exceed_the_learned_ones() -> None:
    assert gpt2.build(spec_of()).max_positions == 512
    assert gpt2.build(spec_of(), max_positions=100).max_positions == 100
    assert gpt2.build(spec_of(), max_positions=1000).max_positions == 512


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_function": "gelu"}, "activation_function is 'gelu', supported: 'gelu_new', 'gelu_pytorch_tanh'"),
        ({"scale_attn_weights": False}, "scale_attn_weights is False"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({"add_cross_attention": True}, "add_cross_attention is True"),
        ({"n_head": 5}, "64 hidden numbers do not divide into 5 heads"),
        ({"n_layer": -1}, "'n_layer' is -1, outside 1 to"),
        ({"layer_norm_epsilon": "small"}, "'layer_norm_epsilon' is 'small', not a number"),
    ],
)
def test_settings_that_are_not_supported_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        spec_of(**changes)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"gpt2.attention.head_count_kv": 1}, "grouped-query attention is not part of gpt2"),
        ({"gpt2.attention.head_count": 3}, "64 hidden numbers do not divide into 3 heads"),
        ({"gpt2.context_length": None}, "gpt2.context_length"),
    ],
)
def test_gguf_settings_that_are_not_supported_are_refused(
    tmp_path: Path, metadata: dict[str, Any], message: str
) -> None:
    config = gpt2_config()
    path = write_gguf(tmp_path / "m.gguf", config, gpt2_weights(config), metadata=metadata)
    with pytest.raises(ModelError, match=message):
        gpt2.spec_from_gguf(open_gguf(path), "tiny")


def test_gguf_and_directory_give_the_same_spec(tmp_path: Path) -> None:
    config = gpt2_config(tie_word_embeddings=False)
    path = write_gguf(tmp_path / "m.gguf", config, gpt2_weights(config))
    read = gpt2.spec_from_gguf(open_gguf(path), "tiny")
    assert read.norm_eps == pytest.approx(1e-5)
    assert read == spec_of(tie_word_embeddings=False, layer_norm_epsilon=read.norm_eps)
