"""Signed bytes of rotated rows: the same bits on every target, and close to the product that they stand for."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from pagemill.base.errors import ModelError
from pagemill.execution.convert import convert
from pagemill.kernels import _native
from pagemill.kernels.native import LAYOUTS, pack
from pagemill.kernels.rotated import quantize_rotated, rotate_rows, rotated_product
from pagemill.kernels.target import available_targets
from pagemill.kernels.tensors import ROTATED, Tensor
from tests.fixtures.plans import Shape, batch, native, reference, rotated, tokens

TARGETS = available_targets()
WIDTHS = [64, 128, 192, 256, 576, 1536]


def activations(rows: int, k: int, seed: int = 0) -> np.ndarray:
    """Rows of several sizes, one channel far above the others, one row of zeros."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((rows, k)) * rng.choice([0.01, 1.0, 30.0], (rows, 1))).astype(np.float32)
    x[:, 3] *= 40
    x[rows // 2] = 0
    return x


@pytest.mark.parametrize("k", WIDTHS)
def test_the_rotation_is_a_hadamard_matrix_in_blocks(k: int) -> None:
    x = activations(5, k)
    blocks, begin = [256] * (k // 256) + [128] * (k % 256 // 128) + [64] * (k % 128 // 64), 0
    wanted = np.empty((5, k))
    for block in blocks:
        matrix = np.ones((1, 1))
        while len(matrix) < block:
            matrix = np.block([[matrix, matrix], [matrix, -matrix]])
        wanted[:, begin : begin + block] = x[:, begin : begin + block].astype(np.float64) @ matrix / np.sqrt(block)
        begin += block
    assert np.allclose(rotate_rows(x), wanted, rtol=0, atol=1e-5 * np.abs(x).max())
    assert np.allclose(rotate_rows(rotate_rows(x)), x, rtol=0, atol=1e-5 * np.abs(x).max())


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("k", WIDTHS)
def test_activations_equal_the_reference(target: str, k: int) -> None:
    x = activations(9, k)
    q, scale, total = _native.quantize_rows(target, x, True)
    wanted, wanted_scale = quantize_rotated(x)
    assert np.array_equal(q, wanted)
    assert np.array_equal(scale[:, 0], wanted_scale)
    assert np.array_equal(total[:, 0], wanted.sum(axis=1, dtype=np.int32))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 32, 64), (3, 70, 192), (8, 7, 576), (40, 70, 576), (67, 33, 1536)])
def test_products_have_the_references_bits(target: str, rows: int, n: int, k: int) -> None:
    weights = rotated(np.random.default_rng(1).standard_normal((n, k)).astype(np.float32))
    x = activations(rows, k)
    y = _native.product(target, LAYOUTS[ROTATED], n, pack(weights), x)
    assert np.array_equal(y, rotated_product(x, weights))


@pytest.mark.parametrize("target", TARGETS)
def test_a_rows_product_has_the_same_bits_in_any_batch(target: str) -> None:
    packed = pack(rotated(np.random.default_rng(1).standard_normal((70, 320)).astype(np.float32)))
    x = activations(67, 320)
    together = _native.product(target, LAYOUTS[ROTATED], 70, packed, x)
    for size in (1, 2, 5, 7, 8, 9, 12, 13, 16, 17, 31, 33):
        parts = [_native.product(target, LAYOUTS[ROTATED], 70, packed, x[i : i + size]) for i in range(0, 67, size)]
        assert np.array_equal(np.concatenate(parts), together)


def test_outliers_cost_little_accuracy() -> None:
    """What the rotation is for: one channel forty times the others, one scale for the row."""
    w = np.random.default_rng(1).standard_normal((128, 576)).astype(np.float32)
    x = activations(32, 576, seed=3)[:15]
    exact = x.astype(np.float64) @ w.T
    error = np.linalg.norm(rotated_product(x, rotated(w)) - exact, axis=1) / np.linalg.norm(exact, axis=1)
    q = np.rint(x * (127 / np.abs(x).max(axis=1, keepdims=True))) * (np.abs(x).max(axis=1, keepdims=True) / 127)
    plain = np.linalg.norm(q @ w.T - exact, axis=1) / np.linalg.norm(exact, axis=1)
    assert error.max() < 0.025
    assert error.mean() < 0.7 * plain.mean()


