"""S8: what has gone is nowhere in the process's memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pagemill.base.kv_spec import KV_VALUE_BYTES
from tests.fixtures.tiny import tiny_llama
from tests.trust import residue
from tests.trust.figures import Figure
from tests.trust.memory import NEEDLE_BYTES, Scanner, masked


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_llama(tmp_path_factory.mktemp("tiny")))


PLAIN = [case for case in residue.CASES if ", " not in case]
IN_INT8 = ("preempted", "rolled back", "purge on end", "lease")  # here; in every codec at release size
CHOSEN = [
    *((case, codec) for case in PLAIN for codec in ("f32", "int8") if codec == "int8" or case not in IN_INT8),
    ("tenant, mistral", "int8"), ("preempted, mistral", "bf16"), ("evicted, qwen2", "int8"), ("aborted, qwen2", "f16"),
    ("busy, two threads", "int8"),
]  # fmt: skip


@pytest.mark.parametrize(("case", "codec"), CHOSEN, ids=str)
def test_no_keys_and_values_are_left(tiny: str, case: str, codec: str, publish: Callable[[Figure], None]) -> None:
    publish(residue.count(tiny, [(case, codec)]))


PAGES = """
from pagemill.kernels.pages import Pages
Pages.move = lambda self, moves: [self.copy(each) for each in moves.copies]
"""
WINDOW_PAGES = """
from pagemill.kernels.native import NativeExecutor
move = NativeExecutor.move
NativeExecutor.move = lambda self, moves: move(self, type(moves)(moves.wipes, moves.copies))
"""
SCRATCH = """
from pagemill.base.transfer import Moves
from pagemill.kernels.native import NativeExecutor
def move(self, moves):
    self._pages.move(moves)
    for pages, each in zip(self._window_pages, moves.windows):
        pages.move(each)
NativeExecutor.move = move
"""


@pytest.mark.parametrize(
    ("broken", "case", "codec"),
    [
        (PAGES, "tenant", "f32"),
        (WINDOW_PAGES, "tenant, qwen2", "int8"),
        *((SCRATCH, "tenant", codec) for codec in KV_VALUE_BYTES),
    ],
)
def test_what_is_not_wiped_is_found(
    broken: str, case: str, codec: str, tiny: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In a process whose product does not wipe: the child imports this before anything else."""
    (tmp_path / "sitecustomize.py").write_text(broken)
    monkeypatch.syspath_prepend(str(tmp_path))
    figure = residue.count(tiny, [(case, codec)])
    assert figure.num_failures == 1
    assert "'missing_before': 0" in figure.replays[0]
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
