"""What the engine asks of an executor in one step, and what it gets back. Frozen values, no arrays.

What is made for each row, token or step is a named tuple: a frozen dataclass takes three times as long to make.

history of one sequence   |<------ computed ------>|<-- token_ids -->|
                          0                      start        start + len(token_ids)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from pagemill.base.params import SamplingParams
from pagemill.base.transfer import NO_MOVES, Moves


class SequenceStep(NamedTuple):
    """One sequence's part of a step: compute `token_ids` at positions start, start+1, …

    block_table: block ids that hold positions 0 .. start+len(token_ids)-1 in order (an `array('i')` that the cache
    owns; the executor only reads it, during the step). sample: take the logits of the last token and choose the next
    one. choice, seed: keys of the random numbers. num_generated: tokens generated before this step (for min_tokens).
    forbid: token ids that must not be chosen in this step. history: the text so far, prompt and then generated ids (an
    `array('i')` of the engine's), where the parameters read it (`SamplingParams.reads_history`), else empty.
    window_tables: a table like block_table for each window group, of pages; -1 where they are not held.
    """

    seq_id: int
    token_ids: Sequence[int]
    start: int
    block_table: Sequence[int]
    sample: bool
    params: SamplingParams
    seed: int
    choice: int = 0
    num_generated: int = 0
    forbid: tuple[int, ...] = ()
    history: Sequence[int] = ()
    window_tables: tuple[Sequence[int], ...] = ()

    @property
    def end(self) -> int:
        """Positions that the sequence has computed after this step."""
        return self.start + len(self.token_ids)


class StepPlan(NamedTuple):
    """All that one native call computes: rows of prefill and decode side by side. moves: made before them."""

    sequences: tuple[SequenceStep, ...]
    moves: Moves = NO_MOVES

    @property
    def num_tokens(self) -> int:
        return sum(len(s.token_ids) for s in self.sequences)


class TokenLogprob(NamedTuple):
    """Natural logarithm of a token's probability before temperature and cuts, and its rank (1 = most likely)."""

    token_id: int
    logprob: float
    rank: int


class PositionLogprobs(NamedTuple):
    """One position: the token that stands there, and the most likely ones, best first."""

    sampled: TokenLogprob
    top: tuple[TokenLogprob, ...]


class Sample(NamedTuple):
    """The token chosen for one sequence. `top`: the `params.logprobs` most likely tokens, best first.

    prompt: with the first token of a request that asked for `prompt_logprobs`, its prompt from position 1 on.
    """

    seq_id: int
    token_id: int
    logprob: TokenLogprob | None = None
    top: tuple[TokenLogprob, ...] = ()
    prompt: tuple[PositionLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class SampleFailure:
    """No token could be chosen for this sequence (say, its logits hold NaN), and why; other rows are not affected.
    param: the parameter of the request that is at fault, as of `RequestError`."""

    seq_id: int
    reason: str
    param: str | None = None


class StepResult(NamedTuple):
    """One sample or one failure for each sequence of the plan that asked for a sample, in the plan's order."""

    samples: tuple[Sample, ...]
    failures: tuple[SampleFailure, ...] = ()


class Executor(Protocol):
    """Runs step plans. Native, reference and fake ones are exchangeable."""

    def run(self, plan: StepPlan) -> StepResult:
        """Make the plan's moves, compute its tokens, write their K and V through the tables, sample where asked."""
        ...

    def resize(self, num_blocks: int) -> None:
        """Have so many blocks from now on; the first ones keep their contents. Raises CapacityError where memory is
        short, and has changed nothing."""
        ...
