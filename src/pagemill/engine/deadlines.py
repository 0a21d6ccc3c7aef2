"""Which sequences have run out of time. Owns the order of deadlines."""

from __future__ import annotations

from heapq import heapify, heappop, heappush

from pagemill.base.errors import DeadlineError
from pagemill.engine.request import Sequence


class Deadlines:
    """Deadlines of sequences, on the engine's clock. Mutated by every method. Sequences without one are not in it.

    num_live: deadlines of unfinished sequences; where there are none, `due` need not be asked.
    """

    __slots__ = ("_heap", "num_live")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Sequence]] = []
        self.num_live = 0

    def add(self, sequence: Sequence) -> None:
        """A new sequence, with the deadline that its request gives, if it gives one."""
        deadline_s = sequence.request.params.deadline_s
        if deadline_s is not None:
            heappush(self._heap, (sequence.request.arrival_s + deadline_s, sequence.seq_id, sequence))
            self.num_live += 1

    def forget(self, sequence: Sequence) -> None:
        """A sequence has finished. Its entry goes with others, when most of them are of finished ones."""
        if sequence.request.params.deadline_s is None:
            return
        self.num_live -= 1
        if not self.num_live or len(self._heap) > 2 * self.num_live + 64:
            self._heap = [entry for entry in self._heap if entry[2].status != "finished"]
            heapify(self._heap)

    def due(self, now_s: float) -> list[tuple[Sequence, Exception]]:
        """The unfinished sequences whose time is over, each told once. One whose error cannot be made has that one."""
        found: list[tuple[Sequence, Exception]] = []
        heap = self._heap
        while heap and heap[0][0] <= now_s:
            sequence = heappop(heap)[2]
            if sequence.status != "finished":
                try:
                    found.append((sequence, _error(sequence)))
                except Exception as error:
                    found.append((sequence, error))
        return found


def _error(sequence: Sequence) -> DeadlineError:
    deadline_s, count = sequence.request.params.deadline_s, sequence.num_generated
    where = "while it waited" if not sequence.rank else f"after {count:,} generated tokens"
    return DeadlineError(
        f"the request was not finished within {deadline_s:g} s: its time ended {where}; give a longer deadline_s, "
        f"fewer max_tokens, or try again when less is asked of the engine"
    )
