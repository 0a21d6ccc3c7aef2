"""What a caller gets back: an answer, its choices, their log-probabilities, its moments."""

from __future__ import annotations

from dataclasses import dataclass

from pagemill.engine.receipt import Receipt


@dataclass(frozen=True, slots=True)
class Logprob:
    """Natural logarithm of a token's probability before temperature and cuts, its rank (1 = most likely), its text."""

    logprob: float
    rank: int
    decoded_token: str


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One choice. finish_reason: "stop", "length", "abort", "error", or None while it runs.

    stop_reason: the stop string or the id of stop_token_ids that ended it. logprobs: one entry a token, id -> Logprob,
    the token taken first, where asked for. cumulative_logprob: their sum over the tokens taken.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None = None
    cumulative_logprob: float | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None


@dataclass(frozen=True, slots=True)
class Timing:
    """Moments of a request on the engine's clock, in seconds; None where it did not come to that."""

    arrival_s: float
    scheduled_s: float | None
    first_token_s: float | None
    finished_s: float | None

    @property
    def ttft_s(self) -> float | None:
        """From arrival to the first token."""
        return None if self.first_token_s is None else self.first_token_s - self.arrival_s


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """The answer to one prompt. num_cached_tokens: prompt tokens whose KV was found in the cache.

    tpot_s: mean time between the tokens of the longest choice, None below two tokens. receipt: what the prefix cache
    did for the prompt, None where nothing is shared. error: why finish_reason is "error"; no other request is affected.
    prompt_logprobs: where asked for, one entry a token of the prompt, the first None (nothing stands before it).
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    timing: Timing
    num_cached_tokens: int = 0
    receipt: Receipt | None = None
    error: Exception | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None

    @property
    def tpot_s(self) -> float | None:
        longest = max(len(each.token_ids) for each in self.outputs)
        begin, end = self.timing.first_token_s, self.timing.finished_s
        return (end - begin) / (longest - 1) if begin is not None and end is not None and longest > 1 else None
