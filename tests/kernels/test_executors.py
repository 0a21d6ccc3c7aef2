"""The native step against the reference executor, flag by flag and on every target."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pagemill.base.kv_spec import KVSpec
from pagemill.kernels.native import NativeExecutor
from pagemill.kernels.reference import ReferenceExecutor, hadamard, quantize_heads, store
from pagemill.kernels.target import arithmetic_of, available_targets
from pagemill.storage.arena import Arena
from tests.fixtures.plans import Shape, batch, build, native, native_with_arena, quantized, reference, tokens

TARGETS = available_targets()

SHAPES = {
    "llama": Shape(),
    "gpt2": Shape(
        norm="layer",
        activation="gelu_tanh",
        gated=False,
        bias=True,
        fused_qkv=True,
        rope="none",
        positions=True,
        kv_heads=4,
    ),
    "pairs": Shape(rope="pairs", rotary_dim=16),
    "qk_norm": Shape(qk_norm=True, bias=True),
    "window": Shape(window=20),
    "softcap": Shape(softcap=5.0, scales=True),
    "gelu": Shape(activation="gelu"),
    "relu": Shape(activation="relu", gated=False),
    "head_dim 40": Shape(head_dim=40, hidden=56, vocab=101),
    "head_dim 80, group 3": Shape(head_dim=80, q_heads=6, kv_heads=2, layers=1),
    "head_dim 256, group 8": Shape(head_dim=256, q_heads=8, kv_heads=1, layers=1),
    "group 7": Shape(q_heads=7, kv_heads=1, layers=1),
    "head_dim 128, group 1": Shape(head_dim=128, q_heads=2, kv_heads=2, layers=1),
    "odd ffn": Shape(ffn=50, hidden=36, vocab=33),
}


def difference(ours: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(ours - wanted).max() / max(1.0, float(np.abs(wanted).max())))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", SHAPES)
def test_mixed_batches_agree_with_the_reference(target: str, name: str) -> None:
    """Two prefills at once, then a decode row beside a second chunk."""
    shape = SHAPES[name]
    ours, wanted = native(shape, target), reference(shape)
    a, b = tokens(45, shape.vocab), tokens(60, shape.vocab, seed=2)
    steps = [
        batch((a[:40], 0, [3, 0, 5]), (b[:17], 0, [7, 1]), every_row=True),
        batch((a[40:41], 40, [3, 0, 5]), (b[17:], 17, [7, 1, 9, 4]), every_row=True),
        batch((a[41:42], 41, [3, 0, 5])),
    ]
    for step in steps:
        assert difference(ours.forward(step), wanted.forward(step)) < 2e-5


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("codec", ["f32", "f16", "bf16", "int8"])
def test_attention_reads_keys_and_values_as_stored(target: str, codec: str) -> None:
    shape = Shape(layers=1)
    ours, wanted = native(shape, target, codec=codec, block_size=32), reference(shape, codec=codec, block_size=32)
    step = batch((tokens(70, shape.vocab), 0, [4, 2, 0]), every_row=True)
    # A key on a rounding boundary may fall to either side; beyond that only f32 noise is left.
    bound = {"f32": 2e-5, "f16": 2e-4, "bf16": 2e-3, "int8": 2e-2}[codec]
    assert difference(ours.forward(step), wanted.forward(step)) < bound


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("codec", ["f16", "bf16"])
def test_a_page_holds_what_the_codec_makes_of_the_values(target: str, codec: str) -> None:
    """The same keys and values, stored as f32 and through the codec: equal to the last bit once rounded."""
    shape = Shape(layers=1, head_dim=40, hidden=56)
    pages = {}
    for name in ("f32", codec):
        executor, arena = native_with_arena(shape, target, codec=name)
        executor.forward(batch((tokens(37, shape.vocab), 0, [4, 2, 0])))
        pages[name] = arena
    exact = np.concatenate([pages["f32"].block(i).view(np.float32) for i in (4, 2, 0)])
    stored = np.concatenate([pages[codec].block(i).view(np.uint16) for i in (4, 2, 0)])
    assert np.count_nonzero(exact) == 2 * 2 * 37 * 40
    decoded = (
        stored.view(np.float16).astype(np.float32)
        if codec == "f16"
        else (stored.astype(np.uint32) << 16).view(np.float32)
    )
    assert np.array_equal(decoded, store(codec, exact))


@pytest.mark.parametrize("target", TARGETS)
def test_an_int8_page_holds_what_the_reference_quantises(target: str) -> None:
    shape = Shape(layers=1, head_dim=40, hidden=56)
    arenas = {}
    for codec in ("f32", "int8"):
        executor, arenas[codec] = native_with_arena(shape, target, codec=codec)
        executor.forward(batch((tokens(37, shape.vocab), 0, [4, 2, 0])))
    for block in (4, 2):
        exact = arenas["f32"].block(block).view(np.float32).reshape(2, 2, 16 * 48)  # [head, keys and values, page]
        pages = arenas["int8"].block(block).reshape(2, -1)
        for head in range(2):
            keys, values = exact[head, 0].reshape(48, 16).T[:, :40], exact[head, 1].reshape(16, 48)[:, :40]
            scales = pages[head, 2 * 16 * 48 :].view(np.float16).astype(np.float32)
            stored_k = pages[head, : 16 * 48].reshape(12, 16, 4).transpose(1, 0, 2).reshape(16, 48).astype(int) - 128
            stored_v = pages[head, 16 * 48 : 2 * 16 * 48].view(np.int8).reshape(4, 48, 4).transpose(0, 2, 1)
            q, scale = quantize_heads(values, stored=True)
            assert np.array_equal(stored_v.reshape(16, 48)[:, :40], q)
            assert np.array_equal(scales[16:], scale)
            # Keys are rotated first, in f32: a rounding boundary may fall to either side.
            q, scale = quantize_heads(hadamard(keys), stored=True)
            assert np.abs(stored_k[:, :40] - q).max() <= 1
            assert np.count_nonzero(stored_k[:, :40] != q) <= 2
            assert np.allclose(scales[:16], scale, rtol=1e-3)
            assert not stored_k[:, 40:].any()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("fmt", ["f16", "bf16", "q4_0", "q4_1", "q8_0"])
def test_weight_formats_agree_with_the_reference(target: str, fmt: str) -> None:
    shape = Shape(format=fmt, q_heads=4, kv_heads=2, head_dim=32)
    ours, wanted = native(shape, target), reference(shape, target=target)
    step = batch((tokens(33, shape.vocab), 0, [0, 1, 2]), every_row=True)
    # Where an activation lies on a rounding boundary, f32 noise moves it by one quantisation step; on a model this
    # small such a step shows. The integers themselves are compared exactly in test_products.
    bound = 2e-5 if fmt == "f16" else 2e-2
    ours_y, wanted_y = ours.forward(step), wanted.forward(step)
    assert difference(ours_y, wanted_y) < bound
    assert np.median(np.abs(ours_y - wanted_y)) < bound / 4


class OneByteHead(ReferenceExecutor):
    """The reference with a head whose activations have 8 bits, as those of other products."""

    def _product(self, x: np.ndarray, weight: str, bias: str | None, *, two_bytes: bool = False) -> np.ndarray:
        return super()._product(x, weight, bias)


@pytest.mark.parametrize("target", [each for each in TARGETS if arithmetic_of(each) == "int8"])
@pytest.mark.parametrize("fmt", ["q4_0", "q4_1", "q8_0"])
def test_the_heads_activations_have_two_bytes(target: str, fmt: str) -> None:
    """The layers multiply floats, so that what the head rounds is nearly all that is rounded."""
    plan, weights = build(Shape(layers=1))
    weights["head"] = quantized(weights["head"].dequantize(), fmt)
    spec = KVSpec(plan.kv, 16, "f32")
    arena = Arena.allocate(spec, 4)
    ours = NativeExecutor(plan, weights, spec, arena.data, 4, target=target, num_threads=1)
    wanted, coarse = (each(plan, weights, spec, 4) for each in (ReferenceExecutor, OneByteHead))
    step = batch((tokens(40), 0, [0, 1, 2]), every_row=True)
    logits, bound = wanted.forward(step), 1e-4
    assert difference(ours.forward(step), logits) < bound
    assert difference(coarse.forward(step), logits) > 10 * bound


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "name", ["window", "softcap", "qk_norm", "pairs", "head_dim 40", "head_dim 80, group 3", "group 7"]
)
def test_int8_keys_and_values_agree_with_the_reference_in_every_shape(target: str, name: str) -> None:
    shape = SHAPES[name]
    ours, wanted = native(shape, target, codec="int8"), reference(shape, codec="int8")
    step = batch((tokens(70, shape.vocab), 0, [4, 2, 0, 1, 3]), every_row=True)
    assert difference(ours.forward(step), wanted.forward(step)) < 2e-2


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("chunk", [1, 600])
def test_equal_weights_of_a_whole_split_fit_its_integer_sums(target: str, chunk: int) -> None:
    """Copies of one token: each position weighs the most there is, and their mean is what the first one says."""
    executor = native(Shape(layers=1, vocab=50, rope="none"), target, codec="int8")
    ids, table = np.full(600, 7, np.int32), list(range(38))
    executor.forward(batch((ids[: 600 - chunk], 0, table))) if chunk < 600 else None
    last = executor.forward(batch((ids[600 - chunk :], 600 - chunk, table), every_row=True))
    first = executor.forward(batch((ids[:1], 0, [50])))
    assert difference(last, np.broadcast_to(first, last.shape)) < 2e-6


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("fmt", ["f16", "bf16"])
def test_widths_that_fill_no_vector_agree_with_the_reference(target: str, fmt: str) -> None:
    shape = Shape(format=fmt, hidden=37, ffn=51, vocab=33)
    ours, wanted = native(shape, target), reference(shape)
    step = batch((tokens(21, 33), 0, [0, 1]), every_row=True)
    assert difference(ours.forward(step), wanted.forward(step)) < 2e-2


@pytest.mark.parametrize("target", TARGETS)
def test_long_contexts_cross_splits(target: str) -> None:
    shape = Shape(layers=1, vocab=50)
    ours, wanted = native(shape, target, block_size=32, threads=1), reference(shape, block_size=32)
    ids, table = tokens(600, 50), list(range(20, 0, -1))
    for start in range(0, 600, 200):
        step = batch((ids[start : start + 200], start, table))
        assert difference(ours.forward(step), wanted.forward(step)) < 2e-5


def test_lowered_plan_that_has_no_phase_is_refused() -> None:
    from dataclasses import replace

    from pagemill.base.errors import ModelError
    from pagemill.kernels.ops import Slice
    from pagemill.kernels.plan import lower
    from tests.fixtures.plans import build

    plan, _ = build(Shape())
    with pytest.raises(ModelError, match="cannot be lowered: op 1 is Slice"):
        lower(replace(plan, ops=(plan.ops[0], Slice("x", "y", 0, 4), *plan.ops[1:])))


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("token id out of range", {"tokens": np.array([1, 100], np.int32)}),
        ("token id out of range", {"tokens": np.array([-1, 3], np.int32)}),
        ("position out of range", {"positions": np.array([1199, 1200], np.int32)}),
        ("consecutive", {"positions": np.array([0, 2], np.int32)}),
        ("block id out of range", {"tables": np.array([[96]], np.int32)}),
        ("block id out of range", {"tables": np.array([[-1]], np.int32)}),
        ("too short", {"positions": np.array([15, 16], np.int32)}),
        ("cover the rows", {"starts": np.array([0, 3], np.int32)}),
        ("without rows", {"starts": np.array([0, 0, 2], np.int32), "tables": np.zeros((2, 1), np.int32)}),
        ("logit row", {"logit_rows": np.array([2], np.int32)}),
    ],
)
def test_wrong_batches_are_refused_before_memory_is_touched(message: str, change: dict[str, np.ndarray]) -> None:
    from dataclasses import replace

    executor = native(Shape(layers=1), TARGETS[0])
    with pytest.raises(ValueError, match=message):
        executor.forward(replace(batch((tokens(2), 0, [0])), **change))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("vocab", [1, 33, 100, 1000])
def test_the_largest_logit_of_each_row_is_found(target: str, threads: int, vocab: int) -> None:
    executor, _ = native_with_arena(Shape(layers=1, vocab=vocab), target, threads=threads)
    for count in (1, 40):
        logits, best = executor.forward_best(batch((tokens(count, vocab), 0, [0, 1, 2]), every_row=True))
        assert best.tolist() == logits.argmax(axis=1).tolist()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("bad", [(0,), (700,), (3, 700), (999,)])
def test_the_first_nan_counts_as_largest(target: str, threads: int, bad: tuple[int, ...]) -> None:
    """A NaN must not hide: whoever samples fails the row by it."""
    plan, weights = build(Shape(layers=1, vocab=1000))
    head = weights["head"].dequantize()
    head[list(bad)] = np.nan
    weights["head"] = quantized(head, "f32")
    spec = KVSpec(plan.kv, 16, "f32")
    arena = Arena.allocate(spec, 4)
    executor = NativeExecutor(plan, weights, spec, arena.data, 4, target=target, num_threads=threads)
    logits, best = executor.forward_best(batch((tokens(5, 1000), 0, [0]), every_row=True))
    assert np.isnan(logits[:, list(bad)]).all()
    assert best.tolist() == [bad[0]] * 5


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("format", "rotates"), [("q4_1", False), ("q8_0", False), ("bf16", False), ("f32", False), ("q4_1", True)]
)
def test_bits_do_not_depend_on_who_multiplies_a_panel(target: str, format: str, rotates: bool) -> None:
    """More threads than cores: those that run take the panels of those that do not."""
    shape = Shape(format=format, rotated=rotates, hidden=64, ffn=256, layers=3, vocab=1000)
    alone, many = native(shape, target), native(shape, target, threads=5)
    for start, count in ((0, 1), (1, 2), (3, 3), (6, 20), (26, 33)):
        step = batch((tokens(59, shape.vocab)[start : start + count], start, list(range(4))), every_row=True)
        logits, best = alone.forward_best(step)
        for _ in range(4):
            others, found = many.forward_best(step)
            assert others.tobytes() == logits.tobytes()
            assert found.tolist() == best.tolist()


def test_equal_logits_go_to_the_lowest_index() -> None:
    plan, weights = build(Shape(layers=1, vocab=600))
    weights["head"] = quantized(np.zeros((600, 64), np.float32), "f32")
    spec = KVSpec(plan.kv, 16, "f32")
    arena = Arena.allocate(spec, 4)
    executor = NativeExecutor(plan, weights, spec, arena.data, 4, target=TARGETS[0], num_threads=2)
    assert executor.forward_best(batch((tokens(5, 600), 0, [0])))[1].tolist() == [0]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("rotates", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_logits_do_not_depend_on_which_rows_are_wanted(target: str, rotates: bool, threads: int) -> None:
    """After the last attention only wanted rows go on, many or few, and in any order; keys and values are all there."""
    shape = Shape(format="q4_1", rotated=rotates, hidden=64, ffn=64, layers=2)
    ids, table = tokens(72, shape.vocab), list(range(5))
    whole = native(shape, target, threads=threads)
    every = whole.forward(batch((ids[:70], 0, table), every_row=True))
    after = whole.forward(batch((ids[70:], 70, table)))
    for rows in ([69], [0, 3, 50, 68], list(range(66)), [7, 2, 2], []):
        executor = native(shape, target, threads=threads)
        part = batch((ids[:70], 0, table))
        logits = executor.forward(replace(part, logit_rows=np.array(rows, np.int32)))
        assert np.array_equal(logits, every[rows])
        assert np.array_equal(executor.forward(batch((ids[70:], 70, table))), after)
