"""Single native steps over a KV cache of any length, without the prompts that would fill it; and what a step must read
and multiply. Owns the filler, the shape of the batches and the counting; the benches own what is compared.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pagemill.base.config import EngineConfig
from pagemill.base.errors import CapacityError, ConfigError
from pagemill.base.kv_spec import LANES, KVSpec, padded
from pagemill.base.units import format_bytes
from pagemill.execution.loader import ConvertedWeights
from pagemill.kernels.batch import Batch
from pagemill.kernels.native import NativeExecutor, PackedMatrix, pack_matrix
from pagemill.kernels.ops import Plan
from pagemill.kernels.plan import Phase, lower
from pagemill.kernels.reference import INTEGER_FORMATS
from pagemill.kernels.target import arithmetic_of
from pagemill.kernels.tensors import BLOCK_BYTES, ROTATED, Tensor
from pagemill.models.checkpoint import Checkpoint, open_checkpoint
from pagemill.models.hub import KNOWN_MODELS, Progress, resolve
from pagemill.models.random_init import SHAPES, random_checkpoint, shape
from pagemill.models.registry import build_plan
from pagemill.planner.machine import this_machine
from pagemill.storage.arena import Arena

WEIGHTS_SEED = 0
FILLER_POSITIONS = 512
_TILE_ROWS, _TILE_DIMS = 8, 32  # from here on attention uses tiles
_RANDOM_FORMATS = {"auto": "bf16", "exact": "bf16", "int8": "bf16"}


@dataclass(frozen=True, slots=True)
class Work:
    """One step: `num_seqs` sequences, of each of which the last `rows` of `context` positions are computed.

    rows 1 decodes. Every sequence gets the logits of its last row.
    """

    num_seqs: int
    context: int
    rows: int = 1

    @property
    def num_rows(self) -> int:
        """Rows of the step."""
        return self.num_seqs * self.rows


@dataclass(frozen=True, slots=True)
class Demand:
    """What steps cannot do without. multiply_adds: by arithmetic (roofline_peaks.ARITHMETICS); weight_bytes: packed
    matrices, once a step; kv_bytes: keys and values, read once a step and sequence."""

    multiply_adds: dict[str, int]
    weight_bytes: int
    kv_bytes: int

    @property
    def num_bytes(self) -> int:
        """Bytes in all."""
        return self.weight_bytes + self.kv_bytes


@dataclass(frozen=True, slots=True, eq=False)
class PackedModel:
    """A model ready for executors of several KV codecs, each matrix packed once.

    tensors: what is not packed (vectors, position tables). random: its weights were drawn.
    """

    name: str
    target: str
    plan: Plan
    phases: tuple[Phase, ...]
    matrices: dict[str, PackedMatrix]
    formats: dict[str, str]
    tensors: dict[str, Tensor]
    random: bool

    @property
    def weight_bytes(self) -> int:
        """Bytes of all packed matrices."""
        return sum(each.data.nbytes for each in self.matrices.values())

    def main_format(self) -> str:
        """The format that most weight bytes are in."""
        total: dict[str, int] = {}
        for handle, each in self.matrices.items():
            total[self.formats[handle]] = total.get(self.formats[handle], 0) + each.data.nbytes
        return max(total, key=lambda name: total[name])


def open_packed_model(
    config: EngineConfig, target: str, max_context: int, *, progress: Progress | None = None
) -> PackedModel:
    """Load a model, or draw the weights of a shape by name, and pack it for a target.

    max_context: positions that steps will reach; fewer where the model's context ends before. Raises ConfigError and
    ModelError as loading does.
    """
    name = config.model
    random = name in SHAPES and name not in KNOWN_MODELS and not os.path.exists(name)
    checkpoint = _draw(config) if random else open_checkpoint(resolve(name, progress=progress))
    plan = build_plan(checkpoint.spec, max_positions=min(max_context, checkpoint.spec.context_length))
    phases = lower(plan)
    weights = ConvertedWeights(plan, checkpoint.tensors, config.weights, target)
    handles = dict.fromkeys(ref.weight for phase in phases for ref in phase.matrices)
    unpacked = {phase.positions for phase in phases if phase.positions is not None}
    unpacked |= {handle for handle, each in plan.weights.items() if each.kind == "vector"}
    return PackedModel(
        name=Path(name).name or checkpoint.spec.name,
        target=target,
        plan=plan,
        phases=phases,
        matrices={handle: pack_matrix(weights[handle], target) for handle in handles},
        formats={handle: weights.format_of(handle) for handle in handles},
        tensors={handle: weights[handle] for handle in unpacked},
        random=random,
    )


def _draw(config: EngineConfig) -> Checkpoint:
    weight_format = _RANDOM_FORMATS.get(config.weights, config.weights)
    spec = shape(config.model)
    values, size = BLOCK_BYTES[weight_format]
    num_parameters = sum(math.prod(each.shape) for each in build_plan(spec, max_positions=1).weights.values())
    need, free = 2 * num_parameters * size // values, this_machine().free_bytes
    if need > free:
        raise CapacityError(
            f"not enough memory: {spec.name} has {num_parameters:,} weights, drawn in {weight_format}, then packed = "
            f"{format_bytes(need)}, and {format_bytes(free)} are free; give --weight-format q8_0 or another model"
        )
    return random_checkpoint(spec, seed=WEIGHTS_SEED, weight_format=weight_format)


class NativeSteps:
    """A native executor whose whole KV arena holds plausible keys and values. Mutated by every step, which writes the
    positions that it computes.

    The filler is one real reading of FILLER_POSITIONS positions, copied over and over. Raises CapacityError where the
    arena cannot be had.
    """

    def __init__(self, model: PackedModel, codec: str, num_positions: int, num_threads: int) -> None:
        self.model = model
        self.kv_spec = KVSpec(model.plan.kv, codec=codec)
        filler_blocks = self.kv_spec.num_blocks(min(FILLER_POSITIONS, model.plan.max_positions))
        self._num_blocks = max(filler_blocks, -(-num_positions // self.kv_spec.block_size))
        arena = Arena.allocate(self.kv_spec, self._num_blocks)
        self._executor = NativeExecutor(
            model.plan,
            model.tensors,
            self.kv_spec,
            arena.data,
            self._num_blocks,
            target=model.target,
            num_threads=num_threads,
            matrices=model.matrices.__getitem__,
        )
        self._fill(arena, filler_blocks)

    def _fill(self, arena: Arena, filler_blocks: int) -> None:
        num_filler = min(filler_blocks * self.kv_spec.block_size, self.model.plan.max_positions)
        self._executor.forward_best(self.batch(Work(1, num_filler, num_filler)))
        blocks = arena.data[: self._num_blocks * self.kv_spec.block_bytes].reshape(self._num_blocks, -1)
        for begin in range(filler_blocks, self._num_blocks, filler_blocks):
            count = min(filler_blocks, self._num_blocks - begin)
            blocks[begin : begin + count] = blocks[:count]

    def batch(self, work: Work) -> Batch:
        """The arrays of a step. Blocks of sequences that grow side by side alternate, as a pool hands them out."""
        assert 1 <= work.rows <= work.context
        num_blocks = self.kv_spec.num_blocks(work.context)
        tables = np.arange(num_blocks * work.num_seqs, dtype=np.int32).reshape(num_blocks, work.num_seqs).T
        positions = np.arange(work.context - work.rows, work.context, dtype=np.int32)
        return Batch(
            tokens=_filler_tokens(work, self.model.plan.vocab_size),
            positions=np.tile(positions, work.num_seqs),
            starts=np.arange(work.num_seqs + 1, dtype=np.int32) * np.int32(work.rows),
            tables=np.ascontiguousarray(tables),
            logit_rows=np.arange(1, work.num_seqs + 1, dtype=np.int32) * np.int32(work.rows) - np.int32(1),
        )

    def seconds(self, works: Sequence[Work]) -> float:
        """Seconds of some steps one after the other."""
        batches = [self.batch(each) for each in works]
        began = time.perf_counter()
        for batch in batches:
            self._executor.forward_best(batch)
        return time.perf_counter() - began

    def check_finite(self, work: Work) -> None:
        """Raise ConfigError where a step over the filler gives logits that are no numbers: its time says nothing."""
        logits, _ = self._executor.forward_best(self.batch(work))
        if not np.isfinite(logits).all():
            raise ConfigError(
                f"{self.model.name} gives logits that are not finite on filler tokens, so its speed cannot be "
                "measured this way; take another --model or --weight-format"
            )


def _filler_tokens(work: Work, vocab_size: int) -> NDArray[np.int32]:
    """Token ids that differ along a sequence and between sequences, small enough to be no special ones."""
    place = np.arange(work.num_rows, dtype=np.int64)
    return (place * 7919 % max(1, vocab_size // 2)).astype(np.int32)


def demand(model: PackedModel, kv_spec: KVSpec, work: Work) -> Demand:
    """Bytes and multiply-adds of one step, from the lowered plan and the packed matrices.

    An embedding is a look-up and counts nothing; the head counts the rows whose logits are wanted, and twice where it
    multiplies integers, since its activations have two bytes. Attention counts two products over the positions that
    each row sees, keys and values are read once for all rows of a sequence.
    """
    counted: dict[str, int] = {}
    handles: set[str] = set()

    def count(arithmetic: str, number: int) -> None:
        counted[arithmetic] = counted.get(arithmetic, 0) + number

    kv_bytes = 0
    for phase in model.phases:
        rows = work.num_seqs if phase.kind == "head" else work.num_rows
        for ref in phase.matrices if phase.kind != "embed" else ():
            matrix = model.matrices[ref.weight]
            handles.add(ref.weight)
            weight_format = model.formats[ref.weight]
            arithmetic = product_arithmetic(weight_format, matrix.k, model.target)
            factor = _head_products(weight_format, arithmetic) if phase.kind == "head" else 1
            count(arithmetic, factor * rows * matrix.n * matrix.k)
        if phase.kind == "attention" and (g := phase.qkv) is not None:
            seen, read = _positions(work, phase.window)
            head_rows = work.rows * g.num_q_heads // g.num_kv_heads
            arithmetic = attention_arithmetic(kv_spec.codec, model.target, head_rows, g.head_dim)
            count(arithmetic, 2 * work.num_seqs * seen * g.num_q_heads * g.head_dim)
            kv_bytes += work.num_seqs * read * kv_spec.layer_bytes(g.layer) // kv_spec.block_size
    weight_bytes = sum(model.matrices[handle].data.nbytes for handle in handles)
    return Demand(counted, weight_bytes, kv_bytes)


def _head_products(weight_format: str, arithmetic: str) -> int:
    """Multiply-adds of one weight and row of the head: two of integers, one for each byte of the activation."""
    return 2 if weight_format in INTEGER_FORMATS and arithmetic == "int8" else 1


def _positions(work: Work, window: int | None) -> tuple[int, int]:
    """Of one sequence: positions seen, summed over its rows, and positions that any row sees."""
    first = work.context - work.rows
    if window is None:
        return sum(range(first + 1, work.context + 1)), work.context
    return sum(min(window, p + 1) for p in range(first, work.context)), min(work.context, work.rows + window - 1)


def product_arithmetic(weight_format: str, k: int, target: str) -> str:
    """The arithmetic in which a target multiplies a weight format, by the names of roofline_peaks.ARITHMETICS."""
    if weight_format in ("f32", "f16"):
        return "f32"
    if weight_format == ROTATED:
        return "tile_int8" if target == "amx" else "int8"
    if weight_format == "bf16":
        return "tile_bf16" if target == "amx" and k % 32 == 0 else "bf16"
    return "tile_bf16" if arithmetic_of(target) == "bf16" else "int8"


def attention_arithmetic(codec: str, target: str, head_rows: int, head_dim: int) -> str:
    """The arithmetic of scores and values: integers for int8 KV, on AMX tiles where the rows of a sequence that share a
    KV head fill them (csrc/generic/attention-tasks-inl.h), else f32."""
    if codec != "int8":
        return "f32"
    tiles = target == "amx" and head_rows >= _TILE_ROWS and padded(head_dim, LANES) >= _TILE_DIMS
    return "tile_int8" if tiles else "int8"
