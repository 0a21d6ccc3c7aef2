from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pagemill.base.errors import ModelError
from pagemill.base.model_spec import ModelSpec
from pagemill.kernels.ops import Attention
from pagemill.models import mistral
from pagemill.models.checkpoint import open_checkpoint
from pagemill.models.config_json import ConfigFile
from pagemill.models.gguf import open_gguf
from pagemill.models.registry import build_plan
from tests.fixtures.tiny import llama_config, llama_weights, mistral_config, write_gguf, write_hf


def spec_of(*missing: str, **changes: Any) -> ModelSpec:
    """The spec of a tiny config.json with changes and without the keys `missing`."""
    config = {key: value for key, value in (mistral_config() | changes).items() if key not in missing}
    return mistral.spec_from_config(ConfigFile("config.json", config), "tiny")


def test_every_layer_reads_the_window() -> None:
    plan = mistral.build(spec_of(num_hidden_layers=3))
    assert plan.family == "mistral"
    assert [op.window for op in plan.ops if isinstance(op, Attention)] == [40] * 3
    assert {(each.kind, each.window) for each in plan.kv} == {("window", 40)}


@pytest.mark.parametrize("window", [None, 512, 4096])
def test_a_window_that_nothing_reaches_over_is_none(window: int | None) -> None:
    spec = spec_of(sliding_window=window)
    assert spec.window is None
    assert {each.kind for each in mistral.build(spec).kv} == {"full"}


def test_settings_left_out_are_those_of_mistral() -> None:
    spec = spec_of(
        "sliding_window", "num_key_value_heads", "max_position_embeddings", num_attention_heads=16, head_dim=4
    )
    assert (spec.window, spec.num_kv_heads, spec.context_length) == (4096, 8, 131072)
    assert spec_of(num_key_value_heads=None).num_kv_heads == 4, "null means all heads"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sliding_window": 0}, "'sliding_window' is 0, outside 1 to"),
        ({"sliding_window": "wide"}, "'sliding_window' is 'wide', not a whole number"),
        ({"attention_bias": True}, "Pagemill's mistral does not support: attention_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"quantization_config": {}}, "quantization_config is"),
    ],
)
def test_settings_that_are_not_supported_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        spec_of(**changes)


def test_a_checkpoint_is_read_whole(tmp_path: Path) -> None:
    config = mistral_config()
    checkpoint = open_checkpoint(write_hf(tmp_path / "mistral", config, llama_weights(config)))
    assert set(checkpoint.tensors) == set(build_plan(checkpoint.spec, max_positions=1).weights)
    assert checkpoint.spec.family == "mistral"
    assert checkpoint.spec.window == 40


def test_gguf_files_say_llama(tmp_path: Path) -> None:
    config = llama_config()
    file = open_gguf(write_gguf(tmp_path / "m.gguf", config, llama_weights(config), tokenizer=False))
    with pytest.raises(ModelError, match="GGUF files of Mistral models say llama; convert tiny again"):
        mistral.spec_from_gguf(file, "tiny")
