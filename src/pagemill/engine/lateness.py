"""Whether a request that waits can still end by its deadline. Owns the estimate; the order of a queue is `queue.py`'s.

Served in the order of arrival, a queue that is longer than deadlines allow starts only requests that end too late, and
all that is computed for them is lost. So a request that would be late even if it entered now goes behind the others of
its tenant's queue. What that takes is estimated by what steps took lately: its prompt and those that are being read
before it at the speed at which prompts are read beside those who decode, then a step for each token of its answer.

The estimate is held to what comes of it. Whoever entered in time and was late makes it more careful, by as much as
twenty that were not make it less so.
"""

from __future__ import annotations

from pagemill.engine.request import Sequence

HALF_LIFE_S = 2.0  # of computing, after which what a step told counts half
MOST_CAUTION = 2.0
_CAUTION_UP, _CAUTION_DOWN = 1.1, 1.1 ** (-1 / 20)
_LENGTH_WEIGHT = 0.1


class Pace:
    """Speeds of the engine as requests meet them. Mutated by `saw` and `ended`.

    caution: factor of the estimate, from 1 to MOST_CAUTION.
    """

    __slots__ = ("_length", "_num_prompt_tokens", "_num_steps", "_prompt_s", "_step_s", "caution")

    def __init__(self) -> None:
        self._prompt_s = self._num_prompt_tokens = 0.0  # of steps that read prompts
        self._step_s = self._num_steps = 0.0  # of steps that decode
        self._length = 0.0
        self.caution = 1.0

    def saw(self, num_decoding: int, num_prompt_tokens: int, seconds: float) -> None:
        """A step with so many decode rows and prompt tokens took so long."""
        if seconds <= 0:
            return
        kept = 0.5 ** (seconds / HALF_LIFE_S)
        if num_prompt_tokens:
            self._prompt_s = self._prompt_s * kept + seconds
            self._num_prompt_tokens = self._num_prompt_tokens * kept + num_prompt_tokens
        if num_decoding:
            self._step_s = self._step_s * kept + seconds
            self._num_steps = self._num_steps * kept + 1

    def ended(self, sequence: Sequence, now_s: float) -> None:
        """A sequence that ran has ended, by itself or at its deadline."""
        deadline_s = deadline_of(sequence)
        if deadline_s is not None and not sequence.is_late:
            met = now_s < deadline_s
            caution = self.caution * (_CAUTION_DOWN if met else _CAUTION_UP)
            self.caution = min(max(caution, 1.0), MOST_CAUTION)
            if not met:
                return
        count = sequence.num_generated
        self._length += (_LENGTH_WEIGHT if self._length else 1.0) * (count - self._length)

    def seconds(self, sequence: Sequence, num_unread: int) -> float:
        """What a sequence takes until it ends, entering now with `num_unread` prompt tokens to be read by then, its own
        and those before it; 0 where nothing is known."""
        prompt_s = self._prompt_s / self._num_prompt_tokens if self._num_prompt_tokens else 0.0
        step_s = self._step_s / self._num_steps if self._num_steps else 0.0
        return self.caution * (num_unread * prompt_s + (self.num_expected(sequence) - 1) * step_s)

    def num_expected(self, sequence: Sequence) -> float:
        """Tokens of a sequence's answer: as many as it asked for where nothing else can end it, else as answers had
        lately, within what it asked for; the least that it asked for while none was seen."""
        params, most = sequence.request.params, sequence.request.max_tokens
        if params.ignore_eos and not params.stop and not params.stop_token_ids:
            return most
        return min(max(self._length, params.min_tokens, 1), most)


def deadline_of(sequence: Sequence) -> float | None:
    """When a sequence must have ended, on the engine's clock; None where it may take any time."""
    deadline_s = sequence.request.params.deadline_s
    return None if deadline_s is None else sequence.request.arrival_s + deadline_s
