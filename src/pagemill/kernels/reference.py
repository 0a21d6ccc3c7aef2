"""The reference executor: every op in obvious numpy. Slow and exact, it is the specification of the native one.

Integer parts (quantised activations, integer sums) are exact; everything else is f32 with numpy's roundings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import singledispatchmethod
from math import erf  # numpy has none
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pagemill.base.kv_spec import KVSpec
from pagemill.base.transfer import Moves
from pagemill.kernels import ops
from pagemill.kernels.batch import Batch
from pagemill.kernels.ops import Plan
from pagemill.kernels.rotated import rotated_product
from pagemill.kernels.tensors import QUANT_GROUP, ROTATED, Tensor, dequantize

Float32 = NDArray[np.float32]
INTEGER_FORMATS = ("q4_0", "q4_1", "q8_0")


def to_bf16(x: Float32) -> Float32:
    """Round to bfloat16, nearest even; the result as f32."""
    u = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (u + 0x7FFF + ((u >> 16) & 1)) & 0xFFFF0000
    return rounded.astype(np.uint32).view(np.float32)


def store(codec: str, x: Float32) -> Float32:
    """What a KV codec gives back of x: f32 [..] -> f32 [..]."""
    if codec == "f16":
        with np.errstate(over="ignore"):
            return x.astype(np.float16).astype(np.float32)
    return to_bf16(x) if codec == "bf16" else x


def quantize_rows(x: Float32, two_bytes: bool = False) -> tuple[NDArray[np.int32], Float32, NDArray[np.int32]]:
    """Activations [rows, k] to whole numbers in groups of 32: q [rows, k], scale and integer sum [rows, k/32].

    scale = max|x| / m, q = round(x · (m / max|x|)), to nearest even, m = 127, and with two_bytes 127 · 256, the most
    that a signed high byte holds beside a signed low one; a group of zeros has scale 0.
    """
    most = np.float32(32512 if two_bytes else 127)
    groups = x.reshape(x.shape[0], -1, QUANT_GROUP)
    peak = np.abs(groups).max(axis=2)
    inverse = np.divide(most, peak, out=np.zeros_like(peak), where=peak > 0)
    lowest = -most if two_bytes else -most - 1  # a signed byte holds one value more below zero
    q = np.rint(groups * inverse[..., None]).clip(lowest, most).astype(np.int32)
    return q.reshape(x.shape), peak / most, q.sum(axis=2, dtype=np.int32)


def split_groups(tensor: Tensor) -> tuple[NDArray[np.int8], Float32, Float32]:
    """A quantised matrix [n, k] as integers i8 [n, k/32, 32], scales and minima [n, k/32] (w = q · scale + minimum).

    Q4_0 is q = nibble - 8 with minimum 0, Q4_1 q = nibble, Q8_0 the stored byte.
    """
    n = tensor.shape[0]
    size = {"q4_0": 18, "q4_1": 20, "q8_0": 34}[tensor.format]
    blocks = np.ascontiguousarray(tensor.data).reshape(n, -1, size)
    scale = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0].astype(np.float32)
    minimum = np.zeros_like(scale)
    if tensor.format == "q8_0":
        return np.ascontiguousarray(blocks[..., 2:]).view(np.int8), scale, minimum
    nibbles = blocks[..., 2:]
    if tensor.format == "q4_1":
        minimum = np.ascontiguousarray(blocks[..., 2:4]).view(np.float16)[..., 0].astype(np.float32)
        nibbles = blocks[..., 4:]
    q = np.concatenate([nibbles & 15, nibbles >> 4], axis=-1).astype(np.int8)
    return (q - 8 if tensor.format == "q4_0" else q).astype(np.int8), scale, minimum


def integer_sums(x: Float32, tensor: Tensor, two_bytes: bool = False) -> NDArray[np.int32]:
    """Sums of activation · weight integers per group: [rows, k/32, n] i32, exact. Q4_1's minimum stands apart."""
    a, _, _ = quantize_rows(x, two_bytes)
    q, _, _ = split_groups(tensor)
    groups = a.reshape(x.shape[0], -1, QUANT_GROUP).transpose(1, 0, 2)
    # Sums fit in 24 bits, of two bytes in 28: the floats hold them exactly, and the product runs at matrix speed.
    wide = np.float64 if two_bytes else np.float32
    sums = np.matmul(groups.astype(wide), q.transpose(1, 2, 0).astype(wide))
    exact: NDArray[np.int32] = sums.transpose(1, 0, 2).astype(np.int32)
    return exact


