"""S12: slow sockets beside normal load, at a real `pagemill serve`.

    python -m tests.trust.slow_sockets PORT COUNT SECONDS KIND,KIND...

runs so many slow clients of these kinds, whose timer at the server is so long, until its input ends, and prints what
became of them. They connect and say nothing, send a head, a body, chunks of a body or a TLS handshake byte by byte, or
ask for a large answer and do not read it, or for a long stream and read a byte of it now and then; who is cut comes
again. Normal clients meanwhile ask what they asked without them. Each must be answered, and the same; each slow one
must be cut by its timer; in the end no connection may be left.

The release size compares times as well, without and with in turns. Its timers are those of `--limit header_timeout_s`'s
default: shorter ones make 500 slow sockets a flood of new connections, which is another attack.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from array import array
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import IO, Any, Final

import httpx
from prometheus_client.parser import text_string_to_metric_families

from pagemill.simulator.serve import percentiles
from tests.fixtures.certificate import make_certificate
from tests.fixtures.live_server import wait_until
from tests.fixtures.serve_process import ROOT, ServeProcess
from tests.trust.figures import Figure
from tests.trust.serving import ANSWER_S, Reply, ask, port_of, read_reply, request_bytes, tiny_model

NUM_SLOW: Final = 500
ENOUGH: Final = "enough"  # what the slow clients say when as many of each kind have been cut as there are at a time
NUM_READERS: Final = 4  # of them, that do not read: what they ask for is work; as many more read a byte now and then
MOST_LATE_S: Final = 20.0  # behind its timer, on a machine that has other things to do
LATE_S: Final = 1.0  # behind its timer, from where on a cut is counted as late
MOST_TIMES: Final = 1.2  # of the 99th percentile without slow sockets
NUM_CLIENTS: Final = 4
NUM_QUESTIONS: Final = 8  # different ones
KINDS: Final = ("silence", "head", "body", "chunks")
TLS_KINDS: Final = ("no handshake", "handshake")
LATE: Final = "of them cut more than a second late"
_BEGINNINGS: Final = {
    "silence": b"",
    "head": b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nx-slow: ",
    "body": b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 5000\r\n\r\n{",
    "chunks": b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ntransfer-encoding: chunked\r\n\r\n1\r\n{\r\n",
    "no handshake": b"",
    "handshake": b"",
}
_UNREAD: Final[dict[str, Any]] = {
    "prompt": [7] * 800, "max_tokens": 1, "prompt_logprobs": 20,
}  # fmt: skip
_STREAMED: Final[dict[str, Any]] = {
    "prompt": [7] * 8, "max_tokens": 1400, "logprobs": 20, "n": 2, "ignore_eos": True, "stream": True,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Setting:
    """timeout_s: of the server's timers, as its clients know it. server_timeout_s, write_timeout_s: what they are in
    truth, or that for answers that are not read, where they are others.
    patience_s: how long a client that does not read may stay, from when the questions have been answered. kinds: of
    slow clients; TLS_KINDS meet a server that speaks TLS, and none of them reads slowly."""

    timeout_s: float = 1.0
    server_timeout_s: float | None = None
    write_timeout_s: float | None = None
    num_slow: int = NUM_SLOW
    patience_s: float = 120.0
    kinds: tuple[str, ...] = KINDS

    @property
    def is_tls(self) -> bool:
        """Whether the server speaks TLS."""
        return self.kinds == TLS_KINDS

    @property
    def num_readers(self) -> int:
        """Slow clients that do not read, or hardly."""
        return 0 if self.is_tls else 2 * NUM_READERS

    @property
    def each_kind(self) -> int:
        """How many of each other kind there are at a time."""
        return (self.num_slow - self.num_readers) // len(self.kinds)

    @property
    def options(self) -> list[str]:
        """Of the server."""
        timeout_s = self.timeout_s if self.server_timeout_s is None else self.server_timeout_s
        write_s = timeout_s if self.write_timeout_s is None else self.write_timeout_s
        limits = {"header_timeout_s": timeout_s, "body_timeout_s": timeout_s, "write_timeout_s": write_s}
        given = [text for name, value in limits.items() for text in ("--limit", f"{name}={value}")]
        return [
            "--served-model-name", "tiny", "--packed-weights-cache", "off", "--kv-cache-memory-bytes", "4MiB",
            "--max-num-seqs", "16", *given,
        ]  # fmt: skip


CI: Final = Setting()
RELEASE: Final = Setting(timeout_s=10.0)
CI_TLS: Final = Setting(num_slow=60, kinds=TLS_KINDS)
RELEASE_TLS: Final = Setting(timeout_s=10.0, kinds=TLS_KINDS)


def question(number: int) -> dict[str, Any]:
    """What a normal client asks."""
    return {"prompt": f"Question {number % NUM_QUESTIONS}?", "max_tokens": 16, "temperature": 0, "ignore_eos": True}


@dataclass(slots=True)
class Slow:
    """Slow clients. Mutated by themselves. timeout_s: until one is cut. each_kind: cuts of each kind of which it tells
    its caller. ends: cuts by kind, and those that came LATE_S behind their timer; kept: those that it left open, or
    told something else."""

    port: int
    timeout_s: float
    each_kind: int
    kinds: Sequence[str] = KINDS
    ends: Counter[str] = field(default_factory=Counter)
    kept: list[str] = field(default_factory=list)
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    async def go_on(self, number: int, delay_s: float) -> None:
        """One slow client after another; what does not read stays."""
        if number < 2 * NUM_READERS and self.kinds == KINDS:
            await self._read_slowly(_UNREAD if number < NUM_READERS else _STREAMED)
            return
        await asyncio.sleep(delay_s)
        while not self.ended.is_set():
            await self._drip(self.kinds[number % len(self.kinds)])

    async def _drip(self, kind: str) -> None:
        """Until the server ends the connection."""
        began_s = time.monotonic()
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            self.kept.append(f"{kind}: no connection")
            return
        end = asyncio.create_task(reader.read())
        pieces = _pieces(kind)
        with suppress(OSError):
            writer.write(_BEGINNINGS[kind])
            while not end.done() and not self.ended.is_set():
                await asyncio.wait([end], timeout=self.timeout_s / 4)
                writer.write(b"" if end.done() else next(pieces))
        took_s = time.monotonic() - began_s
        if end.done():
            said = b"" if end.exception() is not None else end.result()
            self.ends[f"{kind} cut"] += 1
            if self.ends[f"{kind} cut"] == self.each_kind and min(map(self._num_cut, self.kinds)) >= self.each_kind:
                print(ENOUGH, flush=True)
            self.ends[LATE] += took_s > self.timeout_s + LATE_S
            if took_s > self.timeout_s + MOST_LATE_S or (said and not said.startswith(b"HTTP/1.1 408 ")):
                self.kept.append(f"{kind}: {said[:80]!r} after {took_s:.1f} s")
        end.cancel()
        writer.close()

    def _num_cut(self, kind: str) -> int:
        return self.ends[f"{kind} cut"]

    async def _read_slowly(self, body: dict[str, Any]) -> None:
        """Ask for more than all buffers hold, and read nothing: not even that it has been cut. Of a stream, a byte now
        and then, which makes no room."""
        loop = asyncio.get_running_loop()
        with socket.socket() as client:
            client.setblocking(False)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            await loop.sock_connect(client, ("127.0.0.1", self.port))
            await loop.sock_sendall(client, request_bytes("/v1/completions", body))
            while "stream" in body and not self.ended.is_set():
                with suppress(OSError, TimeoutError):
                    await asyncio.wait_for(loop.sock_recv(client, 1), self.timeout_s / 4)
                await asyncio.sleep(self.timeout_s / 4)
            await self.ended.wait()


def _pieces(kind: str) -> Iterator[bytes]:
    """What a slow client says, bit by bit."""
    if kind in ("silence", "no handshake"):
        return repeat(b"")
    if kind == "chunks":
        return repeat(b"1\r\na\r\n")
    if kind == "handshake":
        return (bytes([each]) for each in _client_hello())
    return repeat(b"a")


def _client_hello() -> bytes:
    """The beginning of a TLS handshake: some hundred bytes."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):
        ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname="localhost").do_handshake()
    return outgoing.read()


