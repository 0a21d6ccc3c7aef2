"""Text to token ids and back. Owns the building of tokenisers from a checkpoint's vocabulary and their checks; the only
file that imports the `tokenizers` library. Chat templates, streams and stop strings are elsewhere.

Encoding is the library's; decoding is done here, from the bytes that each token stands for, so that a stream, a whole
text and `token_bytes` can never disagree. The library is loaded with the first text to be encoded: where ids come and
go, a start does not wait for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import repeat
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeVar

from pagemill.base.errors import ModelError, RequestError
from pagemill.base.model_spec import VocabSpec
from pagemill.text.pretokenizers import PRE_TOKENIZERS

if TYPE_CHECKING:
    import tokenizers

MAX_JSON_BYTES = 64 * 2**20
MAX_VOCAB = 2**21

# Token types of GGUF (tokenizer.ggml.token_type).
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_WORD_AND_SPACE = re.compile("[a-z] ")
_WORD_START = "▁"  # SentencePiece's mark for a space

_T = TypeVar("_T")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes: itself where printable, else the next character from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    """Bytes of a byte-level token; characters outside the alphabet stand for themselves."""
    if all(character in _BYTE_OF for character in token):
        return bytes([_BYTE_OF[character] for character in token])
    return b"".join(bytes([_BYTE_OF[c]]) if c in _BYTE_OF else c.encode(errors="replace") for c in token)


def _sentencepiece_bytes(token: str) -> bytes:
    """Bytes of a SentencePiece token: `<0xNN>` is one byte, U+2581 a space."""
    match = _BYTE_TOKEN.fullmatch(token)
    if match:
        return bytes([int(match[1], 16)])
    return token.replace(_WORD_START, " ").encode(errors="replace")


@dataclass(frozen=True, slots=True)
class _Alphabet:
    """How tokens spell bytes. drop_space: a space at the beginning of a decoded text is an artefact of encoding."""

    to_bytes: Callable[[str], bytes]
    drop_space: bool = False


class Tokenizer:
    """A checkpoint's tokeniser. Caches bytes of tokens as it goes and makes what encodes when a text first needs it
    (`prepare`); otherwise immutable, safe to share among threads.

    vocab_size: ids are 0 .. vocab_size - 1. stop_ids: ids that end a text or a turn. special_ids: control tokens,
    which `decode` leaves out unless asked; special_texts: their spellings -> ids. unknown_bytes: bytes that the
    vocabulary cannot spell; `encode` leaves them out, as the models' own tokenisers do. cuts_at_words: `remembered.py`.
    """

    def __init__(
        self,
        make_library: Callable[[], tokenizers.Tokenizer],
        spell: Callable[[int], str | None],
        vocab: VocabSpec,
        *,
        vocab_size: int,
        alphabet: _Alphabet,
        special: dict[int, str],
        literal: dict[int, str],
        unknown_bytes: frozenset[int] = frozenset(),
        cuts_at_words: bool = False,
    ) -> None:
        """make_library: called until it succeeds. spell: a token as the vocabulary writes it, None beyond its end.
        special, literal: id -> text of control and of user-defined tokens. Raises ModelError on ids out of range."""
        self._make_library = make_library
        self._spell = spell
        self._alphabet = alphabet
        self._bytes = {token: text.encode(errors="replace") for token, text in (special | literal).items()}
        self._lock = Lock()
        self._made: tokenizers.Tokenizer | None = None
        self._plain: tokenizers.Tokenizer | None = None
        self.vocab_size = vocab_size
        self.bos_id = vocab.bos_id
        self.add_bos = vocab.add_bos
        self.special_ids = frozenset(special)
        self.special_texts = {text: token for token, text in special.items()}
        self.unknown_bytes = unknown_bytes
        self.cuts_at_words = cuts_at_words
        self.stop_ids = frozenset(vocab.stop_ids) | (frozenset() if vocab.eos_id is None else {vocab.eos_id})
        _check_ids(vocab, self.vocab_size)

    def prepare(self) -> None:
        """Check and make now what the first texts to be encoded would wait for, some 200 ms with 49,152 tokens: with
        control tokens and without. Raises ModelError where the vocabulary's merges are damaged."""
        self._without_special()

    @property
    def _library(self) -> tokenizers.Tokenizer:
        made = self._made
        if made is None:
            with self._lock:
                if (made := self._made) is None:
                    made = self._made = self._make_library()
        return made

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of a text.

        add_special: what the model wants around a text (a BOS). parse_special: control tokens spelt out in the text
        become those tokens; otherwise they are text like any other. Raises RequestError for what is not Unicode text.
        """
        if not isinstance(text, str):
            raise RequestError(f"the prompt is {type(text).__name__}, not text; give a string")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"the prompt holds half of a surrogate pair at character {error.start}, which is not Unicode text; "
                "read or decode the input as UTF-8"
            ) from None
        library = self._library if parse_special else self._without_special()
        ids: list[int] = _guarded(
            lambda: library.encode(text, add_special_tokens=add_special).ids, "the tokeniser failed on this text"
        )
        if add_special and self.add_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD.

        An id beyond the vocabulary (checkpoints pad theirs) has no text. Raises RequestError for a negative id.
        """
        hidden = self.special_ids if skip_special else ()
        raw = b"".join([self.token_bytes(token) for token in ids if token not in hidden])
        if self._alphabet.drop_space and raw.startswith(b" "):
            raw = raw[1:]
        return raw.decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one id adds to a text. Raises RequestError for a negative id."""
        known = self._bytes.get(token_id)
        if known is not None:
            return known
        if token_id < 0:
            raise RequestError(f"token id {token_id} is negative; ids go from 0 to {self.vocab_size - 1}")
        token = self._spell(token_id)
        raw = b"" if token is None else self._alphabet.to_bytes(token)
        self._bytes[token_id] = raw
        return raw

    def _without_special(self) -> tokenizers.Tokenizer:
        """The same tokeniser, blind to control tokens; made when first wanted."""
        library = self._library
        if not self.special_ids:
            return library
        with self._lock:
            if self._plain is None:
                self._plain = type(library).from_str(library.to_str())
                self._plain.encode_special_tokens = True
            return self._plain


def build_tokenizer(vocab: VocabSpec) -> Tokenizer:
    """The tokeniser that a checkpoint describes: its `tokenizer_json`, or else its vocabulary lists.

    Raises ModelError where the description is damaged, contradicts itself, or is of a kind that is not supported.
    Merges, which only encoding reads, are checked before the first text is encoded, or by `Tokenizer.prepare`.
    """
    if vocab.tokenizer_json is not None:
        return _from_json(vocab, vocab.tokenizer_json)
    if not vocab.tokens:
        raise ModelError("the model brings no vocabulary; take a file with tokenizer.ggml.tokens or a tokenizer.json")
    ids = _checked_vocab(vocab)
    if vocab.model == "gpt2":
        return _byte_level_bpe(vocab, ids)
    if vocab.model == "llama":
        return _sentencepiece_bpe(vocab, ids)
    raise ModelError(f"tokeniser model {vocab.model!r} is not supported; supported: gpt2, llama, or a tokenizer.json")


# ---- from vocabulary lists


def _checked_vocab(vocab: VocabSpec) -> dict[str, int]:
    """Token -> id. Refuses duplicates, empty or malformed tokens and lists of different lengths."""
    tokens, types = vocab.tokens, vocab.token_types
    if len(tokens) > MAX_VOCAB:
        raise ModelError(f"the vocabulary has {len(tokens):,} tokens; up to {MAX_VOCAB:,} are supported")
    ids = dict(zip(tokens, range(len(tokens)), strict=True))
    if len(ids) != len(tokens):
        twice = next(token for i, token in enumerate(tokens) if ids[token] != i)
        raise ModelError(f"token {twice!r} is in the vocabulary twice (ids {tokens.index(twice)} and {ids[twice]})")
    if "" in ids:
        raise ModelError(f"token {ids['']} of the vocabulary is empty")
    try:
        "".join(tokens).encode()
    except UnicodeEncodeError:
        raise ModelError("the vocabulary holds tokens that are not Unicode text; the file is damaged") from None
    for name, values in (("token types", types), ("scores", vocab.scores)):
        if values and len(values) != len(tokens):
            raise ModelError(f"the vocabulary has {len(tokens):,} tokens but {len(values):,} {name}")
    strange = set(types) - {NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE}
    if strange:
        raise ModelError(f"token type {min(strange)} is unknown; known: 1 to 6")
    return ids


def _check_ids(vocab: VocabSpec, vocab_size: int) -> None:
    named = {"BOS": vocab.bos_id, "EOS": vocab.eos_id, "unknown": vocab.unk_id, "padding": vocab.pad_id}
    for name, token in [*named.items(), *(("stop", stop) for stop in vocab.stop_ids)]:
        if token is not None and not 0 <= token < vocab_size:
            raise ModelError(f"the {name} token id is {token}, but the vocabulary has {vocab_size:,} tokens")
    if vocab.add_bos and vocab.bos_id is None:
        raise ModelError("the model wants a BOS token before each text but names none (bos_id)")


def _of_type(vocab: VocabSpec, *types: int) -> dict[int, str]:
    ids: list[int] = []
    for wanted in types:
        at = -1
        for _ in range(vocab.token_types.count(wanted)):  # few of many, so that the searching is left to the tuple
            at = vocab.token_types.index(wanted, at + 1)
            ids.append(at)
    return {i: vocab.tokens[i] for i in sorted(ids)}


def _spelling(vocab: VocabSpec) -> Callable[[int], str | None]:
    """Tokens of vocabulary lists by id."""
    tokens = vocab.tokens
    return lambda token: tokens[token] if token < len(tokens) else None


def _check_merges(vocab: VocabSpec, ids: dict[str, int], added: Iterable[str]) -> None:
    """Refuse merges that are not two tokens that make a third one, or are listed twice. added: tokens of no merges."""
    merges = vocab.merges
    if not merges and any(len(token) > 1 for token in set(vocab.tokens) - set(added)):
        raise ModelError("the byte-level vocabulary comes without merges (tokenizer.ggml.merges)")
    if _all_merge(vocab, ids):
        return
    for rank, merge in enumerate(merges):
        left, space, right = merge.partition(" ")
        if not space or not left or not right or " " in right:
            raise ModelError(f"merge {rank} is {merge!r}; it must be two tokens with a space between them")
        if left not in ids or right not in ids or left + right not in ids:
            missing = next(part for part in (left, right, left + right) if part not in ids)
            raise ModelError(f"merge {rank} is {merge!r}, but {missing!r} is not in the vocabulary")
    raise ModelError("a merge is listed twice; the file is damaged")


def _all_merge(vocab: VocabSpec, ids: dict[str, int]) -> bool:
    """Whether every merge is two tokens that make a third one, and none is listed twice: told at half the cost of
    looking for one that is not."""
    merges = vocab.merges
    if set(map(str.count, merges, repeat(" "))) - {1} or not set(_halves(merges)) <= ids.keys():
        return False
    # Most vocabularies end with what their merges make, in the same order: compared as one text, a line for each.
    # Tokens are all different, and so are then the merges.
    last = "\n".join(vocab.tokens[max(0, len(ids) - len(merges)) :])
    if last.count("\n") == len(merges) - 1 < len(ids) and last == "\n".join(merges).replace(" ", ""):
        return True
    return len(set(merges)) == len(merges) and all(merge.replace(" ", "") in ids for merge in merges)


def _halves(merges: tuple[str, ...]) -> list[str]:
    """Left and right token of each merge."""
    return " ".join(merges).split(" ") if merges else []


def _byte_level_bpe(vocab: VocabSpec, ids: dict[str, int]) -> Tokenizer:
    pre = PRE_TOKENIZERS.get(vocab.pre)
    if pre is None:
        names = ", ".join(sorted(PRE_TOKENIZERS))
        raise ModelError(f"pre-tokeniser {vocab.pre!r} is not supported; supported: {names}")
    special, literal = _of_type(vocab, UNKNOWN, CONTROL), _of_type(vocab, USER_DEFINED)

    def make_library() -> tokenizers.Tokenizer:
        import tokenizers
        from tokenizers import models, pre_tokenizers

        _check_merges(vocab, ids, (*special.values(), *literal.values()))
        halves = _halves(vocab.merges)
        merges = list(zip(halves[::2], halves[1::2], strict=True))
        bpe = _guarded(
            lambda: models.BPE(vocab=ids, merges=merges, ignore_merges=pre.whole_pieces),
            "the vocabulary and merges make no tokeniser",
        )
        library = tokenizers.Tokenizer(bpe)
        splits = [pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated") for pattern in pre.patterns]
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
        library.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
        _add_tokens(library, special, literal)
        return library

    return Tokenizer(
        make_library,
        _spelling(vocab),
        vocab,
        vocab_size=len(ids),
        alphabet=_Alphabet(_byte_level_bytes),
        special=special,
        literal=literal,
        unknown_bytes=frozenset(byte for character, byte in _BYTE_OF.items() if character not in ids),
        cuts_at_words=not any(_WORD_AND_SPACE.search(text) for text in (*special.values(), *literal.values())),
    )


def _sentencepiece_bpe(vocab: VocabSpec, ids: dict[str, int]) -> Tokenizer:
    """SentencePiece's BPE (arXiv 1808.06226): the best-scored pair is merged first, unknown characters become bytes."""
    if not vocab.scores:
        raise ModelError("the SentencePiece vocabulary comes without scores (tokenizer.ggml.scores)")
    byte_tokens = {f"<0x{byte:02X}>" for byte in range(256)}
    if not byte_tokens <= ids.keys() and vocab.unk_id is None:
        missing = min(byte_tokens - ids.keys())
        raise ModelError(f"the vocabulary has neither an unknown token nor all byte tokens ({missing} is missing)")
    special, literal = _of_type(vocab, UNKNOWN, CONTROL), _of_type(vocab, USER_DEFINED)
    unknown = None if vocab.unk_id is None or vocab.unk_id >= len(vocab.tokens) else vocab.tokens[vocab.unk_id]

    def make_library() -> tokenizers.Tokenizer:
        import tokenizers
        from tokenizers import models, normalizers

        merges = _merges_from_scores(vocab, ids)
        bpe = _guarded(
            lambda: models.BPE(vocab=ids, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True),
            "the vocabulary and scores make no tokeniser",
        )
        library = tokenizers.Tokenizer(bpe)
        spaces = [normalizers.Replace(" ", _WORD_START)]
        prefix = [normalizers.Prepend(_WORD_START)] if vocab.add_space_prefix else []
        library.normalizer = normalizers.Sequence([*prefix, *spaces])
        _add_tokens(library, special, literal)
        return library

    return Tokenizer(
        make_library,
        _spelling(vocab),
        vocab,
        vocab_size=len(ids),
        alphabet=_Alphabet(_sentencepiece_bytes, drop_space=vocab.add_space_prefix),
        special=special,
        literal=literal,
    )


