"""The largest logit where no other is wanted: the same index and the same bits as among all logits, on every target."""

from __future__ import annotations

import numpy as np
import pytest

from pagemill.base.kv_spec import KVSpec
from pagemill.kernels.native import NativeExecutor
from pagemill.kernels.target import available_targets
from pagemill.kernels.tensors import Tensor
from pagemill.storage.arena import Arena
from tests.fixtures.plans import BLOCKS, Shape, batch, build, quantized, tokens

TARGETS = [target for target in available_targets() if target != "amx"]  # which widens the head: nothing is ranked
FORMATS = ["q4_0", "q8_0"]
UNTOUCHED = np.float32(7e7)  # stands where no logit was written


def executor_of(
    shape: Shape, target: str, head: Tensor | np.ndarray | None = None, *, threads: int = 1, **vectors: np.ndarray
) -> NativeExecutor:
    """head: f32 [vocab, hidden], stored in the shape's format, or as it is. vectors: weights by handle, as f32."""
    plan, weights = build(shape)
    if head is not None:
        weights["head"] = head if isinstance(head, Tensor) else quantized(head, shape.format)
    weights |= {name: quantized(values, "f32") for name, values in vectors.items()}
    spec = KVSpec(plan.kv, 16, "f32")
    arena = Arena.allocate(spec, BLOCKS)
    return NativeExecutor(plan, weights, spec, arena.data, BLOCKS, target=target, num_threads=threads)


