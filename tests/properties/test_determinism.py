"""The determinism contract: on one build, target, weight format and KV codec the same request gives the same bits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagemill.execution.loader import rotated_handles
from pagemill.kernels.native import NativeExecutor
from pagemill.kernels.target import available_targets, rotates
from pagemill.kernels.tensors import ROTATED
from tests.fixtures.plans import Shape, batch, build, native, tokens

TARGETS = available_targets()
LENGTH = 530
CASES = [
    ("f32", "f32"),
    ("f16", "f16"),
    ("bf16", "bf16"),
    ("q4_0", "bf16"),
    ("q4_1", "bf16"),
    ("q8_0", "f16"),
    ("q4_1", "int8"),
    ("rotated", "int8"),  # the default's arithmetic on targets that rotate; weight_format int8 on all
]
# Random schedules, on the best target; what is rotated on all.
SCHEDULES = [(TARGETS[0], "q4_1", codec) for codec in ("f16", "bf16", "int8")]
SCHEDULES += [(target, "rotated", "int8") for target in TARGETS]


def shape(fmt: str) -> Shape:
    """A small model in a weight format, or a q4_1 model whose layers are "rotated", in blocks of 256, 128 and 64."""
    if fmt == "rotated":
        return Shape(
            format="q4_1", rotated=True, layers=2, hidden=192, q_heads=6, kv_heads=2, head_dim=32, ffn=320, vocab=64
        )
    return Shape(format=fmt, layers=2, q_heads=6, kv_heads=2, vocab=64)


def whole(executor: NativeExecutor, ids: np.ndarray, table: list[int]) -> np.ndarray:
    return executor.forward(batch((ids, 0, table), every_row=True))


def in_chunks(executor: NativeExecutor, ids: np.ndarray, table: list[int], size: int) -> np.ndarray:
    parts = [executor.forward(batch((ids[i : i + size], i, table), every_row=True)) for i in range(0, len(ids), size)]
    return np.concatenate(parts)


@pytest.mark.parametrize("weight_format", ["auto", "int8"])
def test_the_rotated_case_is_rotated_as_the_loader_does_it(weight_format: str) -> None:
    plan, weights = build(shape("rotated"))
    found = {handle for handle, each in weights.items() if each.format == ROTATED}
    matrices = {handle for handle, each in plan.weights.items() if each.kind == "matrix"}
    assert found == matrices - {"embed", "head"}
    stored = build(replace(shape("rotated"), rotated=False))[1]
    assert all(stored[handle].format == "q4_1" for handle in matrices)
    for target in TARGETS:
        expected = found if weight_format == "int8" or rotates(target) else set()
        assert rotated_handles(plan, stored, weight_format, target) == expected


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("fmt", "codec"), CASES)
def test_chunks_give_the_bits_of_one_piece(target: str, fmt: str, codec: str) -> None:
    length = LENGTH if target != "scalar" else 290
    executor = native(shape(fmt), target, codec=codec)
    ids = tokens(length, 64)
    expected = whole(executor, ids, list(range(40)))
    for size in (1, 7, 64, 512):
        if size == 1 and target == "scalar":
            continue
        assert np.array_equal(in_chunks(executor, ids, list(range(95, 55, -1)), size), expected), size


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("fmt", "codec"), CASES)
def test_a_batch_gives_the_bits_of_each_alone(target: str, fmt: str, codec: str) -> None:
    executor = native(shape(fmt), target, codec=codec)
    lengths = [1, 17, 40, 5, 128, 3]
    prompts = [tokens(n, 64, seed=n) for n in lengths]
    tables, at = [], 0
    for n in lengths:
        tables.append(list(range(at, at + -(-(n + 1) // 16))))
        at += len(tables[-1])
    alone = [whole(executor, p, [60, 61, 62, 63, 64, 65, 66, 67, 68])[-1] for p in prompts]
    together = executor.forward(batch(*((p, 0, t) for p, t in zip(prompts, tables, strict=True))))
    assert np.array_equal(together, np.stack(alone))
    # One more token each: decode rows beside a fresh prefill.
    new = tokens(30, 64, seed=99)
    mixed = executor.forward(
        batch(
            *((np.array([i], np.int32), len(p), t) for i, (p, t) in enumerate(zip(prompts, tables, strict=True))),
            (new, 0, [70, 71]),
        )
    )
    for i, p in enumerate(prompts):
        ids = np.append(p, np.int32(i))
        assert np.array_equal(mixed[i], whole(executor, ids, [80, 81, 82, 83, 84, 85, 86, 87, 88])[-1])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("fmt", "codec"), CASES)
def test_two_threads_give_the_bits_of_one(target: str, fmt: str, codec: str) -> None:
    one, two = (native(shape(fmt), target, codec=codec, threads=n) for n in (1, 2))
    ids = tokens(300, 64)
    for executor in (one, two):
        executor.forward(batch((ids[:299], 0, list(range(30)))))
    last = [e.forward(batch((ids[299:], 299, list(range(30))))) for e in (one, two)]
    assert np.array_equal(*last)
    assert np.array_equal(whole(one, ids[:100], list(range(30))), whole(two, ids[:100], list(range(30))))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("codec", ["f16", "bf16", "int8"])
def test_windows_give_the_same_bits_in_chunks(target: str, codec: str) -> None:
    executor = native(Shape(window=33, vocab=64), target, codec=codec)
    ids = tokens(290, 64)
    expected = whole(executor, ids, list(range(20)))
    for size in (7, 64):
        assert np.array_equal(in_chunks(executor, ids, list(range(30, 50)), size), expected)


@pytest.mark.parametrize(("target", "fmt", "codec"), SCHEDULES)
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_schedule_gives_the_bits_of_one_piece(target: str, fmt: str, codec: str, data: st.DataObject) -> None:
    """Random chunk sizes, random company, random blocks."""
    executor = native(shape(fmt), target, codec=codec)
    count = data.draw(st.integers(1, 3))
    lengths = [data.draw(st.integers(1, 300)) for _ in range(count)]
    prompts = [tokens(n, 64, seed=n + 7 * i) for i, n in enumerate(lengths)]
    blocks = data.draw(st.permutations(range(96)))
    tables = [list(blocks[i * 20 : (i + 1) * 20]) for i in range(count)]
    done, last = [0] * count, [np.empty(0)] * count
    while any(d < n for d, n in zip(done, lengths, strict=True)):
        running = [i for i in range(count) if done[i] < lengths[i]]
        sizes = {i: data.draw(st.integers(1, lengths[i] - done[i])) for i in running}
        parts = [(prompts[i][done[i] : done[i] + sizes[i]], done[i], tables[i]) for i in running]
        logits = executor.forward(batch(*parts))
        for row, i in enumerate(running):
            done[i] += sizes[i]
            last[i] = logits[row]
    for i in range(count):
        assert np.array_equal(last[i], whole(executor, prompts[i], list(range(20)))[-1])
