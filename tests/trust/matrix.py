"""S1: the isolation matrix. For every field of a key and every tier: different never shares, and equal does.

A cell stores a text under one value of one field and looks for it under another; its control looks under the same value
again and must find all of it. The hot tier is the only one yet. Below the cells stand the pairs of names that would be
one key if fields were joined without their types and lengths, and the options of real engines.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, replace
from itertools import combinations, permutations
from pathlib import Path
from unittest.mock import patch

from pagemill import LLM, build
from pagemill.base.params import CacheOptions
from pagemill.cache.entry import SharingConfig
from pagemill.cache.keys import Fingerprint, Namespace, Secrets, root_key
from pagemill.cache.manager import CacheManager
from pagemill.kernels.target import available_targets, choose_target
from tests.fixtures.tiny import llama_weights, mistral_config, tiny_llama, write_hf
from tests.trust.figures import Figure

TIERS = ("hot",)
TOKENS = array("i", range(1, 14))
MOST = len(TOKENS) - 1
BASE = Fingerprint("w", "q4_1", "auto", "amx-1", "int8", 1, "rope", 4, "adapter", "1", b"media")
VALUES: dict[str, tuple[object, ...]] = {
    "weights": ("w", "v", ""),
    "weight_format": ("q4_1", "q8_0", ""),
    "compute_dtype": ("auto", "bfloat16", ""),
    "numerics": ("amx-1", "amx-2", "avx2-1", ""),
    "codec": ("int8", "bf16", ""),
    "codec_version": (1, 2),
    "positions": ("rope", "yarn", ""),
    "block_size": (4, 8),
    "adapter": ("adapter", "other", "", None),
    "adapter_version": ("1", "2", "", None),
    "media": (b"media", b"other", b"", None),
}
SCOPES = (
    CacheOptions("t"), CacheOptions("u"), CacheOptions("t", "x"), CacheOptions("t", ""), CacheOptions("u", "x"),
    CacheOptions("t", public="p"), CacheOptions("t", "x", "p"), CacheOptions("p"), CacheOptions("p", "x"),
)  # fmt: skip

# Engines of `engines_of`: the fields that each changes by itself; beside the plain one unless BESIDE says another.
OWN_FIELDS: dict[str, set[str]] = {
    "other weights": {"weights"},
    "other rope": {"positions"},
    "other norm": {"weights"},
    "weights in q8_0": {"weight_format"},
    "weights in bf16": {"weight_format"},
    "dtype float32": {"weight_format"},
    "window 40": {"positions"},
    "window 80": {"positions"},
    "keys in f16": {"codec"},
    "keys in bf16": {"codec"},
    "keys in f32": {"codec"},
    "blocks of 32": {"block_size"},
    "reference": {"numerics"},
}
TARGETS_CHANGE = {"numerics", "compute_dtype"}
BESIDE = {"window 80": "window 40", "dtype float32": "weights in bf16"}
NOT_OF_ENGINES = {"codec_version", "adapter", "adapter_version", "media"}  # no option changes them: see VALUES
OF_TILES = "amx"  # a target that multiplies as bfloat16


def look(cache: CacheManager, options: CacheOptions, fingerprint: Fingerprint) -> tuple[int, str | None]:
    """Look a text up, compute the rest and leave it. Returns the tokens that were hit and the reason of the miss."""
    shared = cache.shared
    assert shared is not None
    shared._config = replace(shared._config, fingerprint=fingerprint)  # as an engine with several adapters has it
    lookup = cache.open(1, len(TOKENS), 1000, TOKENS, options)
    cache.moved(cache.moves())
    cache.commit(1, len(TOKENS))
    cache.close(1)
    cache.verify()
    return lookup.num_hit, None if lookup.miss is None else lookup.miss.reason


def cell(first: tuple[CacheOptions, Fingerprint], second: tuple[CacheOptions, Fingerprint], reason: str) -> list[str]:
    """One negative and its control; what is wrong with them."""
    cache = CacheManager(64, 4, "paged", SharingConfig())
    assert cache.shared is not None
    cache.shared.tenancy.declare_public("p")
    found = []
    look(cache, *first)
    told = look(cache, *second)
    if told != (0, reason):
        found.append(f"{second} after {first} hit {told[0]} tokens and was told {told[1]!r}, not {reason!r}")
    for each in (first, second):
        if look(cache, *each) != (MOST, None):
            found.append(f"the control of {each} did not hit")
    return found


def cache_cells() -> Iterator[list[str]]:
    """Every ordered pair of values of every field, and of every pair of scopes."""
    assert list(VALUES) == [each.name for each in fields(Fingerprint)], "a field of the key has no cells"
    options = CacheOptions("t", "x")
    for name, values in VALUES.items():
        for a, b in permutations(values, 2):
            one, other = (replace(BASE, **{name: value}) for value in (a, b))  # type: ignore[arg-type]
            yield cell((options, one), (options, other), "other format")
    for first, second in permutations(SCOPES, 2):
        yield cell((first, BASE), (second, BASE), "not seen")


def token_cells() -> Iterator[list[str]]:
    """Another token at each place is never hit, and all before it is."""
    for place in range(len(TOKENS)):
        cache = CacheManager(64, 4, "paged", SharingConfig())
        look(cache, SCOPES[0], BASE)
        other = TOKENS[:place] + array("i", [TOKENS[place] + 2**24]) + TOKENS[place + 1 :]
        lookup = cache.open(1, len(other), 1000, other, SCOPES[0])
        yield [] if lookup.num_hit == min(place, MOST) else [f"{lookup.num_hit} tokens hit before place {place}"]


def key_cells() -> Iterator[list[str]]:
    """Names that are one where fields are joined, cut or folded have keys of their own, and another secret changes
    every key."""
    plain = Namespace("t", "x")
    names = [
        (plain, BASE),
        *((Namespace(tenant, salt), BASE) for tenant, salt in (("ab", "c"), ("a", "bc"), ("abc", ""), ("abc", None))),
        *((plain, replace(BASE, adapter=a, adapter_version=b)) for a, b in (("ab", "c"), ("a", "bc"), ("x", "1"))),
        (Namespace("t", "adapter"), replace(BASE, adapter="x")),
        (Namespace("t", "x", public=True), BASE),
        (Namespace("t", "None"), BASE),
        (Namespace("t"), BASE),
        (Namespace("t\x00x"), BASE),
        (Namespace("t", "e\u0301"), BASE),
        (Namespace("t", "\u00e9"), BASE),
        (plain, replace(BASE, codec_version=11, block_size=1)),
        (plain, replace(BASE, codec_version=1, block_size=11)),
        (plain, replace(BASE, media=b"adapter", adapter=None)),
    ]
    secret, other = bytes(32), bytes([1] * 32)
    for one, two in combinations(names, 2):
        yield (
            ["two names have one key: " + repr((one, two))] if root_key(secret, *one) == root_key(secret, *two) else []
        )
    for name in names:
        yield (
            [f"the secret is no part of the key of {name}"] if root_key(secret, *name) == root_key(other, *name) else []
        )
    drawn = Secrets()
    pairs = combinations([drawn.of(Namespace(tenant, public=public)) for tenant in "ab" for public in (0, 1)], 2)
    yield ["two tenants have one secret"] if any(a == b for a, b in pairs) else []


def fingerprint_of(model: Path, target: str | None = None, **options: object) -> Fingerprint:
    """What a real engine's blocks are told apart by."""
    forced = {"PAGEMILL_FORCE_TARGET": target} if target else {}
    fixed = {"kv_cache_memory_bytes": "4MiB", "packed_weights_cache": "off", "num_threads": 1}
    with patch.dict(os.environ, forced), LLM(str(model), **{**fixed, **options}) as llm:  # type: ignore[arg-type]
        shared = llm.built.engine.cache.shared
        assert shared is not None
        return shared._config.fingerprint


