"""R11: ten times the load, and one tenant that floods: the real scheduler, cache and admission on a virtual clock, over
steps that take the time of a cost model (`pagemill.simulator.serve`).

A seed draws a machine (the cost of a step), its places and queue, and what tenants ask. Goodput is of answers that came
whole, in tokens a second. Ten times the load is a flood - one tenant asks for ten times of what the machine can do -
and everybody's ten times; the peak is looked for among lower loads of the same kind. A flood is compared with the same
load of its victims where the flooder asks for its share and no more: what they leave of the machine (max-min fairness),
so that the machine is as full.

Worlds of the release size have thousands of requests, and each is judged by its own 99th percentile. Those for every
change have so few victims' requests that they are judged together, beside one that is judged alone.
"""

from __future__ import annotations

import random
from array import array
from dataclasses import dataclass, replace
from math import ceil
from typing import Final

from pagemill.kernels.policies import POLICIES
from pagemill.simulator.serve import Served, ServeSettings, StepCost, percentiles, serve
from pagemill.simulator.trace import Request, Trace
from tests.trust.figures import Figure

TIMES: Final = 10
LEAST_GOODPUT: Final = 0.9  # of the peak
MOST_TTFT: Final = 1.5  # times what it is beside a flooder that is held to its share
FLOODER: Final = "flooder"


@dataclass(frozen=True, slots=True)
class Size:
    """Of a world. num_served: requests that the machine can serve in its day. loads: of what the machine can do, where
    the peak is looked for beside the load that just fills it."""

    num_served: int
    loads: tuple[float, ...]


SMALL: Final = Size(200, (1.3,))
ALONE: Final = Size(1000, ())
RELEASE: Final = Size(3000, (1.15, 1.3, 1.6, 2.0, 3.0))


@dataclass(frozen=True, slots=True)
class Part:
    """What a tenant asks: requests a second, at random times; tokens of prompt and of answer, from and to."""

    tenant: str
    rate: float
    num_input: tuple[int, int]
    num_output: tuple[int, int]


@dataclass(frozen=True, slots=True)
class World:
    """A server and its tenants as a seed draws them. victims: their rates are parts of what the machine can do; the
    flooder is the last part."""

    seed: int
    cost: StepCost
    settings: ServeSettings
    victims: tuple[Part, ...]
    flooder: Part
    seconds: float

    @property
    def share(self) -> float:
        """The victims' part of what the machine can do."""
        return sum(part.rate for part in self.victims) / self.flooder.rate

    def day(self, parts: tuple[Part, ...]) -> Served:
        """The load served. The times and sizes of a part do not depend on the other parts."""
        arrivals: list[tuple[float, int, int, str]] = []
        for part in parts:
            draw = random.Random(f"{self.seed} {part.tenant}")
            time_s = draw.expovariate(part.rate)
            while time_s < self.seconds:
                arrivals.append((time_s, draw.randint(*part.num_input), draw.randint(*part.num_output), part.tenant))
                time_s += draw.expovariate(part.rate)
        arrivals.sort()
        trace = Trace("day", 0, tuple(Request(each[0], each[1], each[2], ()) for each in arrivals))
        tenants = [each[3] for each in arrivals]
        return serve(trace, self.cost, replace(self.settings, tenant_of=tenants.__getitem__))


def draw_world(seed: int, num_served: int) -> World:
    """A machine, a day of so many requests, and tenants whose rates are in requests a second that it can serve."""
    draw = random.Random(seed)
    cost = StepCost(
        base_s=draw.uniform(0.002, 0.02), row_s=draw.uniform(0.0001, 0.001), token_s=draw.uniform(0.0001, 0.0006),
        read_s=draw.uniform(0.0, 5e-8),
    )  # fmt: skip
    places = draw.choice((8, 16, 24))
    settings = ServeSettings(
        num_blocks=places * 40, max_num_seqs=places, max_queued_requests=draw.choice((16, 64, 200)),
        policy=draw.choice(("lru", "adaptive")), makers=POLICIES,
    )  # fmt: skip
    sizes = (20, draw.randint(60, 300)), (5, draw.randint(20, 50))
    rate = capacity(cost, settings, Part(FLOODER, 1.0, *sizes))
    count = draw.choice((1, 1, 2))
    share = draw.uniform(0.15, 0.3) / count
    victims = tuple(
        Part(f"victim {index}", rate * share, (10, draw.randint(30, 100)), (5, draw.randint(10, 20)))
        for index in range(count)
    )
    return World(seed, cost, settings, victims, Part(FLOODER, rate, *sizes), num_served / rate)


def capacity(cost: StepCost, settings: ServeSettings, part: Part) -> float:
    """Requests of one kind a second that the machine can serve: of many that are there from the beginning."""
    draw, count = random.Random(0), 4 * settings.max_num_seqs
    sizes = [(draw.randint(*part.num_input), draw.randint(*part.num_output)) for _ in range(count)]
    trace = Trace("capacity", 0, tuple(Request(0.0, *each, ()) for each in sizes))
    return count / serve(trace, cost, replace(settings, max_queued_requests=None)).seconds


def goodput(day: Served) -> float:
    """Tokens a second of answers that came whole."""
    assert not day.num_failed
    return day.num_generated_tokens / day.seconds


