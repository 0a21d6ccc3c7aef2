"""S8: what has gone is nowhere in the process's memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.fixtures.tiny import tiny_llama
from tests.trust import residue
from tests.trust.figures import Figure
from tests.trust.memory import NEEDLE_BYTES, Scanner, masked


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_llama(tmp_path_factory.mktemp("tiny")))


@pytest.mark.parametrize("codec", ["f32", "int8"])
@pytest.mark.parametrize("case", residue.CASES)
def test_no_keys_and_values_are_left(tiny: str, case: str, codec: str, publish: Callable[[Figure], None]) -> None:
    publish(residue.count(tiny, [(case, codec)]))


def test_a_page_that_is_not_wiped_is_found(tiny: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In a process whose product does not wipe: the child imports this before anything else."""
    patch = (
        "from pagemill.kernels.pages import Pages\n"
        "Pages.move = lambda self, moves: [self.copy(each) for each in moves.copies]\n"
    )
    (tmp_path / "sitecustomize.py").write_text(patch)
    monkeypatch.syspath_prepend(str(tmp_path))
    figure = residue.count(tiny, [("tenant", "f32")])
    assert figure.num_failures == 1
    assert "'left': 0" not in figure.replays[0]


def test_the_search_finds_a_planted_needle_and_nothing_once_it_is_gone() -> None:
    planted = np.random.default_rng(3).integers(0, 256, 4096, np.uint8)
    scanner = Scanner()
    needle = masked(planted[128 : 128 + NEEDLE_BYTES]).tobytes()
    assert list(scanner.scan({needle}).values()) == [(needle, scanner.scan({needle})[_address(planted) + 128][1])]
    planted[:] = 0
    assert scanner.scan({needle}) == {}
    assert scanner.num_bytes > 10**6


def _address(values: np.ndarray) -> int:
    return int(values.__array_interface__["data"][0])
