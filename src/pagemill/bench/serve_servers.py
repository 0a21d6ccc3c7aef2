"""Servers that `pagemill bench serve` compares: each a process of its own on a free port of this machine.

Owns how they are started, how their address is learned, what CPU time they took, and how they are ended.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_ENDING_S = 15.0
_POLL_S = 0.05
_TAIL_BYTES = 4000
_QUOTED = 300
_LISTENING = re.compile(rb"(?:^ready: |Uvicorn running on )https?://([0-9.]+):(\d+)", re.MULTILINE)


class ServerError(Exception):
    """A server that did not start, or that has ended; the message tells what it said last."""


@dataclass(frozen=True, slots=True, eq=False)
class Contender:
    """A server in one setting. command: prints its address once it answers. python_path: of its environment; None:
    none. fields: of every request's body. at_once: sequences that it runs together, None where it has no such
    setting. target_itl_ms: time between tokens that it is told to keep to, None for none. note: what must be known of
    it."""

    engine: str
    mode: str
    command: tuple[str, ...]
    fields: Mapping[str, Any] = field(default_factory=dict)
    python_path: str | None = None
    at_once: int | None = None
    target_itl_ms: int | None = None
    note: str = ""

    @property
    def name(self) -> str:
        """As tables and messages show it."""
        return f"{self.engine} {self.mode}"


class Server:
    """A contender's process. Mutated by `wait` and `close`. Use as a context manager: leaving it ends the process.

    host, port: where it answers, known after `wait`. Raises ServerError where the command cannot be started.
    """

    def __init__(self, contender: Contender) -> None:
        self.contender = contender
        self.host, self.port = "", 0
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `close`)
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # a start is to be a second one's, without the compiler
        environment["PYTHONUNBUFFERED"] = "1"
        if contender.python_path is not None:
            environment["PYTHONPATH"] = contender.python_path
        try:
            self._process = subprocess.Popen(
                list(contender.command),
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            self._log.close()
            raise ServerError(f"cannot start {contender.command[0]}: {error.strerror}") from None

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def wait(self, timeout_s: float, interrupted: Callable[[], bool] = lambda: False) -> None:
        """Wait until it answers. Raises ServerError where it ends before, or takes more than timeout_s."""
        end_s = time.monotonic() + timeout_s
        while not interrupted():
            match = _LISTENING.search(self._said())
            if match is not None:
                self.host, self.port = match[1].decode(), int(match[2])
                return
            self.check()
            if time.monotonic() > end_s:
                raise ServerError(f"was not ready within {timeout_s:g} s{self._last_words()}")
            time.sleep(_POLL_S)
        raise ServerError("was interrupted before it was ready")

    def check(self) -> None:
        """Raise ServerError where the process has ended."""
        code = self._process.poll()
        if code is not None:
            how = f"code {code}" if code >= 0 else signal.Signals(-code).name
            raise ServerError(f"ended with {how}{self._last_words()}")

    def cpu_s(self) -> float:
        """CPU seconds of the process so far, 0 where the machine does not tell (proc(5), `stat`)."""
        try:
            text = Path(f"/proc/{self._process.pid}/stat").read_text()
            return sum(map(int, text.rpartition(")")[2].split()[11:13])) / os.sysconf("SC_CLK_TCK")
        except (OSError, ValueError, IndexError):
            return 0.0

    def close(self) -> None:
        """End the process, in kindness first; a second call does nothing."""
        if self._log.closed:
            return
        try:
            if self._process.poll() is None:
                self._process.terminate()
                try:
                    self._process.wait(_ENDING_S)
                except subprocess.TimeoutExpired:
                    self._process.kill()
            self._process.wait()
        finally:
            self._log.close()

    def _said(self) -> bytes:
        return os.pread(self._log.fileno(), 1 << 20, 0)

    def _last_words(self) -> str:
        size = os.fstat(self._log.fileno()).st_size
        text = os.pread(self._log.fileno(), _TAIL_BYTES, max(0, size - _TAIL_BYTES)).decode(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return f": {lines[-1][:_QUOTED]}" if lines else ""
