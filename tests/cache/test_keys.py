"""Keys: what differs never meets, what is equal always does."""

from __future__ import annotations

import hashlib
from dataclasses import fields, replace
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagemill.cache.keys import Fingerprint, Namespace, Secrets, child_key, encode_field, root_key

SECRET = bytes(range(32))
BASE = Fingerprint(
    "w", "q4_1", "auto", "amx-1", "int8", 1, "rope", 16, adapter="a", adapter_version="1", media=b"m"
)  # fmt: skip
CHANGED = {
    "codec_version": 2, "block_size": 32, "media": b"n",
}  # fmt: skip
SCALARS = st.none() | st.text() | st.binary() | st.integers(-(2**70), 2**70)


def variants() -> list[Fingerprint]:
    found = [BASE]
    for each in fields(Fingerprint):
        found.append(replace(BASE, **{each.name: CHANGED.get(each.name, "other")}))
    return [*found, replace(BASE, adapter=None), replace(BASE, adapter=""), replace(BASE, media=None)]


NAMESPACES = [
    Namespace("t"), Namespace("t", ""), Namespace("t", "x"), Namespace("u"), Namespace("t", public=True),
    Namespace("tx"), Namespace("t", "xa"),
]  # fmt: skip


def test_every_field_of_the_fingerprint_is_part_of_the_key() -> None:
    keys = {root_key(SECRET, Namespace("t"), each) for each in variants()}
    assert len(keys) == len(variants()) == len(fields(Fingerprint)) + 4
    assert all(len(key) == 32 for key in keys)


def test_namespaces_never_meet_even_with_one_secret() -> None:
    assert len({root_key(SECRET, each, BASE) for each in NAMESPACES}) == len(NAMESPACES)


def test_a_salt_is_no_adapter() -> None:
    salted = root_key(SECRET, Namespace("t", "x"), replace(BASE, adapter=None))
    adapted = root_key(SECRET, Namespace("t"), replace(BASE, adapter="x"))
    assert salted != adapted


def test_equal_fields_give_equal_keys_and_other_secrets_others() -> None:
    assert root_key(SECRET, Namespace("t"), BASE) == root_key(SECRET, Namespace("t"), replace(BASE))
    assert root_key(SECRET, Namespace("t"), BASE) != root_key(SECRET[::-1], Namespace("t"), BASE)


@given(st.lists(SCALARS, max_size=4), st.lists(SCALARS, max_size=4))
def test_encodings_of_lists_are_equal_only_where_the_lists_are(
    a: list[str | bytes | int | None], b: list[str | bytes | int | None]
) -> None:
    encoded = [b"".join(map(encode_field, each)) for each in (a, b)]
    typed = [[(type(value), value) for value in each] for each in (a, b)]
    assert (encoded[0] == encoded[1]) == (typed[0] == typed[1])


def test_a_block_key_is_the_hash_of_its_parent_and_its_tokens() -> None:
    tokens = (5).to_bytes(4, "little") + (2**31 - 1).to_bytes(4, "little")
    assert child_key(SECRET, tokens) == hashlib.sha256(SECRET + tokens).digest()


def test_secrets_are_random_for_each_tenant_and_can_be_forgotten() -> None:
    secrets, again = Secrets(), Secrets()
    drawn = [secrets.of(each) for each in (Namespace("a"), Namespace("b"), Namespace("a", public=True))]
    assert len(set(drawn)) == 3
    assert secrets.of(Namespace("a", "salt")) == drawn[0]
    assert again.of(Namespace("a")) != drawn[0]
    secrets.forget("a")
    assert secrets.of(Namespace("a")) not in drawn
    assert secrets.of(Namespace("a", public=True)) == drawn[2], "a tenant named like a public namespace is another"


@pytest.mark.parametrize(("first", "second"), list(combinations(range(3), 2)))
def test_chains_that_differ_anywhere_have_different_ends(first: int, second: int) -> None:
    blocks = [b"\1\0\0\0", b"\2\0\0\0", b"\3\0\0\0"]
    ends = []
    for order in ([0, 1, 2], [1, 0, 2], [2, 1, 0]):
        key = SECRET
        for index in order:
            key = child_key(key, blocks[index])
        ends.append(key)
    assert ends[first] != ends[second]