async def run_slow(port: int, number: int, timeout_s: float, each_kind: int, kinds: Sequence[str]) -> Slow:
    """So many slow clients until standard input ends. They come one by one, as many a second as are cut later."""
    slow, loop = Slow(port, timeout_s, each_kind, kinds), asyncio.get_running_loop()
    tasks = [asyncio.create_task(slow.go_on(index, index * timeout_s / number)) for index in range(number)]
    print("began", flush=True)
    await loop.run_in_executor(None, sys.stdin.read)
    slow.ended.set()
    await asyncio.wait(tasks)
    for task in tasks:
        task.result()
    return slow


@contextmanager
def slow_clients(port: int, setting: Setting, ends: Counter[str], wrong: list[str]) -> Generator[threading.Event]:
    """Slow clients in a process of their own. Yields what tells that as many of each kind have been cut as there are at
    a time."""
    command = [
        sys.executable,
        "-m",
        "tests.trust.slow_sockets",
        f"{port}",
        f"{setting.num_slow}",
        f"{setting.timeout_s}",
        f"{setting.each_kind}",
        ",".join(setting.kinds),
    ]
    variables = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )  # fmt: skip
    lines, enough = list[str](), threading.Event()

    def read(file: IO[str]) -> None:
        for line in file:
            lines.append(line)
            if line.strip() == ENOUGH:
                enough.set()

    assert process.stdin is not None
    assert process.stdout is not None
    reader = threading.Thread(target=read, args=(process.stdout,), daemon=True)
    try:
        assert process.stdout.readline() == "began\n"
        reader.start()
        yield enough
        process.stdin.close()
        reader.join(60)
        met = json.loads(lines[-1])
        ends.update(met["ends"])
        wrong += met["kept"]
    finally:
        process.kill()
        process.wait()
        if reader.is_alive():
            reader.join(10)
        for stream in (process.stdin, process.stdout):
            with suppress(OSError):
                stream.close()


