"""The isolation matrix: for every field of a key, equal shares and different never does; random traffic of tenants."""

from __future__ import annotations

import random
from array import array
from dataclasses import fields, replace

import pytest

from pagemill.base.params import CacheOptions
from pagemill.cache.entry import SharingConfig
from pagemill.cache.keys import Fingerprint
from pagemill.cache.manager import CacheManager
from pagemill.cache.receipt import Lookup

BASE = Fingerprint("w", "q4_1", "auto", "amx-1", "int8", 1, "rope", 4, "adapter", "1", b"media")
OTHER = {"codec_version": 2, "block_size": 8, "media": b"other"}
TOKENS = array("i", range(1, 12))


def request(cache: CacheManager, tokens: array[int], options: CacheOptions, seq_id: int = 1) -> Lookup:
    lookup = cache.open(seq_id, len(tokens), 1000, tokens, options)
    cache.moved(cache.moves())
    cache.commit(seq_id, len(tokens))
    cache.close(seq_id)
    cache.verify()
    return lookup


def with_fingerprint(cache: CacheManager, fingerprint: Fingerprint) -> None:
    """Another adapter, format or kernel over the same cache, as an engine with several adapters has."""
    assert cache.shared is not None
    cache.shared._config = replace(cache.shared._config, fingerprint=fingerprint)


@pytest.mark.parametrize("name", [each.name for each in fields(Fingerprint)])
def test_another_fingerprint_never_shares_and_the_receipt_says_why(name: str) -> None:
    cache = CacheManager(32, 4, "paged", SharingConfig(fingerprint=BASE))
    request(cache, TOKENS, CacheOptions("t"))
    with_fingerprint(cache, replace(BASE, **{name: OTHER.get(name, "other")}))
    lookup = request(cache, TOKENS, CacheOptions("t"))
    assert lookup.num_hit == 0
    assert lookup.miss is not None
    assert lookup.miss.reason == "other format"
    with_fingerprint(cache, replace(BASE))
    assert request(cache, TOKENS, CacheOptions("t")).num_hit == len(TOKENS) - 1


OPTIONS = [
    CacheOptions("t"), CacheOptions("u"), CacheOptions("t", "x"), CacheOptions("t", ""), CacheOptions("u", "x"),
    CacheOptions("t", None, "p"), CacheOptions("t", "x", "p"), CacheOptions("p"),
]  # fmt: skip


@pytest.mark.parametrize("first", OPTIONS, ids=str)
@pytest.mark.parametrize("second", OPTIONS, ids=str)
def test_namespaces_share_exactly_where_they_are_one(first: CacheOptions, second: CacheOptions) -> None:
    cache = CacheManager(32, 4, "paged", SharingConfig(fingerprint=BASE))
    assert cache.shared is not None
    cache.shared.tenancy.declare_public("p")
    request(cache, TOKENS, first)
    lookup = request(cache, TOKENS, second)
    same = (first.public or first.tenant, first.salt, first.public) == (
        second.public or second.tenant, second.salt, second.public,
    )  # fmt: skip
    assert lookup.num_hit == (len(TOKENS) - 1 if same else 0)
    if not same:
        assert lookup.miss is not None
        assert lookup.miss.reason == "not seen", "a reason tells nothing of another namespace"


def test_random_traffic_of_tenants_with_shared_texts_never_crosses() -> None:
    """Each tenant's hits are at most what it stored itself, to the token; shared texts make crossing likely."""
    draw = random.Random(7)
    cache = CacheManager(96, 4, "paged", SharingConfig(fingerprint=BASE))
    texts = [array("i", [draw.randrange(3) for _ in range(draw.randint(2, 30))]) for _ in range(40)]
    seen: dict[str, list[array[int]]] = {}
    num_lookups = num_hits = 0
    for _ in range(4000):
        tenant, tokens = draw.choice("abcd"), draw.choice(texts)
        lookup = request(cache, tokens, CacheOptions(tenant))
        own = max((_common(tokens, each) for each in seen.get(tenant, [])), default=0)
        assert lookup.num_hit <= own
        seen.setdefault(tenant, []).append(tokens)
        num_lookups += 1
        num_hits += lookup.num_hit > 0
    assert num_hits > num_lookups // 4


def _common(a: array[int], b: array[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
