"""S12: slow sockets beside normal load."""

from __future__ import annotations

from array import array
from collections.abc import Callable

import pytest

from tests.fixtures.tiny import tiny_llama
from tests.trust import slow_sockets
from tests.trust.figures import Figure


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_llama(tmp_path_factory.mktemp("tiny"), context=1536))


def test_normal_clients_are_answered_beside_slow_ones_which_are_cut(
    tiny: str, publish: Callable[[Figure], None]
) -> None:
    [figure] = slow_sockets.count(tiny, num_rounds=1, num_questions=120)
    publish(figure)
    for kind in slow_sockets.KINDS:
        assert figure.also[f"{kind} cut"] >= slow_sockets.NUM_SLOW // 4 - 2 * slow_sockets.NUM_READERS, figure
    assert figure.also["unread cut"] == 2 * slow_sockets.NUM_READERS


def test_slow_tls_handshakes_are_cut_beside_normal_clients(tiny: str, publish: Callable[[Figure], None]) -> None:
    [figure] = slow_sockets.count(tiny, num_rounds=1, num_questions=40, setting=slow_sockets.CI_TLS)
    publish(figure)
    assert min(figure.also[f"{kind} cut"] for kind in slow_sockets.TLS_KINDS) > 10


def test_a_server_that_waits_for_readers_is_counted(tiny: str) -> None:
    setting = slow_sockets.Setting(write_timeout_s=600.0, num_slow=10, patience_s=2.0)
    [figure] = slow_sockets.count(tiny, num_rounds=1, num_questions=8, setting=setting)
    assert figure.replays[0] == "a client that does not read was not cut"


@pytest.mark.parametrize("kinds", [slow_sockets.KINDS, slow_sockets.TLS_KINDS], ids=["http", "tls"])
def test_a_server_that_waits_for_slow_sockets_is_counted(tiny: str, kinds: tuple[str, ...]) -> None:
    setting = slow_sockets.Setting(server_timeout_s=600.0, num_slow=24, patience_s=1.0, kinds=kinds)
    [figure] = slow_sockets.count(tiny, num_rounds=1, num_questions=8, setting=setting)
    for kind in kinds:
        assert any(f"only 0 {kind} cut" in each for each in figure.replays)
    assert figure.num_failures == len(kinds) + 1


def test_times_beside_slow_sockets_are_compared_at_the_99th_percentile() -> None:
    alone = array("d", [1.0] * 98 + [2.0] * 2)
    assert slow_sockets.compared(alone, array("d", [1.0] * 98 + [2.3] * 2)).num_failures == 0
    assert slow_sockets.compared(alone, array("d", [1.0] * 98 + [2.5] * 2)).num_failures == 1
