"""The tokeniser as a checkpoint describes it, as a VocabSpec. Owns the reading and the checks of lists, ids and sizes;
does not build a tokeniser (`text/tokenizer.py` does)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pagemill.base.errors import ModelError
from pagemill.base.model_spec import VocabSpec
from pagemill.models.config_json import MAX_CONFIG_BYTES, ConfigFile, parse_object, read_bounded, read_config
from pagemill.models.gguf import GGUFFile

MAX_TOKENIZER_BYTES = 64 << 20
MAX_TEMPLATE_BYTES = 1 << 20
MAX_TOKENIZER_CONFIG_BYTES = 16 << 20

_KINDS = ("gpt2", "llama")
_CONTROL = 3
# Control tokens that end a text or a turn by convention, whatever the file's eos id says.
_END_TEXTS = frozenset(
    ("<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|end|>", "<end_of_turn>", "</s>")
)
# Byte-level files that say nothing of a first token and yet begin every text with one.
_PRE_WITH_BOS = frozenset(("llama3", "llama-v3", "llama-bpe"))


def vocab_from_gguf(file: GGUFFile, vocab_size: int) -> VocabSpec:
    """The tokeniser of a GGUF file; an empty one (ids only) where the file holds none.

    vocab_size: rows of the embedding, which may exceed the vocabulary. Raises ModelError where lists and ids disagree
    with each other or with it.
    """
    key = "tokenizer.ggml."
    kind = file.get_str(key + "model", "no_vocab")
    if kind in ("no_vocab", "none"):
        return VocabSpec()
    if kind not in _KINDS:
        raise ModelError(
            f"{file.path}: tokenisers of the kind {kind[:40]!r} are not supported; supported: {', '.join(_KINDS)}. Use "
            "another checkpoint"
        )
    tokens = tuple(file.get_strings(key + "tokens"))
    _check_vocabulary_size(len(tokens), vocab_size, str(file.path))
    types = _numbers(file, key + "token_type", len(tokens))
    scores = tuple(file.get_floats(key + "scores").tolist()) if file.has(key + "scores") else ()
    if scores and len(scores) != len(tokens):
        raise ModelError(f"{file.path}: {len(scores)} scores for {len(tokens)} tokens; fetch the file again")
    pre = file.get_str(key + "pre", "default")
    eos = _token_id(file, "eos_token_id", len(tokens))
    ends = [eos, _token_id(file, "eot_token_id", len(tokens)), _token_id(file, "eom_token_id", len(tokens))]
    ends += [i for i in _all_at(types, _CONTROL) if tokens[i] in _END_TEXTS]
    template = file.get_str("tokenizer.chat_template") if file.has("tokenizer.chat_template") else None
    _check_template(template, str(file.path))
    return VocabSpec(
        tokens=tokens,
        merges=tuple(file.get_strings(key + "merges")) if file.has(key + "merges") else (),
        scores=scores,
        token_types=types,
        model=kind,
        pre=pre,
        bos_id=_token_id(file, "bos_token_id", len(tokens)),
        eos_id=eos,
        unk_id=_token_id(file, "unknown_token_id", len(tokens)),
        pad_id=_token_id(file, "padding_token_id", len(tokens)),
        stop_ids=tuple(sorted({i for i in ends if i is not None})),
        add_bos=file.get_bool(key + "add_bos_token", kind == "llama" or pre in _PRE_WITH_BOS),
        add_space_prefix=file.get_bool(key + "add_space_prefix", kind == "llama"),
        chat_template=template,
    )


def vocab_from_directory(directory: Path, config: ConfigFile, vocab_size: int) -> VocabSpec:
    """The tokeniser of a Hugging Face directory; ids only where there is no `tokenizer.json`.

    config: its `config.json`. Raises ModelError where ids or sizes disagree with the embedding of vocab_size rows.
    """
    generation = _optional_config(directory / "generation_config.json")
    settings = _optional_config(directory / "tokenizer_config.json", MAX_TOKENIZER_CONFIG_BYTES)
    tokenizer_path = directory / "tokenizer.json"
    text: str | None = None
    ids: dict[str, int] = {}
    if tokenizer_path.is_file():
        content = read_bounded(tokenizer_path, MAX_TOKENIZER_BYTES)
        ids = _token_ids(parse_object(content, str(tokenizer_path)), str(tokenizer_path))
        _check_vocabulary_size(max(ids.values(), default=-1) + 1, vocab_size, str(tokenizer_path))
        text = content.decode("utf-8")
    named_eos = ids.get(_token_text(settings, "eos_token"))
    from_config = config.get_ids("eos_token_id", vocab_size)
    stops = {*from_config, *generation.get_ids("eos_token_id", vocab_size)}
    if named_eos is not None:
        stops.add(named_eos)
    eos = named_eos if named_eos is not None else next(iter(from_config), None)
    return VocabSpec(
        bos_id=_first(config.get_ids("bos_token_id", vocab_size), ids.get(_token_text(settings, "bos_token"))),
        eos_id=eos,
        unk_id=ids.get(_token_text(settings, "unk_token")),
        pad_id=_first(config.get_ids("pad_token_id", vocab_size), ids.get(_token_text(settings, "pad_token"))),
        stop_ids=tuple(sorted(stops)),
        add_bos=settings.get_bool("add_bos_token", False),
        chat_template=_directory_template(directory, settings),
        tokenizer_json=text,
    )


def _numbers(file: GGUFFile, key: str, count: int) -> tuple[int, ...]:
    if not file.has(key):
        return ()
    numbers = tuple(file.get_ints(key).tolist())
    if len(numbers) != count:
        raise ModelError(f"{file.path}: {key} has {len(numbers)} numbers for {count} tokens; fetch the file again")
    return numbers


def _all_at(values: tuple[int, ...], wanted: int) -> list[int]:
    """Every place of a value, in order."""
    places: list[int] = []
    at = -1
    for _ in range(values.count(wanted)):
        at = values.index(wanted, at + 1)
        places.append(at)
    return places


def _token_id(file: GGUFFile, name: str, count: int) -> int | None:
    key = f"tokenizer.ggml.{name}"
    return file.get_int(key, maximum=count - 1) if file.has(key) else None


def _check_vocabulary_size(num_tokens: int, vocab_size: int, origin: str) -> None:
    if not 0 < num_tokens <= vocab_size:
        raise ModelError(
            f"{origin}: the tokeniser has {num_tokens} tokens, the embedding {vocab_size} rows; they do not belong "
            "together: fetch the whole checkpoint again"
        )


def _check_template(template: str | None, origin: str) -> None:
    if template is not None and len(template) > MAX_TEMPLATE_BYTES:
        raise ModelError(f"{origin}: the chat template is larger than {MAX_TEMPLATE_BYTES} bytes; fetch it again")


def _optional_config(path: Path, max_bytes: int = MAX_CONFIG_BYTES) -> ConfigFile:
    return read_config(path, max_bytes=max_bytes) if path.is_file() else ConfigFile(str(path), {})


def _token_ids(tokenizer: dict[str, Any], origin: str) -> dict[str, int]:
    """Every token of a `tokenizer.json` with its id."""
    model, added = tokenizer.get("model"), tokenizer.get("added_tokens") or []
    vocab = model.get("vocab") if isinstance(model, dict) else None
    pairs: list[tuple[Any, Any]] = []
    if isinstance(vocab, dict):
        pairs += vocab.items()
    elif isinstance(vocab, list):
        pairs += ((item[0] if isinstance(item, list) and item else None, i) for i, item in enumerate(vocab))
    else:
        raise ModelError(f"{origin}: holds no vocabulary; fetch it again")
    if not isinstance(added, list):
        raise ModelError(f"{origin}: added_tokens is no list; fetch it again")
    pairs += ((item.get("content"), item.get("id")) if isinstance(item, dict) else (None, None) for item in added)
    for text, token in pairs:
        if not isinstance(text, str) or isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise ModelError(f"{origin}: a token of the vocabulary is no text with a whole id; fetch it again")
    return dict(pairs)


def _token_text(settings: ConfigFile, key: str) -> str:
    """A token of `tokenizer_config.json`: a string, or an object with `content`; empty where it is missing."""
    value = settings.values.get(key)
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""


def _first(ids: tuple[int, ...], otherwise: int | None) -> int | None:
    return ids[0] if ids else otherwise


def _directory_template(directory: Path, settings: ConfigFile) -> str | None:
    """`chat_template.jinja`, or the template of `tokenizer_config.json` (the one named default among several)."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        try:
            return read_bounded(path, MAX_TEMPLATE_BYTES).decode("utf-8")
        except UnicodeDecodeError:
            raise ModelError(f"{path} is not UTF-8 text; fetch it again") from None
    value = settings.values.get("chat_template")
    if isinstance(value, list):
        named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
        value = named.get("default")
    if value is not None and not isinstance(value, str):
        raise ModelError(f"{settings.origin}: chat_template is no text; fetch it again")
    _check_template(value, settings.origin)
    return value
