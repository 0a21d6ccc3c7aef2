"""The largest logit where no other is wanted: the same index and the same bits as among all logits, on every target."""

from __future__ import annotations

import numpy as np
import pytest

from pagemill.base.kv_spec import KVSpec
from pagemill.kernels import _native
from pagemill.kernels.batch import Batch
from pagemill.kernels.native import NativeExecutor
from pagemill.kernels.target import available_targets
from pagemill.kernels.tensors import Tensor
from pagemill.storage.arena import Arena
from tests.fixtures.plans import BLOCKS, Shape, batch, build, quantized, tokens

TARGETS = [target for target in available_targets() if target != "amx"]  # which widens the head: nothing is ranked
FORMATS = ["q4_0", "q8_0"]


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


def rank_step(executor: NativeExecutor, step: Batch) -> tuple[np.ndarray, np.ndarray, float | None]:
    """All logits of a step and the best of each row, after all that is promised of the best ones was asserted; and the
    share of the panels that were multiplied whole to find them, None where all logits were computed."""
    logits, best = executor.forward_best(step)
    assert executor.ranked_panels == -1
    all_logits, all_best, rows = logits.copy(), best.copy(), np.arange(len(best))
    best.fill(-1)
    logits, best = executor.forward_best(step, best_only=True)
    assert best.tolist() == all_best.tolist()
    assert logits[rows, best].tobytes() == all_logits[rows, best].tobytes()
    if executor.ranked_panels < 0:
        assert logits.tobytes() == all_logits.tobytes()
        return all_logits, all_best, None
    others = logits.copy()
    others[rows, best] = 0
    assert not others.any(), "logits of an earlier step"
    return all_logits, all_best, executor.ranked_panels / (len(best) * -(-logits.shape[1] // 32))


def rank(executor: NativeExecutor, count: int, vocab: int, seed: int = 1) -> tuple[np.ndarray, float | None]:
    """The same of a step of `count` rows of one text: its logits, and the share."""
    step = batch((tokens(count, vocab, seed=seed), 0, list(range(count // 16 + 1))), every_row=True)
    logits, _, share = rank_step(executor, step)
    return logits, share


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("vocab", [33, 2047, 2048, 3001, 4096])
def test_the_best_logit_is_that_of_all_logits(target: str, format: str, threads: int, vocab: int) -> None:
    executor = executor_of(Shape(format=format, layers=1, vocab=vocab), target, threads=threads)
    shares = [rank(executor, count, vocab, seed=count)[1] for count in (1, 4, 5, 7, 20, 40)]
    wanted = [False] + [vocab > 2016] * 5  # from 64 panels on, of some rows
    assert [share is not None for share in shares] == wanted
    assert all(share is None or share < 1 / 16 for share in shares)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("format", FORMATS)
def test_equal_columns_go_to_the_first(target: str, format: str) -> None:
    """Every column stands in the vocabulary several times, in panels far apart; and scaled by a factor that rounds."""
    shape = Shape(format=format, layers=1, vocab=8200, scales=True)
    few = np.random.default_rng(3).standard_normal((2050, shape.hidden)).astype(np.float32)
    logits, share = rank(executor_of(shape, target, np.tile(few, (4, 1))), 24, shape.vocab)
    assert share is not None
    assert (logits.argmax(axis=1) < 2050).all()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("apart", [0.0, 1e-4, 1e-3, 1e-2, 1e-1])
def test_columns_that_hardly_differ(target: str, format: str, apart: float) -> None:
    """High bytes alone cannot tell these apart, or not all of them: some of the vocabulary, or all of it."""
    shape, rng = Shape(format=format, layers=1, vocab=2500), np.random.default_rng(4)
    column = rng.standard_normal(shape.hidden)
    for alike in (40, shape.vocab):
        head = rng.standard_normal((shape.vocab, shape.hidden))
        head[:: shape.vocab // alike] = 3 * (
            column + apart * rng.standard_normal((len(head[:: shape.vocab // alike]), shape.hidden))
        )
        executor = executor_of(shape, target, head.astype(np.float32), threads=2)
        shares = [rank(executor, 9, shape.vocab, seed)[1] for seed in range(6)]
        assert apart > 1e-3 or alike == 40 or shares == [None] * 6, (
            "where nothing is ruled out, all logits are computed"
        )
        assert alike != 40 or any(share is not None for share in shares)


def test_what_coarse_logits_leave_out_is_bounded_closely() -> None:
    """Columns along the low part of a row's activations, where coarse logits are as wrong as they can be."""
    shape = Shape(format="q8_0", layers=1, vocab=2080)
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
        for at, amount in ((100, 0.0), (1500, 1e-4), (2000, -1e-4)):
            head[at] = top * (1 + amount) + away / np.linalg.norm(away) * rng.uniform(-3, 3)
        rank(executor_of(shape, TARGETS[0], head), 4, shape.vocab, seed)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bits", [0x7E00, 0x7C00, 0xFC00], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("column", [0, 350, 2099])
def test_damaged_weights_are_seen(target: str, format: str, bits: int, column: int) -> None:
    shape = Shape(format=format, layers=1, vocab=2100)
    head = build(shape)[1]["head"]
    data = head.data.copy()
    data[column, :2] = np.frombuffer(np.uint16(bits).tobytes(), np.uint8)  # the scale of its first group
    logits, share = rank(executor_of(shape, target, Tensor(format, head.shape, data), threads=2), 8, shape.vocab)
    assert share is not None
    assert not np.isfinite(logits[:, column]).any()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("format", FORMATS)
def test_a_row_that_is_not_finite_harms_no_other(target: str, format: str) -> None:
    shape = Shape(format=format, layers=1, vocab=2100)
    embedding = np.random.default_rng(6).standard_normal((shape.vocab, shape.hidden)).astype(np.float32)
    ids = tokens(40, shape.vocab)
    embedding[ids[2]] = np.nan
    executor = executor_of(shape, target, embed=embedding)
    logits, best, share = rank_step(executor, batch(*[(ids[i : i + 1], 0, [i]) for i in range(40)]))
    assert np.isnan(logits[2]).all()
    assert best[2] == 0
    assert share is not None


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("size", [1e-41, 1e-38, 1e-30, 1e-25, 1e-22, 1e-19, 1e-15, 1e-9, 1e-6, 1e15, 1e18, 1e30, 1e37])
def test_activations_at_the_ends_of_floats(target: str, format: str, size: float) -> None:
    """Squares of these are no floats, or lose their bits, while many columns hardly differ."""
    shape, rng = Shape(format=format, layers=1, vocab=4096), np.random.default_rng(7)
    head = rng.standard_normal((shape.vocab, shape.hidden)).astype(np.float32)
    head[::128] = 2 * head[0] + 0.01 * rng.standard_normal((32, shape.hidden)).astype(np.float32)
    executor = executor_of(shape, target, head, final=np.full(shape.hidden, size, np.float32))
    shares = [rank(executor, 40, shape.vocab, seed)[1] for seed in range(3)]
    assert not 1e-6 <= size <= 1e15 or None not in shares


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "shape",
    [
        Shape(format="q4_1", layers=1, vocab=2100),
        Shape(format="f32", layers=1, vocab=2100),
        Shape(format="q8_0", layers=1, vocab=2100, softcap=5.0),
    ],
    ids=["with minima", "floats", "soft cap"],
)
def test_heads_of_other_kinds_write_all_logits(target: str, shape: Shape) -> None:
    assert rank(executor_of(shape, target), 8, shape.vocab)[1] is None


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("hidden", [1024, 4096])
def test_wide_heads(target: str, hidden: int) -> None:
    shape = Shape(format="q8_0", layers=1, vocab=6000, hidden=hidden, q_heads=hidden // 128, head_dim=64)
    assert rank(executor_of(shape, target, threads=2), 6, shape.vocab)[1] is not None


@pytest.mark.parametrize("target", TARGETS)
def test_only_rows_that_are_wanted_are_ranked(target: str) -> None:
    """Prompts and single tokens beside each other, so that wanted rows move to the front first."""
    shape = Shape(format="q8_0", layers=2, vocab=2100)
    executor = executor_of(shape, target, threads=2)
    texts = [tokens(n, shape.vocab, seed=n) for n in (40, 1, 7, 1, 33)]
    parts = [(text, 0, [4 * i, 4 * i + 1, 4 * i + 2]) for i, text in enumerate(texts)]
    assert rank_step(executor, batch(*parts))[2] is not None


def test_a_model_without_phases_ranks_nothing() -> None:
    model = _native.NativeModel(TARGETS[0], 1, 64, 100, 8)
    model.set_kv(np.zeros(1 << 16, np.uint8), 1 << 12, 16, 1, 0, [])
    ids, starts = np.zeros(1, np.int32), np.array([0, 1], np.int32)
    best, logits = np.full(1, -1, np.int32), np.zeros((1, 100), np.float32)
    model.step(ids, ids, starts, np.zeros((1, 1), np.int32), ids, logits, best, best_only=True)
    assert model.ranked_panels == -1
