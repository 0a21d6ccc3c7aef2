"""Signed bytes with one scale for each row, after a rotation that spreads outliers: the specification of weight format
`i8_rotated` and of its activations.

For an orthonormal H, x Wᵀ = (x H)(W H)ᵀ: both sides are rotated, then rounded, and multiplied as integers. A Hadamard
matrix makes one large channel into many middling ones, so that a single scale serves the row (QuaRot, arXiv 2404.00456;
what it costs on the default model is in docs/performance.md). Owns rotation, rounding and product; who uses the format
is `execution/convert.py`'s.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pagemill.kernels.tensors import ROTATED, Tensor

Float32 = NDArray[np.float32]
MULTIPLE = 64  # widths that can be rotated are multiples of it
_BLOCKS = (256, 128, 64)  # the largest is what a kernel holds in registers


def rotate_rows(x: Float32) -> Float32:
    """x [rows, k] times the orthonormal Hadamard matrix, in blocks of 256, the rest in one of 128 and one of 64.

    k: a multiple of 64. Additions are in the order of the butterflies, so that results are bit-equal everywhere.
    """
    assert x.shape[1] % MULTIPLE == 0, x.shape
    rotated = np.empty_like(x, order="C")
    begin = 0
    for block in _BLOCKS:
        end = begin + (x.shape[1] - begin) // block * block
        if end > begin:
            rotated[:, begin:end] = _rotate_blocks(x[:, begin:end], block)
        begin = end
    return rotated


def _rotate_blocks(x: Float32, block: int) -> Float32:
    y = np.array(x.reshape(-1, block).T, np.float32, order="C")  # blocks side by side: every step runs over long rows
    other = np.empty_like(y)
    half = 1
    while half < block:
        pairs, sums = (each.reshape(-1, 2, half, y.shape[1]) for each in (y, other))
        np.add(pairs[:, 0], pairs[:, 1], out=sums[:, 0])
        np.subtract(pairs[:, 0], pairs[:, 1], out=sums[:, 1])
        y, other = other, y
        half *= 2
    y *= np.float32(block**-0.5)
    rotated: Float32 = y.T.reshape(x.shape)
    return rotated


def quantize_rotated(x: Float32) -> tuple[NDArray[np.int8], Float32]:
    """Rows of f32 [rows, k], rotated: q [rows, k] and scale [rows] with x H ≈ q · scale.

    scale = max|x H| / 127, q = round(x H · (127 / max|x H|)), to nearest even; a row of zeros has scale 0.
    """
    rotated = rotate_rows(x)
    peak = np.maximum(rotated.max(axis=1), -rotated.min(axis=1))
    inverse = np.divide(np.float32(127), peak, out=np.zeros_like(peak), where=peak > 0)
    rotated *= inverse[:, None]
    np.rint(rotated, out=rotated)
    return rotated.astype(np.int8), peak / np.float32(127)


def rotated_product(x: Float32, tensor: Tensor) -> Float32:
    """y = x Wᵀ, x [rows, k] f32, W [n, k] in i8_rotated: exact integer sums, then (sum · scale of x) · scale of W."""
    assert tensor.format == ROTATED
    q, scale = quantize_rotated(x)
    weights = np.ascontiguousarray(tensor.data[:, 4:]).view(np.int8)
    weight_scale = np.ascontiguousarray(tensor.data[:, :4]).view(np.float32)[:, 0]
    sums = (q.astype(np.float64) @ weights.T.astype(np.float64)).astype(np.int32)
    y: Float32 = (sums.astype(np.float32) * scale[:, None]) * weight_scale
    return y
