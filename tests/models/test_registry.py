from __future__ import annotations

from dataclasses import replace

import pytest

from pagemill.base.errors import ModelError
from pagemill.models import gpt2, llama
from pagemill.models.random_init import SHAPES
from pagemill.models.registry import FAMILIES, build_plan, check_sizes, family, supported


def test_families_are_called_what_checkpoints_call_them() -> None:
    assert supported() == ("gpt2", "llama", "mistral", "qwen2")
    assert family("llama", "here") is llama
    assert family("gpt2", "here") is gpt2


def test_unknown_family_is_refused_with_what_is_supported() -> None:
    with pytest.raises(
        ModelError, match="here: models of the kind 'qwen9' are not supported; supported: gpt2, llama, mistral, qwen2"
    ):
        family("qwen9", "here")


@pytest.mark.parametrize("name", SHAPES)
def test_plan_comes_from_the_family_of_the_spec(name: str) -> None:
    plan = build_plan(SHAPES[name], max_positions=16)
    assert plan.family == SHAPES[name].family
    assert plan.max_positions == 16
    assert len(plan.kv) == SHAPES[name].num_layers


def test_every_family_names_every_weight_of_its_plan() -> None:
    for name, module in FAMILIES.items():
        shape = SHAPES["gpt2-medium" if name == "gpt2" else "llama-1b"]
        spec = replace(shape, family=name)
        untied = replace(spec, tied_head=False, attention_bias=True, mlp_bias=True, num_layers=2)
        handles = {row.handle for row in module.NAMES.rows(2)}
        assert set(build_plan(untied, max_positions=1).weights) == handles


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 0}, "num_layers is 0"),
        ({"head_dim": 257}, "head_dim is 257, outside 1 to 256"),
        ({"context_length": 1 << 25}, "context_length is 33554432"),
        ({"vocab_size": 1 << 40}, "vocab_size is"),
        ({"num_kv_heads": 5}, "32 query heads cannot be shared out among 5 KV heads"),
        ({"norm_eps": 1.0}, "epsilon of the norms is 1.0"),
        ({"window": 0}, "attention window is 0"),
    ],
)
def test_sizes_that_cannot_be_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        check_sizes(replace(SHAPES["llama-1b"], **changes), "here")  # type: ignore[arg-type]
