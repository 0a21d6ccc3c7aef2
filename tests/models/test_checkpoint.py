from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pagemill.base.errors import ModelError
from pagemill.models.checkpoint import open_checkpoint
from pagemill.models.registry import build_plan
from tests.fixtures.tiny import (
    gguf_arrays,
    gpt2_config,
    gpt2_weights,
    llama_config,
    llama_weights,
    tiny_gpt2,
    tiny_llama,
    write_gguf,
    write_hf,
)


def edit_config(path: Path, **changes: Any) -> Path:
    """Overwrite keys of a directory's config.json."""
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))
    return path


def edit_tensors(path: Path, *, drop: tuple[str, ...] = (), **changes: Any) -> Path:
    """Drop or overwrite tensors of a directory."""
    file = path / "model.safetensors"
    tensors = {name: array.copy() for name, array in load_file(file).items() if name not in drop}
    save_file({**tensors, **changes}, file)
    return path


def test_directory_gives_spec_handles_and_values(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_llama(tmp_path, q_heads=4, kv_heads=1, head_dim=32, ffn=96))
    weights = llama_weights(llama_config(q_heads=4, kv_heads=1, head_dim=32, ffn=96))
    spec = checkpoint.spec
    assert (spec.family, spec.num_layers, spec.hidden_dim, spec.ffn_dim) == ("llama", 2, 64, 96)
    assert (spec.num_q_heads, spec.num_kv_heads, spec.head_dim, spec.vocab_size) == (4, 1, 32, 272)
    assert (spec.context_length, spec.tied_head) == (512, False)
    assert spec.rope is not None
    assert (spec.rope.style, spec.rope.rotary_dim) == ("halves", 32)
    assert set(checkpoint.tensors) == set(build_plan(spec).weights)
    for handle, name in {
        "embed": "model.embed_tokens.weight",
        "head": "lm_head.weight",
        "layers.1.q": "model.layers.1.self_attn.q_proj.weight",
        "layers.0.down": "model.layers.0.mlp.down_proj.weight",
        "layers.1.mlp_norm.weight": "model.layers.1.post_attention_layernorm.weight",
    }.items():
        np.testing.assert_array_equal(checkpoint.tensors[handle].dequantize(), weights[name])


def test_gguf_gives_the_values_of_the_directory_in_its_own_row_order(tmp_path: Path) -> None:
    config = llama_config()
    arrays = gguf_arrays(config, llama_weights(config))
    checkpoint = open_checkpoint(tiny_llama(tmp_path, format="gguf"))
    assert checkpoint.spec.rope is not None
    assert checkpoint.spec.rope.style == "pairs"
    np.testing.assert_array_equal(checkpoint.tensors["layers.1.k"].dequantize(), arrays["blk.1.attn_k.weight"])
    assert checkpoint.spec.name == "tiny"
    assert checkpoint.source_format == "gguf"


def test_gpt2_conv1d_matrices_are_turned(tmp_path: Path) -> None:
    weights = gpt2_weights(gpt2_config())
    for wanted, format in (("f32", "safetensors"), ("bf16", "safetensors"), ("f32", "gguf")):
        checkpoint = open_checkpoint(tiny_gpt2(tmp_path, format=format, weight_format=wanted))
        qkv = checkpoint.tensors["layers.0.qkv"]
        assert qkv.shape == (192, 64)
        tolerance = 0.0 if wanted == "f32" else 2.0**-8
        np.testing.assert_allclose(qkv.dequantize(), weights["transformer.h.0.attn.c_attn.weight"].T, rtol=tolerance)


