"""S13: without a key exactly the allow-list is open."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pagemill.server.access_door import OPEN_ROUTES
from pagemill.server.access_keys import hash_key, id_of
from tests.trust import doors
from tests.trust.figures import Figure


def test_without_a_key_exactly_the_allow_list_is_open(publish: Callable[[Figure], None]) -> None:
    [walk, comparisons] = doors.count()
    publish(walk)
    publish(comparisons)
    assert walk.also["with a right body"] > 1000


def test_the_walk_knows_every_route() -> None:
    public, admin = doors.public_routes(), doors.admin_routes()
    assert OPEN_ROUTES | {"/v1/chat/completions", "/openapi.json", "/metrics"} <= public.keys()
    assert {"/admin/drain", "/admin/tenants/alice", "/admin/cache/pin/1"} <= admin.keys()


def test_every_route_that_takes_a_body_has_a_right_one() -> None:
    taking = {
        path
        for routes in (doors.public_routes(), doors.admin_routes())
        for path, methods in routes.items()
        if methods & doors.WITH_BODY
    }
    assert taking == doors.BODIES.keys()


@pytest.mark.parametrize(
    "opened",
    [
        {("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("POST", "/tokenize"), ("POST", "/detokenize")},
        {("POST", "/admin/cache/purge"), ("POST", "/admin/keys/reload"), ("PUT", "/admin/tenants/alice")},
        {("POST", "/admin/cache/pin"), ("DELETE", "/admin/cache/pin/1")},
    ],
    ids=["public", "admin", "pins"],
)
def test_a_door_that_is_open_for_a_method_is_seen(opened: set[tuple[str, str]], tmp_path: Path) -> None:
    """In a process whose door is: the server imports this before anything else."""
    patch = (
        "from pagemill.server.access_door import Door\n"
        f"opened, let_in = {opened!r}, Door._let_in\n"
        "def let_all_in(self, path, method, headers):\n"
        "    if (method, path) not in opened: return let_in(self, path, method, headers)\n"
        "    self._ring.nobody.enter()\n"
        "    return self._ring.nobody\n"
        "Door._let_in = let_all_in\n"
    )
    (tmp_path / "sitecustomize.py").write_text(patch)
    with doors.served(tmp_path, str(tmp_path)) as (process, key, _):
        wrong = [each for walk in doors.walked(process, key, ["{}"]) for each in walk.wrong]
    assert {tuple(each.split()[2:4]) for each in wrong} == opened


def test_a_comparison_that_ends_early_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(self: doors.KeyRing, key: str) -> object:
        for same in self._by_id.values():
            for each in same:
                if each.entry is not None and each.entry.sha256 == hash_key(key):
                    return each
        raise doors.RefusedError("no", 401, "unknown key")

    monkeypatch.setattr(doors.KeyRing, "find", found)
    assert doors.comparisons().num_failures == 5


def test_a_comparison_more_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(self: doors.KeyRing, key: str) -> object:
        for each in self._by_id.get(id_of(key), ()):
            if each.entry is not None and doors.hmac.compare_digest(hash_key(key), each.entry.sha256):
                return each
        doors.hmac.compare_digest(hash_key(key), "0" * 64)
        raise doors.RefusedError("no", 401, "unknown key")

    monkeypatch.setattr(doors.KeyRing, "find", found)
    [told] = doors.comparisons().replays
    assert told.startswith("its public half")
