"""S12: slow sockets beside normal load, at a real `pagemill serve`.

    python -m tests.trust.slow_sockets PORT COUNT SECONDS

runs so many slow clients, whose timer at the server is so long, until its input ends, and prints what became of them.
They connect and say nothing, send a head or a body byte by byte, or ask for a large answer and do not read it; who is
cut comes again. Normal clients meanwhile ask what they asked without them. Each must be answered, and the same; each
slow one must be cut by its timer; in the end no connection may be left.

The release size compares times as well, without and with in turns. Its timers are those of `--limit header_timeout_s`'s
default: shorter ones make 500 slow sockets a flood of new connections, which is another attack.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from array import array
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from prometheus_client.parser import text_string_to_metric_families

from pagemill.simulator.serve import percentiles
from tests.fixtures.live_server import wait_until
from tests.fixtures.serve_process import ROOT, ServeProcess
from tests.trust.figures import Figure
from tests.trust.serving import ask, port_of, request_bytes, tiny_model

NUM_SLOW: Final = 500
NUM_READERS: Final = 4  # of them, that do not read: what they ask for is work
MOST_LATE_S: Final = 20.0  # behind its timer, on a machine that has other things to do
MOST_TIMES: Final = 1.2  # of the 99th percentile without slow sockets
NUM_CLIENTS: Final = 4
NUM_QUESTIONS: Final = 8  # different ones
KINDS: Final = ("silence", "head", "body")
_BEGINNINGS: Final = {
    "silence": b"",
    "head": b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nx-slow: ",
    "body": b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 5000\r\n\r\n{",
}
_UNREAD: Final[dict[str, Any]] = {
    "prompt": [7] * 800, "max_tokens": 1, "prompt_logprobs": 20,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Setting:
    """timeout_s: of the server's timers. write_timeout_s: of that for answers that are not read, where it is another.
    patience_s: how long a client that does not read may stay, from when the questions have been answered."""

    timeout_s: float = 1.0
    write_timeout_s: float | None = None
    num_slow: int = NUM_SLOW
    patience_s: float = 120.0

    @property
    def options(self) -> list[str]:
        """Of the server."""
        write_s = self.timeout_s if self.write_timeout_s is None else self.write_timeout_s
        limits = {"header_timeout_s": self.timeout_s, "body_timeout_s": self.timeout_s, "write_timeout_s": write_s}
        given = [text for name, value in limits.items() for text in ("--limit", f"{name}={value}")]
        return [
            "--served-model-name", "tiny", "--packed-weights-cache", "off", "--kv-cache-memory-bytes", "4MiB",
            "--max-num-seqs", "16", *given,
        ]  # fmt: skip


CI: Final = Setting()
RELEASE: Final = Setting(timeout_s=10.0)


def question(number: int) -> dict[str, Any]:
    """What a normal client asks."""
    return {"prompt": f"Question {number % NUM_QUESTIONS}?", "max_tokens": 16, "temperature": 0, "ignore_eos": True}


@dataclass(slots=True)
class Slow:
    """Slow clients. Mutated by themselves. timeout_s: until one is cut. ends: by kind and what the server said; kept:
    those that it left open."""

    port: int
    timeout_s: float
    ends: Counter[str] = field(default_factory=Counter)
    kept: list[str] = field(default_factory=list)
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    async def go_on(self, number: int, delay_s: float) -> None:
        """One slow client after another; what does not read stays."""
        if number < NUM_READERS:
            await self._unread()
            return
        await asyncio.sleep(delay_s)
        while not self.ended.is_set():
            await self._drip(KINDS[number % len(KINDS)])

    async def _drip(self, kind: str) -> None:
        """Until the server ends the connection."""
        began_s = time.monotonic()
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            self.kept.append(f"{kind}: no connection")
            return
        end = asyncio.create_task(reader.read())
        with suppress(OSError):
            writer.write(_BEGINNINGS[kind])
            while not end.done() and not self.ended.is_set():
                await asyncio.wait([end], timeout=self.timeout_s / 4)
                writer.write(b"" if kind == "silence" or end.done() else b"a")
        took_s = time.monotonic() - began_s
        if end.done():
            said = b"" if end.exception() is not None else end.result()
            self.ends[f"{kind} cut"] += 1
            if took_s > self.timeout_s + MOST_LATE_S or (said and not said.startswith(b"HTTP/1.1 408 ")):
                self.kept.append(f"{kind}: {said[:80]!r} after {took_s:.1f} s")
        end.cancel()
        writer.close()

    async def _unread(self) -> None:
        """Ask for more than all buffers hold, and read nothing: not even that it has been cut."""
        loop = asyncio.get_running_loop()
        with socket.socket() as client:
            client.setblocking(False)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            await loop.sock_connect(client, ("127.0.0.1", self.port))
            await loop.sock_sendall(client, request_bytes("/v1/completions", _UNREAD))
            await self.ended.wait()


async def run_slow(port: int, number: int, timeout_s: float) -> Slow:
    """So many slow clients until standard input ends. They come one by one, as many a second as are cut later."""
    slow, loop = Slow(port, timeout_s), asyncio.get_running_loop()
    tasks = [asyncio.create_task(slow.go_on(index, index * timeout_s / number)) for index in range(number)]
    print("began", flush=True)
    await loop.run_in_executor(None, sys.stdin.read)
    slow.ended.set()
    await asyncio.wait(tasks)
    for task in tasks:
        task.result()
    return slow


@contextmanager
def slow_clients(port: int, setting: Setting, ends: Counter[str], wrong: list[str]) -> Generator[None]:
    """Slow clients in a process of their own."""
    command = [
        sys.executable,
        "-m",
        "tests.trust.slow_sockets",
        f"{port}",
        f"{setting.num_slow}",
        f"{setting.timeout_s}",
    ]
    variables = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "began\n"
        yield
        met = json.loads(process.communicate("", timeout=60)[0])
        ends.update(met["ends"])
        wrong += met["kept"]
    finally:
        process.kill()
        process.wait()


async def ask_normally(port: int, number: int, expected: list[str] | None) -> tuple[list[str], array[float]]:
    """So many questions, NUM_CLIENTS at a time. Returns what was wrong, and how long each took, in seconds."""
    wrong: list[str] = []
    times, left = array("d"), iter(range(number))

    async def go_on() -> None:
        for each in left:
            began_s = time.monotonic()
            reply = await ask(port, "/v1/completions", question(each))
            times.append(time.monotonic() - began_s)
            text = reply.json["choices"][0]["text"] if reply.status == 200 else f"status {reply.status}"
            if expected is not None and text != expected[each % NUM_QUESTIONS]:
                wrong.append(f"question {each}: {text!r}")

    await asyncio.gather(*(go_on() for _ in range(NUM_CLIENTS)))
    return wrong, times


def _num_sockets(process: ServeProcess) -> int:
    links = Path(f"/proc/{process.process.pid}/fd")
    found = 0
    for link in links.iterdir():
        with suppress(OSError):
            found += os.readlink(link).startswith("socket:")
    return found


def _num_unread_cut(process: ServeProcess) -> int:
    with process.client() as client:
        families = text_string_to_metric_families(client.get("/metrics").text)
    return sum(
        int(each.value)
        for family in families
        for each in family.samples
        if each.name == "pagemill:http_connections_cut_total" and each.labels.get("reason") == "read"
    )


def count(
    model: str, *, num_rounds: int, num_questions: int, setting: Setting = CI, timed: bool = False
) -> list[Figure]:
    """Rounds without and with slow sockets, at one server."""
    wrong: list[str] = []
    ends: Counter[str] = Counter()
    alone, beside = array("d"), array("d")
    with tempfile.TemporaryDirectory() as directory, ServeProcess(Path(directory), model, *setting.options) as process:
        port = port_of(process.url)
        expected = [
            asyncio.run(ask(port, "/v1/completions", question(each))).json["choices"][0]["text"]
            for each in range(NUM_QUESTIONS)
        ]
        num_sockets, num_cut = _num_sockets(process), 0
        for _ in range(num_rounds):
            what, times = asyncio.run(ask_normally(port, num_questions, expected))
            wrong, alone = wrong + what, alone + times
            with slow_clients(port, setting, ends, wrong):
                time.sleep(1.5 * setting.timeout_s)
                what, times = asyncio.run(ask_normally(port, num_questions, expected))
                wanted = num_cut + NUM_READERS
                if not wait_until(lambda: _num_unread_cut(process) >= wanted, setting.patience_s):  # noqa: B023
                    wrong.append("a client that does not read was not cut")
            num_cut = _num_unread_cut(process)
            wrong, beside = wrong + what, beside + times
        if not wait_until(lambda: _num_sockets(process) <= num_sockets, 20):
            wrong.append(f"{_num_sockets(process) - num_sockets} connections are left")
        ends["unread cut"] = num_cut
        wrong += [] if process.end() == 0 else [f"it ended with {process.process.returncode}: {process.told[-300:]}"]
    num_trials, also = len(beside) + ends.total(), dict(ends)
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
        return count(model, num_rounds=4, num_questions=500, setting=RELEASE, timed=True)


def main() -> None:
    """Slow clients."""
    slow = asyncio.run(run_slow(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
    print(json.dumps({"ends": slow.ends, "kept": slow.kept}), flush=True)


if __name__ == "__main__":
    main()
