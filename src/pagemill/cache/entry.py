"""Values of the cache: its configuration, how a sequence enters it, and what it tells."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from pagemill.base.params import CacheOptions
from pagemill.cache.block import Node
from pagemill.cache.keys import Fingerprint
from pagemill.cache.policies.registry import POLICIES, Makers
from pagemill.cache.prefix import Match
from pagemill.cache.receipt import Lookup
from pagemill.cache.tenancy import Account
from pagemill.cache.windows import WindowSpec

NO_FINGERPRINT = Fingerprint()


@dataclass(frozen=True, slots=True)
class SharingConfig:
    """How blocks are shared. policy: name of the eviction policy. fingerprint: of the model, its formats and numerics.
    page_bytes: of a block. known_tenants_only: refuse tenants that were not declared. wipes: have pages overwritten
    with zeros once their contents are dropped. windows: KV groups that have pages of their own and read a window.
    makers: of the policies."""

    policy: str = "lru"
    fingerprint: Fingerprint = NO_FINGERPRINT
    page_bytes: int = 1
    known_tenants_only: bool = False
    wipes: bool = True
    windows: tuple[WindowSpec, ...] = ()
    makers: Makers = field(default_factory=lambda: POLICIES, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Stored:
    """A block can be found from now on."""

    key: bytes
    parent: bytes
    block: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Removed:
    """A block can no longer be found. evicted: for want of room."""

    key: bytes
    evicted: bool


class Entry(NamedTuple):
    """How a sequence of known tokens can enter: what it hits and what it must take.

    match: what the tree has of it. node: the last whole block that is hit, or the root. shared: block ids of whole
    hits. tail: node whose first num_tail_tokens positions are copied. num_asked: tokens looked for. num_hit: positions
    that need not be computed. num_new: blocks to take. num_spare: blocks that it may take, beside what it hits.
    num_room: blocks that are there to be taken, whatever its tenant's cap. data: the tokens packed, empty where nothing
    was looked for. window_cut: a window group has let go of what a longer hit would read.
    """

    account: Account
    match: Match
    node: Node
    shared: list[int]
    tail: Node | None
    num_tail_tokens: int
    num_asked: int
    num_hit: int
    num_new: int
    num_spare: int
    num_room: int
    data: bytes
    options: CacheOptions
    window_cut: bool = False


class Entered(NamedTuple):
    """What `SharedBlocks.enter` gives. table: block ids. missing: keys of whole blocks that were not found; edges: the
    tokens of each of these, packed."""

    table: array[int]
    lookup: Lookup
    missing: list[bytes]
    edges: list[bytes]


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Use of the cache, in blocks and token positions.

    num_positions: positions granted to sequences. num_unused_positions: those of active blocks that are not, the
    waste that paging keeps below one block a sequence. num_leaked_blocks: active blocks that no sequence owns (0).
    num_cached_blocks: published ones that nobody holds, to be hit or evicted. num_held_blocks: out of service.
    num_pinned_blocks: under a lease. num_hit_tokens of num_asked_tokens: looked for and found since the start, of
    each request once; num_reentry_hit_tokens of num_reentry_tokens: the same of sequences that were put off and came
    again, and of a request's further choices. num_left_blocks: that can no longer be found, by reason
    (`residents.Departure`); num_evicted_blocks: those of them that made room.
    num_rebuilds: how often what the cache said of itself was contradictory, so that all of it was dropped and computed
    again (0). num_quarantined_blocks: blocks that had contents then.
    """

    num_blocks: int
    num_free_blocks: int
    num_active_blocks: int
    num_sequences: int
    num_positions: int
    num_unused_positions: int
    num_leaked_blocks: int
    num_cached_blocks: int = 0
    num_held_blocks: int = 0
    num_pinned_blocks: int = 0
    num_asked_tokens: int = 0
    num_hit_tokens: int = 0
    num_reentry_tokens: int = 0
    num_reentry_hit_tokens: int = 0
    num_evicted_blocks: int = 0
    num_left_blocks: Mapping[str, int] = field(default_factory=dict)
    num_rebuilds: int = 0
    num_quarantined_blocks: int = 0
