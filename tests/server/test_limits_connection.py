"""Slow clients are cut, and nobody else is (S12): over sockets, with uvicorn and a small application."""

from __future__ import annotations

import asyncio
import importlib
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread
from typing import Literal

import httpx
import pytest
import uvicorn

from pagemill.server import limits_connection, limits_tls
from pagemill.server.access_door import Receive, Scope, Send, send_json
from pagemill.server.access_listen import TlsOptions
from pagemill.server.limits import Limits
from pagemill.server.limits_body import BodyLimits
from pagemill.server.limits_connection import guarded_protocol
from pagemill.server.limits_tls import GuardedServer
from pagemill.telemetry.metrics import Metrics
from tests.fixtures.certificate import make_certificate

Loop = Literal["auto", "asyncio", "uvloop"]
LIMITS = Limits(
    header_timeout_s=0.4, body_timeout_s=0.5, write_timeout_s=0.5, max_header_bytes=4096, max_url_bytes=1024,
    max_connections=600,
)  # fmt: skip
HEAD = b"POST /v1/x HTTP/1.1\r\nhost: a\r\n"


class Small:
    """An application behind the guards, on a thread of its own. Mutated by requests: what it saw."""

    def __init__(self, limits: Limits = LIMITS, tls: ssl.SSLContext | None = None, loop: Loop = "auto") -> None:
        self.metrics = Metrics("tiny")
        self.gone = Event()
        self.num_answered = 0
        self.bodies: list[bytes] = []
        listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.port: int = listener.getsockname()[1]
        config = uvicorn.Config(
            BodyLimits(self._app, lambda: limits, self.metrics),
            http=guarded_protocol(limits, self.metrics),
            loop=loop,
            log_level="critical",
            lifespan="off",
            ws="none",
            timeout_keep_alive=2,
        )
        self._server = GuardedServer(config, tls, limits, self.metrics)
        self._thread = Thread(target=self._server.run, args=([listener],), daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/flood":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for _ in range(2000):  # more than all buffers hold
                await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
                if self.cut("read") or self._server.should_exit:
                    break
            self.gone.set()
            return
        if scope["path"] == "/some":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"x" * 60_000, "more_body": False})
            return
        if scope["path"] == "/wait":
            await receive()
            while (await receive())["type"] != "http.disconnect":
                pass
            self.gone.set()
            return
        if scope["method"] == "POST":
            self.bodies.append((await receive()).get("body", b""))
        if scope["path"] == "/slow":
            await asyncio.sleep(1.0)
        self.num_answered += 1
        await send_json(send, 200, {})

    def cut(self, reason: str) -> float:
        """Connections cut so far for this reason."""
        samples = self.metrics["pagemill:http_connections_cut"].samples()
        return sum(each.value for each in samples if each.labels == (reason,))

    @property
    def num_connections(self) -> int:
        """Connections that are open now."""
        return self._server.num_connections

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)


@pytest.fixture
def small() -> Iterator[Small]:
    server = Small()
    yield server
    server.stop()


def answer_of(connection: socket.socket) -> bytes:
    """All that comes until the connection ends."""
    pieces = []
    try:
        while piece := connection.recv(65536):
            pieces.append(piece)
    except ConnectionResetError:
        pass
    return b"".join(pieces)


def test_a_connection_that_says_nothing_is_cut(small: Small) -> None:
    with small.connect() as connection:
        assert answer_of(connection).startswith(b"HTTP/1.1 408 ")
    assert small.cut("head") == 1


def test_a_head_that_drips_is_cut_at_its_time_however_often_a_byte_comes(small: Small) -> None:
    with small.connect() as connection:
        began = time.monotonic()
        try:
            for byte in HEAD * 20:
                connection.sendall(bytes([byte]))
                time.sleep(0.05)
        except OSError:
            pass
        assert time.monotonic() - began < 5
    assert small.cut("head") == 1


def test_a_second_head_on_the_same_connection_is_timed_too(small: Small) -> None:
    with small.connect() as connection:
        connection.sendall(HEAD + b"content-length: 0\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")
        connection.sendall(b"POST /v1")
        assert b"408" in answer_of(connection)
    assert small.cut("head") == 1


