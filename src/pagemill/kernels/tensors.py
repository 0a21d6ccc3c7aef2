"""A weight tensor as it stands in a checkpoint: format, shape, raw bytes. Owns the block formats and their exact
dequantisation (GGUF's, ggml `block_q4_0`, `block_q4_1`, `block_q8_0`), nothing of files."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pagemill.base.errors import ModelError

QUANT_GROUP = 32

# format -> (values per block, bytes per block)
BLOCK_BYTES: dict[str, tuple[int, int]] = {
    "f32": (1, 4),
    "f16": (1, 2),
    "bf16": (1, 2),
    "q4_0": (QUANT_GROUP, 18),
    "q4_1": (QUANT_GROUP, 20),
    "q8_0": (QUANT_GROUP, 34),
}
# A format of our own: a row's f32 scale, then a signed byte for each value of the rotated row (kernels/rotated.py).
ROTATED = "i8_rotated"


def row_bytes(format: str, width: int) -> int:
    """Bytes of a row of so many values."""
    if format == ROTATED:
        return 4 + width
    values, size = BLOCK_BYTES[format]
    return width // values * size


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """Rows of values in one of BLOCK_BYTES' formats, or in ROTATED.

    shape: numpy order, [out, in] for matrices; blocks run along the last dimension. data: u8, row by row,
    `[rows, bytes per row]`, read-only and possibly memory-mapped.
    """

    format: str
    shape: tuple[int, ...]
    data: NDArray[np.uint8]

    def __post_init__(self) -> None:
        if self.format not in (*BLOCK_BYTES, ROTATED):
            raise ModelError(f"weight format {self.format!r} is not supported; supported: {', '.join(BLOCK_BYTES)}")
        values = 64 if self.format == ROTATED else BLOCK_BYTES[self.format][0]
        if self.shape[-1] % values:
            raise ModelError(f"rows of {self.shape[-1]} values cannot be {self.format}: not a multiple of {values}")
        assert self.data.dtype == np.uint8
        assert self.data.shape == (self.num_rows, row_bytes(self.format, self.shape[-1])), (self.shape, self.data.shape)

    @property
    def num_rows(self) -> int:
        """Rows along the last dimension (1 for a vector)."""
        return math.prod(self.shape[:-1])

    @classmethod
    def from_array(cls, values: NDArray[np.generic]) -> Tensor:
        """An f32 or f16 array as a tensor; other dtypes are turned into f32."""
        array = np.ascontiguousarray(values, dtype=values.dtype if values.dtype == np.float16 else np.float32)
        rows = array.reshape(-1, array.shape[-1])
        return cls("f16" if array.dtype == np.float16 else "f32", array.shape, rows.view(np.uint8))

    def rows(self, index: NDArray[np.int64] | slice) -> Tensor:
        """Some rows of a matrix, in the order of `index`; quantised blocks are moved whole."""
        data = self.data[index]
        return Tensor(self.format, (data.shape[0], self.shape[-1]), data)

    def dequantize(self) -> NDArray[np.float32]:
        """The values as f32, in `shape`, exactly as the format defines them; of ROTATED, those of the rotated rows."""
        return dequantize(self.format, self.data).reshape(self.shape)


def dequantize(format: str, data: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Raw rows [rows, bytes] to f32 [rows, values]. Every product and sum is rounded once, as ggml does it."""
    raw = np.ascontiguousarray(data)
    num_rows = raw.shape[0]
    if format == "f32":
        return raw.view(np.float32).copy()
    if format == "f16":
        return raw.view(np.float16).astype(np.float32)
    if format == "bf16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if format == ROTATED:
        q = np.ascontiguousarray(raw[:, 4:]).view(np.int8).astype(np.float32)
        return q * np.ascontiguousarray(raw[:, :4]).view(np.float32)
    blocks = raw.reshape(num_rows, -1, BLOCK_BYTES[format][1])
    scale = np.ascontiguousarray(blocks[..., 0:2]).view(np.float16).astype(np.float32)  # [rows, groups, 1]
    if format == "q8_0":
        values = np.ascontiguousarray(blocks[..., 2:]).view(np.int8).astype(np.float32) * scale
        return values.reshape(num_rows, -1)
    nibbles = blocks[..., 2:] if format == "q4_0" else blocks[..., 4:]
    quants = np.concatenate([nibbles & 15, nibbles >> 4], axis=-1).astype(np.float32)
    if format == "q4_0":
        return ((quants - np.float32(8)) * scale).reshape(num_rows, -1)
    minimum = np.ascontiguousarray(blocks[..., 2:4]).view(np.float16).astype(np.float32)
    return (quants * scale + minimum).reshape(num_rows, -1)
