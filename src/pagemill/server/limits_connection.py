"""Cuts connections that are too slow: heads that do not come, answers that are not read, and too many of them. Owns the
timers of one connection, below ASGI; bodies are timed in `limits_body.py`, TLS handshakes in `limits_tls.py`.

uvicorn itself waits for a head for ever and for a reader for ever (slowloris and its mirror image).
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from pagemill.server.limits import Limits
from pagemill.telemetry.metrics import Metrics

BUSY: Final = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\nretry-after: 1\r\nconnection: close\r\n\r\n"
)  # fmt: skip
_TOO_LARGE: Final = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
_TOO_SLOW: Final = b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


_Base: Any = AutoHTTPProtocol  # httptools where it is installed, else h11


class _GuardedProtocol(_Base):  # type: ignore[misc]
    """One connection. Mutated by the transport's events. limits, metrics: set by `guarded_protocol`.

    A head is under way from the connection's beginning, or from the first byte behind a request, until the cycle of
    its request exists. What comes behind a request that is being answered is a head too, but not timed: the answer
    may be long, and uvicorn's keep-alive timer runs from its end. A whole head there is not taken: the connection
    ends with the answer. uvicorn would stop reading, and then not see the client of the first one leave.

    An answer is unread while the system has not taken it. A connection that is being closed waits for that too, without
    a limit of its own, so that clients who ask and do not read could hold all that there may be.
    """

    limits: Limits
    metrics: Metrics

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._end_timer: asyncio.TimerHandle | None = None
        self._num_head_bytes = 0
        self._is_last = False

    def connection_made(self, transport: asyncio.Transport) -> None:
        if transport.get_extra_info("sslcontext") is None:
            # What the system does not take is unread. With TLS the loop's own limits stay: `_end_soon` ends the rest.
            transport.set_write_buffer_limits(high=0)
        super().connection_made(transport)
        if len(self.connections) > self.limits.max_connections:
            self._cut("too many", BUSY)
            return
        self._head_timer = self.loop.call_later(self.limits.header_timeout_s, self._cut, "head", _TOO_SLOW)

    def data_received(self, data: bytes) -> None:
        if self._is_last:
            return
        before = self.cycle
        running = self._is_answering()
        if running and before.more_body:
            super().data_received(data)
            self._look_behind()
            return
        if not running and self._head_timer is None:
            self._head_timer = self.loop.call_later(self.limits.header_timeout_s, self._cut, "head", _TOO_SLOW)
        self._num_head_bytes += len(data)
        super().data_received(data)
        self._look_behind()
        if self.cycle is not before or self.transport.is_closing():
            self._num_head_bytes = 0
            self._stop_head_timer()
        elif self._num_head_bytes > self.limits.max_header_bytes + self.limits.max_url_bytes:
            self._cut("head", b"" if running else _TOO_LARGE)

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _end_with_answer(self) -> None:
        self._is_last = True
        self.cycle.keep_alive = False

    def _look_behind(self) -> None:
        """h11 keeps what comes behind a request and stops reading; httptools calls what follows."""
        conn = getattr(self, "conn", None)
        if conn is None or not self._is_answering() or self.cycle.more_body or not conn.trailing_data[0]:
            return
        if b"\r\n\r\n" in conn.trailing_data[0]:
            self._end_with_answer()
        self.flow.resume_reading()

    def on_headers_complete(self) -> None:
        if self._is_answering():
            self._end_with_answer()
        else:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self._is_last:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._is_last:
            super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        self._stop_write_timer()
        self._stop_end_timer()
        super().connection_lost(exc)

    def eof_received(self) -> None:
        super().eof_received()
        self._end_soon()  # the transport closes itself behind this

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._end_soon()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._end_soon()

    def shutdown(self) -> None:
        super().shutdown()
        if self.transport.is_closing():
            self._end_soon()

    def _end_soon(self) -> None:
        """Closing has begun."""
        if self._end_timer is None:
            self._end_timer = self.loop.call_later(self.limits.write_timeout_s, self._cut, "read", b"")

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self.limits.write_timeout_s, self._cut, "read", b"")

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_write_timer()

    def _cut(self, reason: str, answer: bytes) -> None:
        self._stop_head_timer()
        if self.transport.is_closing() and reason != "read":  # closing waits for a reader that does not read
            return
        self._stop_write_timer()
        self._stop_end_timer()
        self.metrics["pagemill:http_connections_cut"].add(1, reason)
        if not answer:
            self.transport.abort()
            return
        self.transport.write(answer)
        self.transport.close()
        self._end_soon()

    def _stop_head_timer(self) -> None:
        timer, self._head_timer = self._head_timer, None
        if timer is not None:
            timer.cancel()

    def _stop_write_timer(self) -> None:
        timer, self._write_timer = self._write_timer, None
        if timer is not None:
            timer.cancel()

    def _stop_end_timer(self) -> None:
        timer, self._end_timer = self._end_timer, None
        if timer is not None:
            timer.cancel()


def guarded_protocol(limits: Limits, metrics: Metrics) -> type[asyncio.Protocol]:
    """uvicorn's HTTP protocol (the `http` of its Config) with the limits' timers."""
    return type("GuardedProtocol", (_GuardedProtocol,), {"limits": limits, "metrics": metrics})
