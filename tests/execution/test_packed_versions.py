"""Stored packed weights are told apart by version numbers: the bits that each version stands for."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from pagemill.execution.convert import CONVERSION_VERSION, convert
from pagemill.kernels.native import LAYOUTS, PACKING_VERSION, pack, packed_bytes
from pagemill.kernels.tensors import BLOCK_BYTES, ROTATED, Tensor

# One digest (its first 16 digits) a version: a change of bits needs a new version, and a new line.
PACKED = {
    1: {
        "f32": "1da01caf9972f305",
        "f16": "66c9bdf9838be7a0",
        "bf16": "ee66b5f387d01e92",
        "q4_0": "f2169dbcf809ecce",
        "q4_1": "22956f647259c911",
        "q8_0": "aab6537836be08ad",
        "q4_0_tiles": "3463932c599fa4cc",
        "q4_1_tiles": "eb350b1c061cf837",
        "q8_0_tiles": "45cf48e02b6325eb",
    },
}
CONVERTED = {
    1: {
        ("f32", "f32"): "e8d361823000c480",
        ("f32", "bf16"): "76418667a7f6e94c",
        ("f32", "q8_0"): "7e0a223ad148354e",
        ("f16", "f32"): "c437e812037ab513",
        ("f16", "bf16"): "4dcc5f85c3cdc521",
        ("f16", "q8_0"): "877dbe292d1b7b0f",
        ("bf16", "f32"): "39fcee1c151c899e",
        ("bf16", "bf16"): "54092f92d37fce61",
        ("bf16", "q8_0"): "bec682d4d80047ac",
        ("q4_0", "f32"): "2586151e044994a7",
        ("q4_0", "bf16"): "c1c8cbd18d5599e0",
        ("q4_0", "q8_0"): "39388fb4316a3eec",
        ("q4_1", "f32"): "291e070c5cefdeab",
        ("q4_1", "bf16"): "16062e9cde4f1f04",
        ("q4_1", "q8_0"): "8ff8b06dab09521a",
        ("q8_0", "f32"): "99b517e64a86a81d",
        ("q8_0", "bf16"): "94a2ce2834175317",
        ("q8_0", "q8_0"): "93ae492f6e4f170b",
    },
}
# The same of matrices [70, 448] that are rotated, and of one that is packed.
ROTATIONS = {
    1: {
        "f32": "a90dc648c38c75ac",
        "f16": "4d0064d43a30b49a",
        "bf16": "6c8cee6146be807f",
        "q4_0": "76953b3b449e6782",
        "q4_1": "d29dd196d8cfe423",
        "q8_0": "72487c16fbcf2595",
    },
}
PACKED_ROTATION = {1: "388c9c0939ad759c"}


def tensor(fmt: str, width: int = 96) -> Tensor:
    """A matrix [70, width] of fixed bytes, its numbers and scales finite."""
    values, size = BLOCK_BYTES[fmt]
    data = np.random.RandomState(7).randint(0, 256, (70, width // values, size)).astype(np.uint8)
    high_bytes = {"f32": [3], "f16": [1], "bf16": [1], "q4_1": [1, 3]}.get(fmt, [1])
    data[..., high_bytes] &= 0xBB  # no exponent of ones
    return Tensor(fmt, (70, width), data.reshape(70, -1))


def short_digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


@pytest.mark.parametrize("layout", [each for each in LAYOUTS if each != ROTATED])
def test_a_layout_is_the_one_that_its_version_stands_for(layout: str) -> None:
    packed = pack(tensor(layout.removesuffix("_tiles")), layout)
    assert packed.nbytes == packed_bytes(layout, 70, 96)
    assert short_digest(packed.tobytes()) == PACKED[PACKING_VERSION][layout], "bump PACKING_VERSION"


@pytest.mark.parametrize("weight_format", ["f32", "bf16", "q8_0"])
@pytest.mark.parametrize("fmt", BLOCK_BYTES)
def test_a_conversion_is_the_one_that_its_version_stands_for(fmt: str, weight_format: str) -> None:
    converted = convert(tensor(fmt), weight_format)
    assert short_digest(converted.data.tobytes()) == CONVERTED[CONVERSION_VERSION][fmt, weight_format], (
        "bump CONVERSION_VERSION"
    )


@pytest.mark.parametrize("weight_format", ["f32", "bf16", "q8_0"])
@pytest.mark.parametrize("fmt", BLOCK_BYTES)
def test_rows_converted_alone_are_those_of_the_whole(fmt: str, weight_format: str) -> None:
    whole, rows = convert(tensor(fmt), weight_format), convert(tensor(fmt).rows(slice(32, 64)), weight_format)
    np.testing.assert_array_equal(rows.data, whole.data[32:64])


@pytest.mark.parametrize("fmt", BLOCK_BYTES)
def test_a_rotation_is_the_one_that_its_version_stands_for(fmt: str) -> None:
    converted = convert(tensor(fmt, 448), ROTATED)
    assert short_digest(converted.data.tobytes()) == ROTATIONS[CONVERSION_VERSION][fmt], "bump CONVERSION_VERSION"
    np.testing.assert_array_equal(convert(tensor(fmt, 448).rows(slice(32, 33)), ROTATED).data, converted.data[32:33])


def test_rotated_rows_are_packed_as_their_version_says() -> None:
    packed = pack(convert(tensor("q4_1", 448), ROTATED))
    assert len(packed) == packed_bytes(ROTATED, 70, 448)
    assert short_digest(packed.tobytes()) == PACKED_ROTATION[PACKING_VERSION], "bump PACKING_VERSION"
