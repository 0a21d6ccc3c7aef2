"""The GPT-2 family (Radford et al. 2019): LayerNorm before each part, learned positions, fused QKV, plain GELU MLP.

Owns its settings in `config.json` and in GGUF metadata, its tensor names and its plan. Nothing of files or weights.
"""

from __future__ import annotations

from pagemill.base.errors import ModelError
from pagemill.base.kv_spec import LayerKV
from pagemill.base.model_spec import ModelSpec
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
    Slice,
    WeightDecl,
    WriteKV,
)
from pagemill.models.config_json import ConfigFile
from pagemill.models.gguf import GGUFFile
from pagemill.models.weights import NameRow, TensorNames

ARCHITECTURES = ("GPT2LMHeadModel", "GPT2Model")

_LINEARS = (
    ("qkv", "attn_qkv", "attn.c_attn"),
    ("o", "attn_output", "attn.c_proj"),
    ("fc", "ffn_up", "mlp.c_fc"),
    ("proj", "ffn_down", "mlp.c_proj"),
)
_NORMS = (("attn_norm", "attn_norm", "ln_1"), ("mlp_norm", "ffn_norm", "ln_2"))

# Hugging Face keeps the linear weights as Conv1D, [in, out].
NAMES = TensorNames(
    model=(
        NameRow("embed", "token_embd.weight", "transformer.wte.weight"),
        NameRow("pos_embed", "position_embd.weight", "transformer.wpe.weight"),
        NameRow("final_norm.weight", "output_norm.weight", "transformer.ln_f.weight"),
        NameRow("final_norm.bias", "output_norm.bias", "transformer.ln_f.bias"),
        NameRow("head", "output.weight", "lm_head.weight"),
    ),
    layer=(
        *(NameRow(f"{h}.{e}", f"{gguf}.{e}", f"{hf}.{e}") for h, gguf, hf in _NORMS for e in ("weight", "bias")),
        *(NameRow(h, f"{gguf}.weight", f"{hf}.weight", hf_transposed=True) for h, gguf, hf in _LINEARS),
        *(NameRow(f"{h}.bias", f"{gguf}.bias", f"{hf}.bias") for h, gguf, hf in _LINEARS),
    ),
    hf_layer="transformer.h.",
    hf_optional_prefix="transformer.",
    ignored=r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",
)

