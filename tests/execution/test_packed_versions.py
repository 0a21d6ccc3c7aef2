"""Stored packed weights are told apart by version numbers: the bits that each version stands for."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from pagemill.execution.loader import CONVERSION_VERSION, convert
from pagemill.kernels.native import PACKING_VERSION, pack_matrix, packed_bytes
from pagemill.kernels.tensors import BLOCK_BYTES, Tensor

# One digest (its first 16 digits) a version: a change of bits needs a new version, and a new line.
PACKED = {
    1: {
        "f32": "1da01caf9972f305",
        "f16": "66c9bdf9838be7a0",
        "bf16": "ee66b5f387d01e92",
        "q4_0": "f2169dbcf809ecce",
        "q4_1": "22956f647259c911",
        "q8_0": "aab6537836be08ad",
    },
}
CONVERTED = {
    1: {
        ("f32", "float32"): "e8d361823000c480",
        ("f32", "bfloat16"): "76418667a7f6e94c",
        ("f16", "float32"): "c437e812037ab513",
        ("f16", "bfloat16"): "4dcc5f85c3cdc521",
        ("bf16", "float32"): "39fcee1c151c899e",
        ("bf16", "bfloat16"): "54092f92d37fce61",
        ("q4_0", "float32"): "2586151e044994a7",
        ("q4_0", "bfloat16"): "c1c8cbd18d5599e0",
        ("q4_1", "float32"): "291e070c5cefdeab",
        ("q4_1", "bfloat16"): "16062e9cde4f1f04",
        ("q8_0", "float32"): "99b517e64a86a81d",
        ("q8_0", "bfloat16"): "94a2ce2834175317",
    },
}


def tensor(fmt: str) -> Tensor:
    """A matrix [70, 96] of fixed bytes, its numbers and scales finite."""
    values, size = BLOCK_BYTES[fmt]
    data = np.random.RandomState(7).randint(0, 256, (70, 96 // values, size)).astype(np.uint8)
    high_bytes = {"f32": [3], "f16": [1], "bf16": [1], "q4_1": [1, 3]}.get(fmt, [1])
    data[..., high_bytes] &= 0xBB  # no exponent of ones
    return Tensor(fmt, (70, 96), data.reshape(70, -1))


def short_digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


@pytest.mark.parametrize("fmt", BLOCK_BYTES)
def test_a_layout_is_the_one_that_its_version_stands_for(fmt: str) -> None:
    packed = pack_matrix(tensor(fmt))
    assert (packed.format, packed.n, packed.k, packed.data.nbytes) == (fmt, 70, 96, packed_bytes(fmt, 70, 96))
    assert short_digest(packed.data.tobytes()) == PACKED[PACKING_VERSION][fmt], "bump PACKING_VERSION"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fmt", BLOCK_BYTES)
def test_a_conversion_is_the_one_that_its_version_stands_for(fmt: str, dtype: str) -> None:
    converted = convert(tensor(fmt), dtype)
    assert short_digest(converted.data.tobytes()) == CONVERTED[CONVERSION_VERSION][fmt, dtype], (
        "bump CONVERSION_VERSION"
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fmt", BLOCK_BYTES)
def test_rows_converted_alone_are_those_of_the_whole(fmt: str, dtype: str) -> None:
    whole, rows = convert(tensor(fmt), dtype), convert(tensor(fmt).rows(slice(32, 64)), dtype)
    np.testing.assert_array_equal(rows.data, whole.data[32:64])
