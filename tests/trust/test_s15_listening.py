"""S15: one socket on loopback, and one for the admin."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fixtures.tiny import tiny_llama
from tests.trust import listening
from tests.trust.figures import Figure


def test_a_server_listens_where_it_may_and_nowhere_else(publish: Callable[[Figure], None]) -> None:
    for figure in listening.count():
        publish(figure)


@pytest.mark.parametrize(
    "setting",
    [
        listening.Setting((), 2),
        listening.Setting((), 1, 1),
        listening.Setting(("--host", "0.0.0.0", "--insecure"), 1),
    ],
    ids=str,
)
def test_a_socket_too_many_or_one_that_others_reach_is_seen(setting: listening.Setting, tmp_path: Path) -> None:
    assert "listens on" in listening.wrong_with(setting, tmp_path / "place", str(tiny_llama(tmp_path)))


def test_a_server_that_is_not_refused_is_seen(tmp_path: Path) -> None:
    setting = listening.Setting((*listening.ADMIN, "--admin-host", "0.0.0.0"), 0, told=listening.TLS)
    planted = "from pagemill.cli import serve_access\nserve_access.check_admin_address = lambda *_, **__: False\n"
    wrong = listening.wrong_with(setting, tmp_path / "place", str(tiny_llama(tmp_path)), planted)
    assert "was not refused" in wrong


def test_a_name_that_is_taken_for_this_machine_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from pagemill.server import access_listen

    decide = access_listen.is_loopback
    monkeypatch.setattr(access_listen, "is_loopback", lambda host: host.endswith(".test") or decide(host))
    names = ["everybody.test", "half.test", "half6.test", "outside.test"]
    assert listening.addresses() == [f"{name!r}{what} is let in" for name in names for what in ("", " for the admin")]


def test_an_admin_address_that_nobody_checks_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "check_admin_address", lambda host, *, has_tls: True)
    wrong = listening.addresses()
    assert len(wrong) == len(listening.REFUSED)
    assert all("for the admin is let in" in each for each in wrong)
