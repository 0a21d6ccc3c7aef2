"""Spans of requests: which are kept, what they say, which trace they belong to. Owns values and the decision; sends
nothing (that is `telemetry/otlp.py`, an extra).

W3C Trace Context (https://www.w3.org/TR/trace-context/) on the way in; OpenTelemetry's names for generative AI on the
way out. A request's spans are made when it has ended, out of moments that are known by then, so that slow requests can
be kept whatever the lot said, and a request that is not kept costs nothing.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from random import SystemRandom
from typing import TYPE_CHECKING, Final, Literal

from pagemill.base.errors import ConfigError

if TYPE_CHECKING:
    from pagemill.telemetry.observe import Finished

Attribute = str | bool | int | float | Sequence[str]
Kind = Literal["server", "internal"]

_TRACEPARENT: Final = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.ASCII)
_RANDOM: Final = SystemRandom()


@dataclass(frozen=True, slots=True)
class TraceContext:
    """Where a span stands: trace_id (128 bits), span_id (64 bits), and whether the caller keeps its own."""

    trace_id: int
    span_id: int
    sampled: bool


@dataclass(frozen=True, slots=True)
class Span:
    """One ended span. Times in nanoseconds since 1970. parent_id: None for the first of a trace."""

    name: str
    trace_id: int
    span_id: int
    parent_id: int | None
    start_ns: int
    end_ns: int
    kind: Kind
    attributes: Mapping[str, Attribute]
    failed: bool = False


@dataclass(frozen=True, slots=True)
class RequestTrace:
    """What the door knows of a request that may be traced. parent: the caller's span, None without one. attributes: of
    its first span, never text of the request."""

    trace_id: int
    span_id: int
    parent: TraceContext | None
    operation: str
    attributes: Mapping[str, Attribute]


def parse_traceparent(header: str) -> TraceContext | None:
    """The caller's span from a `traceparent` header; None for anything that the specification tells to ignore."""
    match = _TRACEPARENT.fullmatch(header.strip()) if len(header) <= 256 else None
    if match is None or match[1] == "ff" or (match[1] == "00" and match[5] is not None):
        return None
    trace_id, span_id = int(match[2], 16), int(match[3], 16)
    if not trace_id or not span_id:
        return None
    return TraceContext(trace_id, span_id, bool(int(match[4], 16) & 1))


def start_trace(
    operation: str, traceparent: str = "", attributes: Mapping[str, Attribute] | None = None
) -> RequestTrace:
    """A request comes in: its trace is the caller's, where it names one."""
    parent = parse_traceparent(traceparent) if traceparent else None
    trace_id = _RANDOM.getrandbits(128) or 1 if parent is None else parent.trace_id
    return RequestTrace(trace_id, _RANDOM.getrandbits(64) or 1, parent, operation, dict(attributes or {}))


def sibling_of(trace: RequestTrace) -> RequestTrace:
    """Another span beside this one, for a further prompt of the same HTTP request."""
    return replace(trace, span_id=_RANDOM.getrandbits(64) or 1)


@dataclass(frozen=True, slots=True)
class Sampling:
    """Which requests are kept: those whose caller keeps its own, a share `ratio` of those without a caller's word, and
    all that take `slow_s` seconds or more (None: no such rule). Raises ConfigError for values out of range."""

    ratio: float = 1.0
    slow_s: float | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.ratio <= 1.0:
            raise ConfigError(f"the share of traces is {self.ratio}; give a number from 0 to 1")
        if self.slow_s is not None and not self.slow_s > 0:
            raise ConfigError(f"slow traces begin at {self.slow_s} s; give seconds above 0, or leave it out")

    def keeps(self, trace: RequestTrace, duration_s: float) -> bool:
        """By the low 56 bits of the trace id, as OpenTelemetry's ratio does, so that all parts of a trace agree."""
        if self.slow_s is not None and duration_s >= self.slow_s:
            return True
        if trace.parent is not None:
            return trace.parent.sampled
        return (trace.trace_id & (2**56 - 1)) < self.ratio * 2**56


class Tracer:
    """Makes the spans of ended requests and hands them to `sink`. on_result: told "kept", "sampled out" or "failed".

    offset_s: what the engine's clock (monotonic) lacks to be seconds since 1970.
    """

    __slots__ = ("_offset_s", "_on_result", "_sampling", "_sink", "model")

    def __init__(
        self,
        model: str,
        sampling: Sampling,
        sink: Callable[[Span], None],
        *,
        offset_s: float | None = None,
        on_result: Callable[[str], None] | None = None,
    ) -> None:
        self.model = model
        self._sampling = sampling
        self._sink = sink
        self._offset_s = time.time() - time.monotonic() if offset_s is None else offset_s
        self._on_result = on_result

    def finished(self, done: Finished, trace: RequestTrace | None) -> None:
        """A request has ended; without a trace nothing is made."""
        if trace is None:
            return
        result = "sampled out"
        if self._sampling.keeps(trace, done.finished_s - done.arrival_s):
            result = "kept"
            try:
                for span in self.spans(done, trace):
                    self._sink(span)
            except Exception:  # a collector's trouble is no request's
                result = "failed"
        if self._on_result is not None:
            self._on_result(result)

    def spans(self, done: Finished, trace: RequestTrace) -> list[Span]:
        """The request's span, then queue, prefill and decode as far as it came."""
        failed = done.finish_reason == "error"
        attributes: dict[str, Attribute] = {
            **trace.attributes,
            "gen_ai.operation.name": trace.operation,
            "gen_ai.provider.name": "pagemill",
            "gen_ai.request.model": self.model,
            "gen_ai.response.id": done.request_id,
            "gen_ai.response.finish_reasons": (done.finish_reason,),
            "gen_ai.usage.input_tokens": done.num_prompt_tokens,
            "gen_ai.usage.output_tokens": done.num_generated,
            "gen_ai.usage.cache_read.input_tokens": done.num_cached_tokens,
        }
        if done.first_token_s is not None:
            attributes["gen_ai.response.time_to_first_chunk"] = done.first_token_s - done.arrival_s
        if done.miss is not None:
            attributes["pagemill.cache.miss"] = done.miss
        parent = None if trace.parent is None else trace.parent.span_id
        name = f"{trace.operation} {self.model}"
        first = self._span(name, trace, trace.span_id, parent, done.arrival_s, done.finished_s, attributes)
        spans = [replace(first, kind="server", failed=failed)]
        for stage, start_s, end_s in (
            ("queue", done.arrival_s, done.scheduled_s or done.finished_s),
            ("prefill", done.scheduled_s, done.first_token_s or done.finished_s),
            ("decode", done.first_token_s, done.finished_s),
        ):
            if start_s is not None:
                own = _RANDOM.getrandbits(64) or 1
                spans.append(self._span(stage, trace, own, trace.span_id, start_s, end_s, {}))
        return spans

    def _span(
        self,
        name: str,
        trace: RequestTrace,
        span_id: int,
        parent_id: int | None,
        start_s: float,
        end_s: float,
        attributes: Mapping[str, Attribute],
    ) -> Span:
        begin, end = (round((each + self._offset_s) * 1e9) for each in (start_s, end_s))
        return Span(name, trace.trace_id, span_id, parent_id, begin, max(begin, end), "internal", attributes)