def integer_product(x: Float32, tensor: Tensor, two_bytes: bool = False) -> Float32:
    """x [rows, k] times a quantised matrix [n, k]: activations in groups of 32, one f32 addition chain over groups."""
    _, a_scale, a_sum = quantize_rows(x, two_bytes)
    _, scale, minimum = split_groups(tensor)
    sums = integer_sums(x, tensor, two_bytes).astype(np.float32)
    y = np.zeros((x.shape[0], tensor.shape[0]), np.float32)
    for g in range(sums.shape[1]):
        y += (sums[:, g] * a_scale[:, g, None]) * scale[None, :, g]
        y += minimum[None, :, g] * (a_scale[:, g] * a_sum[:, g].astype(np.float32))[:, None]
    return y


def product(
    x: Float32,
    tensor: Tensor,
    dense: Float32 | None = None,
    arithmetic: str = "int8",
    two_bytes: bool = False,
) -> Float32:
    """y = x Wᵀ in the arithmetic of the weight format: x [rows, k] f32, W [n, k]. dense: W in f32, if at hand.

    arithmetic: of quantised formats (`target.arithmetic_of`): int8 sums, or both sides rounded to bfloat16. two_bytes:
    of int8 sums, activations in 16 bits instead of 8.
    """
    if tensor.format == ROTATED:
        return rotated_product(x, tensor)
    quantised = tensor.format in INTEGER_FORMATS
    if quantised and arithmetic == "int8":
        return integer_product(x, tensor, two_bytes)
    w = dequantize(tensor.format, tensor.data) if dense is None else dense
    if quantised:
        w = to_bf16(w)
    y: Float32 = (to_bf16(x) if quantised or tensor.format == "bf16" else x) @ w.T
    return y


def activate(kind: str, x: Float32) -> Float32:
    """silu, gelu (erf), gelu_tanh or relu of x, element by element."""
    y: Float32
    if kind == "silu":
        y = x / (1 + np.exp(-x))
    elif kind == "relu":
        y = np.maximum(x, 0)
    elif kind == "gelu_tanh":
        inner = np.float32(0.7978845608028654) * (x + np.float32(0.044715) * x * x * x)
        y = np.float32(0.5) * x * (1 + np.tanh(inner))
    else:
        assert kind == "gelu"
        phi = np.vectorize(lambda v: 0.5 * (1.0 + erf(v * 0.70710678118654752)), otypes=[np.float64])(x)
        y = (x * phi).astype(np.float32)
    return y


def rotate(x: Float32, table: Float32, style: str) -> Float32:
    """Rotary embedding of heads x [rows, heads, head_dim] by table rows [rows, rotary_dim] (cosines, then sines)."""
    half = table.shape[1] // 2
    cosine, sine = table[:, None, :half], table[:, None, half:]
    out = x.copy()
    first = slice(0, half) if style == "halves" else slice(0, 2 * half, 2)
    second = slice(half, 2 * half) if style == "halves" else slice(1, 2 * half, 2)
    a, b = x[..., first], x[..., second]
    out[..., first] = a * cosine - b * sine
    out[..., second] = b * cosine + a * sine
    return out


def hadamard(x: Float32) -> Float32:
    """Orthonormal Hadamard rotation of the last axis, in blocks of the largest power of two that divides it."""
    dim = x.shape[-1]
    block = dim & -dim
    matrix = np.ones((1, 1), np.float32)
    while matrix.shape[0] < block:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    y: Float32 = (x.reshape(*x.shape[:-1], -1, block) @ matrix).reshape(x.shape) * np.float32(block**-0.5)
    return y


