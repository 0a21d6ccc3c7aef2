"""Which model families exist: one line each. Owns the table and the sanity of sizes that every family shares; the
settings, names and plan of a family are in its module."""

from __future__ import annotations

from functools import lru_cache
from typing import Protocol

from pagemill.base.errors import ModelError
from pagemill.base.model_spec import ModelSpec
from pagemill.kernels.ops import Plan
from pagemill.models import gpt2, llama, mistral, qwen2
from pagemill.models.config_json import ConfigFile
from pagemill.models.gguf import GGUFFile
from pagemill.models.weights import TensorNames


class Family(Protocol):
    """What a family's module offers.

    ARCHITECTURES: classes in `config.json` that it computes. NAMES: its tensor names. The functions raise ModelError
    for settings that are missing, absurd or not supported.
    """

    @property
    def ARCHITECTURES(self) -> tuple[str, ...]: ...  # noqa: N802

    @property
    def NAMES(self) -> TensorNames: ...  # noqa: N802

    def spec_from_config(self, config: ConfigFile, name: str) -> ModelSpec: ...

    def spec_from_gguf(self, file: GGUFFile, name: str) -> ModelSpec: ...

    def build(self, spec: ModelSpec, *, max_positions: int | None = None) -> Plan: ...


FAMILIES: dict[str, Family] = {
    "gpt2": gpt2,
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen2,
}

# Largest sizes that are believed; beyond them a configuration is damaged or hostile.
MAX_SIZES: dict[str, int] = {
    "num_layers": 1024,
    "hidden_dim": 1 << 17,
    "num_q_heads": 2048,
    "num_kv_heads": 2048,
    "head_dim": 256,
    "ffn_dim": 1 << 20,
    "vocab_size": 1 << 23,
    "context_length": 1 << 24,
}


def supported() -> tuple[str, ...]:
    """Names of the families, as checkpoints call them (`model_type`, `general.architecture`)."""
    return tuple(sorted(FAMILIES))


def family(name: str, origin: str) -> Family:
    """The module of a family. origin: names the checkpoint in the message. Raises ModelError for an unknown one."""
    if name not in FAMILIES:
        raise ModelError(
            f"{origin}: models of the kind {name[:60]!r} are not supported; supported: {', '.join(supported())}. Use a "
            "checkpoint of one of these"
        )
    return FAMILIES[name]


def build_plan(spec: ModelSpec, *, max_positions: int | None = None) -> Plan:
    """The plan of a model. max_positions: longest sequence that it must cover (the context length where None).

    Raises ModelError for an unknown family or sizes that cannot be.
    """
    check_sizes(spec, spec.name)
    return _outline(spec) if max_positions == 1 else _build(spec, max_positions)


def _build(spec: ModelSpec, max_positions: int | None) -> Plan:
    return family(spec.family, spec.name).build(spec, max_positions=max_positions)


@lru_cache(maxsize=1)
def _outline(spec: ModelSpec) -> Plan:
    """The plan for one position, of which a start asks declarations and geometry several times."""
    return _build(spec, 1)


def check_sizes(spec: ModelSpec, origin: str) -> None:
    """Raise ModelError where a size is absurd or sizes do not fit each other."""
    for name, limit in MAX_SIZES.items():
        if not 1 <= getattr(spec, name) <= limit:
            raise ModelError(
                f"{origin}: {name} is {getattr(spec, name)}, outside 1 to {limit}; the configuration is damaged or the "
                "model is of a kind that Pagemill cannot run: fetch it again or use another one"
            )
    problem = None
    if spec.num_q_heads % spec.num_kv_heads:
        problem = f"{spec.num_q_heads} query heads cannot be shared out among {spec.num_kv_heads} KV heads"
    elif spec.rope is not None and (spec.rope.rotary_dim % 2 or not 2 <= spec.rope.rotary_dim <= spec.head_dim):
        problem = f"rope rotates {spec.rope.rotary_dim} of {spec.head_dim} dimensions, but needs an even number of them"
    elif not 0.0 < spec.norm_eps < 1.0:
        problem = f"the epsilon of the norms is {spec.norm_eps}, not between 0 and 1"
    elif spec.window is not None and spec.window < 1:
        problem = f"the attention window is {spec.window}"
    if problem:
        raise ModelError(f"{origin}: {problem}; the configuration is damaged: fetch it again")
