"""Whether one more request may wait. Owns the bounds of the queue, and how long it takes to go down.

A tenant may have `limit` requests waiting. All of them together may have a quarter more, and the fuller that is the
fewer each may have: a tenant enters while it has at most four times what is left (a dynamic threshold, Choudhury and
Hahne, IEEE/ACM ToN 1998). So nobody can fill the queue, and whoever comes new finds room.
"""

from __future__ import annotations

from math import ceil

from pagemill.base.errors import QueueFullError

_SLOPE = 4
_WEIGHT = 0.1
_LONGEST_S = 600.0


class Backlog:
    """Bounds of the queue. Mutated by `finished`.

    limit: requests of one tenant that may wait, beside those that could run at once; None for no bound.
    """

    __slots__ = ("_busy_s", "_interval_s", "_limit")

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self._interval_s = 0.0  # between requests that finish
        self._busy_s: float | None = None  # when the last one did

    def finished(self, now_s: float, num_running: int) -> None:
        """A request has finished; `num_running` sequences go on."""
        if self._busy_s is not None:
            seconds = max(now_s - self._busy_s, 0.0)
            self._interval_s += (_WEIGHT if self._interval_s else 1.0) * (seconds - self._interval_s)
        self._busy_s = now_s if num_running else None

    def check(self, tenant: str, num_own: int, num_queued: int, num_places: int) -> None:
        """Raise QueueFullError unless one more request of a tenant, which has `num_own` waiting, may wait beside
        `num_queued` of all tenants, of which `num_places` will run at once."""
        if self._limit is None or num_queued < num_places:
            return
        waiting = num_queued - num_places
        own = min(num_own, waiting)
        room = self._limit + ceil(self._limit / _SLOPE)
        if own < self._limit and own < _SLOPE * (room - waiting):
            return
        alone = own >= self._limit or own == waiting
        whose = f"tenant {tenant!r} has" if alone else "all tenants have"
        count = own if alone else waiting
        retry_after_s = self.retry_after_s(count)
        raise QueueFullError(
            f"{whose} {count:,} requests waiting, and max_queued_requests is {self._limit:,}; try again in "
            f"{retry_after_s:.0f} s",
            retry_after_s=retry_after_s,
            status=429 if alone else 503,
        )

    def retry_after_s(self, num_waiting: int) -> float:
        """Whole seconds after which half of those that wait are likely to have entered: 1 at least."""
        return float(min(max(ceil(self._interval_s * num_waiting / 2), 1), _LONGEST_S))
