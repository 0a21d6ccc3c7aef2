"""S15: a server listens on loopback, with one socket and one more for its admin; an address that others can reach is
refused without keys, that of the admin without TLS, unless `--insecure` says otherwise. A name is what it stands for.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from pagemill.base.errors import ConfigError
from pagemill.server.access_listen import check_address, check_admin_address
from tests.fixtures.certificate import make_certificate
from tests.fixtures.live_server import wait_until
from tests.fixtures.serve_process import ROOT, ServeProcess
from tests.fixtures.tiny import tiny_llama
from tests.trust.figures import Figure

LOOPBACK = ("0100007F", "00000000000000000000000001000000")  # as /proc writes 127.0.0.1 and ::1
KEY = "a-key-that-is-long-enough"


# Names, and the addresses that a resolver would give for them.
NAMES = {
    "everybody.test": ("0.0.0.0",),
    "half.test": ("127.0.0.1", "192.168.1.4"),
    "half6.test": ("::1", "fe80::1"),
    "outside.test": ("8.8.8.8", "2001:4860:4860::8888"),
    "mill.test": ("127.0.0.1",),
    "both.test": ("127.0.0.1", "::1"),
}
KEYS, TLS = "pagemill keys add", "--ssl-certfile"  # what a refusal tells to give


@dataclass(frozen=True, slots=True)
class Setting:
    """How a server is started. num_sockets: that it may have; 0 where it must not start. num_outside: of them, that
    others are to reach. told: a word of the refusal. has_tls: with a certificate."""

    arguments: tuple[str, ...]
    num_sockets: int
    num_outside: int = 0
    told: str = KEYS
    has_tls: bool = False


ADMIN = ("--admin-port", "0")
SETTINGS = (
    Setting((), 1),
    Setting(ADMIN, 2),
    Setting(("--host", "::1", *ADMIN), 2),
    Setting(("--host", "localhost", "--api-key", KEY), 1),
    Setting(("--host", "0.0.0.0", "--api-key", KEY, *ADMIN), 2, 1),
    Setting(("--host", "0.0.0.0", "--insecure"), 1, 1),
    Setting((*ADMIN, "--admin-host", "0.0.0.0", "--insecure"), 2, 1),
    Setting((*ADMIN, "--admin-host", "0.0.0.0", "--admin-key", KEY), 2, 1, has_tls=True),
    Setting(("--host", "0.0.0.0"), 0),
    Setting(("--host", "::"), 0),
    Setting(("--host", ""), 0),
    Setting(("--host", "half.test"), 0),
    Setting(("--host", "0.0.0.0", *ADMIN), 0),
    Setting(("--host", "0.0.0.0", *ADMIN, "--admin-key", KEY), 0),
    Setting((*ADMIN, "--admin-host", "0.0.0.0", "--admin-key", KEY), 0, told=TLS),
    Setting((*ADMIN, "--admin-host", "everybody.test", "--api-key", KEY), 0, told=TLS),
)  # fmt: skip
REFUSED = (
    "0.0.0.0",
    "::",
    "",
    "[::]",
    "0",
    "192.168.1.4",
    "10.0.0.1",
    "169.254.1.1",
    "fe80::1",
    "::ffff:8.8.8.8",
    "8.8.8.8",
    "everybody.test",
    "half.test",
    "half6.test",
    "outside.test",
)
ALLOWED = ("127.0.0.1", "127.8.9.10", "::1", "[::1]", "localhost", "mill.test", "both.test")
# Part of a process's `sitecustomize`: what `resolver` does here.
_RESOLVER = """
import socket
names, resolve = NAMES, socket.getaddrinfo
def getaddrinfo(host, *rest, **named):
    return [each for one in names.get(host, (host,)) for each in resolve(one, *rest, **named)]
