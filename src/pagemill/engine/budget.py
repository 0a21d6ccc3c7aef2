"""How many prompt tokens a step may read beside those who decode. Owns what steps were seen to take.

A long prompt read at once makes everybody who decodes wait for it; read in small chunks it reuses less of each pass
over the weights (Sarathi, arXiv 2308.16369). How large a chunk may be depends on machine, model, number of streams and
their length, so it is measured: seconds of steps that only decode, by number of rows, and seconds that a prompt token
adds, more of them the more text stands before it. Steps are cut differently from run to run, answers are not: no bit
depends on how a prompt was cut.

The measure is a step in which all decode that have a place, those too whose prompts wait: what they will make every
step take once they are in. Measured by those few that decode already, steps would stay short and prompts enter so
slowly that as few decode at any time, and the passes over the weights that more could share are the throughput.
For the throughput's sake too no step is held below some time, where few wait for it: beside few decode rows it is the
prompts that fill the passes.

An operator to whom short times between tokens are worth that names one, and steps are held to it instead (`Target`).
"""

from __future__ import annotations

from bisect import bisect_left, insort

SHORTEST_S = 0.032  # 31 tokens a second is faster than people read
FEW = 16  # sequences that decode
TILE_ROWS = 8
SMALLEST_CHUNK = 4
UNKNOWN_CHUNK = 128  # where nothing is known of steps that only decode
PROBE_STEPS = 64
_WEIGHT = 0.2
_LEAST_READ = 16  # of fewer tokens read alone a step's own time is most of what each seems to cost
_FAR = 1024  # positions by which the cost of a prompt token's place is counted
_ROWS_OF_BASE = 12  # as many decode rows as cost what an empty step does, where nothing nearer is known
_USUAL_STRETCH = 1.8  # where a target cannot be kept and no percentage is given
_MOST_CAUTION = 1.5
_CAUTION_UP, _CAUTION_DOWN = 1.04, 1.04 ** (-1 / 20)


class Target:
    """A time between tokens that 95 of 100 steps with prompts and decode rows are to keep to. Mutated by `saw` and
    `began`.

    What is not foreseen (the work between two steps, other programs, a text that costs more than the last) shows in how
    many steps are too long. After each of them the next are aimed at a shorter time; twenty that were not too long make
    up for it. target_s: from the beginning of such a step to the next one's, which is from token to token.
    """

    __slots__ = ("_began_s", "_can_shrink", "_caution", "_is_mixed", "target_s")

    def __init__(self, target_s: float) -> None:
        self.target_s = target_s
        self._caution = 1.0
        self._began_s: float | None = None
        self._is_mixed = self._can_shrink = False  # of the last step

    @property
    def aim_s(self) -> float:
        """Seconds that the next step is to take."""
        return self.target_s / self._caution

    def saw(self, num_prompt_tokens: int) -> None:
        """A step with decode rows read so many prompt tokens."""
        self._is_mixed = num_prompt_tokens > 0
        self._can_shrink = num_prompt_tokens > SMALLEST_CHUNK

    def began(self, now_s: float | None) -> None:
        """A step begins, and tells how long the last one took; None where nobody waited for it."""
        if self._is_mixed and self._began_s is not None and now_s is not None:
            if now_s - self._began_s <= self.target_s:
                self._caution = max(self._caution * _CAUTION_DOWN, 1.0)
            elif self._can_shrink:
                self._caution = min(self._caution * _CAUTION_UP, _MOST_CAUTION)
        self._began_s, self._is_mixed = now_s, False


