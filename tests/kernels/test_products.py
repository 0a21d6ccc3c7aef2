"""Every weight format on every target against the reference: integers exactly, floats to rounding."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagemill.kernels import _native, reference
from pagemill.kernels.native import FORMATS, LAYOUTS, layout_for, pack
from pagemill.kernels.target import arithmetic_of, available_targets, built_targets
from tests.fixtures.plans import quantized

TARGETS = available_targets()
INTEGER = [f for f in FORMATS if f in reference.INTEGER_FORMATS]
OTHERS = [layout for layout in LAYOUTS if layout not in FORMATS]
TILES = [layout for layout in OTHERS if layout.endswith("_tiles")]
# Every layout that a target of this machine reads.
READ = [(t, f) for t in TARGETS for f in [*FORMATS, *TILES] if f in FORMATS or arithmetic_of(t) == "bf16"]
# The same, each with one byte to an activation, and those that have groups of integers with two as well.
MULTIPLIED = [(t, f, two_bytes) for t, f in READ for two_bytes in (False, True) if f in INTEGER or not two_bytes]


def format_of(layout: str) -> str:
    return layout.removesuffix("_tiles")


def case(fmt: str, rows: int, n: int, k: int, seed: int = 0) -> tuple[np.ndarray, reference.Tensor]:
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((rows, k)) * rng.choice([0.01, 1.0, 30.0], (rows, 1))).astype(np.float32)
    return x, quantized(rng.standard_normal((n, k), np.float32), format_of(fmt))


@pytest.mark.parametrize("layout", [*FORMATS, *TILES])
@pytest.mark.parametrize(("n", "k"), [(32, 32), (70, 96), (1, 64), (33, 320)])
def test_packed_rows_unpack_to_the_checkpoints_values(layout: str, n: int, k: int) -> None:
    _, tensor = case(layout, 1, n, k)
    packed, dense = pack(tensor, layout), tensor.dequantize()
    for row in {0, n // 2, n - 1}:
        assert np.array_equal(_native.unpack_row(LAYOUTS[layout], n, k, packed, row), dense[row])


@pytest.mark.parametrize("two_bytes", [False, True])
@pytest.mark.parametrize("target", TARGETS)
@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 1e4, 3e37]),
)
def test_quantised_activations_equal_the_reference(
    target: str, two_bytes: bool, rows: int, groups: int, seed: int, size: float
) -> None:
    x = (np.random.default_rng(seed).standard_normal((rows, 32 * groups)) * size).astype(np.float32)
    x[0, : seed % 32] = 0.0
    with np.errstate(over="ignore"):
        expected = reference.quantize_rows(x, two_bytes)
    for ours, wanted in zip(_native.quantize_rows(target, x, two_bytes=two_bytes), expected, strict=True):
        assert np.array_equal(ours, wanted)


@pytest.mark.parametrize("target", TARGETS)
def test_every_value_of_two_bytes_survives_being_cut_in_two(target: str) -> None:
    """In each group 31 of them, and one that sets the scale to 1."""
    groups = -(-65025 // 31)
    wanted = np.full((groups, 32), -32512, np.int32)
    wanted[:, :31] = np.minimum(np.arange(31 * groups) - 32512, 32512).reshape(groups, 31)
    q, scale, total = _native.quantize_rows(target, wanted.reshape(1, -1).astype(np.float32), two_bytes=True)
    assert np.array_equal(q, wanted.reshape(1, -1))
    assert (scale == 1.0).all()
    assert np.array_equal(total[0], wanted.sum(axis=1))


@pytest.mark.parametrize("two_bytes", [False, True])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("fmt", INTEGER)
def test_integer_sums_equal_the_reference_exactly(target: str, fmt: str, two_bytes: bool) -> None:
    x, tensor = case(fmt, 5, 70, 192)
    sums = _native.integer_sums(target, FORMATS[fmt], 70, pack(tensor), x, two_bytes)
    assert np.array_equal(sums, reference.integer_sums(x, tensor, two_bytes))


@pytest.mark.parametrize(("two_bytes", "most"), [(False, 127), (True, 32512)])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("fmt", "raw", "total"), [("q4_0", 0xFF, 7), ("q4_1", 0xFF, 15), ("q8_0", 0x7F, 127)])
def test_extreme_integers_do_not_saturate(
    target: str, fmt: str, raw: int, total: int, two_bytes: bool, most: int
) -> None:
    """Activations at their most against the largest weights: the sums that 16-bit steps would clip."""
    x = np.full((1, 32), 5.0, np.float32)
    data = quantized(np.ones((1, 32), np.float32), fmt).data.copy()
    data[0, -(32 if fmt == "q8_0" else 16) :] = raw
    sums = _native.integer_sums(target, FORMATS[fmt], 1, pack(reference.Tensor(fmt, (1, 32), data)), x, two_bytes)
    assert sums.item() == 32 * most * total


@pytest.mark.parametrize(("two_bytes", "most"), [(False, 127), (True, 32512)])
@pytest.mark.parametrize("target", TARGETS)
def test_stored_byte_of_minus_128_is_exact(target: str, two_bytes: bool, most: int) -> None:
    """Quantisers write -127..127 into Q8_0, a file may say -128."""
    x = np.full((1, 32), -3.0, np.float32)
    tensor = quantized(np.ones((1, 32), np.float32), "q8_0")
    data = tensor.data.copy()
    data[0, 2:] = 0x80
    hostile = reference.Tensor("q8_0", (1, 32), data)
    sums = _native.integer_sums(target, FORMATS["q8_0"], 1, pack(hostile), x, two_bytes)
    assert sums.item() == 32 * most * 128


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("fmt", "raw", "weight"),
    [("q8_0", 0x7F, 127), ("q8_0", 0x80, -128), ("q8_0", 0x81, -127), ("q4_0", 0x00, -8), ("q4_0", 0xFF, 7)],
)
@pytest.mark.parametrize(
    ("high", "low"), [(127, -128), (126, 127), (0, -128), (0, 127), (-126, -128), (-127, 127), (-127, 0)]
)
def test_low_bytes_at_their_most_are_exact(target: str, fmt: str, raw: int, weight: int, high: int, low: int) -> None:
    """Both bytes at the ends of their range, beside one value that sets the scale to 1."""
    values = [256 * high + low] * 31 + [-32512]
    x = np.array([values], np.float32)
    data = quantized(np.ones((1, 32), np.float32), fmt).data.copy()
    data[0, 2:] = raw
    packed = pack(reference.Tensor(fmt, (1, 32), data))
    sums = _native.integer_sums(target, FORMATS[fmt], 1, packed, x, True)
    assert sums.item() == sum(value * weight for value in values)


@pytest.mark.parametrize(("target", "layout", "two_bytes"), MULTIPLIED)
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 32, 32), (13, 70, 96), (31, 7, 576), (50, 33, 64)])
def test_products_agree_with_the_reference(
    target: str, layout: str, rows: int, n: int, k: int, two_bytes: bool
) -> None:
    x, tensor = case(layout, rows, n, k)
    y = _native.product(target, LAYOUTS[layout], n, pack(tensor, layout), x, two_bytes)
    expected = reference.product(x, tensor, arithmetic="bf16" if layout in TILES else "int8", two_bytes=two_bytes)
    scale = np.abs(x).max(axis=1, keepdims=True) * np.sqrt(k)
    assert np.all(np.abs(y - expected) <= 2e-6 * scale)


@pytest.mark.parametrize(("target", "layout", "two_bytes"), MULTIPLIED)
def test_a_rows_product_has_the_same_bits_in_any_batch(target: str, layout: str, two_bytes: bool) -> None:
    x, tensor = case(layout, 67, 70, 160)
    packed, form = pack(tensor, layout), LAYOUTS[layout]
    together = _native.product(target, form, 70, packed, x, two_bytes)
    for size in (1, 2, 5, 7, 16, 17, 31, 33):
        parts = [_native.product(target, form, 70, packed, x[i : i + size], two_bytes) for i in range(0, 67, size)]
        assert np.array_equal(np.concatenate(parts), together)


@pytest.mark.parametrize("two_bytes", [False, True])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("fmt", INTEGER)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rows", [1, 13])
def test_a_number_that_is_not_finite_reaches_the_result(
    target: str, fmt: str, two_bytes: bool, bad: float, rows: int
) -> None:
    """Integers would hide it, wherever it stands in its group, and with it that a row came to nothing."""
    x, tensor = case(fmt, rows, 40, 96)
    packed, row = pack(tensor), rows // 2
    clean = _native.product(target, FORMATS[fmt], 40, packed, x, two_bytes)
    for lane in (0, 3, 15, 16, 20, 31):
        damaged = x.copy()
        damaged[row, 32 + lane] = bad
        y = _native.product(target, FORMATS[fmt], 40, packed, damaged, two_bytes)
        assert not np.isfinite(y[row]).any(), lane
        assert np.array_equal(np.delete(y, row, axis=0), np.delete(clean, row, axis=0))


@pytest.mark.skipif("amx" not in TARGETS, reason="this machine has no AMX")
@pytest.mark.parametrize("layout", TILES)
def test_widened_weights_give_the_bits_of_bfloat16_weights(layout: str) -> None:
    x, tensor = case(layout, 40, 70, 192)
    halves = (reference.to_bf16(tensor.dequantize()).view(np.uint32) >> 16).astype(np.uint16)
    rounded = reference.Tensor("bf16", tensor.shape, halves.view(np.uint8).reshape(70, -1))
    ours = _native.product("amx", LAYOUTS[layout], 70, pack(tensor, layout), x)
    assert np.array_equal(ours, _native.product("amx", LAYOUTS["bf16"], 70, pack(rounded), x))


@pytest.mark.skipif("amx" not in TARGETS, reason="this machine has no AMX")
def test_every_8_bit_code_is_widened_exactly() -> None:
    data = np.zeros((256, 34), np.uint8)
    data[:, :2] = np.array([0.0371], np.float16).view(np.uint8)
    data[:, 2] = np.arange(256)
    tensor = reference.Tensor("q8_0", (256, 32), data)
    y = _native.product("amx", LAYOUTS["q8_0_tiles"], 256, pack(tensor, "q8_0_tiles"), np.eye(1, 32, dtype=np.float32))
    assert np.array_equal(y[0], reference.to_bf16(tensor.dequantize()[:, 0]))


@pytest.mark.parametrize("target", built_targets())
def test_the_layout_follows_the_targets_arithmetic(target: str) -> None:
    tiles = arithmetic_of(target) == "bf16"
    assert layout_for("q4_1", target) == ("q4_1_tiles" if tiles else "q4_1")
    assert layout_for("bf16", target) == "bf16"


@pytest.mark.parametrize("target", [t for t in TARGETS if arithmetic_of(t) == "int8"])
def test_a_target_refuses_a_layout_that_it_does_not_read(target: str) -> None:
    x, tensor = case("q4_0", 2, 32, 64)
    with pytest.raises(ValueError, match="does not read weights in tiles"):
        _native.product(target, LAYOUTS["q4_0_tiles"], 32, pack(tensor, "q4_0_tiles"), x)


@pytest.mark.parametrize("fmt", ["f32", "f16", "bf16"])
def test_odd_widths_are_packed_whole(fmt: str) -> None:
    _, tensor = case(fmt, 1, 5, 33)
    packed = pack(tensor)
    for row in range(5):
        assert np.array_equal(_native.unpack_row(FORMATS[fmt], 5, 33, packed, row), tensor.dequantize()[row])


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("wrong size", lambda p: _native.product(TARGETS[0], 0, 33, p, np.zeros((1, 32), np.float32))),
        ("multiples of 32", lambda p: _native.product(TARGETS[0], 4, 32, p, np.zeros((1, 33), np.float32))),
        ("unknown weight format", lambda p: _native.product(TARGETS[0], 10, 32, p, np.zeros((1, 32), np.float32))),
        ("not available", lambda p: _native.product("avx9", 0, 32, p, np.zeros((1, 32), np.float32))),
        ("row out of range", lambda p: _native.unpack_row(0, 32, 32, p, 32)),
    ],
)
def test_wrong_arguments_are_refused_before_memory_is_touched(message: str, call: object) -> None:
    packed = pack(quantized(np.zeros((32, 32), np.float32), "f32"))
    with pytest.raises(ValueError, match=message):
        call(packed)  # type: ignore[operator]