def _merges_from_scores(vocab: VocabSpec, ids: dict[str, int]) -> list[tuple[str, str]]:
    """All pairs of tokens that make a token, best score first. Control, unknown and byte tokens are never made."""
    types = vocab.token_types or (NORMAL,) * len(vocab.tokens)
    text_ids = {
        token: i for token, i in ids.items() if types[i] in (NORMAL, USER_DEFINED, UNUSED) and len(token) <= 1024
    }
    pairs: list[tuple[float, int, int, str, str]] = []
    for token, i in text_ids.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in text_ids and right in text_ids:
                pairs.append((-vocab.scores[i], text_ids[left], text_ids[right], left, right))
    pairs.sort()
    return [(left, right) for _, _, _, left, right in pairs]


def _add_tokens(library: tokenizers.Tokenizer, special: dict[int, str], literal: dict[int, str]) -> None:
    from tokenizers import AddedToken

    library.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special.values()])
    library.add_tokens([AddedToken(text, special=False, normalized=False) for text in literal.values()])


# ---- from tokenizer.json


def _from_json(vocab: VocabSpec, text: str) -> Tokenizer:
    """A tokeniser from the text of a tokenizer.json, which may be hostile."""
    import orjson
    import tokenizers

    if len(text) > MAX_JSON_BYTES:
        raise ModelError(f"tokenizer.json has {len(text):,} characters; up to {MAX_JSON_BYTES:,} are supported")
    try:
        document = orjson.loads(text)
    except (orjson.JSONDecodeError, UnicodeEncodeError) as error:
        raise ModelError(f"tokenizer.json is not JSON: {error}; fetch the model again") from None
    if not isinstance(document, dict) or not isinstance(document.get("model"), dict):
        raise ModelError('tokenizer.json has no "model" object; fetch the model again')
    vocab_size = _checked_json_size(document)
    alphabet = _json_alphabet(document)
    library = _guarded(lambda: tokenizers.Tokenizer.from_str(text), "tokenizer.json cannot be used")
    library.no_truncation()
    library.no_padding()
    added = library.get_added_tokens_decoder()
    special = {token: entry.content for token, entry in added.items() if entry.special}
    literal = {token: entry.content for token, entry in added.items() if not entry.special}
    if vocab.tokens and len(vocab.tokens) != vocab_size:
        raise ModelError(
            f"tokenizer.json has {vocab_size:,} token ids, but the model's vocabulary has {len(vocab.tokens):,}; "
            "take both from the same checkpoint"
        )

    def spell(token: int) -> str | None:
        found: str | None = library.id_to_token(token) if token < 2**32 else None
        return found

    return Tokenizer(
        lambda: library, spell, vocab, vocab_size=vocab_size, alphabet=alphabet, special=special, literal=literal
    )


