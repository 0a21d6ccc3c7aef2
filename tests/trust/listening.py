"""S15: a server listens on loopback, with one socket and one more for its admin; an address that others can reach is
refused without keys, unless `--insecure` says otherwise.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pagemill.base.errors import ConfigError
from pagemill.server.access_listen import check_address
from tests.fixtures.serve_process import ROOT, ServeProcess
from tests.fixtures.tiny import tiny_llama
from tests.trust.figures import Figure

LOOPBACK = ("0100007F", "00000000000000000000000001000000")  # as /proc writes 127.0.0.1 and ::1
KEY = "a-key-that-is-long-enough"


@dataclass(frozen=True, slots=True)
class Setting:
    """How a server is started. num_sockets: that it may have; 0 where it must not start. everywhere: the first of them
    is to be reached by others."""

    arguments: tuple[str, ...]
    num_sockets: int
    everywhere: bool = False


SETTINGS = (
    Setting((), 1),
    Setting(("--admin-port", "0"), 2),
    Setting(("--host", "::1", "--admin-port", "0"), 2),
    Setting(("--host", "localhost", "--api-key", KEY), 1),
    Setting(("--host", "0.0.0.0", "--api-key", KEY, "--admin-port", "0"), 2, everywhere=True),
    Setting(("--host", "0.0.0.0", "--insecure"), 1, everywhere=True),
    Setting(("--host", "0.0.0.0"), 0),
    Setting(("--host", "::"), 0),
    Setting(("--host", ""), 0),
    Setting(("--host", "0.0.0.0", "--admin-port", "0"), 0),
    Setting(("--host", "0.0.0.0", "--admin-port", "0", "--admin-key", KEY), 0),
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
)
ALLOWED = ("127.0.0.1", "127.8.9.10", "::1", "[::1]", "localhost")


def has_ipv6() -> bool:
    """True where ::1 can be listened on."""
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


def wrong_with(setting: Setting, place: Path, model: str) -> str:
    """What is wrong with where a server of one setting listens; "" for nothing."""
    arguments = [model, "--kv-cache-memory-bytes", "8MiB", "--packed-weights-cache", "off", *setting.arguments]
    named = " ".join(setting.arguments) or "no option"
    place.mkdir()
    if not setting.num_sockets:
        return _refused(arguments, place, named)
    with ServeProcess(place, *arguments) as process:
        found = process.listening()
    if len(found) != setting.num_sockets:
        return f"{named}: listens on {found}"
    outside = [each for each in found if each.split(":")[0] not in LOOPBACK]
    return f"{named}: listens on {found}" if len(outside) != setting.everywhere else ""


def _refused(arguments: Sequence[str], place: Path, named: str) -> str:
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PAGEMILL_")}
    variables |= {"PYTHONPATH": str(ROOT / "src"), "PAGEMILL_THREADS": "1"}
    command = [sys.executable, "-m", "pagemill", "serve", "--port", "0", *arguments]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=90, cwd=place, env=variables)
    except subprocess.TimeoutExpired:
        return f"{named}: was not refused"
    told = ended.stderr
    if ended.returncode != 2 or "pagemill keys add" not in told or "Traceback" in told or "ready" in ended.stdout:
        return f"{named}: ended with {ended.returncode}: {told[-200:]}"
    return ""


def addresses() -> list[str]:
    """What is wrong with the decision on each address, told by `check_address` itself."""
    wrong = []
    for host in (*REFUSED, *ALLOWED):
        try:
            loopback = check_address(host, has_keys=False)
        except ConfigError:
            loopback = False
            if host in ALLOWED:
                wrong.append(f"{host!r} is refused")
        if loopback and host in REFUSED:
            wrong.append(f"{host!r} is let in")
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
    asked, decided = len(REFUSED) + len(ALLOWED), addresses()
    return [
        Figure("S15", "servers that listen where they must not", len(wrong), len(settings), "servers", also, wrong),
        Figure("S15", "addresses decided wrongly", len(decided), asked, "addresses without a key", {}, decided),
    ]
