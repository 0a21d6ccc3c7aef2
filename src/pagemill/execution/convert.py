"""From a checkpoint's weight formats to others: what `--dtype` and `--weight-format` ask for. Owns the arithmetic of
conversion and quantisation, a matrix or some of its rows at a time; which format is wanted is the loader's."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pagemill.base.config import OPTIONS
from pagemill.base.errors import ConfigError, ModelError
from pagemill.kernels.reference import to_bf16
from pagemill.kernels.rotated import MULTIPLE, quantize_rotated
from pagemill.kernels.tensors import QUANT_GROUP, ROTATED, Tensor, dequantize, row_bytes

# Version of what `convert` computes. Bump it with every change of a bit: converted weights are kept on disk.
CONVERSION_VERSION = 1
FORMATS = OPTIONS["weight_format"].choices
# Of these, the ones that leave what they do not rotate as it is in the checkpoint.
OWN = ("auto", "exact", "int8")

_CHUNK_VALUES = 1 << 17  # stays in a core's own cache through all passes

Float32 = NDArray[np.float32]
UInt8 = NDArray[np.uint8]


def can_rotate(tensor: Tensor) -> bool:
    """Whether a matrix can be ROTATED: its rows are whole blocks."""
    return tensor.shape[-1] % MULTIPLE == 0


def loaded_format(tensor: Tensor, weight_format: str) -> str:
    """The format that a matrix is loaded in: the one asked for, its own with those of OWN, and bf16 instead of q8_0
    where its rows are no whole number of groups. Raises ConfigError for a format that is not known."""
    if weight_format == ROTATED:
        assert can_rotate(tensor), tensor.shape
        return ROTATED
    if weight_format not in FORMATS:
        raise ConfigError(f"unknown weight format {weight_format!r}; choose one of {', '.join(FORMATS)}")
    if weight_format in OWN:
        return tensor.format
    return "bf16" if weight_format == "q8_0" and tensor.shape[-1] % QUANT_GROUP else weight_format


def convert(tensor: Tensor, weight_format: str) -> Tensor:
    """A matrix in the format it is loaded in; the same tensor where that is its own. weight_format: or ROTATED.

    Every row is converted alone. Raises ModelError where values are too large for q8_0, ConfigError for a format that
    is not known.
    """
    wanted = loaded_format(tensor, weight_format)
    if wanted == tensor.format:
        return tensor
    rows, width = tensor.num_rows, tensor.shape[-1]
    data = np.empty((rows, row_bytes(wanted, width)), np.uint8)
    step = max(1, _CHUNK_VALUES // width)
    for begin in range(0, rows, step):
        part = slice(begin, begin + step)
        data[part] = _ENCODERS[wanted](dequantize(tensor.format, tensor.data[part]))
    return Tensor(wanted, tensor.shape, data)


def quantize_q8_0(values: Float32) -> UInt8:
    """Rows of f32 [rows, k] as Q8_0 blocks, u8 [rows, k / 32 * 34]: an f16 scale, then 32 signed bytes.

    scale = f16(max|x| / 127) and q = x / scale, clipped to ±127, both rounded to nearest even: q belongs to the scale
    as it is stored. Groups whose scale rounds to 0 become zeros. Raises ModelError where a scale exceeds f16.
    Source: ggml's `block_q8_0`, which rounds q half away from zero, by the scale before it was rounded.
    """
    groups = values.reshape(-1, QUANT_GROUP)
    peak = np.abs(values).reshape(-1)
    while peak.size > len(groups):  # neighbours pairwise: several times faster than a maximum over an axis of 32
        peak = np.maximum(peak[::2], peak[1::2])
    with np.errstate(over="ignore"):
        scale = (peak / np.float32(127)).astype(np.float16)[:, None]
    if not np.isfinite(peak).all():
        raise ModelError("a weight is not a finite number, so that the file is damaged; get it again")
    if not np.isfinite(scale).all():
        raise ModelError(
            "weights beyond ±8.3 million do not fit in q8_0, whose scales are f16; leave weight_format at auto, or "
            "give bf16 or f32"
        )
    wide = scale.astype(np.float32)
    quotients = groups * np.divide(np.float32(1), wide, out=np.zeros_like(wide), where=wide > 0)
    np.rint(quotients, out=quotients)
    np.clip(quotients, -127, 127, out=quotients)
    blocks = np.empty((len(groups), 2 + QUANT_GROUP), np.uint8)
    blocks[:, :2] = scale.view(np.uint8)
    blocks[:, 2:] = quotients.astype(np.int8).view(np.uint8)
    return blocks.reshape(values.shape[0], -1)


def _encode_f32(values: Float32) -> UInt8:
    return values.view(np.uint8)


def _encode_bf16(values: Float32) -> UInt8:
    return (to_bf16(values).view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)


def _encode_rotated(values: Float32) -> UInt8:
    if not np.isfinite(values).all():
        raise ModelError("a weight is not a finite number, so that the file is damaged; get it again")
    q, scale = quantize_rotated(values)
    return np.concatenate([scale[:, None].view(np.uint8), q.view(np.uint8)], axis=1)


_ENCODERS = {"f32": _encode_f32, "bf16": _encode_bf16, "q8_0": quantize_q8_0, ROTATED: _encode_rotated}
