from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pagemill.base.errors import ModelError
from pagemill.base.model_spec import ModelSpec
from pagemill.kernels.ops import Attention
from pagemill.models import qwen2
from pagemill.models.checkpoint import open_checkpoint
from pagemill.models.config_json import ConfigFile
from pagemill.models.gguf import open_gguf
from pagemill.models.registry import build_plan
from tests.fixtures.tiny import llama_config, llama_weights, qwen2_config, write_gguf, write_hf


def spec_of(**changes: Any) -> ModelSpec:
    """The spec of a tiny config.json of four layers with changes; None removes a key."""
    config = {key: value for key, value in (qwen2_config(layers=4) | changes).items() if value is not None}
    return qwen2.spec_from_config(ConfigFile("config.json", config), "tiny")


def windows(spec: ModelSpec) -> list[int | None]:
    plan = qwen2.build(spec)
    found = [op.window for op in plan.ops if isinstance(op, Attention)]
    assert [each.window for each in plan.kv] == found
    return found


def test_upper_layers_read_the_window() -> None:
    assert windows(spec_of(max_window_layers=1)) == [None, 40, 40, 40]
    assert windows(spec_of(max_window_layers=0)) == [40] * 4


@pytest.mark.parametrize(
    "changes",
    [{"use_sliding_window": False}, {"use_sliding_window": None}, {"max_window_layers": None}, {"sliding_window": 600}],
)
def test_layers_read_all_where_the_window_is_off_or_reaches_none(changes: dict[str, Any]) -> None:
    assert windows(spec_of(**changes)) == [None] * 4


def test_layers_are_named_one_by_one() -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    assert windows(spec_of(layer_types=kinds)) == [40, None, 40, None]


@pytest.mark.parametrize("kinds", ["full_attention", ["full_attention"] * 3, ["full_attention"] * 3 + ["chunked"]])
def test_kinds_of_layers_that_are_not_known_are_refused(kinds: object) -> None:
    with pytest.raises(ModelError, match=r"layer_types is .* for each of 4 layers"):
        spec_of(layer_types=kinds)


def test_q_k_and_v_have_biases_and_o_has_none() -> None:
    weights = qwen2.build(spec_of()).weights
    assert {f"layers.0.{each}.bias" for each in "qkv"} <= set(weights)
    assert not [name for name in weights if name.endswith(("o.bias", "gate.bias", "up.bias", "down.bias"))]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sliding_window": 0}, "'sliding_window' is 0, outside 1 to"),
        ({"use_sliding_window": "yes"}, "'use_sliding_window' is 'yes', not true or false"),
        ({"hidden_act": "gelu"}, "Pagemill's qwen2 does not support: hidden_act is 'gelu'"),
    ],
)
def test_settings_that_are_not_supported_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        spec_of(**changes)


def test_a_checkpoint_is_read_whole(tmp_path: Path) -> None:
    config = qwen2_config()
    checkpoint = open_checkpoint(write_hf(tmp_path / "qwen2", config, llama_weights(config)))
    assert set(checkpoint.tensors) == set(build_plan(checkpoint.spec, max_positions=1).weights)
    assert (checkpoint.spec.window, checkpoint.spec.window_layers) == (40, (1,))


def test_gguf_files_are_refused(tmp_path: Path) -> None:
    config = llama_config()
    file = open_gguf(write_gguf(tmp_path / "m.gguf", config, llama_weights(config), tokenizer=False))
    with pytest.raises(ModelError, match="GGUF files of qwen2 are not supported; use the Hugging Face checkpoint"):
        qwen2.spec_from_gguf(file, "tiny")
