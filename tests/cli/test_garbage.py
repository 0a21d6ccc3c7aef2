"""A server collects old garbage where nobody waits."""

from __future__ import annotations

import asyncio
import gc
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from weakref import ref

import httpx
import pytest

from pagemill.cli.garbage import PAUSE_S, THRESHOLDS, collect_in_pauses, settle
from tests.fixtures.serve_process import ROOT, ServeProcess


class Knot:
    """Holds itself, so that only a collection ends it."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)
    gc.unfreeze()


def test_what_is_there_is_permanent_and_full_collections_are_rare() -> None:
    settle()
    assert gc.get_threshold() == THRESHOLDS
    assert gc.get_freeze_count() > 1000


def old_knot() -> ref[Knot]:
    """A weak reference to garbage that collections of the young and the middle-aged do not look at any more."""
    knot = Knot()
    gc.collect(1)
    gc.collect(1)
    return ref(knot)


@pytest.mark.parametrize("busy", [0, 1, 3])
def test_a_pause_ends_old_garbage_and_work_does_not(busy: int) -> None:
    """busy: pauses in which there are requests."""
    slept: list[float] = []
    left: list[bool] = []
    garbage = old_knot()

    async def sleep(seconds: float) -> None:
        left.append(garbage() is not None)
        slept.append(seconds)
        gc.collect(1)  # something went on
        if len(slept) == busy + 3:
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(collect_in_pauses(lambda: len(slept) > busy, sleep=sleep))
    assert slept == [PAUSE_S] * (busy + 3)
    assert left == [True] * (busy + 1) + [False] * 2


def test_where_nothing_went_on_nothing_is_collected(monkeypatch: pytest.MonkeyPatch) -> None:
    collected: list[int] = []
    counts = iter([(5, 0, 0), (900, 0, 0), (5, 1, 0), (5, 0, 2)])
    monkeypatch.setattr(gc, "get_count", lambda: next(counts))
    monkeypatch.setattr(gc, "collect", lambda: collected.append(len(slept)))
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 5:
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(collect_in_pauses(lambda: True, sleep=sleep))
    assert collected == [3, 4]


WATCHED = """
import atexit, gc, sys
from pagemill.cli import garbage
garbage.PAUSE_S, garbage.THRESHOLDS = 0.1, (100, 2, 5000)  # so that little work is enough, and no full one comes of it
full = [0]
def saw(phase, info):
    full[0] += phase == "stop" and info["generation"] == 2 and gc.get_freeze_count() > 0
gc.callbacks.append(saw)
atexit.register(lambda: print("told", gc.get_threshold(), full[0], file=sys.stderr))
"""


def test_a_server_does_both(tiny_model: Path, tmp_path: Path) -> None:
    """It settles when it is ready, and collects all garbage in a pause."""
    (tmp_path / "sitecustomize.py").write_text(WATCHED)
    variables = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT / 'src'}"}
    options = ("--kv-cache-memory-bytes", "8MiB", "--packed-weights-cache", "off", "--served-model-name", "tiny")
    with ServeProcess(tmp_path, str(tiny_model), *options, variables=variables) as process:
        with httpx.Client(base_url=process.url, trust_env=False, timeout=60) as client:
            for _ in range(40):
                body = {"model": "tiny", "prompt": "x " * 40, "max_tokens": 60, "ignore_eos": True, "logprobs": 5}
                assert client.post("/v1/completions", json=body).status_code == 200
                time.sleep(0.02)
        time.sleep(0.5)
        assert process.end() == 0
        told = re.search(r"told \((\d+), (\d+), (\d+)\) (\d+)", process.told)
    assert told is not None, process.told
    assert told.groups()[:3] == ("100", "2", "5000")
    assert int(told[4]) > 0