class StepBudget:
    """Tokens of a step. Mutated by `began` and `saw`.

    most: tokens of any step. percent: how long a step with prompts and decode rows may take, in percent of one that
    decodes alone; None for no bound. target_s: the time between tokens that such steps are held to, whatever `percent`
    says, as far as decoding leaves any of it; None for none. One that a single stream does not keep to by itself is out
    of reach, and steps are bounded by the percentage, 180 where there is none.
    """

    __slots__ = ("_alone_s", "_far_s", "_known", "_num_mixed", "_stretch", "_target", "_token_s", "most")

    def __init__(self, most: int, percent: int | None, target_s: float | None = None) -> None:
        self.most = most
        self._stretch = None if percent is None else percent / 100
        self._target = None if target_s is None else Target(target_s)
        if self._target is not None and self._stretch is None:
            self._stretch = _USUAL_STRETCH
        self._alone_s: dict[int, float] = {}  # of as many decode rows as the class begins with
        self._known: list[int] = []  # its keys, sorted
        self._token_s = 0.0  # of a prompt token, and what _FAR positions before it add
        self._far_s = 0.0
        self._num_mixed = PROBE_STEPS  # steps since one that decoded alone; the first of all does

    def for_prompts(self, num_decoding: int, num_reading: int = 0, position: int = 0) -> int:
        """Prompt tokens for a step in which so many sequences decode and so many others, with a place to run, are to
        have their prompts read, from such a position on. Now and then none, to see what decoding takes."""
        left = self.most - num_decoding
        if self._stretch is None or not num_decoding or left <= 0:
            return max(left, 0)
        if self._num_mixed >= PROBE_STEPS:
            return 0
        alone_s = self.alone_s(num_decoding)
        if not alone_s:
            return min(left, UNKNOWN_CHUNK)
        if self._target is not None and self.alone_s(1) < self._target.target_s:
            seconds = max(self._target.aim_s - alone_s, 0.0)
        else:
            together_s = self.alone_s(num_decoding + num_reading)
            seconds = max(self._stretch * max(alone_s, together_s), shortest_s(num_decoding)) - alone_s
        # Where no prompt was read yet, a token of one is taken to cost a decode row, which is more than it does.
        token_s = self._token_at(position) or _row_s(alone_s, num_decoding)
        token_s = self._token_at(position + seconds / token_s / 2) or token_s  # in the middle of the chunk
        chunk = max(int(seconds / token_s), SMALLEST_CHUNK)
        whole = (chunk + num_decoding) // TILE_ROWS * TILE_ROWS - num_decoding  # kernels work in tiles of rows
        return min(left, whole if whole >= TILE_ROWS else chunk)

    def began(self, now_s: float | None) -> None:
        """A step begins at such a time of the engine's clock; None where none runs that could have waited for it."""
        if self._target is not None:
            self._target.began(now_s)

    def alone_s(self, num_decoding: int) -> float:
        """Seconds of a step that only decodes so many rows, 0 where no such step was seen."""
        if not self._known:
            return 0.0
        rows = _class_of(num_decoding)
        if rows not in self._alone_s:
            place = bisect_left(self._known, rows)
            rows = min(self._known[max(place - 1, 0) : place + 1], key=lambda near: abs(near - rows))
        return _row_s(self._alone_s[rows], rows) * (num_decoding + _ROWS_OF_BASE)

    def saw(self, num_decoding: int, num_prompt_tokens: int, seconds: float, positions: float = 0.0) -> None:
        """A step with so many decode rows and prompt tokens took so long. positions: of those tokens, summed up."""
        if self._stretch is None:
            return
        if self._target is not None and num_decoding:
            self._target.saw(num_prompt_tokens)
        if not num_prompt_tokens:
            self._num_mixed = 0
        elif num_decoding:
            self._num_mixed += 1
        if seconds <= 0:
            return
        if not num_prompt_tokens:
            rows = _class_of(num_decoding)
            own_s = _row_s(seconds, num_decoding) * (rows + _ROWS_OF_BASE)
            known_s = self._alone_s.get(rows)
            if known_s is None:  # what was seen nearby tells how strange a first step is
                near_s = self.alone_s(rows) or own_s
                self._alone_s[rows] = min(max(own_s, near_s / 2), 2 * near_s)
                insort(self._known, rows)
            else:
                self._alone_s[rows] = _towards(known_s, own_s)
            return
        if num_decoding:
            seconds -= self.alone_s(num_decoding)
        elif num_prompt_tokens < _LEAST_READ:
            return
        self._learn(max(seconds, 0.0) / num_prompt_tokens, positions / num_prompt_tokens / _FAR)

    def _token_at(self, position: float) -> float:
        """Seconds of a prompt token at a position, 0 where none was seen."""
        return self._token_s + self._far_s * position / _FAR

    def _learn(self, seen_s: float, far: float) -> None:
        """A prompt token took so long, so far from its text's beginning. What was expected moves towards it, each part
        by as much as it counts there (Kaczmarz' projection)."""
        known_s = self._token_s + self._far_s * far
        error_s = (_towards(known_s, seen_s) - known_s) / (1 + far * far)
        self._token_s = max(self._token_s + error_s, 0.0)
        self._far_s = max(self._far_s + error_s * far, 0.0)


def shortest_s(num_decoding: int) -> float:
    """Seconds below which no step is held for so many sequences: beyond a few, twice as many wait half as long."""
    return SHORTEST_S * min(1.0, FEW / num_decoding)


def _class_of(num_rows: int) -> int:
    """The least number of rows whose steps are taken together with those of so many: with the same leading three bits,
    so that each class is seen often and one strange step stands for none for long."""
    shift = max(num_rows.bit_length() - 3, 0)
    return num_rows >> shift << shift


def _row_s(seconds: float, num_rows: int) -> float:
    """Seconds of a decode row in a step that only decodes."""
    return seconds / (num_rows + _ROWS_OF_BASE)


def _towards(known: float, seen: float) -> float:
    """A running mean in which one strange step counts for little."""
    if not known:
        return seen
    return known + _WEIGHT * (min(max(seen, known / 2), known * 2) - known)