@dataclass(frozen=True, slots=True)
class Outcome:
    """A seed's figures. kept: goodput under the flood, of the peak; kept_by_all: under ten times everybody's load.
    usual, flooded: the victims' times to the first token beside a flooder that is held, and beside the flood, in
    medians of the former. num_lost: victims' requests that were refused. num_refused: the flooder's."""

    kept: float
    kept_by_all: float
    usual: array[float]
    flooded: array[float]
    num_lost: int
    num_refused: int

    @property
    def slowed(self) -> float:
        """The victims' 99th percentile beside the flood, of that beside a flooder that is held."""
        return percentiles(self.flooded)["p99"] / percentiles(self.usual)["p99"]


def replay(seed: int, size: Size = RELEASE) -> Outcome:
    """One seed."""
    world = draw_world(seed, size.num_served)
    flooder, victims = world.flooder, world.victims

    def flooding(times: float) -> Served:
        return world.day((*victims, replace(flooder, rate=times * flooder.rate)))

    def asking(times: float) -> Served:
        parts = *victims, replace(flooder, rate=(1 - world.share) * flooder.rate)
        return world.day(tuple(replace(part, rate=times * part.rate) for part in parts))

    held, flooded, asked = flooding(1 - world.share), flooding(TIMES), asking(TIMES)
    full = goodput(held)
    usual, found = _first_tokens(held, victims), _first_tokens(flooded, victims)
    median_s = percentiles(usual)["p50"]
    return Outcome(
        kept=goodput(flooded) / max(full, *(goodput(flooding(each)) for each in (1.0, *size.loads))),
        kept_by_all=goodput(asked) / max([full, *(goodput(asking(each)) for each in size.loads)]),
        usual=array("d", (each / median_s for each in usual)),
        flooded=array("d", (each / median_s for each in found)),
        num_lost=len(usual) - len(found),
        num_refused=flooded.num_refused,
    )


def _first_tokens(day: Served, victims: tuple[Part, ...]) -> array[float]:
    """The victims' times to the first token, in seconds."""
    times = array("d")
    for part in victims:
        times.extend(day.ttft_s.get(part.tenant, ()))
    return times


def count(seeds: range) -> list[Figure]:
    """Small worlds: those whose goodput fell; and victims' requests that were refused, or that waited for longer than
    MOST_TTFT times the 99th percentile, beyond the one in a hundred that may. The percentile is of all seeds together.
    """
    outcomes = {seed: replay(seed, SMALL) for seed in seeds}
    usual = array("d", (each for outcome in outcomes.values() for each in outcome.usual))
    most = MOST_TTFT * percentiles(usual)["p99"]
    late = {seed: sum(each > most for each in outcome.flooded) for seed, outcome in outcomes.items()}
    num_victims, num_lost = len(usual), sum(each.num_lost for each in outcomes.values())
    broken = max(sum(late.values()) - ceil(num_victims / 100), 0) + num_lost
    slowed = {seed: f"{count} late" for seed, count in late.items() if count} if broken else {}
    return [
        *_goodputs(outcomes, SMALL),
        Figure(
            "R11", "refused, or beyond the 1 % that may wait 1.5 times the 99th percentile", broken, num_victims,
            "requests of a flood's victims", {"waited for so long": sum(late.values())},
            [_command(seed, SMALL, told) for seed, told in slowed.items()],
        ),
    ]  # fmt: skip


def count_each(seeds: range, size: Size = RELEASE) -> list[Figure]:
    """Larger worlds, each by its own figures: those whose goodput fell, those whose victims' 99th percentile rose
    above MOST_TTFT times, and victims' requests that were refused."""
    outcomes = {seed: replay(seed, size) for seed in seeds}
    slowed = {seed: each for seed, each in outcomes.items() if each.slowed > MOST_TTFT}
    lost = {seed: each for seed, each in outcomes.items() if each.num_lost}
    num_victims = sum(len(each.usual) for each in outcomes.values())
    return [
        *_goodputs(outcomes, size),
        Figure(
            "R11", "whose victims' 99th percentile to the first token rose above 1.5 times", len(slowed), len(outcomes),
            "worlds judged each", {},
            [_command(seed, size, f"p99 {each.slowed:.2f} times") for seed, each in slowed.items()],
        ),
        Figure(
            "R11", "refused", sum(each.num_lost for each in lost.values()), num_victims,
            "requests of a flood's victims", {},
            [_command(seed, size, f"{each.num_lost} refused") for seed, each in lost.items()],
        ),
    ]  # fmt: skip


def _goodputs(outcomes: dict[int, Outcome], size: Size) -> list[Figure]:
    fallen = {seed: each.kept for seed, each in outcomes.items() if each.kept < LEAST_GOODPUT}
    fallen_by_all = {seed: each.kept_by_all for seed, each in outcomes.items() if each.kept_by_all < LEAST_GOODPUT}
    what = "lost more than a tenth of their goodput"
    return [
        Figure(
            "R11", what, len(fallen), len(outcomes), "worlds under a flood",
            {"requests refused": sum(each.num_refused for each in outcomes.values())},
            [_command(seed, size, f"{each:.2f}") for seed, each in fallen.items()],
        ),
        Figure(
            "R11", what, len(fallen_by_all), len(outcomes), "worlds under ten times everybody's load", {},
            [_command(seed, size, f"{each:.2f}") for seed, each in fallen_by_all.items()],
        ),
    ]  # fmt: skip


def _command(seed: int, size: Size, told: str) -> str:
    if size == RELEASE:
        return f"python scripts/trust.py --replay R11:{seed}  # {told}"
    call = f"replay({seed}, Size({size.num_served}, {size.loads}))"
    return f'python -c "from tests.trust.overload import *; print({call})"  # {told}'


def shard(number: int) -> list[Figure]:
    """A part of the release size."""
    return count_each(range(number, number + 1))
