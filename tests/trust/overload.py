"""R11: ten times the load, and one tenant that floods: the real scheduler, cache and admission on a virtual clock, over
steps that take the time of a cost model (`pagemill.simulator.serve`).

A seed draws a machine (the cost of a step), its places and queue, and what tenants ask. Goodput is of answers that came
whole, in tokens a second. A flood is compared with the same load of its victims where the flooder asks for its share
and no more: what they leave of the machine (max-min fairness), so that the machine is as full.
"""

from __future__ import annotations

import random
from array import array
from dataclasses import dataclass, replace
from math import ceil
from typing import Final

from pagemill.simulator.serve import Served, ServeSettings, StepCost, percentiles, serve
from pagemill.simulator.trace import Request, Trace
from tests.trust.figures import Figure

TIMES: Final = 10
PER_SHARD: Final = 6
NUM_SERVED: Final = 200  # requests that the machine can serve in a day
LEAST_GOODPUT: Final = 0.9  # of the peak
MOST_TTFT: Final = 1.5  # times what it is beside a flooder that is held to its share
FLOODER: Final = "flooder"
OVER: Final = 1.3  # of what the machine can do: there, or where it is just full, is the peak


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


def draw_world(seed: int) -> World:
    """A machine, and tenants whose rates are in requests a second that it can serve."""
    draw = random.Random(seed)
    cost = StepCost(
        base_s=draw.uniform(0.002, 0.02), row_s=draw.uniform(0.0001, 0.001), token_s=draw.uniform(0.0001, 0.0006),
        read_s=draw.uniform(0.0, 5e-8),
    )  # fmt: skip
    places = draw.choice((8, 16, 24))
    settings = ServeSettings(
        num_blocks=places * 40, max_num_seqs=places, max_queued_requests=draw.choice((16, 64, 200)),
        policy=draw.choice(("lru", "adaptive")),
    )  # fmt: skip
    sizes = (20, draw.randint(60, 300)), (5, draw.randint(20, 50))
    rate = capacity(cost, settings, Part(FLOODER, 1.0, *sizes))
    count = draw.choice((1, 1, 2))
    share = draw.uniform(0.15, 0.3) / count
    victims = tuple(
        Part(f"victim {index}", rate * share, (10, draw.randint(30, 100)), (5, draw.randint(10, 20)))
        for index in range(count)
    )
    return World(seed, cost, settings, victims, Part(FLOODER, rate, *sizes), NUM_SERVED / rate)


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
    """A seed's figures. kept: goodput under the flood, of the peak. usual, flooded: the victims' times to the first
    token beside a flooder that is held, and beside the flood, in medians of the former. num_lost: victims' requests
    that were refused. num_refused: the flooder's."""

    kept: float
    usual: array[float]
    flooded: array[float]
    num_lost: int
    num_refused: int


def replay(seed: int) -> Outcome:
    """One seed."""
    world = draw_world(seed)
    flooder, victims = world.flooder, world.victims

    def offered(times: float) -> Served:
        return world.day((*victims, replace(flooder, rate=times * flooder.rate)))

    held, over, flooded = (offered(times) for times in (1 - world.share, OVER, TIMES))
    usual, found = _first_tokens(held, victims), _first_tokens(flooded, victims)
    median_s = percentiles(usual)["p50"]
    return Outcome(
        kept=goodput(flooded) / max(goodput(held), goodput(over)),
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
    """Seeds: worlds whose goodput fell; and victims' requests that were refused, or that waited for longer than
    MOST_TTFT times the 99th percentile, beyond the one in a hundred that may. The percentile is of all seeds together.
    """
    outcomes = {seed: replay(seed) for seed in seeds}
    fallen = {seed: each.kept for seed, each in outcomes.items() if each.kept < LEAST_GOODPUT}
    usual = array("d", (each for outcome in outcomes.values() for each in outcome.usual))
    most = MOST_TTFT * percentiles(usual)["p99"]
    late = {seed: sum(each > most for each in outcome.flooded) for seed, outcome in outcomes.items()}
    num_victims, num_lost = len(usual), sum(each.num_lost for each in outcomes.values())
    broken = max(sum(late.values()) - ceil(num_victims / 100), 0) + num_lost
    slowed = {seed: f"{count} late" for seed, count in late.items() if count} if broken else {}
    command = "python scripts/trust.py --replay R11:"
    return [
        Figure(
            "R11", "lost more than a tenth of their goodput", len(fallen), len(outcomes), "worlds under a flood",
            {"requests refused": sum(each.num_refused for each in outcomes.values())},
            [f"{command}{seed}  # {each:.2f}" for seed, each in fallen.items()],
        ),
        Figure(
            "R11", "refused, or beyond the 1 % that may wait 1.5 times the 99th percentile", broken, num_victims,
            "requests of a flood's victims", {"waited for so long": sum(late.values())},
            [f"{command}{seed}  # {each}" for seed, each in slowed.items()],
        ),
    ]  # fmt: skip


def shard(number: int) -> list[Figure]:
    """A part of the release size."""
    return count(range(PER_SHARD * number, PER_SHARD * (number + 1)))
