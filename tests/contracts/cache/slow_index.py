"""What a prefix cache must find and whom it must evict, worked out the slow way: what a harness compares with.

Keys are made anew from secret and tokens for every text that was ever written; which of them can be found is replayed
from the cache's events. The longest hit is then looked for by comparing token by token with every text there is.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from pagemill.base.params import CacheOptions
from pagemill.cache.entry import NO_FINGERPRINT, Removed, Stored
from pagemill.cache.keys import Namespace, child_key, root_key
from pagemill.cache.sharing import SharedBlocks


class ViolationError(AssertionError):
    """A cache broke a promise."""


@dataclass(slots=True)
class SlowIndex:
    """Texts by key and the blocks that hold them. Mutated by `learn`, `note` and `touched`.

    stored: by key, what can be found now. used: by key, when it was last stored or hit.
    """

    shared: SharedBlocks
    block_size: int
    stored: dict[bytes, Stored] = field(default_factory=dict)
    used: dict[bytes, int] = field(default_factory=dict)
    _texts: dict[bytes, tuple[bytes, tuple[int, ...]]] = field(default_factory=dict)
    _children: dict[bytes, set[bytes]] = field(default_factory=dict)
    _now: int = 0

    def root(self, options: CacheOptions) -> bytes:
        """The key before the first block of the namespace that these options name."""
        public = options.public is not None
        namespace = Namespace(options.public or options.tenant, options.salt, public)
        return root_key(self.shared.secrets.of(namespace), namespace, NO_FINGERPRINT)

    def learn(self, options: CacheOptions, tokens: list[int]) -> None:
        """A text was written in this namespace: each of its blocks, and its tail, may be stored from now on."""
        key = self.root(options)
        for start in range(0, len(tokens), self.block_size):
            block = tuple(tokens[start : start + self.block_size])
            parent, key = key, child_key(key, array("I", block).tobytes())
            if key not in self._texts:
                self._texts[key] = (parent, block)
                self._children.setdefault(parent, set()).add(key)

    def note(self, event: Stored | Removed) -> None:
        """The cache stored or dropped a block. ViolationError for one that nobody wrote, or that is not there."""
        if isinstance(event, Removed):
            if self.stored.pop(event.key, None) is None:
                raise ViolationError("a block that is not stored was dropped")
            return
        if event.key in self.stored:
            raise ViolationError("a block was stored twice")
        known = self._texts.get(event.key)
        if known is None:
            raise ViolationError("a block was stored that no sequence of its namespace has written")
        if known[0] != event.parent:
            raise ViolationError("a block was stored behind another than its text's")
        if len(known[1]) != event.num_tokens:
            raise ViolationError("a block was stored with another length than its text's")
        self.stored[event.key] = event
        self._use(event.key)

    def longest(self, options: CacheOptions, tokens: list[int]) -> tuple[int, int]:
        """Tokens in whole blocks, and beside them in part of one, that a look-up of `tokens` must find."""
        keys, rest = self._whole(options, tokens)
        whole = len(keys) * self.block_size
        key = keys[-1] if keys else self.root(options)
        found = [self._texts[child][1] for child in self._children.get(key, ()) if child in self.stored]
        return whole, max((_common(each, rest) for each in found), default=0)

    def touched(self, options: CacheOptions, tokens: list[int], tail: bytes | None) -> None:
        """A sequence of these tokens has entered: its chain counts as used, its beginning last; then the tail."""
        for key in [*reversed(self._whole(options, tokens)[0]), *([] if tail is None else [tail])]:
            self._use(key)

    def _whole(self, options: CacheOptions, tokens: list[int]) -> tuple[list[bytes], tuple[int, ...]]:
        key, found, at = self.root(options), [], 0
        most = len(tokens) - 1  # the last token is computed, to have logits
        while at + self.block_size <= most:
            key = child_key(key, array("I", tokens[at : at + self.block_size]).tobytes())
            if key not in self.stored:
                break
            found.append(key)
            at += self.block_size
        return found, tuple(tokens[at : min(at + self.block_size, most)])

    def _use(self, key: bytes) -> None:
        self._now += 1
        self.used[key] = self._now


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count
