"""From an opened checkpoint to a running executor: the format of each weight, KV geometry, native or reference.

Owns which format is wanted; the arithmetic of conversion is `convert.py`'s, packing `packed.py`'s.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Final

import numpy as np

from pagemill.base.config import OPTIONS, weight_format_of
from pagemill.base.errors import ConfigError
from pagemill.base.kv_spec import KVSpec
from pagemill.execution.convert import CONVERSION_VERSION, can_rotate, convert, loaded_format
from pagemill.execution.packed import PackedWeights
from pagemill.execution.runner import Runner
from pagemill.kernels.batch import ModelExecutor
from pagemill.kernels.native import PACKING_VERSION, NativeExecutor
from pagemill.kernels.ops import Plan
from pagemill.kernels.plan import lower
from pagemill.kernels.reference import INTEGER_FORMATS, ReferenceExecutor
from pagemill.kernels.rotated import MULTIPLE
from pagemill.kernels.target import arithmetic_of, choose_target, rotates
from pagemill.kernels.tensors import QUANT_GROUP, ROTATED, Tensor
from pagemill.models.checkpoint import Checkpoint
from pagemill.models.registry import build_plan
from pagemill.storage.arena import Arena

_LOG: Final = logging.getLogger(__name__)
_MAX_LISTED: Final = 4


def kv_codec_for(weight_format: str, kv_cache_dtype: str) -> str:
    """The resident codec: as asked, or by the fixed rule of "auto": f32 with weights in f32, else int8.

    weight_format: as asked, "auto" for the checkpoint's own (`EngineConfig.weights`).
    """
    if kv_cache_dtype != "auto":
        return kv_cache_dtype
    return "f32" if weight_format == "f32" else "int8"


def kv_spec_for(checkpoint: Checkpoint, codec: str, block_size: int) -> KVSpec:
    """KV geometry of a model. Raises ConfigError for an unknown codec or a block size that cannot be."""
    return KVSpec(build_plan(checkpoint.spec, max_positions=1).kv, block_size, codec)


_ROTATING: Final = ("attention_in", "attention_out", "mlp_in", "mlp_out")


def _rotating_phases(plan: Plan) -> list[list[str]]:
    """The matrices of each phase of a layer, by handle."""
    return [[ref.weight for ref in phase.matrices] for phase in lower(plan) if phase.kind in _ROTATING]


def rotated_handles(plan: Plan, tensors: Mapping[str, Tensor], weight_format: str, target: str) -> frozenset[str]:
    """The matrices that become signed bytes of rotated rows: those of all layers with int8, and with auto those of
    4-bit and 8-bit checkpoints where the target `rotates`. The embedding and the head never do.

    A phase's matrices share their activations, so that all of them are rotated or none.
    """
    if weight_format != "int8" and (weight_format != "auto" or not rotates(target)):
        return frozenset()

    def fits(tensor: Tensor) -> bool:
        return can_rotate(tensor) and (weight_format == "int8" or tensor.format in INTEGER_FORMATS)

    phases = (handles for handles in _rotating_phases(plan) if all(fits(tensors[each]) for each in handles))
    return frozenset(handle for handles in phases for handle in handles)


def _listed(handles: list[str]) -> str:
    return f"{', '.join(handles[:_MAX_LISTED])}{', …' * (len(handles) > _MAX_LISTED)}"


class ConvertedWeights(Mapping[str, Tensor]):
    """A checkpoint's tensors by handle, matrices converted when they are asked for, so that no second copy is kept."""

    def __init__(self, plan: Plan, tensors: Mapping[str, Tensor], weight_format: str, target: str) -> None:
        self._plan = plan
        self._tensors = tensors
        self._weight_format = weight_format
        self._rotated = rotated_handles(plan, tensors, weight_format, target)

    @property
    def name(self) -> str:
        """What they are converted to: the weight format as asked, with a mark where auto rotates, since on another
        target it means other numbers."""
        return "auto.rotated" if self._weight_format == "auto" and self._rotated else self._weight_format

    def __getitem__(self, handle: str) -> Tensor:
        tensor = self._tensors[handle]
        return convert(tensor, self._asked(handle)) if self._plan.weights[handle].kind == "matrix" else tensor

    def _asked(self, handle: str) -> str:
        return ROTATED if handle in self._rotated else self._weight_format

    def format_of(self, handle: str) -> str:
        """The format of a matrix, without converting it."""
        return loaded_format(self._tensors[handle], self._asked(handle))

    def rows_of(self, rows: Mapping[str, slice]) -> dict[str, Tensor]:
        """Some rows of several matrices, by handle; those that are converted alike are so in one call."""
        alike: dict[tuple[str, str, int], list[str]] = {}
        for handle in rows:
            tensor = self._tensors[handle]
            alike.setdefault((tensor.format, self._asked(handle), tensor.shape[-1]), []).append(handle)
        found: dict[str, Tensor] = {}
        for (source, asked, width), handles in alike.items():
            parts = [self._tensors[handle].data[rows[handle]] for handle in handles]
            data = np.concatenate(parts)
            converted = convert(Tensor(source, (len(data), width), data), asked)
            end = 0
            for handle, part in zip(handles, parts, strict=True):
                begin, end = end, end + len(part)
                found[handle] = converted.rows(slice(begin, end))
        return found

    def matrices_not_in(self, format: str) -> list[str]:
        """Handles of the matrices that are loaded in another format."""
        handles = (handle for handle, each in self._plan.weights.items() if each.kind == "matrix")
        return [handle for handle in handles if self.format_of(handle) != format]

    def notice(self) -> str | None:
        """What the user is told where matrices have rows that the asked format cannot hold; None where all fit."""
        if self._weight_format == "q8_0" and (others := self.matrices_not_in("q8_0")):
            return (
                f"{len(others)} matrices stay in bf16, their rows are no multiple of {QUANT_GROUP} numbers as q8_0 "
                f"needs: {_listed(others)}"
            )
        if self._weight_format != "int8":
            return None
        layers = [handle for handles in _rotating_phases(self._plan) for handle in handles]
        if not (others := [handle for handle in layers if handle not in self._rotated]):
            return None
        kept = ", ".join(sorted({self.format_of(handle) for handle in others}))
        return (
            f"{len(others)} of the layers' {len(layers)} matrices stay in {kept}, their rows are no multiple of "
            f"{MULTIPLE} numbers as int8 needs: {_listed(others)}; give weight_format q8_0 (multiples of "
            f"{QUANT_GROUP}) or bf16 to convert them too, or exact to keep the checkpoint's own numbers in all"
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def load_executor(
    checkpoint: Checkpoint,
    *,
    dtype: str = "auto",
    weight_format: str = "auto",
    kv_codec: str = "bf16",
    block_size: int = 16,
    num_blocks: int,
    window_pages: tuple[int, ...] = (),
    max_model_len: int | None = None,
    num_threads: int = 1,
    executor: str = "native",
    progress: Callable[[int, int], None] | None = None,
    packed_weights_cache: str = "off",
) -> Runner:
    """A runner with its weights packed and its arena allocated.

    dtype, weight_format: as in EngineConfig. window_pages: as in KVSpec. executor: native or reference.
    progress(done, total) is called while weights are packed. packed_weights_cache: auto, off or a directory
    (`packed.py`). Raises ConfigError, ModelError, CapacityError.
    """
    OPTIONS["dtype"].check(dtype)
    OPTIONS["weight_format"].check(weight_format)
    weight_format = weight_format_of(dtype, weight_format)
    plan = build_plan(checkpoint.spec, max_positions=max_model_len)
    spec = KVSpec(plan.kv, block_size, kv_codec, window_pages)
    target = choose_target()
    weights = ConvertedWeights(plan, checkpoint.tensors, weight_format, target)
    if notice := weights.notice():
        _LOG.warning(notice)
    model: ModelExecutor
    if executor == "reference":
        checkpoint.check_values()
        source_digest = checkpoint.digest
        model = ReferenceExecutor(plan, weights, spec, num_blocks, arithmetic=arithmetic_of(target))
    elif executor == "native":
        arena = Arena.allocate(spec.groups[0].spec, num_blocks)
        packed = PackedWeights(
            checkpoint,
            weights,
            (ref.weight for phase in lower(plan) for ref in phase.matrices),
            weight_format=weights.name,
            target=target,
            conversion_version=CONVERSION_VERSION,
            cache=packed_weights_cache,
        )
        checkpoint.check_values(but=packed.found)
        model = NativeExecutor(
            plan,
            weights,
            spec,
            arena.data,
            num_blocks,
            target=target,
            num_threads=num_threads,
            progress=progress,
            matrices=packed.matrix,
        )
        packed.keep()
        source_digest = packed.source_digest
    else:
        raise ConfigError(f"unknown executor {executor!r}; choose native or reference")
    return Runner(model, weights_id(source_digest, weights.name))


def weights_id(source_digest: str, weight_format: str) -> str:
    """Names loaded weights, number for number: their source, what they were converted to, and both versions of that."""
    return f"{source_digest}/{weight_format}/convert-{CONVERSION_VERSION}/pack-{PACKING_VERSION}"
