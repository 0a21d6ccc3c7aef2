"""The native executor: packs weights, hands the lowered plan to the native core, runs batches. One call per step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pagemill.base.errors import CapacityError
from pagemill.base.kv_spec import LANES, KVSpec, padded
from pagemill.base.transfer import Moves
from pagemill.kernels import _native
from pagemill.kernels.batch import Batch
from pagemill.kernels.ops import Plan
from pagemill.kernels.pages import Pages
from pagemill.kernels.plan import MatrixRef, Phase, lower
from pagemill.kernels.sampling import NativeSampler
from pagemill.kernels.target import arithmetic_of
from pagemill.kernels.tensors import ROTATED, Tensor

FORMATS = {"f32": 0, "f16": 1, "bf16": 2, "q4_0": 3, "q4_1": 4, "q8_0": 5}
# Layouts of the same formats that are multiplied as bfloat16 (`arithmetic_of`).
LAYOUTS = FORMATS | {"q4_0_tiles": 6, "q4_1_tiles": 7, "q8_0_tiles": 8, ROTATED: 9}
CODECS = {"f32": 0, "f16": 1, "bf16": 2, "int8": 3}
PANEL = 32
# Version of the packed layouts (csrc/pack.h). Bump it with every change of theirs: packed weights are kept on disk.
PACKING_VERSION = 1

_KINDS = {
    "embed": 0,
    "attention_in": 1,
    "attention": 2,
    "attention_out": 3,
    "mlp_in": 4,
    "mlp_out": 5,
    "head": 6,
}
_NORMS = {"rms": 1, "layer": 2}
_ROPES = {"none": 0, "halves": 1, "pairs": 2}
_ACTIVATIONS = {"silu": 1, "gelu": 2, "gelu_tanh": 3, "relu": 4}


@dataclass(frozen=True, slots=True, eq=False)
class PackedMatrix:
    """A matrix [n, k] in the layout that products read (csrc/pack.h): a format's own, or that of its tiles.

    data: u8 [packed_bytes], 64-byte aligned, may be read-only and memory-mapped.
    """

    layout: str
    n: int
    k: int
    data: NDArray[np.uint8]


def layout_for(format: str, target: str) -> str:
    """The layout in which a target reads a weight format."""
    tiles = f"{format}_tiles"
    return tiles if tiles in LAYOUTS and arithmetic_of(target) == "bf16" else format


def packed_bytes(layout: str, n: int, k: int) -> int:
    """Bytes of a packed matrix [n, k]."""
    return -(-n // PANEL) * _native.panel_bytes(LAYOUTS[layout], k)


def pack(tensor: Tensor, layout: str | None = None) -> NDArray[np.uint8]:
    """A matrix [n, k] in the layout that products read (csrc/pack.h), u8 [panels * panel bytes], 64-byte aligned.

    layout: the format's own unless given.
    """
    n, k = tensor.shape
    layout = layout or tensor.format
    assert layout.removesuffix("_tiles") == tensor.format, (layout, tensor.format)
    packed = _native.allocate(packed_bytes(layout, n, k))
    _native.pack(LAYOUTS[layout], k, np.ascontiguousarray(tensor.data), 0, packed)
    return packed


def pack_over(rows: Tensor, layout: str, column0: int, panels: NDArray[np.uint8]) -> None:
    """Pack rows [n, k] in the place of those from `column0` on, in packed panels u8; the other columns stay."""
    _native.pack(LAYOUTS[layout], rows.shape[-1], np.ascontiguousarray(rows.data), column0, panels)


def pack_matrix(tensor: Tensor, target: str) -> PackedMatrix:
    """The same as a target reads it, with its layout and shape."""
    n, k = tensor.shape
    layout = layout_for(tensor.format, target)
    return PackedMatrix(layout, n, k, pack(tensor, layout))


def allocate(num_bytes: int, purpose: str) -> NDArray[np.uint8]:
    """Zeroed, aligned memory u8 [num_bytes]. Raises CapacityError that names the purpose."""
    try:
        return _native.allocate(num_bytes)
    except MemoryError:
        raise CapacityError(
            f"not enough memory for {purpose}: {num_bytes:,} bytes could not be had; "
            "lower kv_cache_memory_bytes, max_model_len or max_num_seqs, or free memory"
        ) from None


class NativeExecutor:
    """A plan in native code. Mutated by `forward` (the KV arena and scratch memory).

    weights: handle -> Tensor, matrices in their checkpoint format. arena: u8 [≥ num_blocks * block_bytes
    of the first KV group]; window groups have memory of their own. matrices: gives a matrix packed already, by handle;
    without it each is packed from `weights`.
    """

    def __init__(
        self,
        plan: Plan,
        weights: Mapping[str, Tensor],
        kv_spec: KVSpec,
        arena: NDArray[np.uint8],
        num_blocks: int,
        *,
        target: str,
        num_threads: int,
        progress: Callable[[int, int], None] | None = None,
        matrices: Callable[[str], PackedMatrix] | None = None,
    ) -> None:
        self.kv_spec = kv_spec
        self._plan = plan
        self._weights = weights
        self._logits = np.empty((0, plan.vocab_size), np.float32)
        self._results = self._logits, np.empty(0, np.int32)  # of the step before
        self._num_written = 0  # first rows of _logits that hold all logits of some step
        self._model = _native.NativeModel(target, num_threads, plan.hidden_dim, plan.vocab_size, plan.max_positions)
        self._groups = kv_spec.groups
        self._windows = [
            allocate(
                group.num_pages * group.spec.block_bytes,
                f"{group.num_pages:,} pages of {group.spec.block_bytes:,} bytes for a window of {group.window:,}",
            )
            for group in self._groups[1:]
        ]
        self._window_pages = [
            Pages(memory, group.spec, group.num_pages)
            for memory, group in zip(self._windows, self._groups[1:], strict=True)
        ]
        self._set_arena(arena, num_blocks)
        self._matrices: dict[MatrixRef, int] = {}
        self._packed: dict[str, PackedMatrix] = {}
        self._packed_matrix = matrices or (lambda handle: pack_matrix(weights[handle], target))
        phases = lower(plan)
        for done, phase in enumerate(phases):
            self._add(phase)
            if progress is not None:
                progress(done + 1, len(phases))
        self._packed.clear()

    @property
    def target(self) -> str:
        """Name of the instruction-set target."""
        return self._model.target

    @property
    def num_threads(self) -> int:
        """Kernel threads."""
        return self._model.threads

    def _set_arena(self, arena: NDArray[np.uint8], num_blocks: int) -> None:
        spec, (full, *windows) = self.kv_spec, self._groups
        offsets = {each: group.spec.layer_offset(at) for group in self._groups for at, each in enumerate(group.layers)}
        layers = [
            (
                offsets[i],
                spec.page_bytes(i),
                layer.num_kv_heads,
                layer.head_dim,
                padded(layer.head_dim, LANES),
            )
            for i, layer in enumerate(spec.layers)
        ]
        geometry = full.spec.block_bytes, num_blocks, spec.pages_per_block, CODECS[spec.codec], layers
        if windows:
            groups = [
                (memory, group.spec.block_bytes, group.num_pages, group.window or 0, group.layers)
                for memory, group in zip(self._windows, windows, strict=True)
            ]
            self._model.set_kv(arena, *geometry, groups)
        else:
            self._model.set_kv(arena, *geometry)
        self._arena, self._num_blocks = arena, num_blocks
        self._pages = Pages(arena, full.spec, num_blocks)

    def resize(self, num_blocks: int) -> None:
        """Have so many blocks from now on, the first ones with their contents; the old memory goes back to the system
        once they are copied; window groups keep their pages. Raises CapacityError where there is no room for both, and
        has changed nothing."""
        size = self._groups[0].spec.block_bytes
        arena = allocate(num_blocks * size, f"a KV cache of {num_blocks:,} blocks of {size:,} bytes")
        kept = min(num_blocks, self._num_blocks) * size
        arena[:kept] = self._arena[:kept]
        self._set_arena(arena, num_blocks)

    def wait_prefaulted(self, timeout_s: float) -> bool:
        """Wait until the arena's memory ahead of what is used has been had from the system, which goes on where no step
        runs. False where it takes longer."""
        return self._model.wait_prefaulted(timeout_s)

    @property
    def prefaulted_bytes(self) -> int:
        """Of the arena, from its start: had from the system, or asked of it."""
        return self._model.prefaulted_bytes

    def move(self, moves: Moves) -> None:
        """Wipe and copy blocks of the arena. With blocks, scratch memory is wiped: it holds what was computed for them,
        such as the value of a sequence's first position, which is also its attention's output there."""
        if moves.wipes or any(each.wipes for each in moves.windows):
            self._model.wipe_activations()
        self._pages.move(moves)
        for pages, each in zip(self._window_pages, moves.windows, strict=bool(moves.windows)):
            pages.move(each)

    def forward(self, batch: Batch) -> NDArray[np.float32]:
        """Run one step; logits [num_logits, vocab] f32."""
        return self.forward_best(batch)[0].copy()

    def forward_best(self, batch: Batch, best_only: bool = False) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """The same, and the index of each row's largest logit [num_logits] i32. Good until the next call.

        best_only: that one is the only logit of each row that is sure to be written; the others may be anything but
        those of an earlier step."""
        rows = len(batch.logit_rows)
        logits, best = self._results
        if rows != len(best):
            if rows > len(self._logits):
                self._logits = np.empty((rows, self._plan.vocab_size), np.float32)
                self._num_written = 0
            logits, best = self._results = self._logits[:rows], np.empty(rows, np.int32)
        tables = batch.tables
        if batch.window_tables is not None:
            tables = np.concatenate([tables, *batch.window_tables])
        self._model.step(batch.tokens, batch.positions, batch.starts, tables, batch.logit_rows, logits, best, best_only)
        if self._model.ranked_panels < 0:
            self._num_written = max(self._num_written, rows)
        elif self._num_written:
            self._forget_logits(logits, best)
        return logits, best

    def _forget_logits(self, logits: NDArray[np.float32], best: NDArray[np.int32]) -> None:
        """Wipe the logits of earlier steps, which this one has not written over, but for the best ones of this one."""
        places = np.arange(len(best)), best
        values = logits[places]
        self._logits[: self._num_written] = 0
        logits[places] = values
        self._num_written = 0

    @property
    def ranked_panels(self) -> int:
        """Panels of 32 logits that the last step multiplied whole for a row, over all rows, to find no more than each
        row's largest; -1 where all logits were computed."""
        return self._model.ranked_panels

    def sampler(self) -> NativeSampler:
        """A sampler of this model's logits, on its threads."""
        return NativeSampler(self._model)

    def _matrix(self, ref: MatrixRef) -> int:
        if ref not in self._matrices:
            if ref.weight not in self._packed:
                self._packed[ref.weight] = self._packed_matrix(ref.weight)
            packed = self._packed[ref.weight]
            bias = self._vector(ref.bias)
            self._matrices[ref] = self._model.add_matrix(LAYOUTS[packed.layout], packed.n, packed.k, packed.data, bias)
        return self._matrices[ref]

    def _vector(self, handle: str | None) -> NDArray[np.float32] | None:
        return None if handle is None else np.ascontiguousarray(self._weights[handle].dequantize().reshape(-1))

    def _add(self, phase: Phase) -> None:
        fields: dict[str, object] = {"scale": phase.scale, "softcap": phase.softcap, "window": phase.window or 0}
        if phase.norm is not None:
            fields |= {
                "norm": _NORMS[phase.norm.kind],
                "norm_weight": self._vector(phase.norm.weight),
                "norm_bias": self._vector(phase.norm.bias),
                "norm_eps": phase.norm.eps,
            }
        if (g := phase.qkv) is not None:
            fields |= {
                "layer": g.layer,
                "q_heads": g.num_q_heads,
                "kv_heads": g.num_kv_heads,
                "head_dim": g.head_dim,
                "q_norm": self._vector(g.q_norm),
                "k_norm": self._vector(g.k_norm),
                "qk_eps": g.qk_eps,
                "rope": _ROPES[g.rope_style],
                "rope_table": None if g.rope is None else self._plan.constants[g.rope],
                "rotary_dim": g.rotary_dim,
            }
        if phase.activation is not None:
            fields |= {"activation": _ACTIVATIONS[phase.activation], "gated": phase.gated}
        if phase.positions is not None:
            fields["position_table"] = self._weights[phase.positions].dequantize()
        self._model.add_phase(_KINDS[phase.kind], [self._matrix(ref) for ref in phase.matrices], **fields)
