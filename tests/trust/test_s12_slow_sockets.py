"""S12: slow sockets beside normal load."""

from __future__ import annotations

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
        assert figure.also[f"{kind} cut"] >= slow_sockets.NUM_SLOW // 3 - slow_sockets.NUM_READERS, figure
    assert figure.also["unread cut"] >= 1
