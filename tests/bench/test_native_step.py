from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pagemill.base.config import EngineConfig
from pagemill.base.errors import CapacityError, ConfigError
from pagemill.base.kv_spec import KVSpec
from pagemill.bench import native_step
from pagemill.bench.native_step import (
    NativeSteps,
    PackedModel,
    Work,
    _positions,
    attention_arithmetic,
    demand,
    open_packed_model,
    product_arithmetic,
)
from pagemill.kernels.reference import INTEGER_FORMATS
from pagemill.kernels.target import choose_target
from pagemill.planner.machine import Machine
from tests.fixtures.tiny import llama_config, llama_weights, tiny_gpt2, tiny_llama, write_hf

CONTEXT = 100


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    path = tiny_llama(tmp_path_factory.mktemp("tiny"))
    return open_packed_model(EngineConfig(model=str(path)), choose_target(), CONTEXT)


def multiply_adds(config: dict[str, Any], work: Work) -> tuple[int, int]:
    """(products, attention) of a llama configuration, by hand."""
    hidden, ffn, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    layer = hidden * (q + 2 * kv) + q * hidden + 3 * hidden * ffn
    products = work.num_rows * config["num_hidden_layers"] * layer + work.num_seqs * hidden * config["vocab_size"]
    seen = sum(range(work.context - work.rows + 1, work.context + 1))
    return products, 2 * work.num_seqs * seen * q * config["num_hidden_layers"]


@pytest.mark.parametrize("work", [Work(1, 1), Work(3, 50), Work(1, 64, 64), Work(2, 40, 7)])
@pytest.mark.parametrize("tied", [True, False])
def test_multiply_adds_are_those_of_the_textbook(tmp_path: Path, work: Work, tied: bool) -> None:
    config = llama_config(tie_word_embeddings=tied)
    path = write_hf(tmp_path, config, llama_weights(config))
    model = open_packed_model(EngineConfig(model=str(path)), choose_target(), CONTEXT)
    needed = demand(model, KVSpec(model.plan.kv, codec="int8"), work)
    products, attention = multiply_adds(config, work)
    assert sum(needed.multiply_adds.values()) == products + attention
    assert attention in needed.multiply_adds.values()


@pytest.mark.parametrize("weight_format", ["q4_0", "q4_1", "q8_0", "bf16", "f32"])
@pytest.mark.parametrize("target", ["amx", "avx512", "scalar"])
def test_a_head_of_integers_multiplies_each_weight_twice(tmp_path: Path, weight_format: str, target: str) -> None:
    path = tiny_llama(tmp_path, format="gguf", weight_format=weight_format)
    model = open_packed_model(EngineConfig(model=str(path), weight_format="exact"), target, CONTEXT)
    work = Work(3, 50)
    needed = demand(model, KVSpec(model.plan.kv, codec="bf16"), work)
    [head] = [ref.weight for phase in model.phases if phase.kind == "head" for ref in phase.matrices]
    products, attention = multiply_adds(llama_config(), work)
    twice = model.formats[head] in INTEGER_FORMATS and target != "amx"
    again = work.num_seqs * model.matrices[head].n * model.matrices[head].k if twice else 0
    assert sum(needed.multiply_adds.values()) == products + attention + again


def test_a_table_that_is_only_looked_up_is_no_weight_that_a_step_reads(tmp_path: Path) -> None:
    sizes = {}
    for tied in (True, False):
        config = llama_config(tie_word_embeddings=tied)
        path = write_hf(tmp_path / str(tied), config, llama_weights(config))
        model = open_packed_model(EngineConfig(model=str(path)), choose_target(), CONTEXT)
        sizes[tied] = demand(model, KVSpec(model.plan.kv), Work(1, 10)).weight_bytes
        assert (sizes[tied] < model.weight_bytes) == (not tied)
    assert sizes[True] == sizes[False]


def test_keys_and_values_are_read_once_a_sequence(model: PackedModel) -> None:
    kv_spec = KVSpec(model.plan.kv, codec="bf16")
    assert demand(model, kv_spec, Work(3, 40)).kv_bytes == 3 * 40 * kv_spec.bytes_per_token
    assert demand(model, kv_spec, Work(1, 40, 40)).kv_bytes == 40 * kv_spec.bytes_per_token


