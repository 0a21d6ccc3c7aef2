"""What a trust test counted, as one line. Owns the figures and the bound that a count of nothing gives; runs nothing.

No failure in N trials bounds the rate of failures at 3/N with a confidence of 95 % (the rule of three). N is what ran.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True, slots=True)
class Figure:
    """One count. test: "R5". what: which failures are counted ("blocks leaked"). num_trials of `unit` ran and
    num_failures of them failed. also: further counts, which show what the trials met (evictions, hits …). replays: a
    command for each failure. stated: what the count says, where that is no rate of failures."""

    test: str
    what: str
    num_failures: int
    num_trials: int
    unit: str
    also: dict[str, int] = field(default_factory=dict)
    replays: list[str] = field(default_factory=list)
    stated: str = ""

    @property
    def bound(self) -> str:
        """What the count says about the rate of failures: below 3/N where there was none, else the rate itself."""
        if self.stated:
            return self.stated
        if not self.num_trials:
            return "nothing ran"
        if self.num_failures:
            return f"{self.num_failures / self.num_trials:.1e}"
        return f"< {3 / self.num_trials:.1e}"

    def __str__(self) -> str:
        met = "".join(f", {count:,} {name}" for name, count in self.also.items())
        counted = f"{self.num_failures:,} {self.what} in {self.num_trials:,} {self.unit}"
        bound = self.stated or f"rate {self.bound}"
        return "\n".join([f"{self.test:<4} {counted} ({bound}){met}", *(f"     {each}" for each in self.replays)])

    def encode(self) -> str:
        """As one line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: str) -> Figure:
        """What `encode` wrote."""
        return cls(**json.loads(text))


def added(figures: Iterable[Figure]) -> list[Figure]:
    """Figures of the same test and meaning as one each, in the order in which they first come."""
    sums: dict[tuple[str, str, str], Figure] = {}
    for each in figures:
        name = (each.test, each.what, each.unit)
        known = sums.get(name)
        if known is None:
            sums[name] = each
            continue
        also = Counter(known.also)
        also.update(each.also)
        sums[name] = Figure(
            each.test,
            each.what,
            known.num_failures + each.num_failures,
            known.num_trials + each.num_trials,
            each.unit,
            dict(also),
            [*known.replays, *each.replays],
            "; ".join(filter(None, [known.stated, each.stated])),
        )
    return list(sums.values())
