"""Random operations for a harness: texts that share beginnings, in few namespaces, in any order and state."""

from __future__ import annotations

import random

from pagemill.base.params import CacheOptions, Retain
from tests.contracts.cache.harness import BLOCK, Harness, Options, Text

SCOPES = [
    CacheOptions("a"),
    CacheOptions("a", "x"),
    CacheOptions("a", ""),
    CacheOptions("b"),
    CacheOptions("b", bypass=True),
    CacheOptions("a", None, "p"),
    CacheOptions("b", None, "p"),
]
# Weights of the operations; those after "purge" are left out of a plain harness.
WEIGHTS = {
    "open": 22, "compute": 31, "extend": 12, "roll back": 6, "draft": 4, "share": 3, "fork": 4, "close": 9,
    "preempt": 3, "resume": 3, "pin": 3, "unpin": 1, "advance": 1, "purge": 2, "resize": 1, "quota": 1,
}  # fmt: skip
PLAIN = list(WEIGHTS)[: list(WEIGHTS).index("resize")]


class Exercise:
    """A harness and what is drawn for it. Mutated by `step`. preempted: texts that are to come back."""

    def __init__(self, harness: Harness, seed: int) -> None:
        self.harness = harness
        self.draw = random.Random(seed)
        self.preempted: list[Text] = []
        self._texts = [[1, 2, 3, 1, 2]]
        self._kinds = PLAIN if harness.plain else list(WEIGHTS)
        self._weights = [WEIGHTS[kind] for kind in self._kinds]

    def step(self) -> None:
        """One operation; some are two, as a fork is."""
        harness, draw = self.harness, self.draw
        live = list(harness.live)
        [kind] = draw.choices(self._kinds, self._weights)
        if kind == "open" or (not live and kind not in ("pin", "purge", "advance", "resize", "quota", "resume")):
            self._open(self._text(), self._options())
        elif kind == "compute":
            harness.compute(draw.choice(live), draw.choice((1, 3, 50)))
        elif kind == "extend":
            harness.extend(draw.choice(live), self._text()[:3])
        elif kind == "roll back":
            seq_id = draw.choice(live)
            harness.roll_back(seq_id, draw.randint(1, len(harness.live[seq_id].tokens)))
        elif kind == "draft":
            harness.draft(draw.choice(live), [9] * draw.randint(1, 6))
        elif kind == "share":
            harness.share(draw.choice(live))
        elif kind == "fork":
            harness.fork(draw.choice(live))
        elif kind in ("close", "preempt"):
            text = harness.close(draw.choice(live))
            if kind == "preempt":
                self.preempted.append(text)
        elif kind == "resume" and self.preempted:
            text = self.preempted.pop(draw.randrange(len(self.preempted)))
            self._open(list(text.tokens), text.options)
        else:
            self._operate(kind)

    def _operate(self, kind: str) -> None:
        """What an operator or the clock does."""
        harness, draw = self.harness, self.draw
        if kind == "pin":
            harness.pin(self._text(), self._options(), draw.choice((1.0, 4.0)))
        elif kind == "unpin" and harness.leases:
            harness.unpin(draw.choice(list(harness.leases)))
        elif kind == "advance":
            harness.advance(draw.choice((0.5, 3.0)))
        elif kind == "purge":
            harness.purge(self._text(), self._options(), draw.choice(("text", "prefix", "namespace", "tenant")))
        elif kind == "resize":
            harness.resize(draw.randint(1, 30))
        elif kind == "quota":
            cap = draw.choice((None, None, draw.randint(1, 20)))
            harness.set_quota(draw.choice("abc"), draw.choice((0, 0, draw.randint(0, 8))), cap)

    def _open(self, tokens: list[int], options: Options) -> None:
        live = list(self.harness.live)
        if self.harness.open(tokens, options) is None and live:
            self.harness.close(self.draw.choice(live))

    def _text(self) -> list[int]:
        draw = self.draw
        if draw.random() < 0.4:
            found = draw.choice(self._texts)
            return found[: draw.randint(1, len(found))]
        tail = [draw.choice((1, 2, 3)) for _ in range(BLOCK)]
        found = ([1] * draw.randint(0, 9) + [2] * draw.randint(0, 9) + tail)[draw.randint(0, 2) :]
        self._texts.append(found)
        return found

    def _options(self) -> CacheOptions:
        draw = self.draw
        chosen = draw.choice(SCOPES)
        if not self.harness.plain and draw.random() < 0.2:
            retain = (Retain(0, 6, draw.choice((0, 20, 90)), 5.0),)
            return CacheOptions(chosen.tenant, chosen.salt, chosen.public, chosen.bypass, retain)
        return chosen


def exercise(harness: Harness, seed: int, num_steps: int) -> None:
    """So many random operations, then the end of all sequences and texts."""
    run = Exercise(harness, seed)
    for _ in range(num_steps):
        run.step()
    harness.finish()
