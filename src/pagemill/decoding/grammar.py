"""Grammars to masks: which tokens may come next so that a text stays within a JSON schema, a regular expression or a
Lark grammar. Owns compiling, its limits and errors; the automata are llguidance's, masks are applied in `adjust.py`.

Compiled grammars are kept, so that a schema which many requests bring is compiled once; each text gets a copy of the
beginning state. Safe to share among threads: compiling happens on worker threads, copying on the engine's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any

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


class GrammarState:
    """How far one text has come in its grammar. Mutated by `follow`."""

    __slots__ = ("_fresh", "_matcher", "_num_taken")

    def __init__(self, fresh: LLMatcher) -> None:
        self._fresh = fresh
        self._matcher = fresh.deep_copy()
        self._num_taken = 0

    def follow(self, generated: Sequence[int]) -> None:
        """Come to the end of what was generated so far; a shorter text begins anew. Raises RequestError (500) for a
        text that the grammar does not allow, or that it takes too long to follow."""
        if len(generated) < self._num_taken:
            self._matcher, self._num_taken = self._fresh.deep_copy(), 0
        for token in generated[self._num_taken :]:
            if not self._matcher.consume_token(token):
                raise RequestError(f"the grammar cannot go on: {self._matcher.get_error()[:300]}", status=500)
            self._num_taken += 1

    def allowed(self) -> NDArray[np.bool_]:
        """Which tokens may come next: [vocabulary of the tokeniser, rounded up] bool. Raises RequestError (500) where
        that takes too long to tell."""
        mask = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise RequestError(f"the grammar cannot go on: {self._matcher.get_error()[:300]}", status=500)
        return np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little").view(np.bool_)


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
        return GrammarState(self._compiled(grammar))

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
            raise RequestError(f"the {grammar.noun} cannot be used: {str(error)[:500]}") from None
        if matcher.is_error():
            raise RequestError(f"the {grammar.noun} cannot be used: {matcher.get_error()[:500]}")
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
