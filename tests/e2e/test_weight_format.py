"""Weight formats from the options to an engine that answers: what is loaded, what the KV cache is made of."""

from __future__ import annotations

from pathlib import Path

import pytest

from pagemill.base.config import resolve_config
from pagemill.base.errors import ConfigError
from pagemill.base.params import SamplingParams
from pagemill.build import build, loaded_weight_bytes
from pagemill.llm import LLM
from pagemill.models.checkpoint import open_checkpoint
from tests.fixtures.tiny import tiny_gpt2, tiny_llama

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model"), weight_format="bf16")


@pytest.mark.parametrize(
    ("options", "codec"),
    [
        ({}, "int8"),
        ({"dtype": "bfloat16"}, "int8"),
        ({"weight_format": "q8_0"}, "int8"),
        ({"dtype": "float32"}, "f32"),
        ({"weight_format": "f32"}, "f32"),
        ({"weight_format": "q8_0", "kv_cache_dtype": "bf16"}, "bf16"),
        ({"dtype": "float32", "kv_cache_dtype": "int8"}, "int8"),
    ],
)
def test_the_kv_cache_is_int8_unless_weights_are_f32_or_another_is_asked_for(
    model: Path, options: dict[str, str], codec: str
) -> None:
    config = resolve_config(
        {"model": str(model), "kv_cache_memory_bytes": "4MiB", "packed_weights_cache": "off", **options}, environ={}
    ).config
    assert build(config).kv_spec.codec == codec


def test_an_engine_in_q8_0_answers_like_the_specification(model: Path) -> None:
    prompt = {"prompt_token_ids": list(range(20, 60))}
    answers = []
    for executor in ("native", "reference"):
        with LLM(str(model), weight_format="q8_0", executor=executor, kv_cache_memory_bytes="4MiB") as llm:
            [answer] = llm.generate([prompt], GREEDY)
            answers.append(answer.outputs[0].token_ids)
    assert answers[0] == answers[1]


def test_loaded_bytes_are_those_of_the_format(model: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(model)
    count = checkpoint.num_parameters
    found = {each: loaded_weight_bytes(checkpoint, each) for each in ("auto", "q8_0", "bf16", "f32")}
    vectors = sum(each.data.nbytes for each in checkpoint.tensors.values() if len(each.shape) == 1)
    count -= sum(each.shape[0] for each in checkpoint.tensors.values() if len(each.shape) == 1)
    assert found == {
        "auto": checkpoint.num_bytes,
        "q8_0": count * 34 // 32 + vectors,
        "bf16": 2 * count + vectors,
        "f32": 4 * count + vectors,
    }
    odd = open_checkpoint(tiny_gpt2(tmp_path, hidden=40, heads=2))
    assert loaded_weight_bytes(odd, "q8_0") > odd.num_parameters * 34 // 32


def test_a_contradiction_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dtype is bfloat16, which means weight_format bf16"):
        LLM(str(tmp_path / "nowhere.gguf"), dtype="bfloat16", weight_format="q8_0")