async def ask_normally(
    port: int, number: int, expected: list[str] | None, tls: ssl.SSLContext | None = None
) -> tuple[list[str], array[float]]:
    """So many questions, NUM_CLIENTS at a time. Returns what was wrong, and how long each took, in seconds."""
    wrong: list[str] = []
    times, left = array("d"), iter(range(number))

    async def go_on() -> None:
        for each in left:
            began_s = time.monotonic()
            reply = await _ask(port, question(each), tls)
            times.append(time.monotonic() - began_s)
            text = reply.json["choices"][0]["text"] if reply.status == 200 else f"status {reply.status}"
            if expected is not None and text != expected[each % NUM_QUESTIONS]:
                wrong.append(f"question {each}: {text!r}")

    await asyncio.gather(*(go_on() for _ in range(NUM_CLIENTS)))
    return wrong, times


async def _ask(port: int, body: dict[str, Any], tls: ssl.SSLContext | None) -> Reply:
    if tls is None:
        return await ask(port, "/v1/completions", body)
    async with asyncio.timeout(ANSWER_S):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=tls)
        writer.write(request_bytes("/v1/completions", body, close=True))
        reply = await read_reply(reader)
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()
        return reply


def _num_sockets(process: ServeProcess) -> int:
    links = Path(f"/proc/{process.process.pid}/fd")
    found = 0
    for link in links.iterdir():
        with suppress(OSError):
            found += os.readlink(link).startswith("socket:")
    return found


def _num_cut(process: ServeProcess, reason: str, tls: ssl.SSLContext | None) -> int:
    with httpx.Client(base_url=process.url, timeout=60, trust_env=False, verify=tls or False) as client:
        families = text_string_to_metric_families(client.get("/metrics").text)
    return sum(
        int(each.value)
        for family in families
        for each in family.samples
        if each.name == "pagemill:http_connections_cut_total" and each.labels.get("reason") == reason
    )


