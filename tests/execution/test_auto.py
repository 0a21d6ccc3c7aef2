"""What weight_format "auto" means: by target and by the checkpoint's format."""

from __future__ import annotations

from pathlib import Path

import pytest

from pagemill.build import loaded_weight_bytes
from pagemill.execution.loader import ConvertedWeights
from pagemill.kernels.ops import Plan
from pagemill.kernels.target import built_targets, choose_target, rotates
from pagemill.kernels.tensors import ROTATED
from pagemill.models.checkpoint import Checkpoint, open_checkpoint
from pagemill.models.registry import build_plan
from tests.fixtures.tiny import tiny_llama

MEANS = {"scalar": "exact", "avx2": "exact", "avx512": "int8", "avx512_bf16": "int8", "amx": "int8"}


def formats(checkpoint: Checkpoint, weight_format: str, target: str) -> dict[str, str]:
    """The format of each matrix once loaded."""
    plan: Plan = build_plan(checkpoint.spec, max_positions=1)
    weights = ConvertedWeights(plan, checkpoint.tensors, weight_format, target)
    return {handle: weights.format_of(handle) for handle, each in plan.weights.items() if each.kind == "matrix"}


def test_the_table_names_every_target() -> None:
    assert set(built_targets()) <= set(MEANS)
    assert {target for target in MEANS if rotates(target)} == {target for target in MEANS if MEANS[target] == "int8"}


@pytest.mark.parametrize("target", MEANS)
@pytest.mark.parametrize("weight_format", ["q4_0", "q4_1", "q8_0"])
def test_auto_of_an_integer_checkpoint_follows_the_target(tmp_path: Path, weight_format: str, target: str) -> None:
    checkpoint = open_checkpoint(tiny_llama(tmp_path, format="gguf", weight_format=weight_format))
    found = formats(checkpoint, "auto", target)
    assert found == formats(checkpoint, MEANS[target], target)
    assert (ROTATED in found.values()) == (MEANS[target] == "int8")
    assert ROTATED not in (found["embed"], found["head"])


@pytest.mark.parametrize("target", MEANS)
@pytest.mark.parametrize("weight_format", ["f32", "f16", "bf16"])
def test_auto_of_any_other_checkpoint_is_exact(tmp_path: Path, weight_format: str, target: str) -> None:
    checkpoint = open_checkpoint(tiny_llama(tmp_path, format="gguf", weight_format=weight_format))
    assert formats(checkpoint, "auto", target) == formats(checkpoint, "exact", target)
    assert ROTATED not in formats(checkpoint, "auto", target).values()


@pytest.mark.parametrize("target", MEANS)
def test_auto_of_rows_that_cannot_be_rotated_is_exact(tmp_path: Path, target: str) -> None:
    checkpoint = open_checkpoint(
        tiny_llama(tmp_path, format="gguf", weight_format="q4_1", hidden=96, ffn=96, q_heads=6)
    )
    assert formats(checkpoint, "auto", target) == formats(checkpoint, "exact", target)


@pytest.mark.parametrize(("weight_format", "target", "name"), [
    ("auto", "avx2", "auto"), ("auto", "avx512", "auto.rotated"), ("auto", "amx", "auto.rotated"),
    ("int8", "avx2", "int8"), ("int8", "amx", "int8"), ("exact", "amx", "exact"),
])  # fmt: skip
def test_weights_have_one_name_only_where_they_are_the_same_numbers(
    tmp_path: Path, weight_format: str, target: str, name: str
) -> None:
    checkpoint = open_checkpoint(tiny_llama(tmp_path, format="gguf", weight_format="q4_1"))
    plan = build_plan(checkpoint.spec, max_positions=1)
    assert ConvertedWeights(plan, checkpoint.tensors, weight_format, target).name == name


def test_memory_is_planned_for_what_auto_means(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_llama(tmp_path, format="gguf", weight_format="q4_1"))
    num_bytes = {each: loaded_weight_bytes(checkpoint, each) for each in ("auto", "exact", "int8")}
    assert num_bytes["auto"] == num_bytes[MEANS[choose_target()]]
    assert num_bytes["exact"] < num_bytes["int8"]
