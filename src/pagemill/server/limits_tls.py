"""TLS handshakes that are counted and timed. Owns accepting connections where there is TLS, and how much of an answer
the system keeps; what follows a handshake is `limits_connection.py`'s.

uvicorn's own listener knows of a connection only behind its handshake, and waits a minute for that.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from contextlib import suppress
from functools import partial
from typing import Any, Final

import uvicorn

from pagemill.server.limits import Limits
from pagemill.server.limits_connection import BUSY
from pagemill.telemetry.metrics import Metrics

_LOG: Final = logging.getLogger(__name__)
# Of an answer that is not read, in the system, which would else keep up to 4 MiB for each connection and never miss a
# reader of less. Enough for 5 MB a second at 100 ms to the client and back.
_SEND_BUFFER_BYTES: Final = 256 * 1024
_PAUSE_S: Final = 1.0  # where no connection can be taken, as without descriptors
# Connections beyond the limit that are told so, at a time, and how long each may take for its handshake and its leave.
_MOST_REFUSED: Final = 32
_REFUSAL_S: Final = 2.0


class _Refusal(asyncio.Protocol):
    """Tells a client that there are too many connections, whatever it asks for."""

    def connection_made(self, transport: Any) -> None:
        transport.write(BUSY)
        transport.close()


class GuardedServer(uvicorn.Server):
    """uvicorn's server, which accepts TLS connections itself. Mutated by its life.

    tls: what to speak, None for no TLS. limits: `header_timeout_s` bounds a handshake, `max_connections` counts those
    under way too. A connection beyond is told so, which costs a handshake: a few at a time, the others are cut at once.
    The sockets that are served listen already.
    """

    def __init__(self, config: uvicorn.Config, tls: ssl.SSLContext | None, limits: Limits, metrics: Metrics) -> None:
        super().__init__(config)
        self._tls = tls
        self._limits = limits
        self._metrics = metrics
        self._accepting: list[asyncio.Task[None]] = []
        self._shaking: set[asyncio.Task[None]] = set()
        self._refusing: set[asyncio.Task[None]] = set()

    @property
    def num_connections(self) -> int:
        """Open now, also those in their handshake."""
        return len(self.server_state.connections) + len(self._shaking)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        for each in sockets or ():  # what they accept inherits it
            each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        if self._tls is None:
            await super().startup(sockets)
            return
        await super().startup([])
        self._accepting = [asyncio.create_task(self._accept(each, self._tls)) for each in sockets or ()]

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for task in (*self._accepting, *self._shaking, *self._refusing):
            task.cancel()
        await super().shutdown(sockets)

    async def _accept(self, listener: socket.socket, tls: ssl.SSLContext) -> None:
        loop = asyncio.get_running_loop()
        listener.setblocking(False)
        while True:
            try:
                connection, _ = await loop.sock_accept(listener)
            except ConnectionError:  # gone before it was taken
                continue
            except OSError as error:
                _LOG.error("connections cannot be taken", exc_info=error)
                await asyncio.sleep(_PAUSE_S)
                continue
            if self.num_connections >= self._limits.max_connections:
                self._metrics["pagemill:http_connections_cut"].add(1, "too many")
                if len(self._refusing) >= _MOST_REFUSED:
                    connection.close()
                    continue
                task, kept = loop.create_task(_refuse(connection, tls)), self._refusing
            else:
                task, kept = loop.create_task(self._shake(connection, tls)), self._shaking
            kept.add(task)
            task.add_done_callback(kept.discard)

    async def _shake(self, connection: socket.socket, tls: ssl.SSLContext) -> None:
        protocol: Any = self.config.http_protocol_class
        make = partial(protocol, config=self.config, server_state=self.server_state, app_state=self.lifespan.state)
        timeout_s = self._limits.header_timeout_s
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                make, connection, ssl=tls, ssl_handshake_timeout=timeout_s, ssl_shutdown_timeout=timeout_s
            )
        except ConnectionAbortedError:
            self._metrics["pagemill:http_connections_cut"].add(1, "handshake")
        except OSError:  # no TLS, another version, no certificate, or the client has left
            pass


async def _refuse(connection: socket.socket, tls: ssl.SSLContext) -> None:
    with suppress(OSError):
        await asyncio.get_running_loop().connect_accepted_socket(
            _Refusal, connection, ssl=tls, ssl_handshake_timeout=_REFUSAL_S, ssl_shutdown_timeout=_REFUSAL_S
        )