socket.getaddrinfo = getaddrinfo
"""


def has_ipv6() -> bool:
    """True where ::1 can be listened on."""
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


def resolver() -> Any:
    """A patch under which names stand for what NAMES says."""
    resolve = socket.getaddrinfo

    def getaddrinfo(host: str, *rest: Any, **named: Any) -> list[Any]:
        return [each for one in NAMES.get(host, (host,)) for each in resolve(one, *rest, **named)]

    return patch("pagemill.server.access_listen.socket.getaddrinfo", getaddrinfo)


def wrong_with(setting: Setting, place: Path, model: str, planted: str = "") -> str:
    """What is wrong with where a server of one setting listens; "" for nothing. planted: what its process runs before
    anything else."""
    arguments = [model, "--kv-cache-memory-bytes", "8MiB", "--packed-weights-cache", "off", *setting.arguments]
    named = " ".join(setting.arguments) or "no option"
    place.mkdir()
    if setting.has_tls:
        certificate, key = make_certificate(place)
        arguments += ["--ssl-certfile", str(certificate), "--ssl-keyfile", str(key)]
        named += " with TLS"
    if not setting.num_sockets:
        (place / "sitecustomize.py").write_text(_RESOLVER.replace("NAMES", repr(NAMES)) + planted)
        return _refused(arguments, place, named, setting.told)
    with ServeProcess(place, *arguments) as process:
        found = process.listening()
    if len(found) != setting.num_sockets:
        return f"{named}: listens on {found}"
    outside = [each for each in found if each.split(":")[0] not in LOOPBACK]
    return f"{named}: listens on {found}" if len(outside) != setting.num_outside else ""


def _refused(arguments: Sequence[str], place: Path, named: str, word: str) -> str:
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PAGEMILL_")}
    variables |= {"PYTHONPATH": f"{place}:{ROOT / 'src'}", "PAGEMILL_THREADS": "1"}
    command = [sys.executable, "-m", "pagemill", "serve", "--port", "0", *arguments]
    out, err = place / "stdout.txt", place / "stderr.txt"
    with out.open("wb") as told_out, err.open("wb") as told_err:
        process = subprocess.Popen(command, stdout=told_out, stderr=told_err, cwd=place, env=variables)
    try:
        wait_until(lambda: process.poll() is not None or "ready" in out.read_text(), 90)
        if process.poll() is None:
            return f"{named}: was not refused"
    finally:
        process.kill()
        process.wait()
    told = err.read_text()
    if process.returncode != 2 or word not in told or "Traceback" in told or "ready" in out.read_text():
        return f"{named}: ended with {process.returncode}: {told[-200:]}"
    return ""


def addresses() -> list[str]:
    """What is wrong with the decision on each address, told by `check_address` and `check_admin_address` themselves."""
    checks: dict[str, Callable[[str], bool]] = {
        "": lambda host: check_address(host, has_keys=False),
        " for the admin": lambda host: check_admin_address(host, has_tls=False),
    }
    wrong = []
    with resolver():
        for host in (*REFUSED, *ALLOWED):
            for what, check in checks.items():
                try:
                    loopback = check(host)
                except ConfigError:
                    loopback = None
                if loopback is not (True if host in ALLOWED else None):
                    wrong.append(f"{host!r}{what} is {'refused' if loopback is None else 'let in'}")
    return wrong


def count() -> list[Figure]:
    """Every setting in a process of its own, and every address."""
    settings = [each for each in SETTINGS if has_ipv6() or "::1" not in each.arguments]
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        model = str(tiny_llama(place))
        with ThreadPoolExecutor(2) as pool:
            found = pool.map(lambda each: wrong_with(each[1], place / str(each[0]), model), enumerate(settings))
            wrong = [each for each in found if each]
    also = {"of them refused": sum(not each.num_sockets for each in settings)}
    asked, decided = 2 * (len(REFUSED) + len(ALLOWED)), addresses()
    return [
        Figure("S15", "servers that listen where they must not", len(wrong), len(settings), "servers", also, wrong),
        Figure("S15", "addresses decided wrongly", len(decided), asked, "addresses without a key or TLS", {}, decided),
    ]
