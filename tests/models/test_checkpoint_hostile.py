"""Any value under any key of a checkpoint's descriptions: it opens or is refused with ModelError, nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pagemill.base.errors import ModelError
from pagemill.models.checkpoint import open_checkpoint
from tests.fixtures.tiny import (
    gguf_metadata,
    gpt2_config,
    llama_config,
    llama_weights,
    tiny_gpt2,
    tiny_llama,
    write_gguf,
)

EXTREMES = st.sampled_from([0, 1, -1, 3, 2**31 - 1, 2**31, 2**63, 2**64 - 1, -(2**63), 1e308, 1e-308, 0.5])
WORDS = st.sampled_from(["", "llama", "gpt2", "default", "yarn", "llama3", "linear", "silu", "x" * 5000, "\x00\x1b"])
SCALARS = st.none() | st.booleans() | EXTREMES | WORDS | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False)
ROPE_KEYS = st.sampled_from(["rope_type", "factor", "original_max_position_embeddings", "low_freq_factor", "beta_fast"])
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ROPE_KEYS | WORDS, inner, max_size=4)
)
EXTRA_KEYS = ["rope_scaling", "rope_parameters", "sliding_window", "layer_types", "pretraining_tp", "n_ctx"]
LLAMA_KEYS = sorted({*llama_config(), *EXTRA_KEYS})
GPT2_KEYS = sorted({*gpt2_config(), *EXTRA_KEYS})

many = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama"), layers=1, hidden=32, ffn=32)


@pytest.fixture(scope="module")
def gpt2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gpt2(tmp_path_factory.mktemp("gpt2"), layers=1, hidden=32)


def refusal(path: Path) -> str:
    """What opening a checkpoint is refused with; empty where it opens."""
    try:
        open_checkpoint(path)
    except ModelError as error:
        return str(error)
    return ""


def open_with(directory: Path, name: str, content: str) -> None:
    """Open the checkpoint with one file replaced; what it raises must be a ModelError, and short."""
    file = directory / name
    original = file.read_bytes()
    file.write_text(content, encoding="utf-8")
    try:
        assert len(refusal(directory)) < 4000
    finally:
        file.write_bytes(original)


@many
@given(changes=st.dictionaries(st.sampled_from(LLAMA_KEYS), VALUES, min_size=1, max_size=3))
def test_any_llama_config(llama_dir: Path, changes: dict[str, Any]) -> None:
    config = json.loads((llama_dir / "config.json").read_text())
    open_with(llama_dir, "config.json", json.dumps(config | changes))


@many
@given(changes=st.dictionaries(st.sampled_from(GPT2_KEYS), VALUES, min_size=1, max_size=3))
def test_any_gpt2_config(gpt2_dir: Path, changes: dict[str, Any]) -> None:
    config = json.loads((gpt2_dir / "config.json").read_text())
    open_with(gpt2_dir, "config.json", json.dumps(config | changes))


@many
@given(
    changes=st.dictionaries(
        st.sampled_from(["chat_template", "eos_token", "bos_token", "add_bos_token", "unk_token"]), VALUES
    )
)
def test_any_tokenizer_config(llama_dir: Path, changes: dict[str, Any]) -> None:
    open_with(llama_dir, "tokenizer_config.json", json.dumps(changes))


@many
@given(model=VALUES, vocab=VALUES, added=VALUES)
def test_any_tokenizer_json(llama_dir: Path, model: Any, vocab: Any, added: Any) -> None:
    for content in ({"model": model, "added_tokens": added}, {"model": {"vocab": vocab}, "added_tokens": added}):
        open_with(llama_dir, "tokenizer.json", json.dumps(content))


GGUF_KEYS = sorted(
    {
        *gguf_metadata(llama_config()),
        "llama.rope.scaling.type",
        "llama.rope.scaling.factor",
        "llama.rope.scaling.original_context_length",
        "llama.attention.sliding_window",
        "llama.expert_count",
        "tokenizer.ggml.tokens",
        "tokenizer.ggml.model",
        "tokenizer.ggml.scores",
        "tokenizer.ggml.token_type",
        "tokenizer.ggml.eos_token_id",
    }
)
GGUF_VALUES = (
    st.none()
    | st.booleans()
    | st.sampled_from([0, 1, 2, 3, 2**31 - 1, 2**31, 2**32 - 1])
    | st.sampled_from([0.0, -1.0, 1e-30, 1e30, float("inf"), float("nan")])
    | WORDS
    | st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=4)
    | st.lists(WORDS, min_size=1, max_size=4)
)


@many
@given(changes=st.dictionaries(st.sampled_from(GGUF_KEYS), GGUF_VALUES, min_size=1, max_size=3))
def test_any_gguf_metadata(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = llama_config(layers=1, hidden=32, ffn=32)
    path = write_gguf(tmp_path / "m.gguf", config, llama_weights(config), metadata=changes, tokenizer=False)
    assert len(refusal(path)) < 4000
