"""What the cache did for one request, with an estimate in seconds. Owns the receipt and the estimate's rate."""

from __future__ import annotations

from dataclasses import dataclass

from pagemill.base.step import StepPlan
from pagemill.cache.receipt import Lookup, Reason

HALF_LIFE_TOKENS = 128  # a step counts half once so many prompt tokens were read after it
FEWEST_TOKENS = 16  # a row, on average
MOST_ROWS = 8


@dataclass(frozen=True, slots=True)
class Receipt:
    """num_prompt_tokens = num_cached_tokens + num_computed_tokens; hits by tier are in `tiers`.

    saved_s: estimated seconds of prefill that the hits spared, by the rate seen so far. miss: why the token at
    miss_position was not found ("evicted 3.1 s ago by lru", …), None where all that can be hit was; reason: the same as
    one of `cache.receipt.Reason`, to be counted. Recomputation after preemption is not in it.
    """

    num_prompt_tokens: int
    num_cached_tokens: int
    tiers: dict[str, int]
    saved_s: float
    miss: str | None = None
    miss_position: int | None = None
    reason: Reason | None = None

    @property
    def num_computed_tokens(self) -> int:
        return self.num_prompt_tokens - self.num_cached_tokens

    def describe(self) -> dict[str, object]:
        """As JSON has it."""
        return {
            "cached_tokens": self.num_cached_tokens,
            "computed_tokens": self.num_computed_tokens,
            "tiers": dict(self.tiers),
            "saved_s": self.saved_s,
            "miss": None
            if self.miss is None
            else {"kind": self.reason, "reason": self.miss, "token": self.miss_position},
        }

    def __str__(self) -> str:
        line = f"cache: {self.num_cached_tokens} of {self.num_prompt_tokens} prompt tokens"
        if self.saved_s > 0:
            line += f", about {self.saved_s:.2g} s saved"
        return line if self.miss is None else f"{line}; then {self.miss}"


class PrefillRate:
    """Seconds that a prompt token takes. Mutated by `saw`: a running mean over prompt tokens, so that a long prompt
    counts for more than the few tokens of a slow first step."""

    __slots__ = ("_seconds", "_tokens")

    def __init__(self) -> None:
        self._seconds = 0.0
        self._tokens = 0.0

    @property
    def seconds_per_token(self) -> float:
        """0 while no step was seen."""
        return self._seconds / self._tokens if self._tokens else 0.0

    def saw(self, step: StepPlan, seconds: float) -> None:
        """A step took so long; those that mostly decode tell nothing about prompts."""
        if len(step.sequences) > MOST_ROWS or seconds <= 0:
            return
        num_tokens = step.num_tokens
        if num_tokens < FEWEST_TOKENS * len(step.sequences):
            return
        kept = 0.5 ** (num_tokens / HALF_LIFE_TOKENS)
        self._seconds = self._seconds * kept + seconds
        self._tokens = self._tokens * kept + num_tokens

    def receipt(self, num_prompt_tokens: int, lookup: Lookup) -> Receipt:
        """The receipt of a look-up."""
        miss = lookup.miss
        return Receipt(
            num_prompt_tokens=num_prompt_tokens,
            num_cached_tokens=lookup.num_hit,
            tiers={"hot": lookup.num_hot},
            saved_s=lookup.num_hit * self.seconds_per_token,
            miss=None if miss is None else str(miss),
            miss_position=None if miss is None else miss.position,
            reason=None if miss is None else miss.reason,
        )
