"""Mistral 7B and its kin (arXiv 2310.06825): a llama whose layers read a window of the last positions.

Owns its settings in `config.json`; names and plan are the llama's. Its GGUF files call themselves llama.
"""

from __future__ import annotations

from dataclasses import replace

from pagemill.base.errors import ModelError
from pagemill.base.model_spec import ModelSpec
from pagemill.models.config_json import ConfigFile
from pagemill.models.gguf import GGUFFile
from pagemill.models.llama import NAMES, build, read_spec

__all__ = ["ARCHITECTURES", "NAMES", "build", "spec_from_config", "spec_from_gguf"]

ARCHITECTURES = ("MistralForCausalLM",)

# What stands for a missing key; null is a value of its own (all heads, no window).
_DEFAULTS: dict[str, object] = {
    "num_key_value_heads": 8,
    "max_position_embeddings": 1 << 17,
    "sliding_window": 4096,
}
# Settings that change the arithmetic: allowed values, anything else is refused.
_SETTINGS: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1.0,),
    "num_local_experts": (0, 1),
    "quantization_config": (),
}


def spec_from_config(config: ConfigFile, name: str) -> ModelSpec:
    """The spec of a `config.json` (model_type mistral). Raises ModelError for what is not supported."""
    config.refuse_unless(_SETTINGS, "mistral")
    config = ConfigFile(config.origin, {**_DEFAULTS, **config.values})
    spec = read_spec(config, name, "mistral")
    window = config.get_int("sliding_window", minimum=1) if config.has("sliding_window") else spec.context_length
    return replace(spec, window=window if window < spec.context_length else None)


def spec_from_gguf(file: GGUFFile, name: str) -> ModelSpec:
    """Raises ModelError: no converter writes this architecture."""
    raise ModelError(
        f"{file.path}: general.architecture is mistral, and GGUF files of Mistral models say llama; convert {name} "
        "again with a current converter, or use the Hugging Face checkpoint"
    )
