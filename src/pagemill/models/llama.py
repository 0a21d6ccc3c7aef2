"""The llama family (arXiv 2302.13971, 2307.09288, 2407.21783): RMSNorm, rope, grouped-query attention, SiLU-gated MLP.

Owns its settings in `config.json` and in GGUF metadata, its tensor names and its plan. Nothing of files or weights.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from pagemill.base.errors import ModelError
from pagemill.base.kv_spec import LayerKV
from pagemill.base.model_spec import ModelSpec, RopeScaling, RopeSpec
from pagemill.kernels.ops import (
    Activation,
    Attention,
    Embed,
    Head,
    Linear,
    Norm,
    Op,
    Plan,
    Residual,
    Rope,
    WeightDecl,
    WriteKV,
)
from pagemill.models.config_json import ConfigFile
from pagemill.models.gguf import GGUFFile
from pagemill.models.rope import rope_table, yarn_attention_factor
from pagemill.models.weights import NameRow, TensorNames

ARCHITECTURES = ("LlamaForCausalLM",)

_LINEARS = (
    ("q", "attn_q", "self_attn.q_proj"),
    ("k", "attn_k", "self_attn.k_proj"),
    ("v", "attn_v", "self_attn.v_proj"),
    ("o", "attn_output", "self_attn.o_proj"),
    ("gate", "ffn_gate", "mlp.gate_proj"),
    ("up", "ffn_up", "mlp.up_proj"),
    ("down", "ffn_down", "mlp.down_proj"),
)

NAMES = TensorNames(
    model=(
        NameRow("embed", "token_embd.weight", "model.embed_tokens.weight"),
        NameRow("final_norm.weight", "output_norm.weight", "model.norm.weight"),
        NameRow("head", "output.weight", "lm_head.weight"),
    ),
    layer=(
        NameRow("attn_norm.weight", "attn_norm.weight", "input_layernorm.weight"),
        NameRow("mlp_norm.weight", "ffn_norm.weight", "post_attention_layernorm.weight"),
        *(NameRow(handle, f"{gguf}.weight", f"{hf}.weight") for handle, gguf, hf in _LINEARS),
        *(NameRow(f"{handle}.bias", f"{gguf}.bias", f"{hf}.bias") for handle, gguf, hf in _LINEARS),
    ),
    hf_layer="model.layers.",
    hf_optional_prefix="model.",
    ignored=r"rope_freqs\.weight|blk\.\d+\.(rope_freqs|attn_rot_embd)\.weight|(model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
)

# Settings that change the arithmetic: allowed values, anything else is refused.
_CONFIG_SETTINGS: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu", "swish"),
    "pretraining_tp": (1,),
    "sliding_window": (),
    "attention_multiplier": (1.0,),
    "embedding_multiplier": (1.0,),
    "residual_multiplier": (1.0,),
    "logits_scaling": (1.0,),
    "partial_rotary_factor": (1.0,),
    "num_local_experts": (0, 1),
    "quantization_config": (),
}
_GGUF_SETTINGS: dict[str, tuple[object, ...]] = {
    "llama.expert_count": (0,),
    "llama.use_parallel_residual": (False,),
    "llama.attention.causal": (True,),
    "llama.attention.clamp_kqv": (0.0,),
    "llama.attention.scale": (),
    "llama.attention.max_alibi_bias": (0.0,),
    "llama.attn_logit_softcapping": (0.0,),
    "llama.final_logit_softcapping": (0.0,),
    "llama.embedding_scale": (1.0,),
    "llama.residual_scale": (1.0,),
    "llama.logit_scale": (1.0,),
    "llama.rope.scaling.yarn_ext_factor": (1.0,),
}
_ROPE_KEYS = {
    "rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "attention_factor", "beta_fast",
    "beta_slow", "mscale", "mscale_all_dim", "low_freq_factor", "high_freq_factor", "truncate",
    "partial_rotary_factor", "finetuned",
}  # fmt: skip
_ROPE_TYPES: dict[str, RopeScaling] = {"default": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}


def spec_from_config(config: ConfigFile, name: str) -> ModelSpec:
    """The spec of a Hugging Face `config.json` (model_type llama). Raises ModelError for what is not supported."""
    config.refuse_unless(_CONFIG_SETTINGS, "llama")
    kinds = config.values.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)):
        raise ModelError(
            f"{config.origin}: layer_types is {str(kinds)[:60]}; supported: full_attention in every layer. Use another "
            "checkpoint"
        )
    return read_spec(config, name, "llama")


def read_spec(config: ConfigFile, name: str, family: str) -> ModelSpec:
    """What all families of this shape have in common in `config.json`. Raises ModelError."""
    hidden = config.get_int("hidden_size", minimum=1)
    num_heads = config.get_int("num_attention_heads", minimum=1)
    if not config.has("head_dim") and hidden % num_heads:
        raise ModelError(
            f"{config.origin}: hidden_size {hidden} is no multiple of num_attention_heads {num_heads}, and head_dim is "
            "not given; fetch the file again"
        )
    head_dim = config.get_int("head_dim", hidden // num_heads, minimum=1)
    context = config.get_int("max_position_embeddings", 2048, minimum=1)
    return ModelSpec(
        family=family,
        name=name,
        num_layers=config.get_int("num_hidden_layers", minimum=1),
        hidden_dim=hidden,
        num_q_heads=num_heads,
        num_kv_heads=config.get_int("num_key_value_heads", num_heads, minimum=1),
        head_dim=head_dim,
        ffn_dim=config.get_int("intermediate_size", minimum=1),
        vocab_size=config.get_int("vocab_size", minimum=1),
        context_length=context,
        norm_eps=config.get_float("rms_norm_eps", 1e-6, minimum=0.0, maximum=1.0),
        rope=_rope_from_config(config, head_dim, context),
        tied_head=config.get_bool("tie_word_embeddings", False),
        attention_bias=config.get_bool("attention_bias", False),
        mlp_bias=config.get_bool("mlp_bias", False),
    )


def _rope_from_config(config: ConfigFile, head_dim: int, context: int) -> RopeSpec:
    """transformers 5 nests all of it in `rope_parameters`; before, `rope_theta` stood beside `rope_scaling`."""
    rope = config.get_object("rope_parameters" if config.has("rope_parameters") else "rope_scaling")
    unknown = [ascii(key)[:40] for key in sorted(set(rope.values) - _ROPE_KEYS)]
    if unknown:
        raise ModelError(
            f"{rope.origin}: unknown rope settings {', '.join(unknown[:8])}; known: {', '.join(sorted(_ROPE_KEYS))}. "
            "Use a checkpoint without them"
        )
    rope.refuse_unless({"partial_rotary_factor": (1.0, 1), "truncate": (True,)}, "llama")
    base = rope.get_float("rope_theta", config.get_float("rope_theta", 10000.0), minimum=1.001, maximum=1e30)
    kind = rope.get_str("rope_type", rope.get_str("type", "default"))
    if kind not in _ROPE_TYPES:
        raise ModelError(
            f"{rope.origin}: rope scaling {kind[:40]!r} is not supported; supported: {', '.join(_ROPE_TYPES)}. Use a "
            "checkpoint with one of these"
        )
    scaling = _ROPE_TYPES[kind]
    if scaling == "none":
        return RopeSpec(base, head_dim)
    original = config.get_int(
        "original_max_position_embeddings",
        rope.get_int("original_max_position_embeddings", context, minimum=1),
        minimum=1,
    )
    stretched = context / original if scaling == "yarn" else None
    factor = rope.get_float("factor", stretched, minimum=1e-3, maximum=1e6)
    if scaling == "linear":
        return RopeSpec(base, head_dim, scaling=scaling, factor=factor)
    if scaling == "llama3":
        low = rope.get_float("low_freq_factor", minimum=1e-3, maximum=1e6)
        high = rope.get_float("high_freq_factor", minimum=math.nextafter(low, math.inf), maximum=1e6)
        return RopeSpec(
            base,
            head_dim,
            scaling=scaling,
            factor=factor,
            low_freq_factor=low,
            high_freq_factor=high,
            original_context=original,
        )
    mscale = rope.get_float("mscale", 0.0, minimum=0.0, maximum=1e3)
    mscale_all = rope.get_float("mscale_all_dim", 0.0, minimum=0.0, maximum=1e3)
    attention = yarn_attention_factor(factor, mscale, mscale_all)
    return RopeSpec(
        base,
        head_dim,
        scaling=scaling,
        factor=factor,
        original_context=original,
        attention_factor=rope.get_float("attention_factor", attention, minimum=1e-3, maximum=1e3),
        beta_fast=rope.get_float("beta_fast", 32.0, minimum=1e-3, maximum=1e6),
        beta_slow=rope.get_float("beta_slow", 1.0, minimum=1e-3, maximum=1e6),
    )


def spec_from_gguf(file: GGUFFile, name: str) -> ModelSpec:
    """The spec of a GGUF file (general.architecture llama). Raises ModelError for what is not supported."""
    for key, allowed in _GGUF_SETTINGS.items():
        value = file.metadata.get(key, allowed[0] if allowed else None)
        if value is not None and (isinstance(value, list | np.ndarray) or value not in allowed):
            raise ModelError(
                f"{file.path}: {key} is {value!r:.40}, which Pagemill's llama does not support"
                + (f"; supported: {', '.join(map(str, allowed))}" if allowed else "")
                + ". Use a checkpoint without this setting"
            )
    hidden = file.get_int("llama.embedding_length", minimum=1)
    num_heads = file.get_int("llama.attention.head_count", minimum=1)
    head_dim = file.get_int("llama.attention.key_length", hidden // num_heads, minimum=1)
    if file.get_int("llama.attention.value_length", head_dim) != head_dim:
        raise ModelError(f"{file.path}: keys and values of different lengths are not supported; use another checkpoint")
    context = file.get_int("llama.context_length", minimum=1)
    windowed = file.has("llama.attention.sliding_window")
    window = file.get_int("llama.attention.sliding_window") if windowed else 0
    embed = file.tensors.get("token_embd.weight")
    rows = embed.shape[0] if embed is not None else 1
    return ModelSpec(
        family="llama",
        name=name,
        num_layers=file.get_int("llama.block_count", minimum=1),
        hidden_dim=hidden,
        num_q_heads=num_heads,
        num_kv_heads=file.get_int("llama.attention.head_count_kv", num_heads, minimum=1),
        head_dim=head_dim,
        ffn_dim=file.get_int("llama.feed_forward_length", minimum=1),
        vocab_size=file.get_int("llama.vocab_size", rows, minimum=1),
        context_length=context,
        norm_eps=file.get_float("llama.attention.layer_norm_rms_epsilon", minimum=0.0, maximum=1.0),
        rope=_rope_from_gguf(file, head_dim, context),
        tied_head="output.weight" not in file.tensors,
        window=window if 0 < window < context else None,
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        mlp_bias="blk.0.ffn_gate.bias" in file.tensors,
    )


def _rope_from_gguf(file: GGUFFile, head_dim: int, context: int) -> RopeSpec:
    base = file.get_float("llama.rope.freq_base", 10000.0, minimum=1.001, maximum=1e30)
    rotary = file.get_int("llama.rope.dimension_count", head_dim, minimum=1, maximum=head_dim)
    style: Literal["pairs"] = "pairs"
    factor = file.get_float(
        "llama.rope.scaling.factor", file.get_float("llama.rope.scale_linear", 0.0), minimum=0.0, maximum=1e6
    )
    kind = file.get_str("llama.rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise ModelError(
            f"{file.path}: rope scaling {kind[:40]!r} is not supported; supported: none, linear, yarn and the tensor "
            "rope_freqs.weight. Use a checkpoint with one of these"
        )
    scaled = kind != "none" and factor not in (0.0, 1.0)
    factors = file.tensors.get("rope_freqs.weight")
    if factors is not None:
        values = factors.dequantize().ravel()
        if scaled or not ((values > 0) & (values < 1e9)).all() or values.size != rotary // 2:
            raise ModelError(
                f"{file.path}: rope_freqs.weight must hold {rotary // 2} positive numbers, without another rope "
                "scaling beside it; convert the model again with a current converter"
            )
        return RopeSpec(base, rotary, style, "factors", freq_factors=tuple(float(v) for v in values))
    if not scaled:
        return RopeSpec(base, rotary, style)
    if kind == "linear":
        return RopeSpec(base, rotary, style, "linear", factor=factor)
    prefix = "llama.rope.scaling."
    attention = yarn_attention_factor(factor) * file.get_float(
        prefix + "yarn_attn_factor", file.get_float(prefix + "attn_factor", 1.0), minimum=1e-3, maximum=1e3
    )
    return RopeSpec(
        base,
        rotary,
        style,
        "yarn",
        factor=factor,
        original_context=file.get_int(prefix + "original_context_length", context, minimum=1),
        attention_factor=attention,
        beta_fast=file.get_float(prefix + "yarn_beta_fast", 32.0, minimum=1e-3, maximum=1e6),
        beta_slow=file.get_float(prefix + "yarn_beta_slow", 1.0, minimum=1e-3, maximum=1e6),
    )


def build(spec: ModelSpec, *, max_positions: int | None = None) -> Plan:
    """The plan of a llama, or of a family of this shape.

    max_positions: longest sequence that the rope table covers (the context length at most).
    """
    assert spec.rope is not None, "a llama has rope"
    positions = min(max_positions or spec.context_length, spec.context_length)
    head = "embed" if spec.tied_head else "head"
    ops: list[Op] = [Embed("x", "embed")]
    weights = {
        "embed": WeightDecl((spec.vocab_size, spec.hidden_dim), "matrix"),
        "final_norm.weight": WeightDecl((spec.hidden_dim,), "vector"),
    }
    if not spec.tied_head:
        weights["head"] = WeightDecl((spec.vocab_size, spec.hidden_dim), "matrix")
    for layer in range(spec.num_layers):
        _add_layer(ops, weights, spec, layer)
    ops += [Norm("x", "h", "rms", "final_norm.weight", None, spec.norm_eps), Head("h", head)]
    return Plan(
        family=spec.family,
        hidden_dim=spec.hidden_dim,
        vocab_size=spec.vocab_size,
        max_positions=positions,
        ops=tuple(ops),
        weights=weights,
        constants={"rope": rope_table(spec.rope, positions)},
        kv=tuple(_layer_kv(spec, layer) for layer in range(spec.num_layers)),
    )


def _layer_kv(spec: ModelSpec, layer: int) -> LayerKV:
    window = spec.window_of(layer)
    return LayerKV(spec.num_kv_heads, spec.head_dim, "full" if window is None else "window", window)


def _add_layer(ops: list[Op], weights: dict[str, WeightDecl], spec: ModelSpec, layer: int) -> None:
    p = f"layers.{layer}."
    hidden, head_dim, rope = spec.hidden_dim, spec.head_dim, spec.rope
    q_dim, kv_dim = spec.num_q_heads * head_dim, spec.num_kv_heads * head_dim
    assert rope is not None

    def norm(name: str) -> Norm:
        weights[f"{p}{name}.weight"] = WeightDecl((hidden,), "vector")
        return Norm("x", "h", "rms", f"{p}{name}.weight", None, spec.norm_eps)

    def linear(src: str, dst: str, name: str, out_dim: int, in_dim: int, bias: bool) -> Linear:
        weights[p + name] = WeightDecl((out_dim, in_dim), "matrix")
        if bias:
            weights[f"{p}{name}.bias"] = WeightDecl((out_dim,), "vector")
        return Linear(src, dst, p + name, f"{p}{name}.bias" if bias else None)

    def rotate(register: str, num_heads: int) -> Rope:
        return Rope(register, "rope", num_heads, head_dim, rope.rotary_dim, rope.style)

    attn_bias, mlp_bias = spec.attention_bias, spec.mlp_bias
    ops += [
        norm("attn_norm"),
        linear("h", "q", "q", q_dim, hidden, attn_bias),
        linear("h", "k", "k", kv_dim, hidden, attn_bias),
        linear("h", "v", "v", kv_dim, hidden, attn_bias),
        rotate("q", spec.num_q_heads),
        rotate("k", spec.num_kv_heads),
        WriteKV(layer, "k", "v"),
        Attention(
            layer, "q", "a", spec.num_q_heads, spec.num_kv_heads, head_dim, head_dim**-0.5, spec.window_of(layer)
        ),
        linear("a", "o", "o", hidden, q_dim, attn_bias if spec.output_bias is None else spec.output_bias),
        Residual("x", "o"),
        norm("mlp_norm"),
        linear("h", "g", "gate", spec.ffn_dim, hidden, mlp_bias),
        linear("h", "u", "up", spec.ffn_dim, hidden, mlp_bias),
        Activation("g", "m", "silu", gated="u"),
        linear("m", "d", "down", hidden, spec.ffn_dim, mlp_bias),
        Residual("x", "d"),
    ]