@dataclass(frozen=True, slots=True)
class Int8Rounding:
    """What int8 attention rounds. All of it is the codec; single ones tell what each costs (`bench quality`)."""

    keys: bool = True
    values: bool = True
    queries: bool = True
    probabilities: bool = True


def quantize_heads(x: Float32, *, stored: bool, rounded: bool = True) -> tuple[Float32, Float32]:
    """Vectors [.., dim] to signed bytes, as f32, with one scale each: max|x| / 127, rounded to f16 where stored.

    rounded: False leaves the quotients x / scale as they are.
    """
    scale = np.abs(x).max(axis=-1) / np.float32(127)
    if stored:
        scale = scale.astype(np.float16).astype(np.float32)
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
    q = x * inverse[..., None]
    return (np.rint(q.clip(-127, 127)) if rounded else q), scale


def visible(op: ops.Attention, positions: NDArray[np.int32], length: int) -> NDArray[np.bool_]:
    """Which of positions 0 .. length-1 each row sees: [rows, length]."""
    at = np.arange(length)
    seen = at[None, :] <= positions[:, None]
    if op.window is not None:
        seen &= at[None, :] > positions[:, None] - op.window
    return seen


def probabilities(scores: Float32, op: ops.Attention, seen: NDArray[np.bool_]) -> Float32:
    """Softmax over the last axis of scaled, capped, masked scores [heads, rows, length]; scores are overwritten."""
    scores *= np.float32(op.scale)
    if op.softcap > 0:
        scores = np.float32(op.softcap) * np.tanh(scores / np.float32(op.softcap))
    np.copyto(scores, np.float32(-np.inf), where=~seen)
    scores -= scores.max(axis=2, keepdims=True)
    p: Float32 = np.exp(scores, out=scores)
    p /= p.sum(axis=2, keepdims=True)
    return p


