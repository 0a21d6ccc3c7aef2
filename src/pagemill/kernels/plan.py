"""Lowering: a plan's ops become the phase records that the native step executes. Plain Python, no arrays touched.

    embed          Embed
    attention_in   Norm, Linear q k v (or one fused Linear and its Slices), QKNorm, Rope, WriteKV
    attention      Attention
    attention_out  Linear, Residual
    mlp_in         Norm, Linear (gate and up, or one)
    mlp_out        Activation, Linear, Residual
    head           Norm, Head

An op sequence outside these shapes is refused by name: native code executes records and matches nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

from pagemill.base.errors import ModelError
from pagemill.kernels.ops import (
    Activation,
    ActivationKind,
    Attention,
    Embed,
    Head,
    Linear,
    Norm,
    Op,
    Plan,
    QKNorm,
    Residual,
    Rope,
    Slice,
    WriteKV,
)

PhaseKind = Literal["embed", "attention_in", "attention", "attention_out", "mlp_in", "mlp_out", "head"]


@dataclass(frozen=True, slots=True)
class MatrixRef:
    """A product's weight and bias handles."""

    weight: str
    bias: str | None = None


@dataclass(frozen=True, slots=True)
class QKVGeometry:
    """Heads of an attention phase; q_norm, k_norm, rope: handles or None."""

    layer: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    q_norm: str | None = None
    k_norm: str | None = None
    qk_eps: float = 0.0
    rope: str | None = None
    rotary_dim: int = 0
    rope_style: Literal["none", "halves", "pairs"] = "none"


@dataclass(frozen=True, slots=True)
class Phase:
    """One record. matrices: products whose outputs stand side by side. scale: of embeddings, scores, the residual
    branch or logits, as the kind reads it."""

    kind: PhaseKind
    matrices: tuple[MatrixRef, ...] = ()
    norm: Norm | None = None
    qkv: QKVGeometry | None = None
    scale: float = 1.0
    softcap: float = 0.0
    window: int | None = None
    activation: ActivationKind | None = None
    gated: bool = False
    positions: str | None = None


T = TypeVar("T")


