"""Spans to an OpenTelemetry collector, through OpenTelemetry's own library (the extra `otel`). Owns the conversion.

The library is imported when a sink is made, for it is not there unless asked for, and takes a third of a second.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Final

from pagemill.base.errors import ConfigError
from pagemill.telemetry.trace import Span

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

SERVICE_NAME: Final = "pagemill"
_SHUTDOWN_MS: Final = 5_000


class OtlpSink:
    """Queues spans and sends them in batches from a thread of its own; where the queue is full they are dropped.

    endpoint: of the collector, HTTP with protobuf (http://127.0.0.1:4318/v1/traces). exporter: another one of the
    library instead. Mutated by being called and by `close`. Raises ConfigError without the extra, or for an address
    that is none.
    """

    def __init__(self, endpoint: str, *, exporter: SpanExporter | None = None, version: str = "") -> None:
        trace, sdk, export, resources = _modules()
        self._trace, self._sdk = trace, sdk
        self._resource = resources.Resource.create({"service.name": SERVICE_NAME, "service.version": version})
        self._processor = export.BatchSpanProcessor(_exporter(endpoint) if exporter is None else exporter)

    def __call__(self, span: Span) -> None:
        """Queue one ended span."""
        trace, status = self._trace, self._trace.status
        parent = None if span.parent_id is None else self._context(span.trace_id, span.parent_id, remote=True)
        kind = trace.SpanKind.SERVER if span.kind == "server" else trace.SpanKind.INTERNAL
        self._processor.on_end(
            self._sdk.ReadableSpan(
                name=span.name,
                context=self._context(span.trace_id, span.span_id, remote=False),
                parent=parent,
                resource=self._resource,
                attributes=dict(span.attributes),
                kind=kind,
                status=status.Status(status.StatusCode.ERROR if span.failed else status.StatusCode.UNSET),
                start_time=span.start_ns,
                end_time=span.end_ns,
            )
        )

    def flush(self, timeout_s: float = 5.0) -> bool:
        """Send what is queued; False where that took longer."""
        return bool(self._processor.force_flush(round(timeout_s * 1000)))

    def close(self) -> None:
        """Send what is queued, within five seconds, and end the thread."""
        self._processor.force_flush(_SHUTDOWN_MS)
        self._processor.shutdown()

    def _context(self, trace_id: int, span_id: int, *, remote: bool) -> object:
        flags = self._trace.TraceFlags(self._trace.TraceFlags.SAMPLED)
        return self._trace.SpanContext(trace_id, span_id, is_remote=remote, trace_flags=flags)


def _modules() -> tuple[ModuleType, ModuleType, ModuleType, ModuleType]:
    try:
        from opentelemetry import trace
        from opentelemetry.sdk import resources
        from opentelemetry.sdk import trace as sdk
        from opentelemetry.sdk.trace import export
    except ImportError as error:
        raise ConfigError(
            f"traces need OpenTelemetry ({error}); get it with `pip install '.[otel]'` in a checkout"
        ) from None
    return trace, sdk, export, resources


def _exporter(endpoint: str) -> SpanExporter:
    if not endpoint.startswith(("http://", "https://")):
        raise ConfigError(
            f"the traces endpoint is {endpoint!r}; give an address such as http://127.0.0.1:4318/v1/traces"
        )
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise ConfigError(
            f"traces need OpenTelemetry's exporter ({error}); get it with `pip install '.[otel]'` in a checkout"
        ) from None
    return OTLPSpanExporter(endpoint=endpoint)