def _tls(place: Path, setting: Setting) -> tuple[ssl.SSLContext | None, list[str]]:
    """For a server of TLS_KINDS: what its clients trust, and its options."""
    if not setting.is_tls:
        return None, []
    certificate, key = make_certificate(place)
    return ssl.create_default_context(cafile=certificate), [
        "--ssl-certfile",
        str(certificate),
        "--ssl-keyfile",
        str(key),
    ]


def count(
    model: str, *, num_rounds: int, num_questions: int, setting: Setting = CI, timed: bool = False
) -> list[Figure]:
    """Rounds without and with slow sockets, at one server."""
    wrong: list[str] = []
    ends: Counter[str] = Counter()
    alone, beside = array("d"), array("d")
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        tls, options = _tls(place, setting)
        process = stack.enter_context(ServeProcess(place, model, *setting.options, *options))
        port = port_of(process.url)
        expected = [
            asyncio.run(_ask(port, question(each), tls)).json["choices"][0]["text"] for each in range(NUM_QUESTIONS)
        ]
        num_sockets, num_cut, reason = _num_sockets(process), 0, "handshake" if setting.is_tls else "read"
        for _ in range(num_rounds):
            what, times = asyncio.run(ask_normally(port, num_questions, expected, tls))
            wrong, alone = wrong + what, alone + times
            with slow_clients(port, setting, ends, wrong) as enough:
                time.sleep(1.5 * setting.timeout_s)
                what, times = asyncio.run(ask_normally(port, num_questions, expected, tls))
                wanted = num_cut + (setting.num_readers or setting.num_slow)
                if not wait_until(lambda: _num_cut(process, reason, tls) >= wanted, setting.patience_s):  # noqa: B023
                    wrong.append(f"a client that does not {reason} was not cut")
                enough.wait(setting.patience_s)
            num_cut = _num_cut(process, reason, tls)
            wrong, beside = wrong + what, beside + times
        if not wait_until(lambda: _num_sockets(process) <= num_sockets, 20):
            wrong.append(f"{_num_sockets(process) - num_sockets} connections are left")
        ends["unread cut"] = 0 if setting.is_tls else num_cut
        least = num_rounds * setting.each_kind
        few = [kind for kind in setting.kinds if ends[f"{kind} cut"] < least]
        wrong += [f"only {ends[f'{kind} cut']} {kind} cut, {least} at least" for kind in few]
        wrong += [] if process.end() == 0 else [f"it ended with {process.process.returncode}: {process.told[-300:]}"]
    num_trials, also = len(beside) + ends.total() - ends[LATE], {LATE: 0, **ends}
    what_is_wrong = "wrong answers, or slow sockets left open"
    found = [Figure("S12", what_is_wrong, len(wrong), num_trials, "answers and slow sockets", also, wrong)]
    return [*found, compared(alone, beside)] if timed else found


def compared(alone: array[float], beside: array[float]) -> Figure:
    """The 99th percentile beside slow sockets as a multiple of the one without."""
    times = percentiles(beside)["p99"] / percentiles(alone)["p99"]
    told = f"p99 {times:.2f} times that without"
    failed = [f"{told}, {MOST_TIMES} allowed"] if times > MOST_TIMES else []
    unit = "parts whose answers were slowed"
    return Figure("S12", unit, len(failed), 1, "parts", {"answers beside slow sockets": len(beside)}, failed, told)


def shard(_number: int) -> list[Figure]:
    """A part of the release size."""
    with tiny_model() as model:
        return [
            *count(model, num_rounds=4, num_questions=500, setting=RELEASE, timed=True),
            *count(model, num_rounds=1, num_questions=500, setting=RELEASE_TLS),
        ]


def main() -> None:
    """Slow clients."""
    port, number, timeout_s, each_kind, kinds = sys.argv[1:]
    slow = asyncio.run(run_slow(int(port), int(number), float(timeout_s), int(each_kind), tuple(kinds.split(","))))
    print(json.dumps({"ends": slow.ends, "kept": slow.kept}), flush=True)


if __name__ == "__main__":
    main()
