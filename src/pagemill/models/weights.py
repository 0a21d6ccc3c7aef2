"""From a checkpoint's tensors to a plan's weights: names, completeness, shapes, finite values. Owns these checks and
`Weights`, the access by handle; knows no file format and no family."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pagemill.base.errors import ModelError
from pagemill.kernels.ops import WeightDecl
from pagemill.kernels.tensors import BLOCK_BYTES, Tensor

SourceFormat = Literal["gguf", "safetensors"]

_MAX_LISTED = 12
_CHUNK_ROWS_BYTES = 1 << 18

# Mask of the exponent bits, by format and the unsigned type that a value (or a block's scale) is read as.
_EXPONENTS: dict[str, tuple[type[np.unsignedinteger[Any]], int]] = {
    "f32": (np.uint32, 0x7F800000),
    "f16": (np.uint16, 0x7C00),
    "bf16": (np.uint16, 0x7F80),
}
# Block formats: number of f16 numbers (scale, then minimum) at the head of a block.
_BLOCK_SCALES = {"q4_0": 1, "q4_1": 2, "q8_0": 1}


@dataclass(frozen=True, slots=True)
class NameRow:
    """One weight under its three names: Pagemill's handle, GGUF's, Hugging Face's (without the layer's prefix)."""

    handle: str
    gguf: str
    hf: str
    hf_transposed: bool = False


@dataclass(frozen=True, slots=True)
class TensorNames:
    """How a family's checkpoints name their tensors.

    model: weights outside layers. layer: those of each layer, under `layers.{i}.`, `blk.{i}.` and `hf_layer`.
    hf_optional_prefix: may be missing from all Hugging Face names. ignored: regular expression of names (of either
    format) that hold no weights, such as masks and tables that are computed anew.
    """

    model: tuple[NameRow, ...]
    layer: tuple[NameRow, ...]
    hf_layer: str
    hf_optional_prefix: str
    ignored: str

    def rows(self, num_layers: int) -> Iterator[NameRow]:
        """Every weight that the family knows, with full names."""
        yield from self.model
        for i in range(num_layers):
            for row in self.layer:
                yield NameRow(
                    f"layers.{i}.{row.handle}", f"blk.{i}.{row.gguf}", f"{self.hf_layer}{i}.{row.hf}", row.hf_transposed
                )


@dataclass(frozen=True, slots=True)
class Weights:
    """Checked tensors by handle: what an executor's loader reads."""

    tensors: Mapping[str, Tensor]

    def matrix(self, handle: str) -> Tensor:
        """The tensor [out, in] in the checkpoint's own format."""
        tensor = self.tensors[handle]
        assert len(tensor.shape) == 2, f"{handle} is no matrix"
        return tensor

    def vector(self, handle: str) -> NDArray[np.float32]:
        """A weight of any shape as f32."""
        return self.tensors[handle].dequantize()

    @property
    def num_parameters(self) -> int:
        """Numbers in all tensors, padding of the vocabulary included."""
        return sum(int(np.prod(t.shape, dtype=np.int64)) for t in self.tensors.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors as they are stored."""
        return sum(t.data.nbytes for t in self.tensors.values())

    @property
    def main_format(self) -> str:
        """The format that most parameters are in."""
        totals: dict[str, int] = {}
        for tensor in self.tensors.values():
            totals[tensor.format] = totals.get(tensor.format, 0) + int(np.prod(tensor.shape, dtype=np.int64))
        return max(totals, key=lambda name: totals[name])


def gather(
    expected: Mapping[str, WeightDecl],
    names: TensorNames,
    num_layers: int,
    tensors: Mapping[str, Tensor],
    source: SourceFormat,
    origin: str,
) -> dict[str, Tensor]:
    """The tensors of a plan, by handle, matrices as [out, in].

    expected: the plan's declarations. tensors: the checkpoint's, under its own names. origin: names the checkpoint in
    messages. Raises ModelError listing every missing and extra tensor, or every wrong shape. Values are not looked at.
    """
    present = _without_ignored(names, tensors, source)
    rows = {row.handle: row for row in names.rows(num_layers)}
    found: dict[str, Tensor] = {}
    missing: list[str] = []
    for handle in expected:
        name = rows[handle].gguf if source == "gguf" else rows[handle].hf
        tensor = present.pop(name, None)
        if tensor is None:
            missing.append(name)
        elif source == "safetensors" and rows[handle].hf_transposed:
            found[handle] = _transposed(tensor)
        else:
            found[handle] = tensor
    _refuse_missing_or_extra(missing, present, origin)
    _check_shapes(expected, found, origin)
    return found


def check_finite(tensors: Mapping[str, Tensor], handles: Iterable[str], origin: str) -> None:
    """Raise ModelError for the first tensor that holds NaN or infinite values. Reads all of each."""
    for handle in handles:
        if not is_finite(tensors[handle]):
            raise ModelError(
                f"{origin}: tensor {handle!r} holds NaN or infinite values; the file is damaged or the model diverged "
                "in training: fetch it again, or use another checkpoint"
            )


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite. Of block formats the f16 scales and minima are read, nothing else can be."""
    if tensor.data.size == 0:
        return True
    row_bytes = tensor.data.shape[1]
    step = max(1, _CHUNK_ROWS_BYTES // row_bytes)
    return all(
        _rows_are_finite(tensor.format, tensor.data[begin : begin + step])
        for begin in range(0, tensor.data.shape[0], step)
    )


def _rows_are_finite(format: str, rows: NDArray[np.uint8]) -> bool:
    if format in _BLOCK_SCALES:
        half_words = rows.view(np.uint16).reshape(-1, BLOCK_BYTES[format][1] // 2)
        bits: NDArray[Any] = half_words[:, : _BLOCK_SCALES[format]]
        mask = _EXPONENTS["f16"][1]
    else:
        dtype, mask = _EXPONENTS[format]
        bits = rows.view(dtype)
    return int((bits & mask).max()) != mask


def _without_ignored(names: TensorNames, tensors: Mapping[str, Tensor], source: SourceFormat) -> dict[str, Tensor]:
    ignored = re.compile(names.ignored)
    present: dict[str, Tensor] = {}
    prefix = names.hf_optional_prefix if source == "safetensors" else ""
    add_prefix = bool(prefix) and not any(name.startswith(prefix) for name in tensors)
    for name, tensor in tensors.items():
        if ignored.fullmatch(name):
            continue
        present[prefix + name if add_prefix and not name.startswith("lm_head.") else name] = tensor
    return present


def _transposed(tensor: Tensor) -> Tensor:
    """A copy of a matrix [in, out] as [out, in]."""
    if len(tensor.shape) != 2 or tensor.format not in _EXPONENTS:
        return tensor
    dtype = _EXPONENTS[tensor.format][0]
    turned = np.ascontiguousarray(np.ascontiguousarray(tensor.data).view(dtype).T)
    return Tensor(tensor.format, (tensor.shape[1], tensor.shape[0]), turned.view(np.uint8))


def _listed(items: Iterable[str]) -> str:
    shown = sorted(item if len(item) <= 80 and item.isprintable() else f"{ascii(item)[:77]}..." for item in items)
    more = f" and {len(shown) - _MAX_LISTED} more" if len(shown) > _MAX_LISTED else ""
    return ", ".join(shown[:_MAX_LISTED]) + more


def _refuse_missing_or_extra(missing: list[str], extra: Mapping[str, Tensor], origin: str) -> None:
    problems = []
    if missing:
        problems.append(f"{len(missing)} tensors are missing: {_listed(missing)}")
    if extra:
        problems.append(f"{len(extra)} tensors are unknown: {_listed(extra)}")
    if problems:
        raise ModelError(
            f"{origin}: {'; '.join(problems)}. The configuration and the weights do not belong together, or the file "
            "is incomplete: fetch the whole checkpoint again"
        )


def _check_shapes(expected: Mapping[str, WeightDecl], found: Mapping[str, Tensor], origin: str) -> None:
    wrong = [
        f"{handle} is {list(tensor.shape)} instead of {list(expected[handle].shape)}"
        for handle, tensor in found.items()
        if tensor.shape != expected[handle].shape
    ]
    if wrong:
        raise ModelError(
            f"{origin}: {len(wrong)} tensors have other shapes than the configuration says: {_listed(wrong)}. Fetch "
            "the checkpoint again, with its own configuration"
        )