@pytest.mark.parametrize("weight_format", ["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_every_weight_format_opens(tmp_path: Path, make: Any, weight_format: str) -> None:
    checkpoint = open_checkpoint(make(tmp_path, format="gguf", weight_format=weight_format))
    assert checkpoint.weight_format == weight_format
    assert checkpoint.tensors["layers.0.o"].format == weight_format
    assert checkpoint.tensors["final_norm.weight"].format == "f32"
    assert checkpoint.num_parameters == sum(np.prod(t.shape) for t in checkpoint.tensors.values())
    assert checkpoint.num_bytes < 4 * checkpoint.num_parameters + 1


def test_tied_head_has_no_tensor_of_its_own(tmp_path: Path) -> None:
    directory = tiny_llama(tmp_path / "a", tie_word_embeddings=True)
    for path in (directory, tiny_llama(tmp_path / "b", format="gguf", tie_word_embeddings=True)):
        checkpoint = open_checkpoint(path)
        assert checkpoint.spec.tied_head
        assert "head" not in checkpoint.tensors
    edit_tensors(directory, **{"lm_head.weight": np.ones((272, 64), np.float32)})
    assert "head" not in open_checkpoint(directory).tensors


def test_biases_are_read_in_both_formats(tmp_path: Path) -> None:
    for format in ("safetensors", "gguf"):
        checkpoint = open_checkpoint(tiny_llama(tmp_path, format=format, attention_bias=True, mlp_bias=True))
        assert checkpoint.spec.attention_bias
        assert checkpoint.spec.mlp_bias
        assert checkpoint.tensors["layers.1.o.bias"].shape == (64,)
        assert checkpoint.tensors["layers.1.gate.bias"].shape == (128,)


def test_gpt2_without_prefix_and_with_mask_buffers_opens(tmp_path: Path) -> None:
    weights = gpt2_weights(gpt2_config())
    bare = {name.removeprefix("transformer."): array for name, array in weights.items()}
    bare |= {"h.0.attn.bias": np.ones((1, 1, 8, 8), np.float32), "h.0.attn.masked_bias": np.ones(1, np.float32)}
    checkpoint = open_checkpoint(write_hf(tmp_path / "m", gpt2_config(), bare))
    np.testing.assert_array_equal(checkpoint.tensors["embed"].dequantize(), weights["transformer.wte.weight"])


@pytest.mark.parametrize("dtype", [np.uint8, np.bool_])
def test_gpt2_with_mask_buffers_of_other_dtypes_opens(tmp_path: Path, dtype: Any) -> None:
    weights = gpt2_weights(gpt2_config())
    path = write_hf(tmp_path / "m", gpt2_config(), weights)
    masks = {f"transformer.h.{i}.attn.bias": np.ones((1, 1, 8, 8), dtype) for i in range(2)}
    save_file(weights | masks, path / "model.safetensors")
    assert open_checkpoint(path).num_parameters == sum(array.size for array in weights.values())
    save_file(weights | {"other.bias": np.ones(2, dtype)}, path / "model.safetensors")
    with pytest.raises(ModelError, match=r"the first 'other\.bias'"):
        open_checkpoint(path)


def test_old_rotary_buffers_are_ignored(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path)
    edit_tensors(path, **{"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)})
    assert open_checkpoint(path).spec.num_layers == 2


def test_digest_is_of_the_content_and_not_of_the_path(tmp_path: Path) -> None:
    first = open_checkpoint(tiny_llama(tmp_path / "a"))
    assert len(first.digest) == 64
    assert first.digest == open_checkpoint(tiny_llama(tmp_path / "b")).digest
    assert first.digest != open_checkpoint(tiny_llama(tmp_path / "c", seed=1)).digest
    assert first.digest != open_checkpoint(tiny_llama(tmp_path / "d", weight_format="f16")).digest
    assert first.digest != open_checkpoint(tiny_llama(tmp_path / "e", rope_theta=20000.0)).digest


def test_directory_that_holds_one_gguf_file_opens_it(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path, format="gguf")
    assert open_checkpoint(tmp_path).path == path
    tiny_llama(tmp_path, format="gguf", seed=1)
    with pytest.raises(ModelError, match=r"tiny-llama-f32-0\.gguf, tiny-llama-f32-1\.gguf.*give the file itself"):
        open_checkpoint(tmp_path)


def test_control_characters_of_a_name_are_not_kept(tmp_path: Path) -> None:
    config = llama_config()
    path = write_gguf(
        tmp_path / "m.gguf", config, llama_weights(config), metadata={"general.name": "\x1b[31mred\n" + "x" * 200}
    )
    name = open_checkpoint(path).spec.name
    assert name.isprintable()
    assert len(name) == 100


def test_missing_and_extra_tensors_are_listed_in_one_error(tmp_path: Path) -> None:
    path = edit_tensors(
        tiny_llama(tmp_path),
        drop=("model.norm.weight", "model.layers.1.mlp.up_proj.weight"),
        **{"model.layers.0.self_attn.q_norm.weight": np.ones(16, np.float32)},
    )
    with pytest.raises(ModelError) as error:
        open_checkpoint(path)
    text = str(error.value)
    assert "2 tensors are missing: model.layers.1.mlp.up_proj.weight, model.norm.weight" in text
    assert "1 tensors are unknown: model.layers.0.self_attn.q_norm.weight" in text


def test_more_layers_than_weights_gives_a_short_list(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="9000 tensors are missing") as error:
        open_checkpoint(edit_config(tiny_llama(tmp_path), num_hidden_layers=1002))
    assert len(str(error.value)) < 1500


def test_wrong_shapes_are_listed(tmp_path: Path) -> None:
    path = edit_config(tiny_llama(tmp_path), intermediate_size=96)
    with pytest.raises(ModelError, match=r"6 tensors have other shapes.*layers\.0\.down is \[64, 128\] instead of"):
        open_checkpoint(path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path, value: float) -> None:
    bad = llama_weights(llama_config())["model.layers.1.mlp.up_proj.weight"]
    bad[77, 3] = value
    path = edit_tensors(tiny_llama(tmp_path), **{"model.layers.1.mlp.up_proj.weight": bad})
    with pytest.raises(ModelError, match=r"tensor 'layers\.1\.up' holds NaN or infinite values"):
        open_checkpoint(path)


def test_vocabulary_that_disagrees_with_the_embedding_is_refused(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path, vocab=272)
    wide = tiny_llama(tmp_path / "wide", vocab=300)
    (path / "tokenizer.json").write_text((wide / "tokenizer.json").read_text())
    with pytest.raises(ModelError, match="the tokeniser has 300 tokens, the embedding 272 rows"):
        open_checkpoint(path)


def test_embedding_wider_than_the_vocabulary_is_fine(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path / "wide", vocab=320)
    narrow = tiny_llama(tmp_path, vocab=272)
    (path / "tokenizer.json").write_text((narrow / "tokenizer.json").read_text())
    assert open_checkpoint(edit_config(path, eos_token_id=None)).spec.vocab_size == 320


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, r"kind 'mamba' are not supported; supported: gpt2, llama"),
        ({"model_type": None}, "'model_type' is missing"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "supported for this model_type: LlamaForCausalLM"),
        ({"architectures": 7}, "architectures is 7"),
        ({"num_hidden_layers": 1 << 62}, "outside 1 to"),
        ({"num_hidden_layers": 5000}, "num_layers is 5000, outside 1 to 1024"),
        ({"head_dim": 320}, "head_dim is 320, outside 1 to 256"),
        ({"num_key_value_heads": 3}, "4 query heads cannot be shared out among 3 KV heads"),
        ({"head_dim": 15}, "rope rotates 15 of 15 dimensions"),
        ({"rms_norm_eps": 0.0}, "epsilon of the norms is 0.0"),
        ({"hidden_size": "64"}, "'hidden_size' is '64', not a whole number"),
    ],
)
def test_absurd_settings_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        open_checkpoint(edit_config(tiny_llama(tmp_path), **changes))


def test_unknown_gguf_architecture_is_refused_with_what_is_supported(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "falcon")
    writer.add_tensor("token_embd.weight", np.zeros((8, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="kind 'falcon' are not supported; supported: gpt2, llama"):
        open_checkpoint(path)


def test_paths_that_are_no_checkpoint_say_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist; give a GGUF file or a checkpoint directory"):
        open_checkpoint(tmp_path / "nothing")
    with pytest.raises(ModelError, match=r"neither config\.json nor exactly one GGUF file"):
        open_checkpoint(tmp_path)
    directory = tiny_llama(tmp_path)
    with pytest.raises(ModelError, match="one file of a checkpoint; give its directory"):
        open_checkpoint(directory / "model.safetensors")


@pytest.mark.parametrize("text", ["", "[1]", "{", '"llama"', "[" * 100_000, "\xff\xfe"])
def test_config_that_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    path = tiny_llama(tmp_path)
    (path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ModelError, match=r"config\.json (is not valid JSON|holds no JSON object)"):
        open_checkpoint(path)


def test_config_of_absurd_size_is_refused_unread(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path)
    with (path / "config.json").open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(ModelError, match="larger than 4194304 bytes"):
        open_checkpoint(path)
