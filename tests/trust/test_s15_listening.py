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
        listening.Setting((), 1, everywhere=True),
        listening.Setting(("--host", "0.0.0.0", "--insecure"), 1),
    ],
    ids=str,
)
def test_a_socket_too_many_or_one_that_others_reach_is_seen(setting: listening.Setting, tmp_path: Path) -> None:
    assert "listens on" in listening.wrong_with(setting, tmp_path / "place", str(tiny_llama(tmp_path)))
