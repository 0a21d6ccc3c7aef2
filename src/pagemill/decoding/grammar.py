"""Grammars to masks: which tokens may come next so that a text stays within a JSON schema, a regular expression or a
Lark grammar. Owns compiling, its limits and errors; the automata are llguidance's, masks are applied in `adjust.py`.

Compiled grammars are kept, so that a schema which many requests bring is compiled once; each text gets a copy of the
beginning state. Safe to share among threads: compiling happens on worker threads, copying on the engine's.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from pagemill.base.errors import RequestError
from pagemill.base.params import Grammar
from pagemill.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MOST_KEPT = 64
# Limits of llguidance, in its own units, where its defaults let a hostile grammar take seconds.
LIMITS = {
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}
# What the regular expressions' parser says: the expression, a mark below the place, and what is wrong there.
_REGEX_FAULT: Final = re.compile(r"^error: (.*)", re.MULTILINE)
_REGEX_PLACE: Final = re.compile(r"regex parse error:\n {4}.*\n {4}( *)\^", re.ASCII)
_PLACE: Final = re.compile(r"\Aat \d+\(\d+\): ", re.ASCII)  # line and column of a grammar
_MOST_TOLD: Final = 500


class GrammarState:
    """How far one text has come in its grammar. Mutated by `follow`. noun: what messages call the grammar."""

    __slots__ = ("_fresh", "_matcher", "_noun", "_num_taken")

    def __init__(self, fresh: LLMatcher, noun: str = "grammar") -> None:
        self._fresh = fresh
        self._noun = noun
        self._matcher = fresh.deep_copy()
        self._num_taken = 0

    def follow(self, generated: Sequence[int]) -> None:
        """Come to the end of what was generated so far; a shorter text begins anew. Raises RequestError for a text that
        the grammar does not allow, or that it takes too long to follow."""
        if len(generated) < self._num_taken:
            self._matcher, self._num_taken = self._fresh.deep_copy(), 0
        for token in generated[self._num_taken :]:
            if not self._matcher.consume_token(token):
                raise self._stuck()
            self._num_taken += 1

    def allowed(self) -> NDArray[np.bool_]:
        """Which tokens may come next: [vocabulary of the tokeniser, rounded up] bool. Raises RequestError where none
        may, or where that takes too long to tell."""
        mask = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise self._stuck()
        return np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little").view(np.bool_)

    def _stuck(self) -> RequestError:
        why = _why_stuck(self._matcher)
        return RequestError(f"the {self._noun} cannot go on from the text so far: {why}", param="grammar")


def _unusable(grammar: Grammar, why: str) -> RequestError:
    return RequestError(f"the {grammar.noun} cannot be used: {why}", param="grammar")


class GrammarCompiler:
    """Compiled grammars of one tokeniser. Mutated by `check` and `state`, which remember.

    tokenizer: None for models without a vocabulary, which can follow no grammar.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._lock = Lock()
        self._library_lock = Lock()  # held while the vocabulary is read, when the engine must not wait
        self._library: LLTokenizer | None = None
        self._kept: OrderedDict[Grammar, LLMatcher] = OrderedDict()

    def check(self, grammar: Grammar) -> None:
        """Compile, so that `state` need not. Raises RequestError for a grammar that is wrong, too large, or for which
        the model lacks a vocabulary or an end of text."""
        self._compiled(grammar)

    def state(self, grammar: Grammar) -> GrammarState:
        """A text that begins. Raises as `check` does."""
        return GrammarState(self._compiled(grammar), grammar.noun)

    def _compiled(self, grammar: Grammar) -> LLMatcher:
        with self._lock:
            known = self._kept.get(grammar)
            if known is not None:
                self._kept.move_to_end(grammar)
                return known
        made = self._compile(grammar)
        with self._lock:
            self._kept[grammar] = made
            while len(self._kept) > MOST_KEPT:
                self._kept.popitem(last=False)
        return made

    def _compile(self, grammar: Grammar) -> LLMatcher:
        from llguidance import LLMatcher, LLParserLimits  # a tenth of a second that only grammars should cost

        tokenizer = self._of_library()
        try:
            if grammar.kind == "json_schema":
                text = LLMatcher.grammar_from_json_schema(grammar.text)
            elif grammar.kind == "regex":
                text = LLMatcher.grammar_from_regex(grammar.text)
            else:
                text = LLMatcher.grammar_from_lark(grammar.text)
            matcher = LLMatcher(tokenizer, text, log_level=0, limits=LLParserLimits(**LIMITS))  # type: ignore[arg-type]
        except Exception as error:
            raise _unusable(grammar, _told(str(error), grammar)) from None
        if matcher.is_error():
            raise _unusable(grammar, _told(matcher.get_error(), grammar))
        first = matcher.deep_copy()
        first.consume_tokens(first.compute_ff_tokens())  # what every text begins with
        if not first.is_error():
            first.compute_bitmask()
        if first.is_error():
            raise _unusable(grammar, _why_stuck(first))
        return matcher

    def _of_library(self) -> LLTokenizer:
        """llguidance's view of the vocabulary, made when first wanted."""
        tokenizer = self._tokenizer
        if tokenizer is None:
            raise RequestError("this model brings no vocabulary, so no grammar can be followed; leave it out")
        if not tokenizer.stop_ids:
            raise RequestError("this model names no end of text, so no grammar can end; leave it out")
        with self._library_lock:
            if self._library is None:
                from llguidance import LLTokenizer, TokenizerWrapper

                wrapper = TokenizerWrapper(_Vocabulary(tokenizer))
                self._library = LLTokenizer(wrapper, eos_token=sorted(tokenizer.stop_ids))
            return self._library


def _why_stuck(matcher: LLMatcher) -> str:
    """Why nothing can follow."""
    told = matcher.get_error().partition("\n")[0]
    if told.startswith("NoExtension"):
        return "no text fits it; look for what matches nothing, or begins with itself"
    if "Too many items" in told:
        return "what must follow is too long, or has no end; let each rule end"
    return told[:_MOST_TOLD] or "it ends here"


def _told(message: str, grammar: Grammar) -> str:
    """What the library says of a grammar that is wrong, without the grammar that it makes of an expression."""
    fault, place = _REGEX_FAULT.search(message), _REGEX_PLACE.search(message)
    if fault is not None:
        at = "" if place is None else f" (at character {len(place[1]) + 1})"
        line = _PLACE.match(message) if grammar.kind == "lark" else None  # which is the caller's own
        where = "" if grammar.kind == "regex" else f"{line[0] if line else ''}a pattern in it: "
        return f"{where}{fault[1][:_MOST_TOLD]}{at}"
    if grammar.kind == "regex":
        message = _PLACE.sub("", message).partition("\n")[0]
    return message[:_MOST_TOLD].strip()


class _Vocabulary:
    """The tokeniser as llguidance asks for it. Control tokens carry no bytes of their own."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = min(tokenizer.stop_ids)
        self.bos_token_id = tokenizer.bos_id
        self.tokens = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(tokenizer.special_ids)

    def __call__(self, text: Any) -> list[int]:
        if isinstance(text, bytes):
            text = text.decode(errors="replace")
        return self._tokenizer.encode(text, add_special=False, parse_special=False)
