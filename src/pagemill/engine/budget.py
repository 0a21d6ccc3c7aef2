"""How many prompt tokens a step may read beside those who decode. Owns what steps were seen to take.

A long prompt read at once makes everybody who decodes wait for it; read in small chunks it reuses less of each pass
over the weights (Sarathi, arXiv 2308.16369). How large a chunk may be depends on machine, model, number of streams and
their length, so it is measured: seconds of steps that only decode, by number of rows, and seconds that a prompt token
adds. Steps are cut differently from run to run, answers are not: no bit depends on how a prompt was cut.
"""

from __future__ import annotations

from bisect import bisect_left, insort

SHORTEST_S = 0.03  # no step is held below this: 33 tokens a second is faster than people read
SMALLEST_CHUNK = 16
UNKNOWN_CHUNK = 128  # until both figures are known
PROBE_STEPS = 64
_WEIGHT = 0.2
_ROWS_OF_BASE = 12  # as many decode rows as cost what an empty step does, where nothing nearer is known


class StepBudget:
    """Tokens of a step. Mutated by `saw`.

    most: tokens of any step. percent: how long a step with prompts and decode rows may take, in percent of one that
    decodes alone; None for no bound.
    """

    __slots__ = ("_alone_s", "_known", "_num_mixed", "_stretch", "_token_s", "most")

    def __init__(self, most: int, percent: int | None) -> None:
        self.most = most
        self._stretch = None if percent is None else percent / 100
        self._alone_s: dict[int, float] = {}  # by decode rows
        self._known: list[int] = []  # its keys, sorted
        self._token_s = 0.0
        self._num_mixed = 0  # steps since one that decoded alone

    def for_prompts(self, num_decoding: int) -> int:
        """Prompt tokens for a step in which so many sequences decode. Now and then none, to see what decoding takes."""
        left = self.most - num_decoding
        if self._stretch is None or not num_decoding or left <= 0:
            return max(left, 0)
        if self._num_mixed >= PROBE_STEPS:
            return 0
        alone_s = self.alone_s(num_decoding)
        if not alone_s or not self._token_s:
            return min(left, UNKNOWN_CHUNK)
        seconds = max(self._stretch * alone_s, SHORTEST_S) - alone_s
        chunk = max(int(seconds / self._token_s), SMALLEST_CHUNK)
        rows = (chunk + num_decoding) // SMALLEST_CHUNK * SMALLEST_CHUNK  # kernels work in tiles of rows
        whole = rows - num_decoding
        return min(left, whole if whole >= SMALLEST_CHUNK else chunk)

    def alone_s(self, num_decoding: int) -> float:
        """Seconds of a step that only decodes so many rows, 0 where no such step was seen."""
        exact = self._alone_s.get(num_decoding)
        if exact is not None:
            return exact
        if not self._known:
            return 0.0
        place = bisect_left(self._known, num_decoding)
        near = min(self._known[max(place - 1, 0) : place + 1], key=lambda rows: abs(rows - num_decoding))
        return self._alone_s[near] * (num_decoding + _ROWS_OF_BASE) / (near + _ROWS_OF_BASE)

    def saw(self, num_decoding: int, num_prompt_tokens: int, seconds: float) -> None:
        """A step with so many decode rows and prompt tokens took so long."""
        if self._stretch is None or seconds <= 0:
            return
        if not num_prompt_tokens:
            self._num_mixed = 0
            known_s = self._alone_s.get(num_decoding)
            if known_s is None:
                insort(self._known, num_decoding)
            self._alone_s[num_decoding] = _towards(known_s or seconds, seconds)
            return
        if num_decoding:
            self._num_mixed += 1
            seconds -= self.alone_s(num_decoding)
        elif num_prompt_tokens < SMALLEST_CHUNK:
            return
        self._token_s = _towards(self._token_s, max(seconds, 0.0) / num_prompt_tokens)


def _towards(known: float, seen: float) -> float:
    """A running mean in which one strange step counts for little."""
    if not known:
        return seen
    return known + _WEIGHT * (min(max(seen, known / 2), known * 2) - known)