class _Cursor:
    """Walks the ops of a plan. Mutated by `take` and `many`."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.at = 0

    def ended(self) -> bool:
        return self.at == len(self.plan.ops)

    def peek(self) -> Op | None:
        return None if self.ended() else self.plan.ops[self.at]

    def refuse(self, wanted: str) -> ModelError:
        found = "the end" if self.ended() else repr(self.plan.ops[self.at])
        return ModelError(
            f"the {self.plan.family} plan cannot be lowered: op {self.at} is {found}, expected {wanted}; "
            "run it with executor='reference', or extend the phases in kernels/plan.py"
        )

    def take(self, kind: type[T], *, wanted: Callable[[T], bool] = lambda _: True) -> T:
        op = self.peek()
        if not isinstance(op, kind) or not wanted(op):
            raise self.refuse(kind.__name__)
        self.at += 1
        return op

    def many(self, kind: type[T]) -> list[T]:
        found: list[T] = []
        while isinstance(op := self.peek(), kind):
            found.append(op)
            self.at += 1
        return found


def _ref(op: Linear) -> MatrixRef:
    return MatrixRef(op.weight, op.bias)


def _lower_qkv(cursor: _Cursor, norm: Norm) -> list[Phase]:
    products = cursor.many(Linear)
    slices = cursor.many(Slice)
    if any(p.src != norm.dst for p in products) or len(products) != (1 if slices else 3):
        raise cursor.refuse("Linear q, k, v of the norm's output, or one fused Linear and three Slices")
    outputs = [s.dst for s in slices] if slices else [p.dst for p in products]
    qk_norms = {op.reg: op for op in cursor.many(QKNorm)}
    ropes = {op.reg: op for op in cursor.many(Rope)}
    write = cursor.take(WriteKV)
    attention = cursor.take(Attention)
    expected = [attention.q, write.k, write.v]
    if outputs != expected or write.layer != attention.layer:
        raise cursor.refuse(f"q, k, v in the order {expected}")
    if slices:
        width, kv = attention.num_q_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim
        if [(s.start, s.stop) for s in slices] != [(0, width), (width, width + kv), (width + kv, width + 2 * kv)]:
            raise cursor.refuse("slices that stand side by side as q, k, v")
    if set(ropes) not in (set(), {write.k, attention.q}) or not set(qk_norms) <= {write.k, attention.q}:
        raise cursor.refuse("rope and norms of q and k alone")
    rope = ropes.get(attention.q)
    if rope is not None and (rope.table, rope.rotary_dim, rope.style) != (
        ropes[write.k].table,
        ropes[write.k].rotary_dim,
        ropes[write.k].style,
    ):
        raise cursor.refuse("the same rope for q and k")
    q_norm, k_norm = qk_norms.get(attention.q), qk_norms.get(write.k)
    geometry = QKVGeometry(
        layer=attention.layer,
        num_q_heads=attention.num_q_heads,
        num_kv_heads=attention.num_kv_heads,
        head_dim=attention.head_dim,
        q_norm=q_norm.weight if q_norm else None,
        k_norm=k_norm.weight if k_norm else None,
        qk_eps=(q_norm or k_norm).eps if (q_norm or k_norm) else 0.0,  # type: ignore[union-attr]
        rope=rope.table if rope else None,
        rotary_dim=rope.rotary_dim if rope else 0,
        rope_style=rope.style if rope else "none",
    )
    out = cursor.take(Linear, wanted=lambda op: op.src == attention.dst)
    residual = cursor.take(Residual, wanted=lambda op: op.src == out.dst)
    return [
        Phase("attention_in", tuple(_ref(p) for p in products), norm=norm, qkv=geometry),
        Phase("attention", qkv=geometry, scale=attention.scale, softcap=attention.softcap, window=attention.window),
        Phase("attention_out", (_ref(out),), scale=residual.scale),
    ]


def _lower_mlp(cursor: _Cursor, norm: Norm) -> list[Phase]:
    products = cursor.many(Linear)
    activation = cursor.take(Activation)
    expected = [activation.src] if activation.gated is None else [activation.src, activation.gated]
    if [p.dst for p in products] != expected or any(p.src != norm.dst for p in products):
        raise cursor.refuse(f"products of the norm's output in the order {expected}")
    out = cursor.take(Linear, wanted=lambda op: op.src == activation.dst)
    residual = cursor.take(Residual, wanted=lambda op: op.src == out.dst)
    return [
        Phase("mlp_in", tuple(_ref(p) for p in products), norm=norm),
        Phase(
            "mlp_out",
            (_ref(out),),
            scale=residual.scale,
            activation=activation.kind,
            gated=activation.gated is not None,
        ),
    ]


def _is_attention(cursor: _Cursor) -> bool:
    """Whether the branch that begins at the cursor writes KV before its first residual."""
    for op in cursor.plan.ops[cursor.at :]:
        if isinstance(op, WriteKV):
            return True
        if isinstance(op, Residual):
            return False
    return False


def lower(plan: Plan) -> tuple[Phase, ...]:
    """The phase records of a plan. Raises ModelError where the ops do not have the shape of any phase."""
    cursor = _Cursor(plan)
    embed = cursor.take(Embed)
    phases = [Phase("embed", (MatrixRef(embed.table),), scale=embed.scale, positions=embed.positions)]
    while not cursor.ended():
        norm = cursor.take(Norm, wanted=lambda op: op.src == embed.dst)
        if isinstance(head := cursor.peek(), Head):
            if head.src != norm.dst:
                raise cursor.refuse("a head of the norm's output")
            cursor.take(Head)
            ref = MatrixRef(head.weight, head.bias)
            phases.append(Phase("head", (ref,), norm=norm, scale=head.scale, softcap=head.softcap))
            if not cursor.ended():
                raise cursor.refuse("nothing after the head")
            return tuple(phases)
        phases += _lower_qkv(cursor, norm) if _is_attention(cursor) else _lower_mlp(cursor, norm)
    raise cursor.refuse("a head")