def test_a_head_that_does_not_end_is_cut_by_its_size(small: Small) -> None:
    with small.connect() as connection:
        with suppress(OSError):
            connection.sendall(HEAD + b"x-filler: " + b"a" * 200_000)
        answer_of(connection)
    assert small.cut("head") == 1
    assert small.num_answered == 0


def test_a_head_behind_a_request_that_is_being_answered_is_bounded_too(small: Small) -> None:
    with small.connect() as connection:
        connection.sendall(b"POST /slow HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\n\r\n")
        time.sleep(0.1)
        try:
            connection.sendall(HEAD)
            for _ in range(40):
                connection.sendall(b"x-more: " + b"a" * 8000 + b"\r\n")
                time.sleep(0.005)
        except OSError:
            pass
        answer_of(connection)
    assert small.cut("head") == 1


@pytest.mark.parametrize("parser", ["httptools_impl.HttpToolsProtocol", "h11_impl.H11Protocol"])
@pytest.mark.parametrize("at_once", [True, False])
def test_a_client_that_asked_for_more_is_seen_to_leave(
    parser: str, at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, name = parser.split(".")
    pytest.importorskip(module.removesuffix("_impl"))
    protocol = getattr(importlib.import_module(f"uvicorn.protocols.http.{module}"), name)
    monkeypatch.setattr(limits_connection, "AutoHTTPProtocol", protocol)
    small = Small()
    try:
        first, second = b"GET /wait HTTP/1.1\r\nhost: a\r\n\r\n", HEAD + b"content-length: 2\r\n\r\n{}"
        with small.connect() as connection:
            connection.sendall(first + second if at_once else first)
            time.sleep(0.1)
            connection.sendall(second)
            time.sleep(0.1)
            assert not small.gone.is_set()
        assert small.gone.wait(5), "nobody reads, and it goes on"
        assert small.num_answered == 0
    finally:
        small.stop()


@pytest.mark.parametrize("parser", ["httptools_impl.HttpToolsProtocol", "h11_impl.H11Protocol"])
def test_what_was_asked_for_behind_an_answer_ends_with_it(parser: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, name = parser.split(".")
    pytest.importorskip(module.removesuffix("_impl"))
    protocol = getattr(importlib.import_module(f"uvicorn.protocols.http.{module}"), name)
    monkeypatch.setattr(limits_connection, "AutoHTTPProtocol", protocol)
    small = Small()
    try:
        with small.connect() as connection:
            connection.sendall((HEAD + b"content-length: 4\r\n\r\nabcd") * 3)
            answers = answer_of(connection)
        assert answers.count(b"HTTP/1.1 200 ") == 1
        assert small.bodies == [b"abcd"], "what came behind is no part of it"
    finally:
        small.stop()


def test_a_body_that_drips_is_refused(small: Small) -> None:
    with small.connect() as connection:
        connection.sendall(HEAD + b"content-length: 1000\r\n\r\nab")
        assert answer_of(connection).startswith(b"HTTP/1.1 408 ")
    assert small.num_answered == 0


def test_a_client_that_does_not_read_is_cut(small: Small) -> None:
    with small.connect() as connection:
        connection.sendall(b"GET /flood HTTP/1.1\r\nhost: a\r\n\r\n")
        assert small.gone.wait(20), "the application goes on although nobody reads"
    assert small.cut("read") == 1


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("more", [b"", b"connection: close\r\n"], ids=["kept alive", "closed behind the answer"])
def test_a_client_that_leaves_less_unread_than_a_buffer_holds_is_cut_too(
    loop: Loop, more: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    if loop == "uvloop":
        pytest.importorskip("uvloop")
    monkeypatch.setattr(limits_tls, "_SEND_BUFFER_BYTES", 4096)
    small = Small(loop=loop)
    try:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", small.port))
            client.sendall(b"GET /some HTTP/1.1\r\nhost: a\r\n" + more + b"\r\n")
            wait_until(lambda: small.cut("read") == 1)
            wait_until(lambda: small.num_connections == 0)
    finally:
        small.stop()


def test_a_long_answer_is_not_cut(small: Small) -> None:
    with httpx.Client(trust_env=False) as client:
        assert client.post(f"http://127.0.0.1:{small.port}/slow").status_code == 200
        assert client.post(f"http://127.0.0.1:{small.port}/slow").status_code == 200
    assert small.cut("head") == 0


def test_a_request_whose_parts_come_one_by_one_but_in_time_is_answered(small: Small) -> None:
    with small.connect() as connection:
        for piece in (HEAD, b"content-length: 4\r\n", b"\r\n", b"ab", b"cd"):
            connection.sendall(piece)
            time.sleep(0.02)
        assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")


def test_normal_requests_are_answered_beside_five_hundred_slow_ones(small: Small) -> None:
    slow = [small.connect() for _ in range(500)]
    for connection in slow:
        connection.sendall(b"POST /v1/x HTTP/1.1\r\nhost: ")
    with httpx.Client(trust_env=False) as client:
        assert [client.post(f"http://127.0.0.1:{small.port}/v1/x").status_code for _ in range(50)] == [200] * 50
        deadline = time.monotonic() + 10
        while small.cut("head") < 500 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert client.post(f"http://127.0.0.1:{small.port}/v1/x").status_code == 200
    for connection in slow:
        connection.close()
    assert small.cut("head") == 500
    assert small.num_answered == 51


def test_connections_beyond_the_limit_are_told_to_come_back() -> None:
    small = Small(replace(LIMITS, max_connections=20, header_timeout_s=20.0))
    inside = [small.connect() for _ in range(20)]
    try:
        while small.num_connections < 20:
            time.sleep(0.01)
        with small.connect() as connection:
            assert answer_of(connection).startswith(b"HTTP/1.1 503 ")
        assert small.cut("too many") == 1
    finally:
        for each in inside:
            each.close()
        small.stop()


# TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture(params=["asyncio", "uvloop"])
def secret(certificate: tuple[Path, Path], request: pytest.FixtureRequest) -> Iterator[Small]:
    if request.param == "uvloop":
        pytest.importorskip("uvloop")
    server = Small(replace(LIMITS, header_timeout_s=1.5), tls_of(certificate), request.param)
    yield server
    server.stop()


def tls_of(certificate: tuple[Path, Path]) -> ssl.SSLContext:
    context = TlsOptions(*certificate).context()
    assert context is not None
    return context


def trusting(certificate: tuple[Path, Path]) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(certificate[0]))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_tls_connection_is_answered_and_answered_again(secret: Small, certificate: tuple[Path, Path]) -> None:
    with httpx.Client(verify=trusting(certificate), trust_env=False) as client:
        url = f"https://127.0.0.1:{secret.port}/v1/x"
        assert [client.post(url, content=b"x" * 100_000).status_code for _ in range(5)] == [200] * 5
        assert secret.num_connections == 1
    assert secret.bodies == [b"x" * 100_000] * 5
    wait_until(lambda: secret.num_connections == 0)


def test_a_request_in_one_packet_with_the_end_of_the_handshake_is_answered(
    secret: Small, certificate: tuple[Path, Path]
) -> None:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = trusting(certificate).wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
    with secret.connect() as connection:
        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                connection.sendall(outgoing.read())
                incoming.write(connection.recv(65536))
        tls.write(HEAD + b"content-length: 0\r\n\r\n")
        connection.sendall(outgoing.read())  # the handshake's last message, and the request
        answer = b""
        while b"\r\n\r\n" not in answer:
            try:
                piece = tls.read(65536)
                assert piece, "the answer has ended"
                answer += piece
            except ssl.SSLWantReadError:
                piece = connection.recv(65536)
                assert piece, "the connection has ended"
                incoming.write(piece)
    assert answer.startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("said", [b"", b"\x16\x03\x01\x02\x00\x01"], ids=["nothing", "a part of its hello"])
def test_a_handshake_that_does_not_come_is_cut(secret: Small, said: bytes) -> None:
    with secret.connect() as connection:
        connection.sendall(said)
        assert answer_of(connection) == b""
    wait_until(lambda: secret.cut("handshake") == 1)
    wait_until(lambda: secret.num_connections == 0)


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_tls_client_that_says_goodbye_and_does_not_read_is_cut(
    certificate: tuple[Path, Path], loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    if loop == "uvloop":
        pytest.importorskip("uvloop")
    monkeypatch.setattr(limits_tls, "_SEND_BUFFER_BYTES", 4096)
    small = Small(replace(LIMITS, header_timeout_s=20.0), tls_of(certificate), loop)
    try:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", small.port))
            with trusting(certificate).wrap_socket(client, server_hostname="127.0.0.1") as connection:
                connection.sendall(b"GET /some HTTP/1.1\r\nhost: a\r\n\r\n")
                time.sleep(0.3)
                connection.setblocking(False)
                with pytest.raises(ssl.SSLError):  # it has said so, and what comes is not its answer
                    connection.unwrap()
                wait_until(lambda: small.cut("read") == 1)
                wait_until(lambda: small.num_connections == 0)
    finally:
        small.stop()


def test_a_head_that_does_not_come_behind_a_handshake_is_cut(secret: Small, certificate: tuple[Path, Path]) -> None:
    with trusting(certificate).wrap_socket(secret.connect(), server_hostname="127.0.0.1") as connection:
        connection.sendall(HEAD)
        assert answer_of(connection).startswith(b"HTTP/1.1 408 ")
    assert secret.cut("head") == 1
    assert secret.cut("handshake") == 0


def test_who_speaks_no_tls_is_left_and_nobody_else(secret: Small, certificate: tuple[Path, Path]) -> None:
    for said in (b"GET / HTTP/1.1\r\nhost: a\r\n\r\n", b"\x16\x03\x01\x00\x05hello"):
        with secret.connect() as connection:
            connection.sendall(said)
            answer_of(connection)
    with secret.connect():
        pass  # gone before a byte
    wait_until(lambda: secret.num_connections == 0)
    assert secret.num_answered == 0
    with httpx.Client(verify=trusting(certificate), trust_env=False) as client:
        assert client.post(f"https://127.0.0.1:{secret.port}/v1/x").status_code == 200


@contextmanager
def full_of_handshakes(certificate: tuple[Path, Path], loop: Loop) -> Iterator[tuple[Small, list[socket.socket]]]:
    """A server that takes no more connections: as many as it may have are in their handshakes."""
    if loop == "uvloop":
        pytest.importorskip("uvloop")
    small = Small(replace(LIMITS, max_connections=20, header_timeout_s=20.0), tls_of(certificate), loop)
    inside = [small.connect() for _ in range(20)]
    try:
        wait_until(lambda: small.num_connections == 20)
        yield small, inside
    finally:
        for each in inside:
            each.close()
        small.stop()


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_tls_connections_beyond_the_limit_are_told_to_come_back(certificate: tuple[Path, Path], loop: Loop) -> None:
    with full_of_handshakes(certificate, loop) as (small, inside):
        with httpx.Client(verify=trusting(certificate), trust_env=False) as client:
            for _ in range(3):
                answer = client.post(f"https://127.0.0.1:{small.port}/v1/x", content=b"x" * 1000)
                assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert small.cut("too many") == 3
        assert small.num_answered == 0
        inside.pop().close()
        wait_until(lambda: small.num_connections == 19)
        with httpx.Client(verify=trusting(certificate), trust_env=False) as client:
            assert client.post(f"https://127.0.0.1:{small.port}/v1/x").status_code == 200


def test_a_flood_beyond_the_limit_costs_a_few_handshakes_at_a_time(
    certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits_tls, "_REFUSAL_S", 20.0)
    small = Small(replace(LIMITS, max_connections=1, header_timeout_s=20.0), tls_of(certificate))
    inside = [small.connect()]
    try:
        wait_until(lambda: small.num_connections == 1)
        inside += [small.connect() for _ in range(100)]
        wait_until(lambda: small.cut("too many") == 100)
        for each in inside:
            each.settimeout(0.0)
        wait_until(lambda: sum(map(has_ended, inside)) == 100 - limits_tls._MOST_REFUSED)
    finally:
        for each in inside:
            each.close()
        small.stop()


def has_ended(connection: socket.socket) -> bool:
    try:
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_connections_count_before_their_handshake(certificate: tuple[Path, Path], loop: Loop) -> None:
    with full_of_handshakes(certificate, loop) as (small, _):
        with small.connect() as connection:
            assert answer_of(connection) == b""
        assert small.cut("too many") == 1
        began = time.monotonic()
        small.stop()
        assert time.monotonic() - began < 5, "handshakes do not hold up the end"
