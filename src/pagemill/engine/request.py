"""What the engine knows of a request: the frozen question, and the state of each of its choices."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Literal

from pagemill.base.params import DEFAULT_CACHE_OPTIONS, CacheOptions, SamplingParams
from pagemill.cache.receipt import Lookup
from pagemill.cache.sequences import SequenceBlocks

Status = Literal["waiting", "running", "finished"]


@dataclass(frozen=True, slots=True)
class Request:
    """An admitted request: checked, with every default resolved.

    prompt_token_ids: `array('i')`, not written after admission. max_tokens: tokens generated at the most, cut to fit.
    seed: the caller's, or one derived from the engine's. stop_token_ids: ids that end the text, the model's own
    end-of-text ids included unless ignored. arrival_s: on the engine's clock. cache: whose blocks it may share.
    """

    request_id: str
    prompt_token_ids: array[int]
    params: SamplingParams
    seed: int
    max_tokens: int
    stop_token_ids: tuple[int, ...]
    arrival_s: float
    cache: CacheOptions = DEFAULT_CACHE_OPTIONS

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def longest(self) -> int:
        """Positions that one choice computes at the most: the last token generated is never computed."""
        return len(self.prompt_token_ids) + self.max_tokens - 1


@dataclass(frozen=True, slots=True)
class Marks:
    """Moments of one choice on the engine's clock, in seconds; None where it has not come to that."""

    arrival_s: float
    scheduled_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice of a request on its way. Mutated by the scheduler (status, marks) and by the output (tokens, marks).

    tokens: `array('i')`, prompt and then generated ids. How many of them are computed is the cache's to say.
    num_preemptions: how often its blocks, or some of them, were taken for another. lookup: what its first entry found
    in the cache. first: choice 0 of the same request, whose prompt the others wait for and share. rank: its place
    in the order of first entries, from 1, never changed; 0 before. num_passed: how many later ones entered before it.
    reads_history: of its parameters, which say so at some cost. blocks: what the cache holds for it while it runs.
    num_faults: how often the cache was dropped for what went wrong at this sequence. is_late: it was found, waiting, to
    be unable to end by its deadline. has_begun: of choice 0: its request has entered, by whichever choice. num_found:
    of a kept place (`TenantQueue`): blocks of its text that were in the cache when its time was over.
    """

    seq_id: int
    request: Request
    choice: int
    tokens: array[int]
    marks: Marks
    status: Status = "waiting"
    num_preemptions: int = 0
    lookup: Lookup | None = None
    first: Sequence | None = None
    rank: int = 0
    num_passed: int = 0
    reads_history: bool = False
    blocks: SequenceBlocks | None = None
    num_faults: int = 0
    is_late: bool = False
    has_begun: bool = False
    num_found: int = 0

    @property
    def num_generated(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - len(self.request.prompt_token_ids)


def tenant_of(sequence: Sequence) -> str:
    """Whose turn its turn is."""
    return sequence.request.cache.tenant
