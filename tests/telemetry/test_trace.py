"""Spans of requests: which are kept, what they say, and what reaches a collector."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from pagemill.base.errors import ConfigError
from pagemill.telemetry.observe import Finished
from pagemill.telemetry.otlp import OtlpSink
from pagemill.telemetry.trace import (
    RequestTrace,
    Sampling,
    Span,
    TraceContext,
    Tracer,
    parse_traceparent,
    start_trace,
)

PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def done(**changes: object) -> Finished:
    values = {
        "request_id": "r1", "finish_reason": "stop", "num_choices": 1, "num_prompt_tokens": 12,
        "num_cached_tokens": 8, "num_generated": 5, "arrival_s": 1.0, "scheduled_s": 1.5, "first_token_s": 2.0,
        "finished_s": 4.0, "saved_s": 0.1, "miss": "evicted",
    }  # fmt: skip
    return Finished(**{**values, **changes})  # type: ignore[arg-type]


class Kept:
    """A tracer and what it kept. Mutated by requests."""

    def __init__(self, **sampling: object) -> None:
        self.spans: list[Span] = []
        self.results: list[str] = []
        self.tracer = Tracer(
            "tiny", Sampling(**sampling), self.spans.append, offset_s=1000.0, on_result=self.results.append  # type: ignore[arg-type]
        )  # fmt: skip


def test_a_caller_s_span_is_read() -> None:
    assert parse_traceparent(PARENT) == TraceContext(
        0x4BF92F3577B34DA6A3CE929D0E0E4736, 0x00F067AA0BA902B7, sampled=True
    )
    assert parse_traceparent(PARENT[:-2] + "00") is not None
    assert parse_traceparent("cc" + PARENT[2:] + "-later") is not None, "a later version may say more"


@pytest.mark.parametrize(
    "header",
    [
        "", "x", "ff" + PARENT[2:], PARENT + "-more", PARENT.upper(), "00-" + "0" * 32 + "-00f067aa0ba902b7-01",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-" + "0" * 16 + "-01", PARENT[:-1], "0" * 10_000,
        "00-４bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
    ],
)  # fmt: skip
def test_what_is_no_span_starts_a_trace_of_its_own(header: str) -> None:
    assert parse_traceparent(header) is None
    trace = start_trace("chat", header)
    assert trace.parent is None
    assert trace.trace_id


def test_a_request_s_spans_are_in_the_caller_s_trace_and_in_order() -> None:
    kept = Kept()
    kept.tracer.finished(done(), start_trace("chat", PARENT, {"url.path": "/v1/chat/completions"}))
    first, *stages = kept.spans
    assert (first.name, first.kind, first.parent_id) == ("chat tiny", "server", 0x00F067AA0BA902B7)
    assert {each.trace_id for each in kept.spans} == {0x4BF92F3577B34DA6A3CE929D0E0E4736}
    assert [(each.name, each.parent_id) for each in stages] == [
        (name, first.span_id) for name in ("queue", "prefill", "decode")
    ]
    assert (first.start_ns, first.end_ns) == (1001 * 10**9, 1004 * 10**9)
    assert [each.end_ns for each in stages] == [1001.5e9, 1002e9, 1004e9]
    assert first.attributes["gen_ai.usage.input_tokens"] == 12
    assert first.attributes["gen_ai.usage.cache_read.input_tokens"] == 8
    assert first.attributes["gen_ai.operation.name"] == "chat"
    assert first.attributes["pagemill.cache.miss"] == "evicted"


def test_a_request_that_never_ran_has_its_wait_alone() -> None:
    kept = Kept()
    never = done(scheduled_s=None, first_token_s=None, finish_reason="error")
    kept.tracer.finished(never, start_trace("chat"))
    assert [each.name for each in kept.spans] == ["chat tiny", "queue"]
    assert kept.spans[0].failed


def test_the_share_of_traces_is_kept() -> None:
    kept = Kept(ratio=0.25)
    for _ in range(4000):
        kept.tracer.finished(done(), start_trace("chat"))
    assert 800 < kept.results.count("kept") < 1200


@pytest.mark.parametrize(("ratio", "expected"), [(0.0, "sampled out"), (1.0, "kept")])
def test_none_and_all_are_exact(ratio: float, expected: str) -> None:
    kept = Kept(ratio=ratio)
    for trace_id in (1, 2**56 - 1, 2**128 - 1):
        kept.tracer.finished(done(), RequestTrace(trace_id, 1, None, "chat", {}))
    assert set(kept.results) == {expected}


def test_slow_requests_are_kept_whatever_the_lot_says() -> None:
    kept = Kept(ratio=0.0, slow_s=3.0)
    kept.tracer.finished(done(), start_trace("chat"))
    kept.tracer.finished(done(finished_s=3.9), start_trace("chat"))
    kept.tracer.finished(done(), start_trace("chat", PARENT[:-2] + "00"))
    assert kept.results == ["kept", "sampled out", "kept"]


@pytest.mark.parametrize(("flags", "expected"), [("01", "kept"), ("00", "sampled out")])
def test_a_caller_s_word_goes_before_the_lot(flags: str, expected: str) -> None:
    kept = Kept(ratio=0.0 if flags == "01" else 1.0)
    kept.tracer.finished(done(), start_trace("chat", PARENT[:-2] + flags))
    assert kept.results == [expected]


def test_a_failing_collector_fails_no_request() -> None:
    def refuse(span: Span) -> None:
        raise OSError("no room")

    results: list[str] = []
    Tracer("tiny", Sampling(), refuse, on_result=results.append).finished(done(), start_trace("chat"))
    assert results == ["failed"]


@pytest.mark.parametrize("wrong", [{"ratio": -0.1}, {"ratio": 1.1}, {"ratio": float("nan")}, {"slow_s": 0.0}])
def test_a_sampling_out_of_range_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        Sampling(**wrong)


def test_spans_reach_opentelemetry_as_they_are() -> None:
    exporter = InMemorySpanExporter()
    sink = OtlpSink("http://127.0.0.1:1", exporter=exporter)
    Tracer("tiny", Sampling(), sink, offset_s=0.0).finished(done(finish_reason="error"), start_trace("chat", PARENT))
    assert sink.flush()
    first, *stages = exporter.get_finished_spans()
    sink.close()
    assert first.context is not None
    assert first.parent is not None
    assert f"{first.context.trace_id:032x}" == PARENT[3:35]
    assert f"{first.parent.span_id:016x}" == PARENT[36:52]
    assert (first.start_time, first.end_time) == (10**9, 4 * 10**9)
    assert not first.status.is_ok
    assert [each.name for each in stages] == ["queue", "prefill", "decode"]
    assert first.resource.attributes["service.name"] == "pagemill"


@pytest.fixture
def collector() -> Iterator[tuple[str, list[bytes]]]:
    """A collector over a socket: its address, and the bodies that it was sent."""
    bodies: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1/traces", bodies
    server.shutdown()
    thread.join()
    server.server_close()


def test_spans_reach_a_collector_over_a_socket(
    collector: tuple[str, list[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    url, bodies = collector
    sink = OtlpSink(url, version="0.1")
    Tracer("tiny", Sampling(), sink).finished(done(), start_trace("chat", PARENT))
    sink.close()
    sent = ExportTraceServiceRequest()
    sent.ParseFromString(b"".join(bodies))
    spans = [span for resource in sent.resource_spans for scope in resource.scope_spans for span in scope.spans]
    assert [span.name for span in spans] == ["chat tiny", "queue", "prefill", "decode"]


@pytest.mark.parametrize("endpoint", ["", "127.0.0.1:4318", "ftp://x", "file:///etc/passwd"])
def test_an_endpoint_that_is_none_is_refused(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="4318"):
        OtlpSink(endpoint)
