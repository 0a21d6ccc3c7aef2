"""S5: what one tenant sees does not depend on what another one writes: usage, receipts, reasons, errors, ids.

Two worlds run the same traffic on a virtual clock. In one, tenant "watched" uses the observer's own texts, in the other
texts of the same shape that have nothing in common with them (its tokens are moved by a constant). Everything that the
observer is told must be equal. Where the watched tenant is the observer itself, something must differ: the control.

Two further worlds have room for everybody, so that nothing has to wait or leave: in one the watched tenant asks
nothing, in the other each thing three times. How much others ask must not be told either.
"""

from __future__ import annotations

import random
from array import array
from dataclasses import asdict
from typing import Any

from pagemill.base.errors import PagemillError
from pagemill.base.params import CacheOptions, SamplingParams
from pagemill.cache.entry import SharingConfig
from pagemill.engine.output import Delta
from tests.fixtures.fake_engine import Rig
from tests.trust.figures import Figure

VOCAB = 2**20
MOVED = 2**18
OBSERVER = "observer"
CANARY = "canary-tenant-7f3a"
CANARY_SALT = "canary-salt-91c2"
VOLUME_EVERY = 3  # pairs of worlds for one pair that compares volumes
ROOM: dict[str, Any] = {"num_blocks": 1000, "max_num_seqs": 256, "max_num_batched_tokens": 8192}


class World:
    """One run of the traffic. Mutated by `run`. seen: all that the observer was told, in order. num_times: how often
    the watched tenant asks each thing, with room for everybody; None for once, where room is scarce."""

    def __init__(self, seed: int, watched: str, moved_by: int, num_times: int | None = None) -> None:
        self.draw = random.Random(seed)
        self.watched = watched
        self.moved_by = moved_by
        self.num_times = num_times
        self.seen: list[object] = []
        self._last: dict[bool, str] = {}  # request of the observer (True) and of the watched tenant
        scarce: dict[str, Any] = {
            "num_blocks": self.draw.choice((16, 24, 60)),
            "max_num_seqs": 4,
            "max_num_batched_tokens": 24,
        }
        room = scarce if num_times is None else ROOM
        self.rig = Rig(block_size=4, vocab_size=VOCAB, sharing=SharingConfig(), **room)
        shared = self.rig.cache.shared
        assert shared is not None
        shared.tenancy.declare_public("p")
        if self.draw.random() < 0.5 and num_times is None:
            shared.set_quota(OBSERVER, 2, 12)
        self._texts = [[self.draw.randrange(1000) for _ in range(30)] for _ in range(4)]

    def run(self) -> list[object]:
        for index in range(40):
            self._act(index)
            for _ in range(self.draw.randint(0, 3)):
                self._note(self.rig.step())
        for _ in range(3000):
            if not self.rig.engine.has_unfinished:
                break
            self._note(self.rig.step())
        return self.seen

    def _act(self, index: int) -> None:
        draw = self.draw
        mine = draw.random() < 0.5
        prompt = draw.choice(self._texts)[: draw.randint(1, 30)] + [draw.randrange(1000)] * draw.randint(0, 3)
        params = SamplingParams(temperature=0.0, seed=draw.randrange(3), max_tokens=draw.randint(1, 12))
        kind = draw.random()
        salt = draw.choice((None, "s"))
        if not mine:
            own = self.watched == OBSERVER
            options = CacheOptions(self.watched, salt if own else salt and CANARY_SALT)
            for again in range(1 if self.num_times is None else self.num_times):
                words = [token + self.moved_by + again * MOVED for token in prompt]
                self._do(kind, f"{CANARY}-{index}-{again}", words, params, options, told=False)
            return
        self._do(kind, f"mine-{index}", prompt, params, CacheOptions(OBSERVER, salt), told=True)

    def _do(
        self, kind: float, name: str, prompt: list[int], params: SamplingParams, options: CacheOptions, *, told: bool
    ) -> None:
        shared, result = self.rig.cache.shared, None
        assert shared is not None
        try:
            if kind < 0.8:
                self.rig.engine.add_request(name, prompt, params, cache=options)
                self._last[told] = name
            elif kind < 0.9:
                self.rig.engine.advance_clock()
                result = shared.pin(options, array("i", prompt), 0.2).num_tokens
            elif kind < 0.95:
                self.rig.engine.advance_clock()
                result = shared.purge_text(options, array("i", prompt))
                self.rig.engine.settle()
            else:
                result = [str(delta) for delta in self.rig.abort(self._last.get(told, name))]
        except PagemillError as error:
            result = f"{type(error).__name__}: {error}"
        if told:
            self.seen.append((name, result))

    def _note(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            if delta.request_id.startswith("mine-"):
                self.seen.append(described(delta))


def described(delta: Delta) -> dict[str, Any]:
    """All that a delta tells, as values that can be compared and searched."""
    told = delta._asdict()
    told["error"] = None if delta.error is None else f"{type(delta.error).__name__}: {delta.error}"
    told["receipt"] = None if delta.receipt is None else delta.receipt.describe()
    told["line"] = str(delta.receipt)
    told["marks"] = asdict(delta.marks)
    return told


def leak(seed: int, watched: str = CANARY) -> str:
    """What the observer sees of the watched tenant in one pair of worlds, and, of every third seed, of how much it
    asks; empty for nothing."""
    found = _differs(*(World(seed, watched, moved_by).run() for moved_by in (0, MOVED)))
    return found or (volume_leak(seed, watched) if compares_volume(seed) else "")


def compares_volume(seed: int) -> bool:
    """True for seeds whose worlds are run with another volume, too."""
    return seed % VOLUME_EVERY == 0


def volume_leak(seed: int, watched: str = CANARY) -> str:
    """What the observer sees of the watched tenant's asking three times as against not at all; empty for nothing."""
    return _differs(*(World(seed, watched, 0, num_times).run() for num_times in (0, 3)))


def _differs(one: list[object], other: list[object]) -> str:
    for a, b in zip(one, other, strict=False):
        if a != b:
            return f"{a} beside {b}"
    if len(one) != len(other):
        return f"{len(one)} things told, and {len(other)}"
    named = [each for each in map(str, [*one, *other]) if CANARY in each or CANARY_SALT in each]
    return f"the other tenant is named: {named[0]}" if named else ""


def count(seeds: range) -> Figure:
    """Pairs of worlds, how many differ, and how many of the controls do."""
    replays, controls = [], 0
    for seed in seeds:
        if found := leak(seed):
            replays.append(f"python scripts/trust.py --replay S5:{seed}  # {found:.300}")
        controls += bool(_differs(*(World(seed, OBSERVER, moved_by).run() for moved_by in (0, MOVED))))
    also = {
        "controls that differ (same tenant)": controls,
        "of the pairs also with thrice the volume and none": sum(map(compares_volume, seeds)),
    }
    return Figure(
        "S5", "differences seen by another tenant", len(replays), len(seeds), "pairs of worlds", also, replays
    )