# Settings that change the arithmetic: allowed values, anything else is refused.
_CONFIG_SETTINGS: dict[str, tuple[object, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "sliding_window": (),
    "quantization_config": (),
}


def spec_from_config(config: ConfigFile, name: str) -> ModelSpec:
    """The spec of a Hugging Face `config.json` (model_type gpt2). Raises ModelError for what is not supported."""
    config.refuse_unless(_CONFIG_SETTINGS, "gpt2")
    hidden = config.get_int("n_embd", 768, minimum=1)
    num_heads = config.get_int("n_head", 12, minimum=1)
    return ModelSpec(
        family="gpt2",
        name=name,
        num_layers=config.get_int("n_layer", 12, minimum=1),
        hidden_dim=hidden,
        num_q_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=_head_dim(hidden, num_heads, config.origin),
        ffn_dim=config.get_int("n_inner", 4 * hidden, minimum=1),
        vocab_size=config.get_int("vocab_size", 50257, minimum=1),
        context_length=config.get_int("n_positions", config.get_int("n_ctx", 1024, minimum=1), minimum=1),
        norm_eps=config.get_float("layer_norm_epsilon", 1e-5, minimum=0.0, maximum=1.0),
        rope=None,
        tied_head=config.get_bool("tie_word_embeddings", True),
        attention_bias=True,
        mlp_bias=True,
    )


def spec_from_gguf(file: GGUFFile, name: str) -> ModelSpec:
    """The spec of a GGUF file (general.architecture gpt2). Raises ModelError for what is not supported."""
    hidden = file.get_int("gpt2.embedding_length", minimum=1)
    num_heads = file.get_int("gpt2.attention.head_count", minimum=1)
    if file.get_int("gpt2.attention.head_count_kv", num_heads) != num_heads:
        raise ModelError(f"{file.path}: grouped-query attention is not part of gpt2; use another checkpoint")
    embed = file.tensors.get("token_embd.weight")
    return ModelSpec(
        family="gpt2",
        name=name,
        num_layers=file.get_int("gpt2.block_count", minimum=1),
        hidden_dim=hidden,
        num_q_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=_head_dim(hidden, num_heads, str(file.path)),
        ffn_dim=file.get_int("gpt2.feed_forward_length", 4 * hidden, minimum=1),
        vocab_size=file.get_int("gpt2.vocab_size", embed.shape[0] if embed is not None else 1, minimum=1),
        context_length=file.get_int("gpt2.context_length", minimum=1),
        norm_eps=file.get_float("gpt2.attention.layer_norm_epsilon", minimum=0.0, maximum=1.0),
        rope=None,
        tied_head="output.weight" not in file.tensors,
        attention_bias=True,
        mlp_bias=True,
    )


def _head_dim(hidden: int, num_heads: int, origin: str) -> int:
    if hidden % num_heads:
        raise ModelError(f"{origin}: {hidden} hidden numbers do not divide into {num_heads} heads; fetch it again")
    return hidden // num_heads


def build(spec: ModelSpec, *, max_positions: int | None = None) -> Plan:
    """The plan of a GPT-2. max_positions: longest sequence to be run (the context length at most)."""
    hidden = spec.hidden_dim
    head = "embed" if spec.tied_head else "head"
    ops: list[Op] = [Embed("x", "embed", positions="pos_embed")]
    weights = {
        "embed": WeightDecl((spec.vocab_size, hidden), "matrix"),
        "pos_embed": WeightDecl((spec.context_length, hidden), "vector"),
        "final_norm.weight": WeightDecl((hidden,), "vector"),
        "final_norm.bias": WeightDecl((hidden,), "vector"),
    }
    if not spec.tied_head:
        weights["head"] = WeightDecl((spec.vocab_size, hidden), "matrix")
    for layer in range(spec.num_layers):
        _add_layer(ops, weights, spec, layer)
    ops += [Norm("x", "h", "layer", "final_norm.weight", "final_norm.bias", spec.norm_eps), Head("h", head)]
    return Plan(
        family="gpt2",
        hidden_dim=hidden,
        vocab_size=spec.vocab_size,
        max_positions=min(max_positions or spec.context_length, spec.context_length),
        ops=tuple(ops),
        weights=weights,
        constants={},
        kv=(LayerKV(spec.num_kv_heads, spec.head_dim),) * spec.num_layers,
    )


def _add_layer(ops: list[Op], weights: dict[str, WeightDecl], spec: ModelSpec, layer: int) -> None:
    p = f"layers.{layer}."
    hidden, head_dim = spec.hidden_dim, spec.head_dim

    def norm(name: str) -> Norm:
        weights[f"{p}{name}.weight"] = WeightDecl((hidden,), "vector")
        weights[f"{p}{name}.bias"] = WeightDecl((hidden,), "vector")
        return Norm("x", "h", "layer", f"{p}{name}.weight", f"{p}{name}.bias", spec.norm_eps)

    def linear(src: str, dst: str, name: str, out_dim: int, in_dim: int) -> Linear:
        weights[p + name] = WeightDecl((out_dim, in_dim), "matrix")
        weights[f"{p}{name}.bias"] = WeightDecl((out_dim,), "vector")
        return Linear(src, dst, p + name, f"{p}{name}.bias")

    ops += [
        norm("attn_norm"),
        linear("h", "qkv", "qkv", 3 * hidden, hidden),
        Slice("qkv", "q", 0, hidden),
        Slice("qkv", "k", hidden, 2 * hidden),
        Slice("qkv", "v", 2 * hidden, 3 * hidden),
        WriteKV(layer, "k", "v"),
        Attention(layer, "q", "a", spec.num_q_heads, spec.num_kv_heads, head_dim, head_dim**-0.5),
        linear("a", "o", "o", hidden, hidden),
        Residual("x", "o"),
        norm("mlp_norm"),
        linear("h", "f", "fc", spec.ffn_dim, hidden),
        Activation("f", "m", "gelu_tanh"),
        linear("m", "d", "proj", hidden, spec.ffn_dim),
        Residual("x", "d"),
    ]
