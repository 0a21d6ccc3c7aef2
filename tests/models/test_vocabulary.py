from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pagemill.base.errors import ModelError
from pagemill.base.model_spec import VocabSpec
from pagemill.models.config_json import ConfigFile, read_config
from pagemill.models.gguf import open_gguf
from pagemill.models.vocabulary import vocab_from_directory, vocab_from_gguf
from tests.fixtures.byte_tokenizer import special_id, tokens_and_merges
from tests.fixtures.tiny import CHAT_TEMPLATE, llama_config, llama_weights, tiny_llama, write_gguf

KEY = "tokenizer.ggml."
END = special_id(272, "<|im_end|>")
TEXT_END = special_id(272, "<|endoftext|>")


def gguf_vocab(tmp_path: Path, metadata: Mapping[str, Any], *, tokenizer: bool = False) -> VocabSpec:
    config = llama_config(layers=1)
    path = write_gguf(tmp_path / "m.gguf", config, llama_weights(config), metadata=metadata, tokenizer=tokenizer)
    return vocab_from_gguf(open_gguf(path), 272)


def directory_vocab(directory: Path) -> VocabSpec:
    return vocab_from_directory(directory, read_config(directory / "config.json"), 272)


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


def test_gguf_vocabulary_is_read_whole(tmp_path: Path) -> None:
    vocab = gguf_vocab(tmp_path, {}, tokenizer=True)
    tokens, merges = tokens_and_merges(272)
    assert vocab.tokens == tuple(tokens)
    assert vocab.merges == tuple(merges)
    assert (vocab.model, vocab.pre, vocab.add_bos, vocab.add_space_prefix) == ("gpt2", "gpt-2", False, False)
    assert (vocab.eos_id, vocab.bos_id, vocab.chat_template) == (END, None, CHAT_TEMPLATE)
    assert vocab.token_types[END] == 3


def test_stop_ids_hold_the_control_tokens_that_end_a_text(tmp_path: Path) -> None:
    assert gguf_vocab(tmp_path, {}, tokenizer=True).stop_ids == (TEXT_END, END)
    plain = {KEY + "model": "gpt2", KEY + "tokens": ["a", "<|im_end|>", "b", "c"], KEY + "token_type": [1, 1, 1, 1]}
    assert gguf_vocab(tmp_path, plain).stop_ids == ()
    named = plain | {KEY + "eos_token_id": 0, KEY + "eot_token_id": 2, KEY + "eom_token_id": 3}
    assert gguf_vocab(tmp_path, named).stop_ids == (0, 2, 3)


def test_first_token_and_space_follow_the_kind_of_tokeniser(tmp_path: Path) -> None:
    tokens: dict[str, Any] = {KEY + "tokens": ["a", "b"], KEY + "bos_token_id": 1}
    sentencepiece = gguf_vocab(tmp_path, tokens | {KEY + "model": "llama", KEY + "scores": [0.0, -1.0]})
    assert (sentencepiece.add_bos, sentencepiece.add_space_prefix, sentencepiece.scores) == (True, True, (0.0, -1.0))
    byte_level = gguf_vocab(tmp_path, tokens | {KEY + "model": "gpt2", KEY + "pre": "llama-bpe"})
    assert (byte_level.add_bos, byte_level.add_space_prefix) == (True, False)
    told = gguf_vocab(tmp_path, tokens | {KEY + "model": "llama", KEY + "add_bos_token": False})
    assert not told.add_bos