def _checked_json_size(document: dict[str, Any]) -> int:
    """The highest id + 1. Every token must have an id of its own, and added tokens must agree with the vocabulary."""
    vocab = document["model"].get("vocab")
    added = document.get("added_tokens") or []
    if document["model"].get("type", "BPE") != "BPE":
        raise ModelError(f"tokenizer.json holds a {document['model']['type']!r} model; supported: BPE")
    if not isinstance(vocab, dict) or not vocab or not isinstance(added, list):
        raise ModelError("tokenizer.json holds no vocabulary; fetch the model again")
    owners: dict[int, str] = {}
    entries = [entry if isinstance(entry, dict) else {} for entry in added]
    for token, index in [*vocab.items(), *((entry.get("content"), entry.get("id")) for entry in entries)]:
        if type(index) is not int or not 0 <= index < MAX_VOCAB or not isinstance(token, str):
            raise ModelError(f"tokenizer.json gives token {token!r} the id {index!r}; ids are 0 to {MAX_VOCAB - 1:,}")
        if owners.setdefault(index, token) != token or vocab.get(token, index) != index:
            raise ModelError(f"tokenizer.json disagrees with itself about token {token!r} (id {index})")
    return max(owners) + 1


def _json_alphabet(document: dict[str, Any]) -> _Alphabet:
    """How a tokenizer.json spells bytes, from its decoder."""
    decoder = document.get("decoder")
    steps = decoder.get("decoders", [decoder]) if isinstance(decoder, dict) else []
    kinds = {step.get("type"): step for step in steps if isinstance(step, dict)} if isinstance(steps, list) else {}
    if "ByteLevel" in kinds:
        return _Alphabet(_byte_level_bytes)
    if "Metaspace" in kinds:
        scheme = kinds["Metaspace"].get("prepend_scheme", "always")
        return _Alphabet(_sentencepiece_bytes, drop_space=scheme != "never")
    if "ByteFallback" in kinds:
        return _Alphabet(_sentencepiece_bytes, drop_space="Strip" in kinds)
    given = ", ".join(sorted(map(str, kinds))) or "nothing"
    raise ModelError(f"tokenizer.json decodes with {given}; supported: ByteLevel, Metaspace, ByteFallback")


def _guarded(call: Callable[[], _T], problem: str) -> _T:
    """Run a call into the library; its errors and panics become ModelError."""
    try:
        return call()
    except BaseException as error:
        # The library's panics derive from BaseException alone and their class cannot be imported.
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise ModelError(f"{problem}: {str(error)[:500]}") from None
        raise
