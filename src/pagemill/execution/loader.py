"""From an opened checkpoint to a running executor: weight conversion by dtype, KV geometry, native or reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from pagemill.base.errors import ConfigError
from pagemill.base.kv_spec import KVSpec
from pagemill.execution.packed import PackedWeights
from pagemill.execution.runner import Runner
from pagemill.kernels.batch import ModelExecutor
from pagemill.kernels.native import NativeExecutor
from pagemill.kernels.ops import Plan
from pagemill.kernels.plan import lower
from pagemill.kernels.reference import ReferenceExecutor, to_bf16
from pagemill.kernels.target import choose_target
from pagemill.kernels.tensors import Tensor
from pagemill.models.checkpoint import Checkpoint
from pagemill.models.registry import build_plan
from pagemill.storage.arena import Arena

DTYPES = {"float32": "f32", "bfloat16": "bf16"}
# Version of what `convert` computes. Bump it with every change of a bit: converted weights are kept on disk.
CONVERSION_VERSION = 1


def kv_codec_for(dtype: str, kv_cache_dtype: str) -> str:
    """The resident codec: as asked, or by the fixed rule of "auto": f32 with dtype float32, else bf16."""
    if kv_cache_dtype != "auto":
        return kv_cache_dtype
    return "f32" if dtype == "float32" else "bf16"


def kv_spec_for(checkpoint: Checkpoint, codec: str, block_size: int) -> KVSpec:
    """KV geometry of a model. Raises ConfigError for an unknown codec or a block size that cannot be."""
    return KVSpec(build_plan(checkpoint.spec, max_positions=1).kv, block_size, codec)


def convert(tensor: Tensor, dtype: str) -> Tensor:
    """A matrix in the weight format of a dtype: "auto" keeps the checkpoint's."""
    wanted = DTYPES.get(dtype)
    if dtype == "auto" or tensor.format == wanted:
        return tensor
    if wanted is None:
        raise ConfigError(f"unknown dtype {dtype!r}; choose one of auto, {', '.join(DTYPES)}")
    values = tensor.dequantize()
    if wanted == "f32":
        return Tensor.from_array(values)
    halves = (to_bf16(values).view(np.uint32) >> 16).astype(np.uint16)
    return Tensor("bf16", tensor.shape, halves.reshape(tensor.num_rows, -1).view(np.uint8))


class ConvertedWeights(Mapping[str, Tensor]):
    """A checkpoint's tensors by handle, matrices converted when they are asked for, so that no second copy is kept."""

    def __init__(self, plan: Plan, tensors: Mapping[str, Tensor], dtype: str) -> None:
        self._plan = plan
        self._tensors = tensors
        self._dtype = dtype

    def __getitem__(self, handle: str) -> Tensor:
        tensor = self._tensors[handle]
        return convert(tensor, self._dtype) if self._plan.weights[handle].kind == "matrix" else tensor

    def format_of(self, handle: str) -> str:
        """The format of a matrix, without converting it."""
        return DTYPES.get(self._dtype, self._tensors[handle].format)

    def rows_of(self, handle: str, begin: int, end: int) -> Tensor:
        """Rows begin to end of a matrix, converted alone."""
        return convert(self._tensors[handle].rows(slice(begin, end)), self._dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def load_executor(
    checkpoint: Checkpoint,
    *,
    dtype: str = "auto",
    kv_codec: str = "bf16",
    block_size: int = 16,
    num_blocks: int,
    max_model_len: int | None = None,
    num_threads: int = 1,
    executor: str = "native",
    progress: Callable[[int, int], None] | None = None,
    packed_weights_cache: str = "off",
) -> Runner:
    """A runner with its weights packed and its arena allocated.

    dtype: auto, float32, bfloat16. executor: native or reference. progress(done, total) is called while weights are
    packed. packed_weights_cache: auto, off or a directory (`packed.py`). Raises ConfigError, ModelError, CapacityError.
    """
    plan = build_plan(checkpoint.spec, max_positions=max_model_len)
    spec = KVSpec(plan.kv, block_size, kv_codec)
    weights = ConvertedWeights(plan, checkpoint.tensors, dtype)
    model: ModelExecutor
    if executor == "reference":
        model = ReferenceExecutor(plan, weights, spec, num_blocks)
    elif executor == "native":
        arena = Arena.allocate(spec, num_blocks)
        packed = PackedWeights(
            checkpoint,
            weights,
            (ref.weight for phase in lower(plan) for ref in phase.matrices),
            dtype=dtype,
            conversion_version=CONVERSION_VERSION,
            cache=packed_weights_cache,
        )
        model = NativeExecutor(
            plan,
            weights,
            spec,
            arena.data,
            num_blocks,
            target=choose_target(),
            num_threads=num_threads,
            progress=progress,
            matrices=packed.matrix,
        )
        packed.keep()
    else:
        raise ConfigError(f"unknown executor {executor!r}; choose native or reference")
    return Runner(model)
