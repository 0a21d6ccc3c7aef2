"""A model as a plan: a flat list of ops over named registers. Owns the op kinds; lowering is in `plan.py`.

Registers are row-major f32 matrices, one row per token of the step; "x" is the residual stream. A weight is named by a
handle, the canonical name under which the loader finds it. Matrices are stored [out, in], as y = W x reads them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pagemill.base.kv_spec import LayerKV

NormKind = Literal["rms", "layer"]
ActivationKind = Literal["silu", "gelu", "gelu_tanh", "relu"]


@dataclass(frozen=True, slots=True)
class Embed:
    """dst[r] = table[token[r]] * scale + (positions[position[r]] where given). table: [vocab, hidden]."""

    dst: str
    table: str
    positions: str | None = None
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Norm:
    """RMSNorm (arXiv 1910.07467) or LayerNorm (arXiv 1607.06450) of each row; weight, bias: [width]."""

    src: str
    dst: str
    kind: NormKind
    weight: str
    bias: str | None
    eps: float


@dataclass(frozen=True, slots=True)
class Linear:
    """dst = src Wᵀ + bias. weight: [out, in]; bias: [out]."""

    src: str
    dst: str
    weight: str
    bias: str | None = None


@dataclass(frozen=True, slots=True)
class Slice:
    """dst = columns [start, stop) of src: how a fused QKV product is taken apart."""

    src: str
    dst: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class QKNorm:
    """RMSNorm of each head of a register [rows, num_heads * head_dim], in place; weight: [head_dim]."""

    reg: str
    weight: str
    num_heads: int
    head_dim: int
    eps: float


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotate each head of a register in place, by position. table: constant [positions, rotary_dim] f32, each row cos
    of rotary_dim/2 angles, then their sin. style as in RopeSpec."""

    reg: str
    table: str
    num_heads: int
    head_dim: int
    rotary_dim: int
    style: Literal["halves", "pairs"]


@dataclass(frozen=True, slots=True)
class WriteKV:
    """Store the step's keys and values in the paged cache of a layer, through the codec."""

    layer: int
    k: str
    v: str


@dataclass(frozen=True, slots=True)
class Attention:
    """Causal attention of q over the stored keys and values of a layer (read back through the codec).

    scores = scale · q·k, then softcap · tanh(score / softcap) where softcap > 0; window w: positions p-w+1 .. p.
    """

    layer: int
    q: str
    dst: str
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    softcap: float = 0.0


@dataclass(frozen=True, slots=True)
class Activation:
    """dst = kind(src), times `gated` element by element where given. gelu_tanh is the tanh form (arXiv 1606.08415)."""

    src: str
    dst: str
    kind: ActivationKind
    gated: str | None = None


@dataclass(frozen=True, slots=True)
class Residual:
    """dst = dst + scale · src."""

    dst: str
    src: str
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Head:
    """Logits of the rows that need them: src Wᵀ · scale (+ bias), then softcap. weight: [vocab, hidden]."""

    src: str
    weight: str
    bias: str | None = None
    scale: float = 1.0
    softcap: float = 0.0


Op = Embed | Norm | Linear | Slice | QKNorm | Rope | WriteKV | Attention | Activation | Residual | Head


@dataclass(frozen=True, slots=True)
class WeightDecl:
    """What a plan expects under a handle: shape ([out, in] or [width]) and how it is used.

    kind "matrix": kept in the checkpoint's weight format; "vector": turned into f32.
    """

    shape: tuple[int, ...]
    kind: Literal["matrix", "vector"]


@dataclass(frozen=True, slots=True)
class Plan:
    """A model ready for any executor.

    ops: in order. weights: every handle with its declaration. constants: handle -> f32 array (rope tables).
    kv: geometry of each layer's cache. max_positions: longest sequence that the tables cover.
    """

    family: str
    hidden_dim: int
    vocab_size: int
    max_positions: int
    ops: tuple[Op, ...]
    weights: dict[str, WeightDecl]
    constants: dict[str, NDArray[np.float32]]
    kv: tuple[LayerKV, ...]
