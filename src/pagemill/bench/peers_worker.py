"""A worker of `pagemill bench peers`: another process that holds an engine and answers one request at a time.

Owns starting, talking to, timing out and ending the process. What is said is `peers/worker_protocol.py`'s.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ENDING_S = 10.0
_TAIL_BYTES = 2000
_MAX_ANSWER_BYTES = 1 << 20
_QUOTED = 200
# Compiled modules are kept, as in any environment that was installed: a second start compiles nothing.
_NOT_HANDED_DOWN = ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE")


class WorkerError(Exception):
    """A worker crashed, hung, answered nonsense or said that it failed. signal: that ended it, else None."""

    def __init__(self, message: str, ended_by: int | None = None) -> None:
        super().__init__(message)
        self.ended_by = ended_by


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a worker says once its model is loaded. num_alternatives: settings to choose the faster of."""

    seconds: float
    versions: dict[str, str]
    num_alternatives: int


class Worker:
    """One process. Mutated by every request. timeout_s: for each answer. python_path: its PYTHONPATH.

    Use as a context manager: leaving it ends the process, in kindness first. Raises WorkerError where the command
    cannot be started.
    """

    def __init__(self, command: Sequence[str], *, timeout_s: float, python_path: str | None = None) -> None:
        self._timeout_s = timeout_s
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `close`)
        self._received = b""
        environment = {name: value for name, value in os.environ.items() if name not in _NOT_HANDED_DOWN}
        environment["PYTHONIOENCODING"] = "utf-8"
        if python_path is not None:
            environment["PYTHONPATH"] = python_path
        try:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            self._errors.close()
            raise WorkerError(f"cannot start {command[0]}: {error.strerror}") from None
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def load(self, model: str, num_threads: int, options: dict[str, Any]) -> Loaded:
        """Have the model loaded. Raises WorkerError."""
        answer = self._ask({"do": "load", "model": model, "threads": num_threads, "options": options})
        try:
            versions = {str(name): str(value) for name, value in answer["versions"].items()}
            return Loaded(float(answer["seconds"]), versions, max(1, int(answer["alternatives"])))
        except (KeyError, TypeError, ValueError, AttributeError):
            raise WorkerError(f"answered a load with {str(answer)[:_QUOTED]}") from None

    def generate(
        self, prompts: list[list[int]], num_tokens: int, alternative: int = 0, *, cpu_time: bool = False
    ) -> float:
        """Seconds that answers of exactly `num_tokens` to all prompts at once take. cpu_time: of the worker's CPU time,
        all its threads together. Raises WorkerError."""
        answer = self._ask({"do": "generate", "prompts": prompts, "tokens": num_tokens, "alternative": alternative})
        try:
            seconds, counts = float(answer["cpu_seconds" if cpu_time else "seconds"]), list(answer["tokens"])
        except (KeyError, TypeError, ValueError):
            raise WorkerError(f"answered a request with {str(answer)[:_QUOTED]}") from None
        if counts != [num_tokens] * len(prompts):
            raise WorkerError(f"was asked for {num_tokens} tokens of {len(prompts)} streams and gave {counts[:40]}")
        if not 0.0 < seconds < self._timeout_s:
            raise WorkerError(f"says that a request took {seconds} s")
        return seconds

    def cpu_s(self) -> float:
        """CPU seconds of the process so far, 0 where the machine does not tell (proc(5), `stat`)."""
        try:
            text = Path(f"/proc/{self._process.pid}/stat").read_text()
            return sum(map(int, text.rpartition(")")[2].split()[11:15])) / os.sysconf("SC_CLK_TCK")
        except (OSError, ValueError, IndexError):
            return 0.0

    def close(self) -> None:
        """End the process; a second call does nothing."""
        if self._errors.closed:
            return
        try:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            with suppress(OSError):
                self._process.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_ENDING_S)
            self._kill()
            self._process.stdout.close()
        finally:
            self._errors.close()

    def _kill(self) -> None:
        """End what is left of the process's own session, and collect it."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        end_s = time.monotonic() + self._timeout_s
        self._write(json.dumps(request).encode() + b"\n", request["do"], end_s)
        text = self._read_line(request["do"], end_s)
        try:
            answer = json.loads(text)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise WorkerError(f"answered no JSON object: {text[:_QUOTED].decode(errors='replace')!r}")
        if "error" in answer:
            raise WorkerError(str(answer["error"])[:_TAIL_BYTES])
        return answer

    def _write(self, data: bytes, asked: str, end_s: float) -> None:
        assert self._process.stdin is not None
        descriptor = self._process.stdin.fileno()
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, selectors.EVENT_WRITE)
            while data:
                self._wait(selector, asked, end_s)
                try:
                    data = data[os.write(descriptor, data) :]
                except BlockingIOError:
                    continue
                except OSError:
                    raise self._ended() from None

    def _wait(self, selector: selectors.BaseSelector, asked: str, end_s: float) -> None:
        left_s = end_s - time.monotonic()
        if left_s <= 0 or not selector.select(left_s):
            self._kill()
            raise WorkerError(f"gave no answer to {asked!r} within {self._timeout_s:g} s and was ended")

    def _read_line(self, asked: str, end_s: float) -> bytes:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._received:
                self._wait(selector, asked, end_s)
                chunk = os.read(self._process.stdout.fileno(), 1 << 16)
                if not chunk:
                    raise self._ended()
                self._received += chunk
                if len(self._received) > _MAX_ANSWER_BYTES:
                    self._kill()
                    raise WorkerError(f"answered {asked!r} with more than {_MAX_ANSWER_BYTES:,} bytes and was ended")
        line, _, self._received = self._received.partition(b"\n")
        return line

    def _ended(self) -> WorkerError:
        try:
            code = self._process.wait(_ENDING_S)
        except subprocess.TimeoutExpired:
            self._kill()
            return WorkerError("closed its answers and was ended")
        last = self._last_words()
        if code >= 0:
            return WorkerError(f"ended with code {code}{last}")
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        why = " (an instruction that this machine does not run)" if -code == signal.SIGILL else ""
        return WorkerError(f"was ended by {name}{why}{last}", -code)

    def _last_words(self) -> str:
        size = self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, size - _TAIL_BYTES))
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f": {lines[-1].strip()[:_QUOTED]}" if lines else ""