def engines_of(directory: Path) -> dict[str, Fingerprint]:
    """Engines that compute other bytes than the plain one, by name."""
    model = tiny_llama(directory / "one", seed=0)
    chosen = choose_target()  # the best of the machine, or what the environment forces
    others = [each for each in available_targets() if each != chosen]
    of_windows = mistral_config(window=40), mistral_config(window=80)
    windowed = [write_hf(directory / f"window {i}", each, llama_weights(each)) for i, each in enumerate(of_windows)]
    in_tiles = {}
    if OF_TILES not in available_targets():  # else it is one of the targets below, or the plain one
        with patch.object(build, "choose_target", lambda: OF_TILES):
            in_tiles["arithmetic of tiles"] = fingerprint_of(model)
    return {
        "plain": fingerprint_of(model),
        "other weights": fingerprint_of(tiny_llama(directory / "two", seed=1)),
        "other rope": fingerprint_of(tiny_llama(directory / "three", seed=0, rope_theta=500_000.0)),
        "other norm": fingerprint_of(tiny_llama(directory / "four", seed=0, rms_norm_eps=1e-3)),
        "weights in q8_0": fingerprint_of(model, weight_format="q8_0"),
        "weights in bf16": fingerprint_of(model, weight_format="bf16"),
        "dtype float32": fingerprint_of(model, dtype="float32"),
        "window 40": fingerprint_of(windowed[0]),
        "window 80": fingerprint_of(windowed[1]),
        **in_tiles,
        "keys in f16": fingerprint_of(model, kv_cache_dtype="f16"),
        "keys in bf16": fingerprint_of(model, kv_cache_dtype="bf16"),
        "keys in f32": fingerprint_of(model, kv_cache_dtype="f32"),
        "blocks of 32": fingerprint_of(model, block_size=32),
        "reference": fingerprint_of(model, executor="reference"),
        **{f"target {each}": fingerprint_of(model, target=each) for each in others},
    }


