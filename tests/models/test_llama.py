from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pagemill.base.errors import ModelError
from pagemill.base.model_spec import ModelSpec, RopeSpec
from pagemill.kernels.ops import Attention, Head, Linear, Rope
from pagemill.models import llama
from pagemill.models.config_json import ConfigFile
from pagemill.models.gguf import open_gguf
from pagemill.models.rope import rope_table
from tests.fixtures.tiny import llama_config, llama_weights, write_gguf


def spec_of(**changes: Any) -> ModelSpec:
    """The spec of a tiny config.json with changes; None removes a key."""
    config = {key: value for key, value in (llama_config() | changes).items() if value is not None}
    return llama.spec_from_config(ConfigFile("config.json", config), "tiny")


def gguf_spec_of(
    tmp_path: Path, metadata: Mapping[str, Any], *, extra: Mapping[str, Any] | None = None, **overrides: Any
) -> ModelSpec:
    """The spec of a tiny GGUF file with changed metadata; None removes a key."""
    config = llama_config(**overrides)
    path = write_gguf(
        tmp_path / "m.gguf", config, llama_weights(config), metadata=metadata, extra_tensors=extra, tokenizer=False
    )
    return llama.spec_from_gguf(open_gguf(path), "tiny")


def rope_of(**changes: Any) -> RopeSpec:
    rope = spec_of(**changes).rope
    assert rope is not None
    return rope


def test_layer_is_the_figure_of_the_paper() -> None:
    plan = llama.build(spec_of(num_hidden_layers=1))
    kinds = [type(op).__name__ for op in plan.ops]
    assert kinds == [
        "Embed",
        *("Norm", "Linear", "Linear", "Linear", "Rope", "Rope", "WriteKV", "Attention", "Linear", "Residual"),
        *("Norm", "Linear", "Linear", "Activation", "Linear", "Residual"),
        *("Norm", "Head"),
    ]
    attention = next(op for op in plan.ops if isinstance(op, Attention))
    assert (attention.num_q_heads, attention.num_kv_heads, attention.head_dim, attention.scale) == (4, 2, 16, 0.25)
    assert [(op.reg, op.num_heads) for op in plan.ops if isinstance(op, Rope)] == [("q", 4), ("k", 2)]


def test_plan_names_every_weight_that_its_ops_use() -> None:
    for spec in (spec_of(), spec_of(tie_word_embeddings=True, attention_bias=True, mlp_bias=True)):
        plan = llama.build(spec)
        used = {"embed"}
        for op in plan.ops:
            used |= {getattr(op, field) for field in ("weight", "bias") if getattr(op, field, None) is not None}
        assert used == set(plan.weights)
        assert plan.weights["layers.1.k"].shape == (32, 64)
        assert plan.weights["layers.1.down"].shape == (64, 128)


def test_head_reads_the_embedding_where_it_is_tied() -> None:
    assert llama.build(spec_of()).ops[-1] == Head("h", "head")
    assert llama.build(spec_of(tie_word_embeddings=True)).ops[-1] == Head("h", "embed")


def test_biases_stand_where_the_configuration_says() -> None:
    def with_bias(**changes: Any) -> set[str]:
        plan = llama.build(spec_of(num_hidden_layers=1, **changes))
        return {op.weight.removeprefix("layers.0.") for op in plan.ops if isinstance(op, Linear) and op.bias}

    assert with_bias() == set()
    assert with_bias(attention_bias=True) == {"q", "k", "v", "o"}
    assert with_bias(mlp_bias=True) == {"gate", "up", "down"}


def test_rope_table_covers_the_context_or_what_is_asked_for() -> None:
    spec = spec_of()
    assert spec.rope is not None
    plan = llama.build(spec)
    assert plan.max_positions == 512
    np.testing.assert_array_equal(plan.constants["rope"], rope_table(spec.rope, 512))
    short = llama.build(spec, max_positions=48)
    assert (short.max_positions, short.constants["rope"].shape) == (48, (48, 16))
    assert llama.build(spec, max_positions=9999).max_positions == 512


def test_sizes_left_out_are_those_of_the_format(tmp_path: Path) -> None:
    spec = spec_of(num_key_value_heads=None, head_dim=None, max_position_embeddings=None, rms_norm_eps=None)
    assert (spec.num_kv_heads, spec.head_dim, spec.context_length, spec.norm_eps) == (4, 16, 2048, 1e-6)
    left_out = (
        "llama.attention.key_length",
        "llama.attention.value_length",
        "llama.rope.dimension_count",
        "llama.rope.freq_base",
        "llama.attention.head_count_kv",
        "llama.vocab_size",
    )
    spec = gguf_spec_of(tmp_path, dict.fromkeys(left_out))
    assert (spec.head_dim, spec.num_kv_heads, spec.vocab_size) == (16, 4, 272)
    assert spec.rope == RopeSpec(10000.0, 16, "pairs")


def test_rope_is_read_from_old_and_new_spelling() -> None:
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    expected = RopeSpec(
        5e5, 16, scaling="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=64
    )
    assert rope_of(rope_theta=5e5, rope_scaling=llama3 | {"rope_type": "llama3"}) == expected
    assert rope_of(rope_parameters=llama3 | {"rope_type": "llama3", "rope_theta": 5e5}) == expected
    assert rope_of(rope_theta=5e5, rope_scaling=llama3 | {"type": "llama3"}) == expected
    assert rope_of(rope_scaling={"type": "linear", "factor": 4}).factor == 4.0
    assert rope_of(rope_theta=None) == RopeSpec(10000.0, 16)


