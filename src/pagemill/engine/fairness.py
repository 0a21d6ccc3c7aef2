"""How much of the engine each tenant has had and whose turn it is. Owns weights and service; knows no blocks.

Fair queueing by virtual time (arXiv 2401.00588): a tenant's service is the tokens computed for it divided by its
weight, those of a prompt as it enters, and whoever waits with the least service is next. A tenant that comes back from
idling starts no lower than the least of those that are active, so that idling earns nothing; it keeps what it was
ahead, so that it forgives nothing. Each turn raises the service of whoever got it, therefore everyone's turn comes, in
proportion to the weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import attrgetter

from pagemill.base.errors import ConfigError
from pagemill.engine.queue import TenantQueue

GENERATED_COST = 2.0  # service that a generated token counts as; one of a prompt counts as 1
PRIORITY_FACTOR = 4.0
MOST_GRANTED = 10  # levels of priority
MOST_IDLE = 4096
_TURN = attrgetter("service", "num_running")


@dataclass(slots=True, eq=False)
class Share:
    """One tenant's part. Mutated by Shares (weight, service) and the scheduler (queue and counts).

    num_queued: requests of it that have not begun. num_running: sequences.
    """

    name: str
    weight: float = 1.0
    service: float = 0.0
    queue: TenantQueue = field(default_factory=TenantQueue)
    num_queued: int = 0
    num_running: int = 0

    @property
    def is_idle(self) -> bool:
        """True where nothing of it waits or runs."""
        return not self.num_running and not self.queue


class Shares:
    """The tenants' parts. Mutated by every method that is not a question. In memory: those that are active, those whose
    service is ahead, and the weights that an operator set."""

    __slots__ = ("_idle", "_weights", "active")

    def __init__(self) -> None:
        self.active: dict[str, Share] = {}
        self._idle: dict[str, Share] = {}
        self._weights: dict[str, float] = {}

    def grant(self, tenant: str, weight: float = 1.0, priority: int = 0) -> None:
        """A tenant's weight and priority from now on, 1 and 0 where none are granted. A unit of priority counts as four
        times the weight, the lower the more: who comes last still comes. Raises ConfigError for values out of range."""
        if not 0 < weight <= 1e6 or not -MOST_GRANTED <= priority <= MOST_GRANTED:
            raise ConfigError(
                f"tenant {tenant!r}: weight is {weight} and priority {priority}; give a weight above 0 (1 is usual) "
                f"and a priority from -{MOST_GRANTED} to {MOST_GRANTED} (0 is usual)"
            )
        self._weights[tenant] = weight * PRIORITY_FACTOR**-priority
        known = self.active.get(tenant) or self._idle.get(tenant)
        if known is not None:
            known.weight = self._weights[tenant]

    def of(self, tenant: str) -> Share:
        """The tenant's part, active from now on."""
        share = self.active.get(tenant)
        if share is not None:
            return share
        share = self._idle.pop(tenant, None) or Share(tenant, self._weights.get(tenant, 1.0))
        if self.active:
            share.service = max(share.service, self.least)
        self.active[tenant] = share
        return share

    def rest(self, share: Share) -> None:
        """A part with nothing waiting or running is no longer active. When the last one rests, all is forgiven."""
        assert share.is_idle
        share.queue = TenantQueue()
        del self.active[share.name]
        if not self.active:
            self._idle.clear()
            return
        self._idle[share.name] = share
        if len(self._idle) > 2 * len(self.active) + 16:
            self._forget_idle()

    @property
    def least(self) -> float:
        """The least service of those that are active."""
        return min(share.service for share in self.active.values())

    @property
    def num_known(self) -> int:
        """Parts in memory."""
        return len(self.active) + len(self._idle)

    def charge(self, share: Share, num_prompt: int, num_generated: int) -> None:
        """So many tokens were computed for a tenant for the first time."""
        share.service += (num_prompt + GENERATED_COST * num_generated) / share.weight

    def waiting(self) -> list[Share]:
        """Parts that wait, whoever's turn it is first."""
        found = [share for share in self.active.values() if share.queue]
        if len(found) > 1:
            found.sort(key=_TURN)
        return found

    @property
    def whose_turn(self) -> Share | None:
        """The first of those that wait, None where nobody does."""
        return min((share for share in self.active.values() if share.queue), key=_TURN, default=None)

    def fair(self, share: Share, places: int) -> float:
        """How many of `places` a tenant can claim beside those that are active, at least one."""
        return _fair(share, places, self._weight)

    @property
    def _weight(self) -> float:
        return sum(each.weight for each in self.active.values())

    def above_fair(self, beside: Share, places: int) -> Share | None:
        """Who, other than `beside`, runs most beyond its fair part of `places` and would keep that without one of them;
        None where nobody is, or where `beside` has its own part already."""
        if len(self.active) < 2 or beside.num_running + 1 > self.fair(beside, places):
            return None
        others = [each for each in self.active.values() if each is not beside and each.num_running > 1]
        weight = self._weight
        excess, name = max(
            ((each.num_running - _fair(each, places, weight), each.name) for each in others), default=(0.0, "")
        )
        return self.active[name] if excess >= 1 else None

    def _forget_idle(self) -> None:
        """Drop parts that are not ahead, and beyond MOST_IDLE those that are least ahead."""
        least = self.least
        ahead = sorted((each for each in self._idle.values() if each.service > least), key=lambda each: -each.service)
        self._idle = {each.name: each for each in ahead[:MOST_IDLE]}


def _fair(share: Share, places: int, weight: float) -> float:
    """The part of `places` of one among those that are active, whose weights are `weight` together."""
    return max(1.0, places * share.weight / weight)
