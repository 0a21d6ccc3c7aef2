"""S12: slow sockets beside normal load, at a real `pagemill serve`.

    python -m tests.trust.slow_sockets PORT COUNT

runs so many slow clients until its input ends, and prints what became of them. They connect and say nothing, send a
head or a body byte by byte, or ask for a large answer and do not read it, and come again as soon as they are cut.
Normal clients meanwhile ask what they asked without them. Each must be answered, and the same; each slow one must be
cut by its timer; in the end no connection may be left. The release size compares times as well, without and with in
turns.
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
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any, Final

from prometheus_client.parser import text_string_to_metric_families

from pagemill.simulator.serve import percentiles
from tests.fixtures.live_server import wait_until
from tests.fixtures.serve_process import ROOT, ServeProcess
from tests.trust.figures import Figure
from tests.trust.serving import ask, port_of, request_bytes, tiny_model

NUM_SLOW: Final = 500
NUM_READERS: Final = 1  # of them, that do not read: what they ask for is work
TIMEOUT_S: Final = 1.0
DRIP_S: Final = 0.25
MOST_OPEN_S: Final = 20.0  # of a connection whose timer is TIMEOUT_S, on a machine that has other things to do
MOST_TIMES: Final = 1.2  # of the 99th percentile without slow sockets
NUM_CLIENTS: Final = 4
NUM_QUESTIONS: Final = 8  # different ones
SETTLE_S: Final = 2 * TIMEOUT_S
OPTIONS: Final = (
    "--served-model-name", "tiny", "--packed-weights-cache", "off", "--kv-cache-memory-bytes", "4MiB",
    "--max-num-seqs", "16", "--limit", f"header_timeout_s={TIMEOUT_S}", "--limit", f"body_timeout_s={TIMEOUT_S}",
    "--limit", f"write_timeout_s={TIMEOUT_S}",
)  # fmt: skip
KINDS: Final = ("silence", "head", "body")
_BEGINNINGS: Final = {
    "silence": b"",
    "head": b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nx-slow: ",
    "body": b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 5000\r\n\r\n{",
}
_UNREAD: Final[dict[str, Any]] = {
    "prompt": [[each] * 1000 for each in range(4)], "max_tokens": 1, "prompt_logprobs": 20,
}  # fmt: skip


def question(number: int) -> dict[str, Any]:
    """What a normal client asks."""
    return {"prompt": f"Question {number % NUM_QUESTIONS}?", "max_tokens": 16, "temperature": 0, "ignore_eos": True}


@dataclass(slots=True)
class Slow:
    """Slow clients. Mutated by themselves. ends: by kind and what the server said; kept: those that it left open."""

    port: int
    ends: Counter[str] = field(default_factory=Counter)
    kept: list[str] = field(default_factory=list)
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    async def go_on(self, number: int) -> None:
        """One slow client after another."""
        kind = KINDS[number % len(KINDS)]
        while not self.ended.is_set():
            if number < NUM_READERS:
                await self._unread()
            else:
                await self._drip(kind)

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
                await asyncio.wait([end], timeout=DRIP_S)
                writer.write(b"" if kind == "silence" or end.done() else b"a")
        took_s = time.monotonic() - began_s
        if end.done():
            said = b"" if end.exception() is not None else end.result()
            self.ends[f"{kind} cut"] += 1
            if took_s > MOST_OPEN_S or (said and not said.startswith(b"HTTP/1.1 408 ")):
                self.kept.append(f"{kind}: {said[:80]!r} after {took_s:.1f} s")
        end.cancel()
        writer.close()

    async def _unread(self) -> None:
        """Ask for more than all buffers hold, and leave after a while without having read."""
        loop = asyncio.get_running_loop()
        with socket.socket() as client, suppress(OSError):
            client.setblocking(False)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            await loop.sock_connect(client, ("127.0.0.1", self.port))
            await loop.sock_sendall(client, request_bytes("/v1/completions", _UNREAD))
            with suppress(TimeoutError):
                await asyncio.wait_for(self.ended.wait(), MOST_OPEN_S)


async def run_slow(port: int, number: int) -> Slow:
    """So many slow clients until standard input ends."""
    slow, loop = Slow(port), asyncio.get_running_loop()
    tasks = [asyncio.create_task(slow.go_on(index)) for index in range(number)]
    print("began", flush=True)
    await loop.run_in_executor(None, sys.stdin.read)
    slow.ended.set()
    await asyncio.wait(tasks)
    return slow


@contextmanager
def slow_clients(port: int, ends: Counter[str], wrong: list[str]) -> Generator[None]:
    """Slow clients in a process of their own."""
    command = [sys.executable, "-m", "tests.trust.slow_sockets", str(port), str(NUM_SLOW)]
    variables = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "began\n"
        yield
        told = json.loads(process.communicate("", timeout=60)[0])
        ends.update(told["ends"])
        wrong += told["kept"]
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


def _has_cut(process: ServeProcess, known: int) -> bool:
    return _num_unread_cut(process) > known


def count(model: str, *, num_rounds: int, num_questions: int, timed: bool = False) -> list[Figure]:
    """Rounds without and with slow sockets, at one server."""
    wrong: list[str] = []
    ends: Counter[str] = Counter()
    alone, beside = array("d"), array("d")
    with tempfile.TemporaryDirectory() as directory, ServeProcess(Path(directory), model, *OPTIONS) as process:
        port = port_of(process.url)
        expected = [
            asyncio.run(ask(port, "/v1/completions", question(each))).json["choices"][0]["text"]
            for each in range(NUM_QUESTIONS)
        ]
        num_sockets, num_cut = _num_sockets(process), 0
        for _ in range(num_rounds):
            what, times = asyncio.run(ask_normally(port, num_questions, expected))
            wrong, alone = wrong + what, alone + times
            with slow_clients(port, ends, wrong):
                time.sleep(SETTLE_S)
                what, times = asyncio.run(ask_normally(port, num_questions, expected))
                if not wait_until(partial(_has_cut, process, num_cut), 2 * MOST_OPEN_S):
                    wrong.append("a client that does not read was not cut")
            num_cut = _num_unread_cut(process)
            wrong, beside = wrong + what, beside + times
        if not wait_until(lambda: _num_sockets(process) <= num_sockets, 20):
            wrong.append(f"{_num_sockets(process) - num_sockets} connections are left")
        ends["unread cut"] = num_cut
        wrong += [] if process.end() == 0 else [f"it ended with {process.process.returncode}: {process.told[-300:]}"]
    found = [
        Figure(
            "S12",
            "wrong answers, or slow sockets left open",
            len(wrong),
            len(beside) + ends.total(),
            "answers and slow sockets",
            dict(ends),
            wrong,
        )
    ]
    if timed:
        most_s = MOST_TIMES * percentiles(alone)["p99"]
        num_late = sum(each > most_s for each in beside)
        broken = max(num_late - ceil(len(beside) / 100), 0)
        found.append(
            Figure(
                "S12",
                "beyond the 1 % that may take 1.2 times the 99th percentile",
                broken,
                len(beside),
                "answers beside slow sockets",
                {"took so long": num_late},
            )
        )
    return found


def shard(_number: int) -> list[Figure]:
    """A part of the release size."""
    with tiny_model() as model:
        return count(model, num_rounds=4, num_questions=500, timed=True)


def main() -> None:
    """Slow clients."""
    slow = asyncio.run(run_slow(int(sys.argv[1]), int(sys.argv[2])))
    print(json.dumps({"ends": slow.ends, "kept": slow.kept}), flush=True)


if __name__ == "__main__":
    main()
