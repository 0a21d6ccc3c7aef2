"""Memory of the arena that comes before it is written: how much, when, and that no result tells of it."""

from __future__ import annotations

import gc
import math
import os
import time
from pathlib import Path

import numpy as np
import pytest

from pagemill.kernels.native import NativeExecutor
from tests.fixtures.plans import Shape, batch, native, tokens

SHAPE = Shape(layers=2, head_dim=64, kv_heads=2, q_heads=4)
MB = 1 << 20
AHEAD = 256 * MB
LONG_S = 120.0


def model_with(num_bytes: int) -> NativeExecutor:
    model = native(SHAPE, "scalar")
    model.resize(num_bytes // model.kv_spec.block_bytes)
    return model


def step(model: NativeExecutor, block: int = 0) -> np.ndarray:
    return model.forward(batch((tokens(3, SHAPE.vocab, seed=block), 0, [block])))


def settled(model: NativeExecutor) -> int:
    """Bytes that are there once all that was asked for is."""
    assert model.wait_prefaulted(LONG_S)
    return model.prefaulted_bytes


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_memory_ahead_comes_where_no_step_runs() -> None:
    model = model_with(48 * MB)
    before = resident_bytes()
    assert model.wait_prefaulted(0.0), "nothing is asked for before anything is used"
    assert model.prefaulted_bytes == 0
    step(model)
    assert settled(model) == 48 * MB
    assert resident_bytes() - before > 40 * MB


def test_a_new_arena_has_memory_ahead_too() -> None:
    model = model_with(32 * MB)
    step(model)
    assert settled(model) == 32 * MB
    before = resident_bytes()
    model.resize(64 * MB // model.kv_spec.block_bytes)
    assert model.prefaulted_bytes == 0
    step(model)
    assert settled(model) == 64 * MB
    assert resident_bytes() - before > 24 * MB


def test_so_much_is_kept_ahead_of_the_highest_block_that_is_used() -> None:
    """It is asked for again when half of it is used, and no memory is had twice."""
    model = model_with(500 * MB)
    size = model.kv_spec.block_bytes
    before = resident_bytes()
    for used, wanted in ((0, AHEAD), (100 * MB, AHEAD), (200 * MB, 200 * MB + AHEAD)):
        high = used // size
        text = tokens(20, SHAPE.vocab)
        model.forward(batch((text, 0, [high + 1, high]), (text[:3], 0, [0 if high else 2])))
        assert 0 <= settled(model) - wanted <= 3 * size
    assert resident_bytes() - before < 200 * MB + AHEAD + 20 * MB


def test_steps_are_not_disturbed() -> None:
    """While steps follow each other at once nothing is asked of the system; what was asked for comes when they end.
    On a busy machine a test can stand still between two steps: one of many tries is enough."""

    def is_left_alone() -> bool:
        model = model_with(48 * MB)
        until_s = time.monotonic() + 0.1
        while time.monotonic() < until_s:
            step(model)
        num_bytes = model.prefaulted_bytes
        assert settled(model) == 48 * MB
        return num_bytes == 0

    assert any(is_left_alone() for _ in range(20))


@pytest.mark.parametrize("seconds", [math.inf, 1e300, math.nan, -1.0, 0.0])
def test_any_time_to_wait_is_good(seconds: float) -> None:
    model = model_with(16 * MB)
    step(model)
    finished = model.wait_prefaulted(seconds)
    assert finished or not seconds > 0.0
    assert settled(model) == 16 * MB


def test_a_small_arena_has_no_memory_ahead() -> None:
    model = model_with(8 * MB)
    for block in (0, 1, 2):
        step(model, block)
    assert model.wait_prefaulted(0.0)
    assert model.prefaulted_bytes == 0


def test_results_are_the_same_while_memory_comes() -> None:
    """Everything written while the memory around it comes is read back in the end."""
    model, wanted = model_with(64 * MB), native(SHAPE, "scalar")
    per_piece = 2 * MB // model.kv_spec.block_bytes
    text = tokens(18, SHAPE.vocab)
    blocks = [[index * per_piece, index * per_piece + 1] for index in range(31)]
    for table in blocks:
        model.forward(batch((text[:17], 0, table)))
    assert model.wait_prefaulted(LONG_S)
    wanted.forward(batch((text[:17], 0, [0, 1])))
    last = wanted.forward(batch((text[17:], 17, [0, 1])))
    for table in blocks:
        assert np.array_equal(model.forward(batch((text[17:], 17, table))), last)


def test_an_arena_may_go_while_its_memory_comes() -> None:
    """A new size, or the end, waits for the piece that is under way and for no more."""
    for _ in range(8):
        model = model_with(32 * MB)
        kept = step(model, 1)
        assert np.array_equal(step(model, 1), kept)
        model.resize(40 * MB // model.kv_spec.block_bytes)
        assert np.array_equal(step(model, 1), kept)
        assert np.array_equal(step(model, 1), kept)
        del model
        gc.collect()
