"""The part of `pagemill demo` that serves: `pagemill serve` in a process of its own, asked the same thing twice."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pagemill.base.config import OPTIONS
from pagemill.base.errors import PagemillError

_READY, _STOP_S, _ANSWER_S = "ready: ", 20.0, 300.0
# Straight to this machine, whatever proxy the environment names.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True, slots=True)
class Asked:
    """One answer of the server. cache: `usage.prompt_tokens_details.cache`, the receipt as clients see it."""

    text: str
    seconds: float
    num_prompt_tokens: int
    num_cached_tokens: int
    cache: dict[str, Any] | None


@contextmanager
def served(engine: dict[str, Any]) -> Generator[tuple[str, str]]:
    """(URL, ready line) of a server on a free port of loopback, ended on the way out. engine: options, as commands
    take them. Raises PagemillError where it ends before it is ready."""
    command = [sys.executable, "-m", "pagemill", "serve", "--port", "0"]
    command += ["--config", str(engine["file"])] if engine["file"] else []
    for name, value in engine["arguments"].items():
        command += [OPTIONS[name].flag, str(value)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = next((each for each in process.stdout if each.startswith(_READY)), "").strip()
            if not line:
                raise PagemillError("the server ended before it was ready; `pagemill serve` says why")
            yield line.removeprefix(_READY).split()[0], line
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()


def ask(url: str, content: str, max_tokens: int) -> Asked:
    """Ask /v1/chat/completions, greedily."""
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": max_tokens, "temperature": 0}
    with _OPENER.open(f"{url}/v1/models", timeout=_ANSWER_S) as response:
        body["model"] = json.load(response)["data"][0]["id"]
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    began = time.perf_counter()
    with _OPENER.open(request, timeout=_ANSWER_S) as response:
        answer = json.load(response)
    seconds = time.perf_counter() - began
    usage = answer["usage"]
    details = usage["prompt_tokens_details"]
    return Asked(
        answer["choices"][0]["message"]["content"],
        seconds,
        usage["prompt_tokens"],
        details["cached_tokens"],
        details.get("cache"),
    )
