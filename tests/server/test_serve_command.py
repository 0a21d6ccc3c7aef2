"""`pagemill serve` as a program: the ready line, signals, exit codes, and what it refuses to start with."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from pagemill.server.access_keys import KeyEntry, Role, make_key, write_keys
from tests.fixtures.program import COMMAND, environment, run_program

READY = re.compile(r"ready: (http://127\.0\.0\.1:\d+)  tiny-llama-f32-0  KV cache [\d,]+ tokens in memory")
LONG = {"prompt": "Go on", "max_tokens": 1200, "ignore_eos": True, "temperature": 0}


@contextmanager
def serving(model: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The program, and its URL once it says that it is ready."""
    command = [*COMMAND, "serve", str(model), "--port", "0", "--kv-cache-memory-bytes", "8MiB", *options]
    command += ["--packed-weights-cache", "off"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        found = READY.match(line)
        assert found is not None, (line, process.stderr.read() if process.stderr and process.poll() else "")
        yield process, found[1]
    finally:
        process.kill()
        process.communicate()


def ask(url: str, **fields: object) -> httpx.Response:
    with httpx.Client(trust_env=False, timeout=60) as client:
        return client.post(f"{url}/v1/completions", json={**LONG, **fields})


def wait_until_running(url: str) -> None:
    deadline = time.monotonic() + 30
    with httpx.Client(trust_env=False, timeout=60) as client:
        while not re.search(r"^pagemill:http_open_requests\{.*\} 2", client.get(f"{url}/metrics").text, re.MULTILINE):
            assert time.monotonic() < deadline, "the request does not come"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_requests_finish_and_ends_with_0(tiny_model: Path, number: signal.Signals) -> None:
    with serving(tiny_model) as (process, url):
        answers: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: answers.append(ask(url, stream=True)))
        thread.start()
        wait_until_running(url)
        process.send_signal(number)
        thread.join()
        rest, errors = process.communicate(timeout=30)
        assert process.returncode == 0, errors
        assert rest == ""
        assert errors == ""
        lines = answers[0].text.split("\n\n")
        assert lines[-2] == "data: [DONE]"
        assert json.loads(lines[-3].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"


def test_the_shutdown_timeout_ends_what_takes_longer(tiny_model: Path) -> None:
    with serving(tiny_model, "--shutdown-timeout", "1", "--max-model-len", "1500") as (process, url):
        broken: list[Exception] = []

        def go_on() -> None:
            try:
                for _ in range(1000):
                    ask(url, max_tokens=1400, n=4, temperature=1)
            except httpx.HTTPError as error:
                broken.append(error)

        threads = [threading.Thread(target=go_on) for _ in range(16)]
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        began = time.monotonic()
        process.terminate()
        _, errors = process.communicate(timeout=30)
        for thread in threads:
            thread.join()
        assert process.returncode == 0, errors
        assert time.monotonic() - began < 20
        assert len(broken) == 16


def test_a_model_that_is_not_there_ends_with_2(tmp_path: Path) -> None:
    done = run_program("serve", str(tmp_path / "nothing.gguf"), "--port", "0")
    assert done.returncode == 2
    assert b"nothing.gguf" in done.stderr
    assert done.stdout == b""


def test_a_port_in_use_is_told(tiny_model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run_program("serve", str(tiny_model), "--port", port)
    assert done.returncode == 2
    assert b"in use" in done.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--port", "70000"], b"65535"),
        (["--host", "256.0.0.1"], b"listen"),
        (["--chat-template", "/nothing/there"], b"chat template"),
        (["--shutdown-timeout", "soon"], b"soon"),
        (["--model", "other"], b"twice"),
        (["--chat-template", os.devnull], b"is empty"),
        (["--served-model-name", ""], b"--served-model-name is ''"),
        (["--served-model-name", "a", "--served-model-name", " "], b"--served-model-name is ' '"),
        (["--allowed-hosts", "a b"], b"allowed_hosts names 'a b'"),
        (["--public-namespaces", "a b,,"], b"public_namespaces is 'a b,,'"),
        (["--max-num-seq", "4"], b"--max-num-seq"),
    ],
)
def test_options_that_are_wrong_are_told(tiny_model: Path, options: list[str], said: bytes) -> None:
    done = run_program("serve", str(tiny_model), *options)
    assert done.returncode == 2
    assert said in done.stderr


@pytest.mark.parametrize(("role", "warned"), [(None, True), ("metrics", True), ("user", False)])
def test_a_file_of_keys_that_lets_nobody_generate_is_told_at_the_start(
    tiny_model: Path, tmp_path: Path, role: Role | None, warned: bool
) -> None:
    path = tmp_path / "keys.toml"
    tenant = "a" if role == "user" else None
    write_keys(path, () if role is None else (KeyEntry("a", *make_key()[1:], role=role, tenant=tenant),))
    with serving(tiny_model, "--keys", str(path)) as (process, _):
        process.terminate()
        _, errors = process.communicate(timeout=30)
    assert ("warning: --keys names a file without a key of role user" in errors) == warned


def test_neither_help_nor_generate_imports_what_only_the_server_needs(tiny_model: Path) -> None:
    program = (
        "import sys; from pagemill.cli.main import main; main(sys.argv[1:]); "
        "print([name for name in ('fastapi', 'pydantic', 'uvicorn', 'llguidance') if name in sys.modules])"
    )
    options = ["--kv-cache-memory-bytes", "8MiB", "--max-tokens", "1", "--packed-weights-cache", "off"]
    for arguments in (["--help"], ["serve", "--help"], ["generate", "x", "--model", str(tiny_model), *options]):
        done = subprocess.run(
            [COMMAND[0], "-c", program, *arguments], capture_output=True, text=True, env=environment(), timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "[]"