def rank(executor: NativeExecutor, count: int, vocab: int, seed: int = 1) -> tuple[np.ndarray, float]:
    """The logits of `count` rows, after all that is promised of the best one was asserted, and the share of logits that
    were written to find it."""
    step = batch((tokens(count, vocab, seed=seed), 0, list(range(count // 16 + 1))), every_row=True)
    logits, best = executor.forward_best(step)
    all_logits, all_best, rows = logits.copy(), best.copy(), np.arange(count)
    logits.fill(UNTOUCHED)
    best.fill(-1)
    logits, best = executor.forward_best(step, best_only=True)
    assert best.tolist() == all_best.tolist()
    assert logits[rows, best].tobytes() == all_logits[rows, best].tobytes()
    written = logits != UNTOUCHED
    assert logits[written].tobytes() == all_logits[written].tobytes()
    return all_logits, float(written.mean())


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("vocab", [33, 1000, 4096])
def test_the_best_logit_is_that_of_all_logits(target: str, format: str, threads: int, vocab: int) -> None:
    executor = executor_of(Shape(format=format, layers=1, vocab=vocab), target, threads=threads)
    shares = [rank(executor, count, vocab, seed=count)[1] for count in (1, 4, 5, 7, 20, 40)]
    assert max(shares[1:]) < (0.2 if vocab > 100 else 1.01), "next to nothing was ruled out"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("format", FORMATS)
def test_equal_columns_go_to_the_first(target: str, format: str) -> None:
    """Every column stands in the vocabulary several times, in panels far apart; and scaled by a factor that rounds."""
    shape = Shape(format=format, layers=1, vocab=1100, scales=True)
    few = np.random.default_rng(3).standard_normal((110, shape.hidden)).astype(np.float32)
    logits, _ = rank(executor_of(shape, target, np.tile(few, (10, 1))), 24, shape.vocab)
    assert (logits.argmax(axis=1) < 110).all()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("apart", [0.0, 1e-4, 1e-3, 1e-2, 1e-1])
def test_columns_that_hardly_differ(target: str, format: str, apart: float) -> None:
    """High bytes alone cannot tell these apart, or not all of them."""
    shape, rng = Shape(format=format, layers=1, vocab=700), np.random.default_rng(4)
    column = rng.standard_normal(shape.hidden)
    head = column + apart * rng.standard_normal((shape.vocab, shape.hidden))
    executor = executor_of(shape, target, head.astype(np.float32), threads=2)
    for seed in range(6):
        _, share = rank(executor, 9, shape.vocab, seed)
        assert apart > 1e-3 or share == 1.0


def test_what_coarse_logits_leave_out_is_bounded_closely() -> None:
    """Columns along the low part of a row's activations, where coarse logits are as wrong as they can be."""
    shape = Shape(format="q8_0", layers=1, vocab=960)
    rng = np.random.default_rng(5)
    for seed in range(30):
        head = rng.standard_normal((shape.vocab, shape.hidden)).astype(np.float32)
        head[: shape.vocab // 2] *= rng.choice([0.01, 1, 30])
        probe = executor_of(shape, TARGETS[0], head)
        logits = probe.forward(batch((tokens(4, shape.vocab, seed=seed), 0, [0]), every_row=True))
        values = np.linalg.lstsq(quantized(head, "q8_0").dequantize(), logits[3], rcond=None)[0].reshape(-1, 32)
        scale = np.abs(values).max(axis=1, keepdims=True) / 32512
        whole = np.rint(values / scale)
        low = ((whole - 256 * np.floor((whole + 128) / 256)) * scale).reshape(-1)
        row = values.reshape(-1)
        top = logits[3].max() * row / (row @ row)  # a column whose logit is the largest so far
        away = low - (low @ row) / (row @ row) * row
        for at, amount in ((100, 0.0), (500, 1e-4), (900, -1e-4)):
            head[at] = top * (1 + amount) + away / np.linalg.norm(away) * rng.uniform(-3, 3)
        rank(executor_of(shape, TARGETS[0], head), 4, shape.vocab, seed)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bits", [0x7E00, 0x7C00, 0xFC00], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("column", [0, 350, 699])
def test_damaged_weights_are_seen(target: str, format: str, bits: int, column: int) -> None:
    shape = Shape(format=format, layers=1, vocab=700)
    head = build(shape)[1]["head"]
    data = head.data.copy()
    data[column, :2] = np.frombuffer(np.uint16(bits).tobytes(), np.uint8)  # the scale of its first group
    logits, _ = rank(executor_of(shape, target, Tensor(format, head.shape, data), threads=2), 8, shape.vocab)
    assert not np.isfinite(logits[:, column]).any()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("format", FORMATS)
def test_a_row_that_is_not_finite_harms_no_other(target: str, format: str) -> None:
    shape = Shape(format=format, layers=1, vocab=700)
    embedding = np.random.default_rng(6).standard_normal((shape.vocab, shape.hidden)).astype(np.float32)
    ids = tokens(8, shape.vocab)
    embedding[ids[2]] = np.nan
    executor = executor_of(shape, target, embed=embedding)
    parts = [(ids[i : i + 1], 0, [i]) for i in range(8)]
    logits, best = executor.forward_best(batch(*parts))
    wanted, values = best.copy(), logits[np.arange(8), best].copy()
    logits.fill(UNTOUCHED)
    logits, best = executor.forward_best(batch(*parts), best_only=True)
    assert np.isnan(logits[2]).any()
    assert best.tolist() == wanted.tolist()
    assert logits[np.arange(8), best].tobytes() == values.tobytes()
    assert (logits[3] == UNTOUCHED).any()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("size", [1e-38, 1e-20, 1e18, 1e30, 1e37])
def test_activations_at_the_ends_of_floats(target: str, size: float) -> None:
    shape = Shape(format="q8_0", layers=1, vocab=700)
    rank(executor_of(shape, target, final=np.full(shape.hidden, size, np.float32)), 8, shape.vocab)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "shape",
    [
        Shape(format="q4_1", layers=1, vocab=700),
        Shape(format="f32", layers=1, vocab=700),
        Shape(format="q8_0", layers=1, vocab=700, softcap=5.0),
    ],
    ids=["with minima", "floats", "soft cap"],
)
def test_heads_of_other_kinds_write_all_logits(target: str, shape: Shape) -> None:
    assert rank(executor_of(shape, target), 8, shape.vocab)[1] == 1.0


@pytest.mark.parametrize("target", TARGETS)
def test_only_rows_that_are_wanted_are_ranked(target: str) -> None:
    """Prompts and single tokens beside each other, so that wanted rows move to the front first."""
    shape = Shape(format="q8_0", layers=2, vocab=1000)
    executor = executor_of(shape, target, threads=2)
    texts = [tokens(n, shape.vocab, seed=n) for n in (40, 1, 7, 1, 33)]
    parts = [(text, 0, [4 * i, 4 * i + 1, 4 * i + 2]) for i, text in enumerate(texts)]
    logits, best = executor.forward_best(batch(*parts))
    wanted, values = best.copy(), logits[np.arange(5), best].copy()
    logits, best = executor.forward_best(batch(*parts), best_only=True)
    assert best.tolist() == wanted.tolist()
    assert logits[np.arange(5), best].tobytes() == values.tobytes()