def told_apart(engines: Mapping[str, Fingerprint]) -> Iterator[list[str]]:
    """No two have one fingerprint, and each field that an engine's options change differs by itself: another that does
    as well, such as the digest of the weights, must not stand in for it."""
    changed = set(NOT_OF_ENGINES | TARGETS_CHANGE).union(*OWN_FIELDS.values())
    assert changed == {each.name for each in fields(Fingerprint)}, "a field of the key is changed by no engine"
    for (name, one), (other_name, other) in combinations(engines.items(), 2):
        yield [f"{name} and {other_name} have one fingerprint"] if one == other else []
    for name, own in OWN_FIELDS.items():
        one, other = engines[name], engines[BESIDE.get(name, "plain")]
        same = [each for each in sorted(own) if getattr(one, each) == getattr(other, each)]
        yield [f"{name} changes nothing of {', '.join(same)}"] if same else []
    targets = [engine for name, engine in engines.items() if name.startswith(("target ", "arithmetic ", "plain"))]
    for one, other in combinations(targets, 2):
        yield [f"two targets have the numerics {one.numerics}"] if one.numerics == other.numerics else []
    yield [] if len({each.compute_dtype for each in targets}) == 2 else ["targets change nothing of compute_dtype"]


def engine_cells(directory: Path) -> Iterator[list[str]]:
    """Engines that compute other bytes have other fingerprints, and the same engine the same one, also when it is made
    anew or with options that change no byte."""
    engines = engines_of(directory)
    yield from told_apart(engines)
    model, chosen = tiny_llama(directory / "one", seed=0), choose_target()
    again = {
        "made anew": fingerprint_of(model),
        "with two threads": fingerprint_of(model, num_threads=2),
        "from a copy of the files": fingerprint_of(tiny_llama(directory / "copy", seed=0)),
        "with the target that is chosen anyway": fingerprint_of(model, target=chosen),
    }
    for name, each in again.items():
        yield [] if each == engines["plain"] else [f"the same engine {name} has another fingerprint: {each}"]


def count(parts: Iterable[Iterable[list[str]]]) -> Figure:
    """All cells of these parts, times the tiers."""
    cells = [each for part in parts for each in part]
    wrong = [line for each in cells for line in each]
    return Figure("S1", "cells failed", sum(map(bool, cells)), len(cells) * len(TIERS), "cells", {}, wrong)
