"""S13: without a key exactly the allow-list is open."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pagemill.server.access_door import OPEN_ROUTES
from pagemill.server.access_keys import hash_key
from tests.trust import doors
from tests.trust.figures import Figure


def test_without_a_key_exactly_the_allow_list_is_open(publish: Callable[[Figure], None]) -> None:
    for figure in doors.count():
        publish(figure)


def test_the_walk_knows_every_route() -> None:
    assert OPEN_ROUTES | {"/v1/chat/completions", "/openapi.json", "/metrics"} <= doors.public_paths()
    assert {"/admin/drain", "/admin/tenants/alice", "/admin/cache/pin/1"} <= doors.admin_paths()


def test_a_comparison_that_ends_early_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(self: doors.KeyRing, key: str) -> object:
        for same in self._by_id.values():
            for each in same:
                if each.entry is not None and each.entry.sha256 == hash_key(key):
                    return each
        raise doors.RefusedError("no", 401, "unknown key")

    monkeypatch.setattr(doors.KeyRing, "find", found)
    assert doors.comparisons().num_failures == 5