def test_gguf_without_vocabulary_is_ids_only(tmp_path: Path) -> None:
    assert gguf_vocab(tmp_path, {}) == VocabSpec()
    assert gguf_vocab(tmp_path, {KEY + "model": "no_vocab"}) == VocabSpec()


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({KEY + "model": "t5"}, "kind 't5' are not supported; supported: gpt2, llama"),
        ({KEY + "tokens": None}, "tokenizer.ggml.tokens"),
        ({KEY + "tokens": ["a"] * 273}, "the tokeniser has 273 tokens, the embedding 272 rows"),
        ({KEY + "token_type": [1]}, "token_type has 1 numbers for 2 tokens"),
        ({KEY + "scores": [0.5]}, "1 scores for 2 tokens"),
        ({KEY + "eos_token_id": 2}, "tokenizer.ggml.eos_token_id"),
        ({KEY + "bos_token_id": "one"}, "tokenizer.ggml.bos_token_id"),
        ({"tokenizer.chat_template": "x" * (1 << 20) + "y"}, "chat template is larger than"),
    ],
)
def test_gguf_vocabulary_that_disagrees_with_itself_is_refused(
    tmp_path: Path, metadata: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        gguf_vocab(tmp_path, {KEY + "model": "gpt2", KEY + "tokens": ["a", "b"]} | metadata)


def test_directory_gives_the_file_and_the_ids(tmp_path: Path) -> None:
    directory = tiny_llama(tmp_path)
    vocab = directory_vocab(directory)
    assert vocab.tokenizer_json == (directory / "tokenizer.json").read_text(encoding="utf-8")
    assert (vocab.eos_id, vocab.stop_ids, vocab.chat_template) == (END, (END,), CHAT_TEMPLATE)
    assert vocab.tokens == ()


def test_stop_ids_of_all_files_are_joined(tmp_path: Path) -> None:
    directory = tiny_llama(tmp_path, eos_token_id=[5, 6], bos_token_id=4, pad_token_id=3)
    write_json(directory / "generation_config.json", {"eos_token_id": [6, 7]})
    vocab = directory_vocab(directory)
    assert vocab.stop_ids == (5, 6, 7, END)
    assert (vocab.eos_id, vocab.bos_id, vocab.pad_id) == (END, 4, 3)


def test_special_tokens_are_found_by_their_text(tmp_path: Path) -> None:
    directory = tiny_llama(tmp_path, eos_token_id=None)
    settings = {"eos_token": {"content": "<|endoftext|>"}, "bos_token": "<|im_start|>", "add_bos_token": True}
    write_json(directory / "tokenizer_config.json", settings)
    vocab = directory_vocab(directory)
    assert (vocab.eos_id, vocab.bos_id, vocab.stop_ids) == (TEXT_END, special_id(272, "<|im_start|>"), (TEXT_END,))
    assert vocab.add_bos
    assert vocab.chat_template is None


def test_template_is_taken_from_its_file_first_and_by_name_among_several(tmp_path: Path) -> None:
    directory = tiny_llama(tmp_path)
    templates = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    write_json(directory / "tokenizer_config.json", {"chat_template": templates})
    assert directory_vocab(directory).chat_template == "plain"
    (directory / "chat_template.jinja").write_text("own file")
    assert directory_vocab(directory).chat_template == "own file"


def test_directory_without_tokeniser_is_ids_only(tmp_path: Path) -> None:
    vocab = directory_vocab(tiny_llama(tmp_path, tokenizer=False))
    assert (vocab.tokenizer_json, vocab.tokens, vocab.stop_ids) == (None, (), (END,))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", {"model": {}}, "holds no vocabulary"),
        ("tokenizer.json", {"model": {"vocab": {"a": "0"}}}, "no text with a whole id"),
        ("tokenizer.json", {"model": {"vocab": {"a": -1}}}, "no text with a whole id"),
        ("tokenizer.json", {"model": {"vocab": [["a", 0.0], 7]}}, "no text with a whole id"),
        ("tokenizer.json", {"model": {"vocab": {"a": 1 << 40}}}, "the embedding 272 rows"),
        ("tokenizer.json", {"model": {"vocab": {"a": 0}}, "added_tokens": {"b": 1}}, "added_tokens is no list"),
        ("tokenizer.json", {"model": {"vocab": {"a": 0}}, "added_tokens": ["b"]}, "no text with a whole id"),
        ("tokenizer.json", {"model": {"vocab": {}}}, "the tokeniser has 0 tokens"),
        ("tokenizer.json", [], "holds no JSON object"),
        ("tokenizer_config.json", {"chat_template": 5}, "chat_template is no text"),
        ("tokenizer_config.json", {"add_bos_token": "yes"}, "'add_bos_token' is 'yes'"),
        ("generation_config.json", {"eos_token_id": 272}, "not token ids from 0 to 271"),
        ("generation_config.json", {"eos_token_id": [True]}, "not token ids from 0 to 271"),
    ],
)
def test_damaged_files_are_refused_by_name(tmp_path: Path, name: str, content: object, message: str) -> None:
    directory = tiny_llama(tmp_path)
    write_json(directory / name, content)
    with pytest.raises(ModelError, match=message) as error:
        directory_vocab(directory)
    assert name in str(error.value)


def test_template_that_is_no_utf8_is_refused(tmp_path: Path) -> None:
    directory = tiny_llama(tmp_path)
    (directory / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ModelError, match="is not UTF-8 text"):
        directory_vocab(directory)


def test_unigram_lists_count_by_position(tmp_path: Path) -> None:
    directory = tiny_llama(tmp_path)
    write_json(directory / "tokenizer.json", {"model": {"type": "Unigram", "vocab": [["a", -1.0]] * 300}})
    (directory / "tokenizer_config.json").unlink()
    with pytest.raises(ModelError, match="the embedding 272 rows"):
        vocab_from_directory(directory, ConfigFile("config.json", {}), 272)
