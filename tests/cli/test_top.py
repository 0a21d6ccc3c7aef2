"""`pagemill top` against a real server: once for scripts, live on a terminal, with keys and without, and gone."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from pagemill.base.errors import ConfigError
from pagemill.cli.cache_remote_client import Server, ServerError
from pagemill.cli.main import main
from pagemill.cli.top import Watch, servers
from tests.fixtures.answering import serving
from tests.fixtures.program import COMMAND, environment
from tests.fixtures.serve_process import ServeProcess

OPTIONS = ("--kv-cache-memory-bytes", "4MiB", "--packed-weights-cache", "off")
OTHER_SCREEN, OWN_SCREEN = b"\x1b[?1049h", b"\x1b[?1049l"


@pytest.fixture(scope="module")
def server(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    """Open to this machine, with an admin port."""
    place = tmp_path_factory.mktemp("serve")
    with ServeProcess(place, tiny_model, "--admin-port", "0", *OPTIONS) as started:
        yield started


def ask(server: ServeProcess, num_tokens: int = 8, key: str = "") -> None:
    with server.client(key) as client:
        body = {"prompt": "A mill has a wheel and a stone", "max_tokens": num_tokens, "ignore_eos": True}
        client.post("/v1/completions", json=body).raise_for_status()


def once(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    capsys.readouterr()
    assert main(["top", "--once", "--json", "--interval", "500ms", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


class Clock:
    """Two seconds pass at every look. Mutated by being read."""

    def __init__(self) -> None:
        self.at_s = 0.0

    def __call__(self) -> float:
        self.at_s += 2.0
        return self.at_s


class Terminal:
    """`pagemill top` on a terminal of its own. Mutated by what it prints and by `end`."""

    def __init__(self, *arguments: str, size: Sequence[int] = (24, 80), **variables: str) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
        self._slave = slave
        self._before = termios.tcgetattr(slave)
        variables = {"COLUMNS": str(size[1]), "LINES": str(size[0])} | variables
        self.process = subprocess.Popen(
            [*COMMAND, "top", *arguments], stdin=slave, stdout=slave, stderr=slave, env=environment(**variables)
        )
        self.printed = b""

    def read_until(self, condition: Callable[[str], bool], timeout_s: float = 30.0) -> str:
        """What stands on the screen, as soon as it is so; fails where it never is."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            if condition(self.screen):
                return self.screen
            if select.select([self._master], [], [], 0.05)[0]:
                self.printed += os.read(self._master, 65536)
        raise AssertionError(f"never seen: {self.screen}")

    @property
    def screen(self) -> str:
        """The last picture, without its colours."""
        last = self.printed.split(b"\x1b[H")[-1].decode(errors="replace")
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", last).replace("\r", "")

    def type(self, keys: bytes) -> None:
        os.write(self._master, keys)

    def end(self) -> int:
        """The exit code, all that was printed until then read."""
        end = time.monotonic() + 20
        while self.process.poll() is None and time.monotonic() < end:
            if select.select([self._master], [], [], 0.05)[0]:
                self.printed += os.read(self._master, 65536)
        while select.select([self._master], [], [], 0.05)[0]:
            self.printed += os.read(self._master, 65536)
        return self.process.wait(1)

    @property
    def is_restored(self) -> bool:
        """Whether the terminal is as it was, on its own screen."""
        same = termios.tcgetattr(self._slave) == self._before
        return same and self.printed.count(OTHER_SCREEN) == self.printed.count(OWN_SCREEN)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._master)
        os.close(self._slave)


def test_once_counts_what_the_server_did(capsys: pytest.CaptureFixture[str], server: ServeProcess) -> None:
    before = once(capsys, "--url", server.url)
    for _ in range(2):
        ask(server)
    found = once(capsys, "--url", server.url)
    assert found["status"] == "ready"
    assert found["tokens"]["generated"] - before["tokens"]["generated"] == 16
    assert found["requests"]["running"] == 0
    assert found["hits"]["hit_tokens"] > before["hits"]["hit_tokens"]
    assert found["latency_s"]["ttft"]["since_start"]["count"] >= 2
    assert found["kv"]["blocks"]["cached"] > 0
    assert len(found["curve"]) == 7
    assert found["tenants"] is None
    assert found["window_s"] >= 0.5


def test_rates_are_tokens_between_two_looks(server: ServeProcess) -> None:
    watch = Watch(Server(server.url, None), None, now=Clock())
    assert watch.look()["tokens"]["generated_per_s"] is None
    ask(server, 8)
    assert watch.look()["tokens"]["generated_per_s"] == 4.0
    for _ in range(6):
        found = watch.look()
    assert found["tokens"]["generated_per_s"] == 0.0, "what is older than the window is not counted"
    assert found["window_s"] == 10.0


def test_the_admin_port_alone_tells_tenants_too(capsys: pytest.CaptureFixture[str], server: ServeProcess) -> None:
    ask(server)
    found = once(capsys, "--admin-url", server.admin_url, "--admin-key", server.admin_key)
    assert found["url"] == server.admin_url
    [tenant] = found["tenants"]
    assert tenant["tenant"] == "default"
    assert tenant["kept"] == tenant["cached"] == 16 * found["kv"]["blocks"]["cached"]


def test_without_a_terminal_one_picture_is_printed(capsys: pytest.CaptureFixture[str], server: ServeProcess) -> None:
    assert main(["top", "--url", server.url, "--interval", "500ms"]) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    for text in ("0 running", "tokens/s", "first token", "KV cache", "hits", "misses", "with a cache of"):
        assert text in printed


