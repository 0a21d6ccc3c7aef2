"""From what an engine tells after each step to metrics and to one summary a request. Owns what is open; counts only.

Knows no type of the engine: what it reads of deltas, receipts and statistics is written down here as protocols. Text
and token ids are not among it, so that nothing observed can hold a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from pagemill.telemetry.metrics import Metrics
from pagemill.telemetry.trace import RequestTrace

# Reasons of misses as label values: what a receipt says -> what a query can be written with.
MISS_REASONS: Final = ("not_seen", "evicted", "differs", "other_format", "window_not_kept", "tier_failed", "bypassed")
FINISH_REASONS: Final = ("stop", "length", "abort", "error")
MAX_EARLY: Final = 1024


class MarksLike(Protocol):
    """Moments of one choice, in seconds on the engine's clock."""

    @property
    def arrival_s(self) -> float: ...
    @property
    def scheduled_s(self) -> float | None: ...
    @property
    def first_token_s(self) -> float | None: ...
    @property
    def finished_s(self) -> float | None: ...


class ReceiptLike(Protocol):
    """What the cache did for a prompt. reason: why not more, None where all that could be hit was."""

    @property
    def num_prompt_tokens(self) -> int: ...
    @property
    def num_cached_tokens(self) -> int: ...
    @property
    def tiers(self) -> dict[str, int]: ...
    @property
    def saved_s(self) -> float: ...
    @property
    def reason(self) -> str | None: ...


class DeltaLike(Protocol):
    """What a step added to one choice."""

    @property
    def request_id(self) -> str: ...
    @property
    def choice(self) -> int: ...
    @property
    def token_ids(self) -> Sequence[int]: ...
    @property
    def marks(self) -> MarksLike: ...
    @property
    def finish_reason(self) -> str | None: ...
    @property
    def receipt(self) -> ReceiptLike | None: ...


@dataclass(frozen=True, slots=True)
class Finished:
    """A request that has ended, in numbers. Times are seconds on the engine's clock; None where it did not get there.

    finish_reason: of the choice that ended last. miss: a label of MISS_REASONS, None where nothing was missed.
    """

    request_id: str
    finish_reason: str
    num_choices: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_generated: int
    arrival_s: float
    scheduled_s: float | None
    first_token_s: float | None
    finished_s: float
    saved_s: float = 0.0
    miss: str | None = None


@dataclass(slots=True)
class _Open:
    """A request under way. Mutated as its deltas come."""

    num_prompt_tokens: int
    num_choices: int
    trace: RequestTrace | None
    num_ended: int = 0
    num_generated: int = 0
    scheduled_s: float | None = None
    first_token_s: float | None = None
    last_token_s: dict[int, float] = field(default_factory=dict)  # choice -> when its last token came
    receipt: ReceiptLike | None = None


def miss_label(reason: str | None) -> str | None:
    """The label of a receipt's reason: "other format" is `other_format`."""
    return None if reason is None else reason.replace(" ", "_")


