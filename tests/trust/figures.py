"""What a trust test counted, as one line. Owns the figures, the bound that a count of nothing gives, and what a count
must have met on its way so that it tells anything; runs nothing.

No failure in N trials bounds the rate of failures at 3/N with a confidence of 95 % (the rule of three). N is what ran.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Final

ALL: Final = "each other"
# Test and failures counted, or its unit -> further counts, and how much of each there must be, or nothing was shown. A
# whole number: one in so many trials. A fraction: more than this part of the trials. ALL: all that are not named.
FLOORS: Final[Mapping[tuple[str, str], Mapping[str, int | float]]] = {
    ("R5", "leaks, double frees or divergences"): {ALL: 30},
    ("R6", "held blocks for more than a step, or left something"): {"left at queued": 0.0, "left at decode": 0.0},
    ("R7", "turns whose tokens or logits differ"): {ALL: 0.0, "arms": 100, "logits compared": 1, "preemptions": 500},
    ("R9", "crashes, wrong answers or unclean refusals"): {"answered": 0.1, "refused with 503 and Retry-After": 0.3},
    ("R9", "unclean answers where memory ran out"): {ALL: 0.0},
    ("R13", "lost by a drain"): {"ran": 0.0, "waited": 0.0, "new ones refused with 503": 0.0},
    ("R14", "simulations gone wrong"): {ALL: 0.0},
    ("R14", "days of a server gone wrong"): {ALL: 0.0, "tails dropped": 50},
    ("S2", "hits across tenants"): {"look-ups that hit": 0.5},
    ("S3", "prompts of another tenant told by time"): {"of the control's that hit": 0.0},
    ("S5", "differences seen by another tenant"): {"controls that differ (same tenant)": 0.9, ALL: 0.0},
    ("S5", "differences told over HTTP"): {"controls that differ (same key)": 1, "things told over HTTP": 15.0},
    ("S8", "residues of keys and values"): {"needles of pages": 0.0},
    ("S9", "cases answered wrongly"): {
        "positive": 0.02,
        "negative": 0.02,
        "in chains": 0.02,
        "methods": 0.02,
        "2xx": 0.02,
        "4xx": 0.02,
    },
    ("S14", "requests under watch"): {"of them answered with 200": 0.5, ALL: 0.0},
}


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


def judged(figure: Figure) -> Figure:
    """The figure, with a failure for each of FLOORS that it does not reach, and one where nothing ran."""
    missed = [] if figure.num_trials else [f"nothing ran: {figure.what}"]
    floors = dict(FLOORS.get((figure.test, figure.what)) or FLOORS.get((figure.test, figure.unit), {}))
    others = floors.pop(ALL, None)
    if others is not None:
        floors |= {name: others for name in figure.also if name not in floors}
    for name, floor in floors.items():
        least = figure.num_trials // floor if isinstance(floor, int) else int(floor * figure.num_trials) + 1
        count = figure.also.get(name, 0)
        missed += [f"too little was met: {count:,} {name}, {least:,} at least"] if count < least else []
    if not missed:
        return figure
    return replace(figure, num_failures=figure.num_failures + len(missed), replays=[*figure.replays, *missed])


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