@pytest.mark.parametrize(
    ("work", "seen", "read"), [(Work(1, 5), 5, 5), (Work(1, 50), 8, 8), (Work(1, 10, 4), 7 + 3 * 8, 10)]
)
def test_a_window_hides_what_lies_before_it(work: Work, seen: int, read: int) -> None:
    assert _positions(work, 8) == (seen, read)


@pytest.mark.parametrize(
    ("weight_format", "k", "target", "arithmetic"),
    [
        ("f32", 64, "amx", "f32"),
        ("f16", 64, "avx2", "f32"),
        ("bf16", 64, "amx", "tile_bf16"),
        ("bf16", 40, "amx", "bf16"),
        ("bf16", 64, "avx512_bf16", "bf16"),
        ("q4_0", 64, "amx", "tile_bf16"),
        ("q4_1", 64, "avx512", "int8"),
        ("q8_0", 64, "scalar", "int8"),
    ],
)
def test_arithmetic_follows_format_and_target(weight_format: str, k: int, target: str, arithmetic: str) -> None:
    assert product_arithmetic(weight_format, k, target) == arithmetic


@pytest.mark.parametrize(
    ("codec", "target", "head_rows", "head_dim", "arithmetic"),
    [
        ("int8", "avx512", 100, 64, "int8"),
        ("int8", "amx", 3, 64, "int8"),
        ("int8", "amx", 8, 64, "tile_int8"),
        ("int8", "amx", 100, 16, "int8"),
        ("bf16", "amx", 100, 64, "f32"),
        ("f32", "scalar", 1, 64, "f32"),
    ],
)
def test_attention_multiplies_integers_for_int8_only_and_tiles_where_rows_fill_them(
    codec: str, target: str, head_rows: int, head_dim: int, arithmetic: str
) -> None:
    assert attention_arithmetic(codec, target, head_rows, head_dim) == arithmetic


@pytest.mark.parametrize("codec", ["int8", "bf16"])
def test_the_whole_arena_holds_the_filler(model: PackedModel, codec: str) -> None:
    steps = NativeSteps(model, codec, 4 * CONTEXT, num_threads=1)
    steps.check_finite(Work(4, CONTEXT - 4))
    far, near = (steps._executor.forward_best(steps.batch(Work(n, 90)))[0].copy() for n in (4, 1))
    assert np.abs(far).min(axis=1).all()
    assert not np.array_equal(far[0], far[1])
    assert near.shape == (1, model.plan.vocab_size)


def test_a_batch_gives_every_sequence_blocks_of_its_own(model: PackedModel) -> None:
    batch = NativeSteps(model, "bf16", 300, num_threads=1).batch(Work(3, 40, 2))
    assert sorted(batch.tables.ravel().tolist()) == list(range(9))
    assert batch.positions.tolist() == [38, 39] * 3
    assert batch.starts.tolist() == [0, 2, 4, 6]
    assert batch.logit_rows.tolist() == [1, 3, 5]
    assert batch.tokens.max() < model.plan.vocab_size


def test_a_step_takes_time(model: PackedModel) -> None:
    steps = NativeSteps(model, "bf16", 300, num_threads=2)
    assert 0 < steps.seconds((Work(1, 50, 50), Work(2, 60))) < 60


def test_logits_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    config = llama_config()
    weights = llama_weights(config)
    weights["model.norm.weight"][:] = 3e38
    path = write_hf(tmp_path, config, weights)
    model = open_packed_model(EngineConfig(model=str(path)), choose_target(), CONTEXT)
    with pytest.raises(ConfigError, match="not finite"):
        NativeSteps(model, "bf16", CONTEXT, num_threads=1).check_finite(Work(1, 10))


def test_a_model_with_a_position_table_runs(tmp_path: Path) -> None:
    model = open_packed_model(EngineConfig(model=str(tiny_gpt2(tmp_path))), choose_target(), 32)
    NativeSteps(model, "f32", 64, num_threads=1).check_finite(Work(2, 32))


def test_a_shape_that_memory_cannot_hold_is_refused_before_it_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_step, "this_machine", lambda: Machine(2**30, 2**31, 2))
    with pytest.raises(CapacityError, match=r"llama-1b has 1,2.* weights, drawn in bf16, .* give --weight-format q8_0"):
        open_packed_model(EngineConfig(model="llama-1b"), choose_target(), CONTEXT)