def by_kv_head(x: Float32, num_kv_heads: int) -> Float32:
    """Rows of query heads [rows, q_heads, ..] as [kv_heads, group * rows, ..], those of one query head together."""
    rows, q_heads = x.shape[:2]
    return np.ascontiguousarray(x.swapaxes(0, 1)).reshape(num_kv_heads, q_heads // num_kv_heads * rows, *x.shape[2:])


def by_row(x: Float32, rows: int) -> Float32:
    """The inverse of `by_kv_head`: [kv_heads, group * rows, dim] -> [rows, q_heads, dim]."""
    return x.reshape(-1, rows, x.shape[-1]).swapaxes(0, 1)


def grouped_probabilities(scores: Float32, op: ops.Attention, positions: NDArray[np.int32]) -> Float32:
    """`probabilities` of scores [kv_heads, group * rows, length]."""
    length = scores.shape[2]
    seen = visible(op, positions, length)
    return probabilities(scores.reshape(op.num_q_heads, -1, length), op, seen).reshape(scores.shape)


def attend(q: Float32, k: Float32, v: Float32, op: ops.Attention, positions: NDArray[np.int32]) -> Float32:
    """One sequence: q [rows, q_heads, dim], k and v [length, kv_heads, dim] from position 0 -> [rows, q_heads, dim]."""
    scores = np.matmul(by_kv_head(q, op.num_kv_heads), k.transpose(1, 2, 0))
    p = grouped_probabilities(scores, op, positions)
    return by_row(np.matmul(p, v.swapaxes(0, 1)), len(q))


SPLIT = 256  # positions that share the scale of their quantised probabilities
MOST_WEIGHT = np.float32(65535)


def attend_int8(
    q: Float32,
    k: tuple[Float32, Float32],
    v: tuple[Float32, Float32],
    op: ops.Attention,
    positions: NDArray[np.int32],
    rounding: Int8Rounding = Int8Rounding(),
) -> Float32:
    """Attention on integers. Probabilities times value scales become whole numbers of 16 bits by row and split of 256
    positions: the largest probability times the largest value scale that the row sees of the split is 65,535.

    q: rotated f32 [rows, q_heads, dim]; k (rotated), v: bytes, as f32, [length, kv_heads, dim], and their scales
    [length, kv_heads].
    """
    (kq, ks), (vq, vs) = k, v
    qq, qs = quantize_heads(by_kv_head(q, op.num_kv_heads), stored=False, rounded=rounding.queries)
    scores = np.matmul(qq, kq.transpose(1, 2, 0))  # sums stay below 2^24, so that f32 holds them exactly
    scores *= ks.T[:, None, :]
    scores *= qs[:, :, None]
    p = grouped_probabilities(scores, op, positions)
    seen = np.tile(visible(op, positions, len(ks)), (op.num_q_heads // op.num_kv_heads, 1))
    value_scales = np.where(seen[None], vs.T[:, None, :], np.float32(0))
    out = np.zeros(qq.shape, np.float32)
    for start in range(0, p.shape[2], SPLIT):
        split = slice(start, start + SPLIT)
        most = p[..., split].max(axis=2, keepdims=True) * value_scales[..., split].max(axis=2, keepdims=True)
        inverse = np.divide(MOST_WEIGHT, most, out=np.zeros_like(most), where=most > np.float32(1e-30))
        weights = (p[..., split] * value_scales[..., split] * inverse).astype(np.float64)
        if rounding.probabilities:
            np.rint(weights, out=weights)
        part = np.matmul(weights, vq[split].swapaxes(0, 1).astype(np.float64))  # up to 2^31, exact
        out += part.astype(np.float32) * (most / MOST_WEIGHT)
    return by_row(out, len(q))


class ReferenceExecutor:
    """A plan in numpy. Mutated by `forward` (KV storage of each layer: [blocks, block_size, kv_heads, head_dim] f32).

    weights: handle -> Tensor. arithmetic: of products with quantised weights, as in `product`. rounding: of codec int8.
    """

    def __init__(
        self,
        plan: Plan,
        weights: Mapping[str, Tensor],
        kv_spec: KVSpec,
        num_blocks: int,
        *,
        arithmetic: str = "int8",
        rounding: Int8Rounding = Int8Rounding(),
    ) -> None:
        self.kv_spec = kv_spec
        self._arithmetic = arithmetic
        self._rounding = rounding
        self._plan = plan
        self._weights = weights
        self._tensors: dict[str, Tensor] = {}
        self._dense: dict[str, Float32] = {}
        self._groups = kv_spec.groups
        self._group_of = {each: index for index, group in enumerate(self._groups) for each in group.layers}
        counts = [num_blocks, *kv_spec.window_pages]
        shapes = [
            (counts[self._group_of[i]], kv_spec.block_size, each.num_kv_heads, each.head_dim)
            for i, each in enumerate(kv_spec.layers)
        ]
        self.keys = [np.zeros(shape, np.float32) for shape in shapes]
        self.values = [np.zeros(shape, np.float32) for shape in shapes]
        self.scales = [np.zeros((2, *shape[:3]), np.float32) for shape in shapes]  # of keys and values, int8 alone

    def with_kv(
        self, kv_spec: KVSpec, num_blocks: int, *, rounding: Int8Rounding = Int8Rounding()
    ) -> ReferenceExecutor:
        """The same model with a KV cache of its own and of another kind; weights are shared."""
        other = ReferenceExecutor(
            self._plan, self._weights, kv_spec, num_blocks, arithmetic=self._arithmetic, rounding=rounding
        )
        other._tensors, other._dense = self._tensors, self._dense
        return other

    def resize(self, num_blocks: int) -> None:
        """Have so many blocks, the first ones with their contents; window groups keep their pages."""

        def resized(array: NDArray[Any], axis: int) -> NDArray[Any]:
            shape = list(array.shape)
            kept, shape[axis] = min(num_blocks, shape[axis]), num_blocks
            made = np.zeros(shape, array.dtype)
            index = (slice(None),) * axis + (slice(0, kept),)
            made[index] = array[index]
            return made

        for layer in self._groups[0].layers:
            self.keys[layer] = resized(self.keys[layer], 0)
            self.values[layer] = resized(self.values[layer], 0)
            self.scales[layer] = resized(self.scales[layer], 1)

    def move(self, moves: Moves) -> None:
        """Wipe blocks, then copy first positions of blocks, in every layer."""
        for group, each in zip(self._groups, (moves, *moves.windows), strict=bool(moves.windows)):
            for layer in group.layers:
                for array in (self.keys[layer], self.values[layer], *self.scales[layer]):
                    for block in each.wipes:
                        array[block] = 0
                    for copy in each.copies:
                        array[copy.target, : copy.num_positions] = array[copy.source, : copy.num_positions]

    def forward(self, batch: Batch) -> Float32:
        """Run one step; logits [num_logits, vocab] f32."""
        registers: dict[str, Float32] = {}
        for op in self._plan.ops:
            self._run(op, registers, batch)
        return registers["logits"]

    def forward_best(self, batch: Batch, best_only: bool = False) -> tuple[Float32, NDArray[np.int32]]:
        """The same, and the index of each row's largest logit [num_logits] i32. best_only: all are computed anyway."""
        logits = self.forward(batch)
        return logits, logits.argmax(axis=1).astype(np.int32)

    def _tensor(self, handle: str) -> Tensor:
        """A weight, asked for once: the mapping may convert it at each access."""
        if handle not in self._tensors:
            self._tensors[handle] = self._weights[handle]
        return self._tensors[handle]

    def _dense_of(self, handle: str) -> Float32:
        if handle not in self._dense:
            self._dense[handle] = self._tensor(handle).dequantize()
        return self._dense[handle]

    def _product(self, x: Float32, weight: str, bias: str | None, *, two_bytes: bool = False) -> Float32:
        tensor = self._tensor(weight)
        integer = tensor.format == ROTATED or (tensor.format in INTEGER_FORMATS and self._arithmetic == "int8")
        y = product(x, tensor, None if integer else self._dense_of(weight), self._arithmetic, two_bytes)
        return y if bias is None else y + self._dense_of(bias)

    def _sequence(
        self, batch: Batch, i: int, layer: int
    ) -> tuple[slice, NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
        """Rows of sequence i, their positions, and for positions 0 .. last: block ids of a layer, and slots. Positions
        that none of the rows reads any more stand in the first block that one of them does."""
        rows = slice(int(batch.starts[i]), int(batch.starts[i + 1]))
        positions, size, index = batch.positions[rows], self.kv_spec.block_size, self._group_of[layer]
        at = np.arange(int(positions[-1]) + 1, dtype=np.int32)
        tables = batch.tables
        if index:
            assert batch.window_tables is not None
            tables = batch.window_tables[index - 1]
        blocks = tables[i][at // size]
        if window := self._groups[index].window:
            first = max(int(positions[0]) - window + 1, 0) // size * size
            blocks[:first] = blocks[first]
        assert blocks.min() >= 0, f"layer {layer} reads a page that is not held: {blocks}"
        return rows, positions, blocks, at % size

    @singledispatchmethod
    def _run(self, op: ops.Op, reg: dict[str, Float32], batch: Batch) -> None:
        raise AssertionError(f"no reference for {type(op).__name__}")

    @_run.register
    def _(self, op: ops.Embed, reg: dict[str, Float32], batch: Batch) -> None:
        x = self._dense_of(op.table)[batch.tokens] * np.float32(op.scale)
        reg[op.dst] = x if op.positions is None else x + self._dense_of(op.positions)[batch.positions]

    @_run.register
    def _(self, op: ops.Norm, reg: dict[str, Float32], batch: Batch) -> None:
        x = reg[op.src]
        if op.kind == "layer":
            x = x - x.mean(axis=1, keepdims=True, dtype=np.float32)
        y = x / np.sqrt((x * x).mean(axis=1, keepdims=True) + np.float32(op.eps)) * self._dense_of(op.weight)
        reg[op.dst] = y if op.bias is None else y + self._dense_of(op.bias)

    @_run.register
    def _(self, op: ops.Linear, reg: dict[str, Float32], batch: Batch) -> None:
        reg[op.dst] = self._product(reg[op.src], op.weight, op.bias)

    @_run.register
    def _(self, op: ops.Slice, reg: dict[str, Float32], batch: Batch) -> None:
        reg[op.dst] = reg[op.src][:, op.start : op.stop]

    @_run.register
    def _(self, op: ops.QKNorm, reg: dict[str, Float32], batch: Batch) -> None:
        x = reg[op.reg].reshape(-1, op.num_heads, op.head_dim)
        y = x / np.sqrt((x * x).mean(axis=2, keepdims=True) + np.float32(op.eps)) * self._dense_of(op.weight)
        reg[op.reg] = y.reshape(reg[op.reg].shape)

    @_run.register
    def _(self, op: ops.Rope, reg: dict[str, Float32], batch: Batch) -> None:
        x = reg[op.reg].reshape(-1, op.num_heads, op.head_dim)
        table = self._plan.constants[op.table][batch.positions]
        reg[op.reg] = rotate(x, table, op.style).reshape(reg[op.reg].shape)

    @_run.register
    def _(self, op: ops.WriteKV, reg: dict[str, Float32], batch: Batch) -> None:
        layer = self._plan.kv[op.layer]
        shape = (-1, layer.num_kv_heads, layer.head_dim)
        k, v = reg[op.k].reshape(shape), reg[op.v].reshape(shape)
        for i in range(len(batch.starts) - 1):
            rows, positions, blocks, slots = self._sequence(batch, i, op.layer)
            at = blocks[positions], slots[positions]
            if self.kv_spec.codec == "int8":
                keys, key_scales = quantize_heads(hadamard(k[rows]), stored=True, rounded=self._rounding.keys)
                values, value_scales = quantize_heads(v[rows], stored=True, rounded=self._rounding.values)
                self.keys[op.layer][at], self.scales[op.layer][0][at] = keys, key_scales
                self.values[op.layer][at], self.scales[op.layer][1][at] = values, value_scales
            else:
                self.keys[op.layer][at] = store(self.kv_spec.codec, k[rows])
                self.values[op.layer][at] = store(self.kv_spec.codec, v[rows])

    @_run.register
    def _(self, op: ops.Attention, reg: dict[str, Float32], batch: Batch) -> None:
        q = reg[op.q].reshape(-1, op.num_q_heads, op.head_dim)
        out = np.empty_like(q)
        for i in range(len(batch.starts) - 1):
            rows, positions, blocks, slots = self._sequence(batch, i, op.layer)
            k, v = self.keys[op.layer][blocks, slots], self.values[op.layer][blocks, slots]
            if self.kv_spec.codec == "int8":
                ks, vs = self.scales[op.layer][:, blocks, slots]
                out[rows] = attend_int8(hadamard(q[rows]), (k, ks), (v, vs), op, positions, self._rounding)
            else:
                out[rows] = attend(q[rows], k, v, op, positions)
        reg[op.dst] = out.reshape(len(q), -1)

    @_run.register
    def _(self, op: ops.Activation, reg: dict[str, Float32], batch: Batch) -> None:
        y = activate(op.kind, reg[op.src])
        reg[op.dst] = y if op.gated is None else y * reg[op.gated]

    @_run.register
    def _(self, op: ops.Residual, reg: dict[str, Float32], batch: Batch) -> None:
        reg[op.dst] = reg[op.dst] + np.float32(op.scale) * reg[op.src]

    @_run.register
    def _(self, op: ops.Head, reg: dict[str, Float32], batch: Batch) -> None:
        y = self._product(reg[op.src][batch.logit_rows], op.weight, op.bias, two_bytes=True) * np.float32(op.scale)
        reg["logits"] = np.float32(op.softcap) * np.tanh(y / np.float32(op.softcap)) if op.softcap > 0 else y