class EngineObserver:
    """Counts requests and steps of one engine. Mutated by `added` and `stepped`, from one thread at a time.

    on_finished: told of each request that ends, with its trace where it has one; an exception of it is ours to mend and
    does not reach the engine's loop, whoever calls must see to that.
    """

    __slots__ = ("_early", "_metrics", "_on_finished", "_open")

    def __init__(
        self, metrics: Metrics, on_finished: Callable[[Finished, RequestTrace | None], None] | None = None
    ) -> None:
        self._metrics = metrics
        self._on_finished = on_finished
        self._open: dict[str, _Open] = {}
        self._early: dict[str, list[tuple[DeltaLike, float]]] = {}  # of requests that are not named yet
        for reason in FINISH_REASONS:
            metrics["vllm:request_success"].add(0, reason)
        for reason in MISS_REASONS:
            metrics["pagemill:kv_miss"].add(0, reason)
        for source in ("local_compute", "local_cache_hit"):
            metrics["vllm:prompt_tokens_by_source"].add(0, source)
        for result in ("hit", "miss"):
            metrics["pagemill:kv_lookup_tokens"].add(0, "hot", result)

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return len(self._open)

    @property
    def num_early(self) -> int:
        """Requests that had deltas and are not named yet."""
        return len(self._early)

    def added(
        self, request_id: str, num_prompt_tokens: int, num_choices: int = 1, trace: RequestTrace | None = None
    ) -> None:
        """The engine has taken a request. Its first deltas may have come before, for the engine does not wait."""
        self._open[request_id] = _Open(num_prompt_tokens, num_choices, trace)
        for delta, now_s in self._early.pop(request_id, ()):
            self.stepped((delta,), now_s)

    def stepped(self, deltas: Iterable[DeltaLike], now_s: float) -> None:
        """A step has ended at `now_s` with these deltas; also for the deltas of an abort."""
        gaps: list[float] = []
        num_tokens = 0
        for delta in deltas:
            request = self._open.get(delta.request_id)
            if request is None:
                self._keep(delta, now_s)
                continue
            if count := len(delta.token_ids):
                num_tokens += count
                self._saw_tokens(request, delta, count, now_s, gaps)
            if delta.finish_reason is not None:
                self._saw_end(request, delta, delta.finish_reason, now_s)
        if num_tokens:
            self._metrics["vllm:generation_tokens"].add(num_tokens)
        if gaps:
            self._metrics["vllm:inter_token_latency_seconds"].observe(gaps)

    def _keep(self, delta: DeltaLike, now_s: float) -> None:
        """Until its request is named; those that never are, such as of a client that left at once, go in the end."""
        early = self._early
        early.setdefault(delta.request_id, []).append((delta, now_s))
        if len(early) > MAX_EARLY:
            del early[next(iter(early))]

    def _saw_tokens(self, request: _Open, delta: DeltaLike, count: int, now_s: float, gaps: list[float]) -> None:
        request.num_generated += count
        last = request.last_token_s.get(delta.choice)
        request.last_token_s[delta.choice] = now_s
        if last is not None:
            gaps.extend([(now_s - last) / count] * count)
        elif request.first_token_s is None:
            marks = delta.marks
            request.first_token_s = now_s if marks.first_token_s is None else marks.first_token_s
            self._metrics["vllm:time_to_first_token_seconds"].observe((request.first_token_s - marks.arrival_s,))
            self._metrics["vllm:prompt_tokens"].add(request.num_prompt_tokens)

    def _saw_end(self, request: _Open, delta: DeltaLike, reason: str, now_s: float) -> None:
        request.num_ended += 1
        request.last_token_s.pop(delta.choice, None)
        scheduled = delta.marks.scheduled_s
        if scheduled is not None and (request.scheduled_s is None or scheduled < request.scheduled_s):
            request.scheduled_s = scheduled
        if delta.receipt is not None and (request.receipt is None or delta.choice == 0):
            request.receipt = delta.receipt
        if request.num_ended < request.num_choices:
            return
        del self._open[delta.request_id]
        finished = _finished(request, delta, reason, now_s)
        self._count(finished, request.receipt)
        if self._on_finished is not None:
            self._on_finished(finished, request.trace)

    def _count(self, done: Finished, receipt: ReceiptLike | None) -> None:
        metrics = self._metrics
        metrics["vllm:request_success"].add(1, done.finish_reason)
        metrics["vllm:e2e_request_latency_seconds"].observe((done.finished_s - done.arrival_s,))
        metrics["vllm:request_generation_tokens"].observe((done.num_generated,))
        metrics["vllm:request_prompt_tokens"].observe((done.num_prompt_tokens,))
        if done.scheduled_s is not None:
            metrics["vllm:request_queue_time_seconds"].observe((done.scheduled_s - done.arrival_s,))
            metrics["vllm:request_inference_time_seconds"].observe((done.finished_s - done.scheduled_s,))
            if done.first_token_s is None:
                metrics["vllm:prompt_tokens"].add(done.num_prompt_tokens)
            by_source = metrics["vllm:prompt_tokens_by_source"]
            by_source.add(done.num_cached_tokens, "local_cache_hit")
            by_source.add(done.num_prompt_tokens - done.num_cached_tokens, "local_compute")
        if done.first_token_s is not None:
            if done.scheduled_s is not None:
                metrics["vllm:request_prefill_time_seconds"].observe((done.first_token_s - done.scheduled_s,))
            metrics["vllm:request_decode_time_seconds"].observe((done.finished_s - done.first_token_s,))
        if receipt is None:
            return
        looked_up = metrics["pagemill:kv_lookup_tokens"]
        for tier, count in receipt.tiers.items():
            looked_up.add(count, tier, "hit")
        looked_up.add(receipt.num_prompt_tokens - receipt.num_cached_tokens, "hot", "miss")
        metrics["pagemill:kv_saved_prefill_seconds"].add(max(done.saved_s, 0.0))
        if done.miss is not None:
            metrics["pagemill:kv_miss"].add(1, done.miss)


def _finished(request: _Open, delta: DeltaLike, reason: str, now_s: float) -> Finished:
    receipt, marks = request.receipt, delta.marks
    return Finished(
        request_id=delta.request_id,
        finish_reason=reason,
        num_choices=request.num_choices,
        num_prompt_tokens=request.num_prompt_tokens,
        num_cached_tokens=0 if receipt is None else receipt.num_cached_tokens,
        num_generated=request.num_generated,
        arrival_s=marks.arrival_s,
        scheduled_s=request.scheduled_s,
        first_token_s=request.first_token_s,
        finished_s=now_s if marks.finished_s is None else marks.finished_s,
        saved_s=0.0 if receipt is None else receipt.saved_s,
        miss=None if receipt is None else miss_label(receipt.reason),
    )
