"""Qwen2 and Qwen2.5 (arXiv 2407.10671, 2412.15115): a llama with biases on q, k and v, whose upper layers may read a
window.

Owns its settings in `config.json`; names and plan are the llama's. GGUF files of it are not read.
"""

from __future__ import annotations

from dataclasses import replace

from pagemill.base.errors import ModelError
from pagemill.base.model_spec import ModelSpec
from pagemill.models.config_json import ConfigFile
from pagemill.models.gguf import GGUFFile
from pagemill.models.llama import NAMES, build, read_spec

__all__ = ["ARCHITECTURES", "NAMES", "build", "spec_from_config", "spec_from_gguf"]

ARCHITECTURES = ("Qwen2ForCausalLM",)

# What stands for a missing key.
_DEFAULTS: dict[str, object] = {"num_key_value_heads": 32, "max_position_embeddings": 32768}
# Settings that change the arithmetic: allowed values, anything else is refused.
_SETTINGS: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu", "swish"),
    "partial_rotary_factor": (1.0,),
    "quantization_config": (),
}
_KINDS = ("full_attention", "sliding_attention")


def spec_from_config(config: ConfigFile, name: str) -> ModelSpec:
    """The spec of a `config.json` (model_type qwen2). Raises ModelError for what is not supported."""
    config.refuse_unless(_SETTINGS, "qwen2")
    config = ConfigFile(config.origin, {**_DEFAULTS, **config.values})
    spec = replace(read_spec(config, name, "qwen2"), attention_bias=True, output_bias=False, mlp_bias=False)
    if not config.get_bool("use_sliding_window", False):
        return spec
    window = config.get_int("sliding_window", 4096, minimum=1)
    layers = _window_layers(config, spec.num_layers)
    if not layers or window >= spec.context_length:
        return spec
    return replace(spec, window=window, window_layers=layers)


def _window_layers(config: ConfigFile, num_layers: int) -> tuple[int, ...]:
    """The layers that read the window: as `layer_types` says, else from number `max_window_layers` on."""
    kinds = config.values.get("layer_types")
    if kinds is None:
        return tuple(range(config.get_int("max_window_layers", 28), num_layers))
    if not isinstance(kinds, list) or len(kinds) != num_layers or any(kind not in _KINDS for kind in kinds):
        raise ModelError(
            f"{config.origin}: layer_types is {str(kinds)[:60]}; supported: {' or '.join(_KINDS)} for each of "
            f"{num_layers} layers. Use another checkpoint"
        )
    return tuple(layer for layer, kind in enumerate(kinds) if kind == "sliding_attention")


def spec_from_gguf(file: GGUFFile, name: str) -> ModelSpec:
    """Raises ModelError: this format of it is not read."""
    raise ModelError(
        f"{file.path}: GGUF files of qwen2 are not supported; use the Hugging Face checkpoint of {name}, in safetensors"
    )
