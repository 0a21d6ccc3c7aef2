from __future__ import annotations

import gguf
import numpy as np
import pytest

from pagemill.base.errors import ModelError
from pagemill.kernels.ops import WeightDecl
from pagemill.kernels.tensors import BLOCK_BYTES, Tensor
from pagemill.models.weights import NameRow, TensorNames, Weights, gather, is_finite

NAMES = TensorNames(
    model=(NameRow("embed", "e.weight", "m.e"),),
    layer=(NameRow("w", "w.weight", "w", hf_transposed=True), NameRow("b", "b.weight", "b")),
    hf_layer="m.h.",
    hf_optional_prefix="m.",
    ignored=r"mask\d+",
)
EXPECTED = {
    "embed": WeightDecl((4, 2), "matrix"),
    "layers.0.w": WeightDecl((3, 2), "matrix"),
    "layers.0.b": WeightDecl((2,), "vector"),
}


def counted(*shape: int) -> Tensor:
    return Tensor.from_array(np.arange(np.prod(shape), dtype=np.float32).reshape(shape))


def random_tensor(format: str, rows: int = 5, width: int = 64) -> Tensor:
    values = np.random.default_rng(0).standard_normal((rows, width)).astype(np.float32)
    data = gguf.quants.quantize(values, gguf.GGMLQuantizationType[format.upper()])
    return Tensor(format, (rows, width), np.ascontiguousarray(data).view(np.uint8).reshape(rows, -1))


@pytest.mark.parametrize("prefix", ["m.", ""])
def test_hugging_face_names_are_mapped_and_transposed_with_or_without_prefix(prefix: str) -> None:
    tensors = {f"{prefix}e": counted(4, 2), f"{prefix}h.0.w": counted(2, 3), f"{prefix}h.0.b": counted(2)}
    found = gather(EXPECTED, NAMES, 1, tensors | {"mask12": counted(1)}, "safetensors", "here")
    assert set(found) == set(EXPECTED)
    np.testing.assert_array_equal(found["layers.0.w"].dequantize(), np.arange(6).reshape(2, 3).T)


def test_hostile_names_are_listed_short_and_without_control_characters() -> None:
    tensors = {f"\x1b[31m{i}" + "x" * 5000: counted(1) for i in range(100)}
    with pytest.raises(
        ModelError, match=r"3 tensors are missing: .*; 100 tensors are unknown: .* and 88 more"
    ) as error:
        gather(EXPECTED, NAMES, 1, tensors, "gguf", "here")
    assert len(str(error.value)) < 2000
    assert str(error.value).isprintable()


def test_gguf_names_are_mapped_as_they_are() -> None:
    tensors = {"e.weight": counted(4, 2), "blk.0.w.weight": counted(3, 2), "blk.0.b.weight": counted(2)}
    found = gather(EXPECTED, NAMES, 1, tensors, "gguf", "here")
    assert found["layers.0.w"] is tensors["blk.0.w.weight"]


def test_shape_of_the_wrong_rank_is_refused_before_it_is_turned() -> None:
    tensors = {"m.e": counted(4, 2), "m.h.0.w": counted(6), "m.h.0.b": counted(2, 1)}
    with pytest.raises(ModelError, match=r"layers\.0\.b is \[2, 1\].*layers\.0\.w is \[6\]"):
        gather(EXPECTED, NAMES, 1, tensors, "safetensors", "here")


@pytest.mark.parametrize("format", BLOCK_BYTES)
def test_ordinary_values_are_finite(format: str) -> None:
    assert is_finite(random_tensor(format))


def test_largest_finite_values_are_finite() -> None:
    assert is_finite(Tensor.from_array(np.full((3, 7), np.finfo(np.float32).max)))
    assert is_finite(Tensor.from_array(np.full((3, 7), -65504, dtype=np.float16)))


@pytest.mark.parametrize("bits", [0x7C00, 0xFC00, 0x7E01])
@pytest.mark.parametrize(("format", "at"), [("q4_0", 0), ("q8_0", 0), ("q4_1", 0), ("q4_1", 2)])
def test_scale_or_minimum_that_is_not_finite_is_found(format: str, at: int, bits: int) -> None:
    tensor = random_tensor(format)
    data = tensor.data.copy()
    data[4, at + BLOCK_BYTES[format][1] :][:2] = np.frombuffer(np.uint16(bits).tobytes(), np.uint8)
    assert not is_finite(Tensor(format, tensor.shape, data))


@pytest.mark.parametrize("format", ["q4_0", "q4_1", "q8_0"])
def test_quants_of_any_bits_are_finite(format: str) -> None:
    """0x7c7c, read as f16, is NaN; in the quants it means nothing."""
    tensor = random_tensor(format)
    data = tensor.data.copy().reshape(-1, BLOCK_BYTES[format][1])
    data[:, 4:] = 0x7C
    assert is_finite(Tensor(format, tensor.shape, data.reshape(tensor.data.shape)))


@pytest.mark.parametrize("format", ["f32", "f16", "bf16"])
def test_value_that_is_not_finite_is_found_wherever_it_is(format: str) -> None:
    words = np.uint32 if format == "f32" else np.uint16
    ones = {"f32": 0x7F800000, "f16": 0x7C00, "bf16": 0x7F80}[format]
    rows, width = 700, 480  # more than one chunk
    for row, column in ((0, 0), (350, 17), (699, 479)):
        for sign_and_fraction in (0, 1, 1 << (words().itemsize * 8 - 1)):
            values = np.zeros((rows, width), dtype=words)
            values[row, column] = ones | sign_and_fraction
            assert not is_finite(Tensor(format, (rows, width), values.view(np.uint8)))


def test_vector_is_f32_and_matrix_keeps_its_format() -> None:
    weights = Weights({"b": Tensor.from_array(np.ones(4, np.float16)), "w": random_tensor("q8_0")})
    assert weights.vector("b").dtype == np.float32
    assert weights.matrix("w").format == "q8_0"
    assert weights.num_parameters == 4 + 5 * 64
    assert weights.main_format == "q8_0"
    assert weights.num_bytes == 8 + 5 * 68