def test_yarn_infers_what_is_left_out_as_transformers_does() -> None:
    yarn = {"rope_type": "yarn", "original_max_position_embeddings": 128}
    rope = rope_of(rope_scaling=yarn)
    assert (rope.factor, rope.beta_fast, rope.beta_slow) == (4.0, 32.0, 1.0)
    assert rope.attention_factor == pytest.approx(1.1386294)
    assert rope_of(rope_scaling=yarn | {"attention_factor": 1.0}).attention_factor == 1.0
    assert rope_of(rope_scaling=yarn | {"mscale": 1.0, "mscale_all_dim": 1.0}).attention_factor == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported; supported: default"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "'longrope' is not supported"),
        ({"rope_scaling": {"rope_type": "linear"}}, "'factor' is missing"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "'factor' is 0, outside"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "big"}}, "'factor' is 'big', not a number"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "warp": 3}}, "unknown rope settings 'warp'"),
        ({"rope_scaling": [1]}, r"'rope_scaling' is \[1\], not an object"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": False}}, "truncate is False"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}},
            "'high_freq_factor' is 4.0, outside",
        ),
        ({"rope_theta": 1.0}, "'rope_theta' is 1.0, outside"),
        ({"rope_theta": 1e308}, r"'rope_theta' is 1e\+308, outside"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', supported: 'silu', 'swish'"),
        ({"pretraining_tp": 2}, "pretraining_tp is 2, supported: 1"),
        ({"sliding_window": 4096}, "sliding_window is 4096, supported: none, leave it out"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "supported: full_attention in every layer"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"num_local_experts": 8}, "num_local_experts is 8"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is"),
        ({"attention_bias": "yes"}, "'attention_bias' is 'yes', not true or false"),
        ({"num_attention_heads": 5, "head_dim": None}, "hidden_size 64 is no multiple of num_attention_heads 5"),
        ({"num_attention_heads": 0}, "'num_attention_heads' is 0, outside 1 to"),
        ({"vocab_size": True}, "'vocab_size' is True, not a whole number"),
    ],
)
def test_settings_that_are_not_supported_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        spec_of(**changes)


def test_gguf_rope_scaling_is_read(tmp_path: Path) -> None:
    prefix = "llama.rope.scaling."
    linear = gguf_spec_of(tmp_path, {prefix + "type": "linear", prefix + "factor": 4.0}).rope
    assert linear == RopeSpec(10000.0, 16, "pairs", "linear", factor=4.0)
    assert gguf_spec_of(tmp_path, {"llama.rope.scale_linear": 4.0}).rope == linear
    yarn = gguf_spec_of(
        tmp_path, {prefix + "type": "yarn", prefix + "factor": 4.0, prefix + "original_context_length": 128}
    ).rope
    assert yarn is not None
    assert (yarn.scaling, yarn.factor, yarn.original_context, yarn.style) == ("yarn", 4.0, 128, "pairs")
    assert yarn.attention_factor == pytest.approx(1.1386294)
    assert gguf_spec_of(tmp_path, {prefix + "type": "none", prefix + "factor": 4.0}).rope == RopeSpec(
        10000.0, 16, "pairs"
    )


def test_gguf_frequency_factors_are_read_from_their_tensor(tmp_path: Path) -> None:
    divisors = np.array([1, 1, 2, 4, 8, 8, 8, 8], np.float32)
    rope = gguf_spec_of(tmp_path, {}, extra={"rope_freqs.weight": divisors}).rope
    assert rope == RopeSpec(10000.0, 16, "pairs", "factors", freq_factors=tuple(divisors.tolist()))


@pytest.mark.parametrize("divisors", [[1.0] * 7, [0.0] * 8, [-1.0] * 8, [np.nan] * 8, [np.inf] * 8])
def test_gguf_frequency_factors_that_cannot_be_are_refused(tmp_path: Path, divisors: list[float]) -> None:
    with pytest.raises(ModelError, match=r"rope_freqs\.weight must hold 8 positive numbers"):
        gguf_spec_of(tmp_path, {}, extra={"rope_freqs.weight": np.array(divisors, np.float32)})


def test_gguf_window_reaches_attention_and_cache(tmp_path: Path) -> None:
    spec = gguf_spec_of(tmp_path, {"llama.attention.sliding_window": 100})
    plan = llama.build(spec)
    assert spec.window == 100
    assert {op.window for op in plan.ops if isinstance(op, Attention)} == {100}
    assert {(kv.kind, kv.window) for kv in plan.kv} == {("window", 100)}
    assert gguf_spec_of(tmp_path, {"llama.attention.sliding_window": 512}).window is None


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.expert_count": 8}, r"llama\.expert_count is 8, which Pagemill's llama does not support; supported: 0"),
        ({"llama.expert_count": [0, 0]}, r"llama\.expert_count is array"),
        ({"llama.attention.scale": 0.5}, r"llama\.attention\.scale is 0\.5.*Use a checkpoint without"),
        ({"llama.attention.value_length": 32}, "keys and values of different lengths"),
        ({"llama.rope.scaling.type": "longrope"}, "'longrope' is not supported; supported: none, linear, yarn"),
        ({"llama.block_count": None}, "llama.block_count"),
        ({"llama.block_count": "two"}, "llama.block_count"),
        ({"llama.attention.head_count_kv": [2, 1]}, "llama.attention.head_count_kv"),
        ({"llama.attention.head_count": 0}, "llama.attention.head_count"),
        ({"llama.rope.freq_base": float("nan")}, "llama.rope.freq_base"),
        ({"llama.rope.dimension_count": 17}, "llama.rope.dimension_count"),
    ],
)
def test_gguf_settings_that_are_not_supported_are_refused(
    tmp_path: Path, metadata: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        gguf_spec_of(tmp_path, metadata)