def test_live_until_q_and_the_terminal_is_as_before(server: ServeProcess) -> None:
    with Terminal("--url", server.url, "--interval", "500ms") as terminal:
        first = terminal.read_until(lambda screen: "q quits" in screen)
        ask(server, 40)
        terminal.read_until(lambda screen: re.search(r"out [1-9]", screen) is not None)
        terminal.type(b"\x1b[Ax")
        time.sleep(0.3)
        assert terminal.process.poll() is None, "other keys do nothing"
        terminal.type(b"q")
        assert terminal.end() == 0
        assert terminal.is_restored
    lines = first.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80


def test_a_signal_leaves_the_terminal_as_before(server: ServeProcess) -> None:
    with Terminal("--url", server.url, NO_COLOR="1", PYTHONIOENCODING="ascii") as terminal:
        terminal.read_until(lambda screen: "q quits" in screen)
        assert re.search(rb"\x1b\[[0-9;]*3[0-9]", terminal.printed) is None, "colours in spite of NO_COLOR"
        terminal.process.send_signal(signal.SIGTERM)
        assert terminal.end() == 128 + signal.SIGTERM
        assert terminal.is_restored


def test_a_dumb_terminal_gets_one_picture(server: ServeProcess) -> None:
    with Terminal("--url", server.url, "--interval", "500ms", TERM="dumb") as terminal:
        assert terminal.end() == 0
        assert OTHER_SCREEN not in terminal.printed
        assert b"KV cache" in terminal.printed


def test_keys_decide_who_may_watch_and_a_server_that_goes_away_is_told(
    tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = tmp_path / "keys.toml"
    made = {}
    for name, role in (("alice", "user"), ("prometheus", "metrics"), ("root", "admin")):
        assert main(["keys", "add", name, "--file", str(keys), "--role", role, "--json"]) == 0
        made[name] = json.loads(capsys.readouterr().out)["key"]
    with ServeProcess(tmp_path, tiny_model, "--keys", str(keys), "--admin-port", "0", *OPTIONS) as server:
        for given in ((), ("--key", made["alice"]), ("--key", "wrong")):
            assert main(["top", "--once", "--url", server.url, *given]) == 2
            assert "give a key of role metrics with --key or PAGEMILL_METRICS_KEY" in capsys.readouterr().err
        ask(server, key=made["alice"])
        admin = ("--admin-url", server.admin_url, "--admin-key")
        found = once(capsys, "--url", server.url, "--key", made["prometheus"], *admin, made["root"])
        assert found["url"] == server.url
        assert "alice" in [each["tenant"] for each in found["tenants"]]
        assert main(["top", "--once", *admin, made["prometheus"]]) == 2
        assert "give the operator's key with --admin-key or PAGEMILL_ADMIN_KEY" in capsys.readouterr().err
        with Terminal(*admin, made["root"], "--interval", "500ms") as terminal:
            terminal.read_until(lambda screen: "alice" in screen)
            server.process.kill()
            screen = terminal.read_until(lambda screen: "no answer" in screen and "alice" in screen)
            assert "old: no server answers at" in screen
            assert len(screen.splitlines()) <= 24
            terminal.type(b"q")
            assert terminal.end() == 0


def test_a_server_that_loads_or_ends_is_named_so() -> None:
    answers = {
        "/health": (503, b'{"status": "loading"}', {}),
        "/metrics": (200, b'vllm:num_requests_running{engine="0",model_name="m"} 0.0\n', {}),
        "/admin/tenants": (500, b"", {}),
    }
    with serving(lambda path, authorization: answers[path]) as url:
        watch = Watch(Server(url, None), Server(url, None))
        found = watch.look()
        assert (found["status"], found["tenants"]) == ("loading", None)
        answers["/health"] = (200, b'{"status": "ready", "draining": true}', {})
        answers["/admin/tenants"] = (409, b"", {})
        found = watch.look()
        assert (found["status"], found["tenants"]) == ("draining", None)
        answers["/admin/tenants"] = (200, b'{"tenants": [{}], "block_tokens": 16}', {})
        with pytest.raises(ServerError, match="form of another version"):
            watch.look()
        answers["/health"] = (200, b"", {})
        answers["/metrics"] = (200, b"up 1\n", {})
        with pytest.raises(ServerError, match="tells nothing of a model"):
            watch.look()
        answers["/metrics"] = (404, b"", {})
        with pytest.raises(ServerError, match="is not there"):
            watch.look()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--interval", "0.1"], "--interval is 0.1"),
        (["--interval", "2h"], "--interval is 2h"),
        (["--interval", "often"], "'often' is not a time"),
        (["--url", "ftp://h"], "--url ftp://h"),
        (["--admin-url", "http://"], "--admin-url http://"),
        (["--admin-key", "k"], "--admin-key without --admin-url"),
        (["--url", "http://127.0.0.1:1"], "no server answers"),
    ],
)
def test_wrong_options_are_refused(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(["top", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_environment_names_the_server_and_its_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []

    def answer(path: str, authorization: str | None) -> tuple[int, bytes, dict[str, str]]:
        seen.append(authorization)
        return 200, b"{}", {}

    monkeypatch.setenv("PAGEMILL_METRICS_KEY", "metrics-key")
    monkeypatch.setenv("PAGEMILL_ADMIN_KEY", "admin-key")
    with serving(answer) as url:
        public, admin = servers(url, None, None, None)
        public.health()
        assert admin is None
        monkeypatch.setenv("PAGEMILL_ADMIN_URL", url)
        public, admin = servers(None, None, None, None)
        assert public is admin
        public.health()
        public, admin = servers(url, None, None, None)
        assert admin is not None
        public.health()
        admin.health()
    assert seen == ["Bearer metrics-key", "Bearer admin-key", "Bearer metrics-key", "Bearer admin-key"]
    with pytest.raises(ConfigError, match="letters that no key has"):
        servers(None, "two words", None, None)
