"""Keys: who is who, what each may use, and how a changed file counts."""

from __future__ import annotations

import hmac
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from pagemill.base.clock import VirtualClock
from pagemill.base.errors import ConfigError
from pagemill.server import access
from pagemill.server.access import Bucket, Identity, KeyRing, RefusedError
from pagemill.server.access_keys import (
    MAX_FILE_BYTES,
    KeyEntry,
    given_key,
    hash_key,
    id_of,
    make_key,
    read_keys,
    write_keys,
)


def entry(name: str = "alice", **changes: Any) -> tuple[str, KeyEntry]:
    key, id, sha256 = make_key()
    return key, KeyEntry(name, id, sha256, **{"tenant": name, **changes})


def ring_of(path: Path | None, *entries: KeyEntry, clock: VirtualClock | None = None) -> KeyRing:
    return KeyRing(path, entries, clock or VirtualClock())


def refusal(identity: Identity) -> RefusedError:
    with pytest.raises(RefusedError) as caught:
        identity.enter()
    return caught.value


# The file


def test_a_file_is_read_as_it_was_written_and_holds_no_key(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "keys.toml"
    key, alice = entry(requests_per_minute=60, tokens_per_minute=10_000, max_streams=4, priority=-3)
    odd, bob = entry("bob", tenant='a "quoted"\\ tenant ä')
    admin = KeyEntry("root", *make_key()[1:], role="admin")
    write_keys(path, (alice, bob, admin))
    assert read_keys(path) == (alice, bob, admin)
    text = path.read_text()
    assert key not in text
    assert key.split("-", 2)[-1] not in text
    assert odd not in text
    assert path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(path.parent) == ["keys.toml"], "nothing else is left behind"


def test_keys_are_all_different_and_carry_256_bits_of_chance() -> None:
    made = {make_key()[0] for _ in range(200)}
    assert len(made) == 200
    assert all(len(key.split("-", 2)[2]) == 43 for key in made)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("keys = 3", "give tables"),
        ("[key.a]\nid = 'x'", "give tables"),
        ("[keys]\na = 1", "is no table"),
        ("[keys.a]\nsha256 = 'x'", "has no id"),
        ("[keys.a]\nid = 'x'\nsha256 = 'y'", "16 hexadecimal"),
        ("[keys.a]\nid = '0123456789abcdef'\nsha256 = 'y'", "64 hexadecimal"),
        ("[keys.a]\nid = 7\nsha256 = 'y'", "16 hexadecimal"),
        ("[keys.a]\nid = '0123456789abcdef'\nsha256 = 'HASH'", "tenant is None"),
        ("[keys.a]\nid = '0123456789abcdef'\nsha256 = 'HASH'\ntenant = ''", "tenant is ''"),
        ("[keys.a]\nid = '0123456789abcdef'\nsha256 = 'HASH'\ntenant = 't'\nrole = 'root'", "choose one of user"),
        ("[keys.a]\nid = '0123456789abcdef'\nsha256 = 'HASH'\ntenant = 't'\nrole = 'admin'", "leave tenant out"),
        ("[keys.a]\nid = '0123456789abcdef'\nsha256 = 'HASH'\ntenant = 't'\nmax_streams = 0", "max_streams is 0"),
        ("[keys.a]\nid = '0123456789abcdef'\nsha256 = 'HASH'\ntenant = 't'\nmax_streams = true", "max_streams is True"),
        ("[keys.a]\nid = '0123456789abcdef'\nsha256 = 'HASH'\ntenant = 't'\npriority = 1000", "-100 to 100"),
        ("[keys.a]\nid = '0123456789abcdef'\nsha256 = 'HASH'\ntenant = 't'\nmax_stream = 1", "mean max_streams"),
        ("[keys.'a b']\nid = '0123456789abcdef'\nsha256 = 'HASH'\ntenant = 't'", "letters, digits"),
        ("[keys.a", "no? TOML"),
        ("\xff", "no? TOML"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_and_says_why(text: str, what: str, tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_bytes(text.replace("HASH", "0" * 64).encode("latin-1"))
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=what.replace("no? TOML", "is not a TOML file")):
        read_keys(path)


@pytest.mark.parametrize("field", ["id", "sha256"])
def test_two_keys_that_could_be_taken_for_one_another_are_refused(field: str, tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    (_, one), (_, other) = entry("a"), entry("b")
    same = {"id": one.id, "sha256": other.sha256} if field == "id" else {"id": other.id, "sha256": one.sha256}
    write_keys(path, (one, KeyEntry("b", **same, tenant="b")))
    with pytest.raises(ConfigError, match=f"has the {field} of another"):
        read_keys(path)


def test_a_file_that_others_may_write_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    write_keys(path, (entry()[1],))
    for mode in (0o620, 0o602):
        path.chmod(mode)
        with pytest.raises(ConfigError, match="chmod 600"):
            read_keys(path)
    path.chmod(0o644)
    assert len(read_keys(path)) == 1


def test_a_file_that_is_not_there_or_too_large_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pagemill keys add"):
        read_keys(tmp_path / "none.toml")
    large = tmp_path / "large.toml"
    large.write_bytes(b"#" * (MAX_FILE_BYTES + 1))
    with pytest.raises(ConfigError, match="more than"):
        read_keys(large)


def test_a_path_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write"):
        write_keys(tmp_path / "file" / "keys.toml", (entry()[1],))


@pytest.mark.parametrize("key", ["", "short", "x" * 15, "with a space in it...", "ümlaut-ümlaut-ümlaut", "a\nb" * 10])
def test_a_given_key_that_can_be_guessed_or_not_be_sent_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match="16 or more"):
        given_key(key, "api-key-0", "user", "default")


# Who is who


def test_a_key_finds_its_owner_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    (key, alice), (other, bob) = entry("alice"), entry("bob", tenant="b", priority=5)
    write_keys(path, (alice, bob))
    ring = ring_of(path)
    assert (ring.find(key).tenant, ring.find(key).name) == ("alice", "alice")
    assert (ring.find(other).tenant, ring.find(other).priority) == ("b", 5)
    assert not ring.is_open


@pytest.mark.parametrize("wrong", ["", "x", "last", "half", "long", "id"])
def test_anything_else_is_refused_with_401(wrong: str) -> None:
    key, alice = entry()
    given = {"last": key[:-1] + ("A" if key[-1] != "A" else "B"), "half": key[: len(key) // 2], "long": key + "A"}
    given["id"] = f"pm-{alice.id}-{'A' * 43}"
    with pytest.raises(RefusedError) as caught:
        ring_of(None, alice).find(given.get(wrong, wrong))
    assert caught.value.status == 401
    assert key not in str(caught.value)


def test_no_key_is_refused_unless_none_is_asked_for() -> None:
    with pytest.raises(RefusedError, match="Authorization: Bearer"):
        ring_of(None, entry()[1]).find(None)
    nobody = ring_of(None).find(None)
    assert (nobody.tenant, nobody.name, nobody.role) == ("default", None, "user")


def test_a_key_from_the_command_line_is_found_whatever_it_looks_like() -> None:
    ring = ring_of(None, given_key("sk-some-other-style-of-key", "api-key-0", "user", "default"), entry()[1])
    assert ring.find("sk-some-other-style-of-key").name == "api-key-0"
    assert id_of("sk-some-other-style-of-key") == ""


def test_every_candidate_is_compared_in_constant_time_whether_one_matched_or_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compared: list[tuple[str, str]] = []
    real = hmac.compare_digest

    def counting(one: str, other: str) -> bool:
        compared.append((one, other))
        return real(one, other)

    monkeypatch.setattr(access.hmac, "compare_digest", counting)
    given = [f"some-key-that-is-long-enough-{number}" for number in range(3)]
    ring = ring_of(None, *(given_key(key, f"k{at}", "user", "t") for at, key in enumerate(given)), entry()[1])
    ring.find(given[0])
    assert len(compared) == 3, "no early way out"
    assert all(one == hash_key(given[0]) for one, _ in compared)
    for unknown in (make_key()[0], "x" * 40):
        compared.clear()
        with pytest.raises(RefusedError):
            ring.find(unknown)
        assert compared, "an unknown key is compared as well"


def test_a_request_may_ask_for_later_but_not_for_earlier() -> None:
    _, alice = entry(priority=10)
    identity = Identity(alice, VirtualClock())
    assert [identity.clamp_priority(asked) for asked in (None, -50, 10, 30)] == [10, 10, 10, 30]
    nobody = Identity(None, VirtualClock())
    assert [nobody.clamp_priority(asked) for asked in (None, -50, 30)] == [0, -50, 30]


# The file changes


def test_a_changed_file_counts_within_a_second(tmp_path: Path) -> None:
    path, clock = tmp_path / "keys.toml", VirtualClock()
    (key, alice), (other, bob) = entry("alice"), entry("bob")
    write_keys(path, (alice,))
    ring = ring_of(path, clock=clock)
    ring.find(key)
    write_keys(path, (bob,))
    clock.advance(access.RELOAD_S)
    assert ring.find(other).name == "bob"
    with pytest.raises(RefusedError):
        ring.find(key)


def test_a_wrong_file_changes_nothing_and_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, clock = tmp_path / "keys.toml", VirtualClock()
    key, alice = entry("alice")
    write_keys(path, (alice,))
    ring = ring_of(path, clock=clock)
    path.write_text("[keys.alice]\nnonsense = 1\n")
    with caplog.at_level(logging.ERROR):
        for _ in range(5):
            clock.advance(access.RELOAD_S)
            assert ring.find(key).name == "alice"
        assert len(caplog.records) == 1
        path.unlink()
        for _ in range(3):
            clock.advance(access.RELOAD_S)
            assert ring.find(key).name == "alice"
        assert len(caplog.records) == 2, "another reason is told too"
        assert "No such file" in caplog.text
    other, bob = entry("bob")
    write_keys(path, (bob,))
    clock.advance(access.RELOAD_S)
    assert ring.find(other).name == "bob"


def test_who_stays_keeps_what_it_has_used(tmp_path: Path) -> None:
    path, clock = tmp_path / "keys.toml", VirtualClock()
    key, alice = entry(requests_per_minute=2, max_streams=5)
    write_keys(path, (alice,))
    ring = ring_of(path, clock=clock)
    identity = ring.find(key)
    identity.enter()
    identity.enter()
    write_keys(path, (KeyEntry("alice", alice.id, alice.sha256, tenant="alice", requests_per_minute=3),))
    assert ring.reload()
    assert ring.find(key) is identity
    assert identity.num_streams == 2
    identity.enter()
    assert refusal(identity).reason == "requests"


# What each may use


def test_requests_a_minute_are_refused_beyond_the_limit_and_come_back() -> None:
    clock = VirtualClock()
    identity = Identity(entry(requests_per_minute=6)[1], clock)
    for _ in range(6):
        identity.enter()
        identity.leave()
    refused = refusal(identity)
    assert (refused.status, refused.retry_after_s) == (429, pytest.approx(10.0))
    clock.advance(10.0)
    identity.enter()
    assert refusal(identity).reason == "requests"


def test_streams_are_refused_beyond_the_limit_until_one_ends() -> None:
    identity = Identity(entry(max_streams=2, requests_per_minute=100)[1], VirtualClock())
    identity.enter()
    identity.enter()
    assert refusal(identity).reason == "streams"
    identity.leave()
    identity.enter()


def test_tokens_beyond_the_limit_are_paid_off_before_the_next_request() -> None:
    clock = VirtualClock()
    identity = Identity(entry(tokens_per_minute=600)[1], clock)
    identity.enter()
    identity.charge_tokens(900)
    refused = refusal(identity)
    assert refused.reason == "tokens"
    assert refused.retry_after_s is not None
    clock.advance(refused.retry_after_s)
    identity.enter()


def test_a_refused_request_counts_for_nothing() -> None:
    clock = VirtualClock()
    identity = Identity(entry(tokens_per_minute=60, requests_per_minute=2)[1], clock)
    identity.charge_tokens(120)
    for _ in range(10):
        refusal(identity)
    assert identity.num_streams == 0
    clock.advance(62)
    identity.enter()
    identity.enter()


def test_an_idle_minute_saves_up_no_more_than_a_minute() -> None:
    bucket = Bucket(60, 0.0)
    assert bucket.wait_s(60, 3600.0) == 0.0
    bucket.charge(60, 3600.0)
    assert bucket.wait_s(1, 3600.0) == pytest.approx(1.0)
    assert bucket.wait_s(10_000, 3660.0) == 0.0, "more than a minute's worth asks for a minute's worth"


def test_a_clock_that_stands_still_refills_nothing() -> None:
    bucket = Bucket(60, 5.0)
    bucket.charge(60, 5.0)
    assert bucket.wait_s(1, 5.0) == pytest.approx(1.0)
