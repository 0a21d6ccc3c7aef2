"""The reference's attention against plain loops, and the switches of what int8 rounds."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest

from pagemill.kernels import ops
from pagemill.kernels.reference import Int8Rounding, attend, attend_int8, hadamard, quantize_heads
from tests.fixtures.plans import Shape, batch, reference, tokens

NOTHING = Int8Rounding(**{each.name: False for each in fields(Int8Rounding)})
PARTS = [replace(NOTHING, **{each.name: True}) for each in fields(Int8Rounding)]


def attention(**changes: object) -> ops.Attention:
    op = ops.Attention(0, "q", "y", num_q_heads=6, num_kv_heads=2, head_dim=32, scale=32**-0.5)
    return replace(op, **changes)  # type: ignore[arg-type]


def inputs(rows: int = 5, length: int = 150) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """q [rows, 6, 32], k and v [length, 2, 32], positions of the last rows."""
    random = np.random.RandomState(4)
    q, k, v = (random.randn(*shape).astype(np.float32) for shape in ((rows, 6, 32), (length, 2, 32), (length, 2, 32)))
    return q, k, v, np.arange(length - rows, length, dtype=np.int32)


def plain(q: np.ndarray, k: np.ndarray, v: np.ndarray, op: ops.Attention, positions: np.ndarray) -> np.ndarray:
    """One row and one head at a time, in float64."""
    out = np.zeros(q.shape)
    for row, position in enumerate(positions):
        first = 0 if op.window is None else max(0, position - op.window + 1)
        for head in range(op.num_q_heads):
            kv_head = head * op.num_kv_heads // op.num_q_heads
            scores = k[first : position + 1, kv_head].astype(np.float64) @ q[row, head] * op.scale
            if op.softcap:
                scores = op.softcap * np.tanh(scores / op.softcap)
            p = np.exp(scores - scores.max())
            out[row, head] = p / p.sum() @ v[first : position + 1, kv_head]
    return out


def int8(rounding: Int8Rounding, op: ops.Attention) -> np.ndarray:
    q, k, v, positions = inputs()
    keys = quantize_heads(hadamard(k), stored=True, rounded=rounding.keys)
    values = quantize_heads(v, stored=True, rounded=rounding.values)
    return attend_int8(hadamard(q), keys, values, op, positions, rounding)


@pytest.mark.parametrize("changes", [{}, {"window": 70}, {"softcap": 3.0}])
def test_attention_is_that_of_plain_loops(changes: dict[str, object]) -> None:
    op = attention(**changes)
    assert np.abs(attend(*inputs()[:3], op, inputs()[3]) - plain(*inputs()[:3], op, inputs()[3])).max() < 1e-5


@pytest.mark.parametrize("changes", [{}, {"window": 70}, {"softcap": 3.0}])
def test_int8_attention_that_rounds_nothing_is_exact(changes: dict[str, object]) -> None:
    op = attention(**changes)
    assert np.abs(int8(NOTHING, op) - plain(*inputs()[:3], op, inputs()[3])).max() < 1e-5


def test_every_part_that_is_rounded_costs_something_and_all_cost_most() -> None:
    q, k, v, positions = inputs()
    exact = plain(q, k, v, attention(), positions)
    parts = [np.sqrt(((int8(each, attention()) - exact) ** 2).mean()) for each in PARTS]
    whole = np.sqrt(((int8(Int8Rounding(), attention()) - exact) ** 2).mean())
    named = dict(zip((each.name for each in fields(Int8Rounding)), parts, strict=True))
    assert 1e-6 < named.pop("probabilities") < 1e-5  # 16 bits instead of 8
    assert all(1e-5 < part < whole for part in named.values())
    assert whole == pytest.approx(np.sqrt(np.square(parts).sum()), rel=0.3)


def test_many_small_probabilities_beside_a_large_one_keep_their_share() -> None:
    """One position has four fifths, 255 share the rest, and their values are the opposite of its."""
    length, dim = 256, 32
    k, v = np.zeros((length, 2, dim), np.float32), np.full((length, 2, dim), -1.0, np.float32)
    k[0, :, 0], v[0] = np.log(4 * (length - 1)) * dim**0.5, 1.0
    q = np.zeros((1, 6, dim), np.float32)
    q[..., 0] = 1.0
    rounded = replace(NOTHING, probabilities=True)
    positions = np.array([length - 1], np.int32)
    kv = [quantize_heads(x, stored=True, rounded=False) for x in (hadamard(k), v)]
    assert np.abs(attend_int8(hadamard(q), *kv, attention(), positions, rounded) - 0.6).max() < 2e-3


def test_a_second_kv_cache_on_the_same_weights_gives_the_bits_of_an_executor_of_its_own() -> None:
    shape = Shape(q_heads=4, kv_heads=2)
    first, own = reference(shape), reference(shape, codec="int8")
    step = batch((tokens(33, shape.vocab), 0, [0, 1, 2]), every_row=True)
    before = first.forward(step)
    shared = first.with_kv(own.kv_spec, 96)
    assert np.array_equal(shared.forward(step), own.forward(step))
    assert np.array_equal(first.forward(step), before)
    assert not np.array_equal(shared.forward(step), before)