@pytest.mark.parametrize("target", TARGETS)
def test_largest_integers_do_not_saturate(target: str) -> None:
    """A row whose rotation is one channel, against weights of the same kind: 127 x 127 and 127 x -128."""
    k = 256
    x = np.ones((1, k), np.float32)  # rotates to 16, 0, 0, …
    q, _ = quantize_rotated(x)
    assert q[0, 0] == 127
    data = np.zeros((2, 4 + k), np.uint8)
    data[:, :4] = np.array([1.0], np.float32).view(np.uint8)
    data[0, 4], data[1, 4] = 127, 0x80  # 0x80 is -128, which a damaged file may hold
    y = _native.product(target, LAYOUTS[ROTATED], 2, pack(Tensor(ROTATED, (2, k), data)), x)
    assert np.array_equal(y[0], np.float32([127 * 127, 127 * -128]) * (np.float32(16) / np.float32(127)))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_step_agrees_with_the_reference_and_with_itself_in_other_chunks(target: str, gated: bool, bias: bool) -> None:
    """A chunk of 70 rows keeps rows within threads and gates its MLP at once; single rows and three threads do not."""
    shape = Shape(
        format="q4_1", rotated=True, hidden=128, ffn=192, head_dim=32, gated=gated, bias=bias, activation="silu"
    )
    ids, table = tokens(90, shape.vocab), list(range(6))
    wanted = reference(shape, target=target).forward(batch((ids, 0, table), every_row=True))
    whole = native(shape, target).forward(batch((ids, 0, table), every_row=True))
    assert np.abs(whole - wanted).max() < 0.02 * np.abs(wanted).max()
    for threads, cuts in ((1, (0, 70, 71, 90)), (3, (0, 1, 5, 45, 90)), (2, (0, 90))):
        executor = native(shape, target, threads=threads)
        parts = [executor.forward(batch((ids[a:b], a, table), every_row=True)) for a, b in itertools.pairwise(cuts)]
        assert np.array_equal(np.concatenate(parts), whole)


def test_embeddings_and_mixed_phases_are_refused() -> None:
    w = np.zeros((64, 64), np.float32)
    model = _native.NativeModel(TARGETS[0], 1, 64, 64, 8)
    ours = model.add_matrix(LAYOUTS[ROTATED], 64, 64, pack(rotated(w)), None)
    plain = model.add_matrix(LAYOUTS["f32"], 64, 64, pack(Tensor.from_array(w)), None)
    fields = {
        "norm": 0, "norm_weight": None, "norm_bias": None, "norm_eps": 0.0, "layer": 0, "q_heads": 0, "kv_heads": 0,
        "head_dim": 0, "q_norm": None, "k_norm": None, "qk_eps": 0.0, "rope": 0, "rope_table": None, "rotary_dim": 0,
        "scale": 1.0, "softcap": 0.0, "window": 0, "activation": 0, "gated": False, "position_table": None,
    }  # fmt: skip
    with pytest.raises(ValueError, match="rotated rows are for products"):
        model.add_phase(0, [ours], **fields)
    with pytest.raises(ValueError, match="rotated rows are for products"):
        model.add_phase(4, [ours, plain], **fields)


def test_widths_and_numbers_that_cannot_be_rotated_are_refused() -> None:
    with pytest.raises(ModelError, match="not a multiple of 64"):
        Tensor(ROTATED, (2, 96), np.zeros((2, 100), np.uint8))
    with pytest.raises(ModelError, match="not a finite number"):
        convert(Tensor.from_array(np.full((2, 64), np.nan, np.float32)), ROTATED)
    with pytest.raises(ValueError, match="multiples of 64"):
        _native.panel_bytes(LAYOUTS[ROTATED], 64) and _native.product(
            TARGETS[0], LAYOUTS[ROTATED], 32, np.zeros(32 * 100, np.uint8), np.zeros((1, 96), np.float32)
        )


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("rows", [1, 20])
def test_numbers_that_are_not_finite_reach_the_result(target: str, bad: float, rows: int) -> None:
    """Bytes would hide them, and with them that a row came to nothing. 3e38 is beyond f32 once rotated."""
    x = activations(rows, 192)
    x[rows // 2, 100:105] = bad
    y = _native.product(target, LAYOUTS[ROTATED], 40, pack(rotated(np.ones((40, 192), np.float32))), x)
    assert not np.isfinite(y[rows // 2]).any()
    assert np.isfinite(np.delete(y, rows // 2, axis=0)).all()
