"""`pagemill top`: a running server, live in the terminal or once for scripts. Owns when it is asked, the keys and the
screen; figures are made in `top_figures.py` and drawn in `top_view.py`."""

from __future__ import annotations

import os
import select
import signal
import sys
import termios
import threading
import time
import tty
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final

from rich.console import Console
from rich.live import Live

from pagemill.base.errors import ConfigError, PagemillError, RequestError
from pagemill.base.units import parse_seconds
from pagemill.cli.cache_remote_client import ADMIN_KEY_VARIABLE, ADMIN_URL_VARIABLE, Server, ServerError
from pagemill.cli.terminal import print_json
from pagemill.cli.top_figures import Scrape, figures, read_scrape, restarted
from pagemill.cli.top_view import MOST_SPARKS, NUM_LINES, view

DEFAULT_URL: Final = "http://127.0.0.1:8000"
METRICS_KEY_VARIABLE: Final = "PAGEMILL_METRICS_KEY"
WINDOW_S: Final = 10.0

_LEAST_INTERVAL_S: Final = 0.5  # a server reads its engine no more often
_MOST_INTERVAL_S: Final = 3600.0
_KEY_WAIT_S: Final = 0.1
_PIPE_WIDTH: Final = 120
_OTHER_LINES: Final = 5  # above and below the tenants: a gap, their head, how many more there are, two alarms


class Watch:
    """Looks at one server again and again. Mutated by `look`: scrapes of the last seconds.

    server: where /metrics is. admin: the admin port, None for no tenants. now: a monotonic clock, in seconds.
    """

    def __init__(self, server: Server, admin: Server | None, *, now: Callable[[], float] = time.monotonic) -> None:
        self._server = server
        self._admin = admin
        self._now = now
        self._scrapes: deque[Scrape] = deque()

    def look(self) -> dict[str, Any]:
        """What `top --json` prints. Raises ServerError where the server does not answer, or answers something else."""
        status = self._status()
        text = self._server.text("/metrics")
        try:
            scrape = read_scrape(text, self._now())
        except RequestError as error:
            raise ServerError(f"{self._server.url}: {error}") from None
        if self._scrapes and restarted(self._scrapes[-1], scrape):
            self._scrapes.clear()
        while len(self._scrapes) > 1 and scrape.at_s - self._scrapes[1].at_s >= WINDOW_S:
            self._scrapes.popleft()
        before = self._scrapes[0] if self._scrapes else None
        self._scrapes.append(scrape)
        told = {
            "url": self._server.url,
            "time": round(time.time(), 3),
            "status": status,
            "error": None,
            "stale_s": 0.0,
        }
        return told | figures(before, scrape) | {"tenants": self._tenants(status)}

    def _status(self) -> str:
        """What /health says: ready, loading, draining, failed; "ready" of servers that only answer."""
        try:
            found = self._server.health()
        except ServerError as error:
            if error.status is None:
                raise
            return "not known"
        return "draining" if found.get("draining") is True else str(found.get("status", "ready"))

    def _tenants(self, status: str) -> list[dict[str, Any]] | None:
        """Use by tenant in token positions; None without an admin port, before the model is loaded, or where nothing is
        shared."""
        if self._admin is None or status == "loading":
            return None
        try:
            found = self._admin.ask("GET", "/admin/tenants")
        except ServerError as error:
            if error.status in (409, 503):
                return None
            raise
        try:
            size = int(found["block_tokens"])
            return [_in_tokens(each, size) for each in found["tenants"]]
        except (KeyError, TypeError, ValueError):
            raise ServerError(f"{self._admin.url} tells its tenants in the form of another version") from None


def run(
    *,
    url: str | None,
    key: str | None,
    admin_url: str | None,
    admin_key: str | None,
    interval: str,
    once: bool,
    as_json: bool,
) -> int:
    """Watch a server until q is typed; or look once, where that is asked for or there is no terminal."""
    interval_s = parse_seconds(interval)
    if not _LEAST_INTERVAL_S <= interval_s <= _MOST_INTERVAL_S:
        raise ConfigError(f"--interval is {interval}; give {_LEAST_INTERVAL_S} s to {_MOST_INTERVAL_S:,.0f} s")
    watch = Watch(*servers(url, key, admin_url, admin_key))
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)
    if once or as_json or not sys.stdout.isatty() or console.is_dumb_terminal:
        watch.look()
        time.sleep(interval_s)
        shown = watch.look()
        if as_json:
            print_json(shown)
        else:
            console.print(view(shown, ascii_only=console.options.ascii_only))
        return 0
    return _live(watch, console, interval_s)


def servers(
    url: str | None, key: str | None, admin_url: str | None, admin_key: str | None
) -> tuple[Server, Server | None]:
    """Where /metrics is, and the admin port. What is not given comes from the environment. Raises ConfigError."""
    admin_url = admin_url if admin_url is not None else os.environ.get(ADMIN_URL_VARIABLE) or None
    admin = None
    if admin_url is not None:
        admin_key = admin_key if admin_key is not None else os.environ.get(ADMIN_KEY_VARIABLE)
        admin_hint = f"the operator's key with --admin-key or {ADMIN_KEY_VARIABLE}"
        admin = Server(admin_url, admin_key, option="--admin-url", key_hint=admin_hint)
    elif admin_key is not None:
        raise ConfigError("--admin-key without --admin-url; give the address that it is for")
    if url is None and key is None and admin is not None:
        return admin, admin
    key = key if key is not None else os.environ.get(METRICS_KEY_VARIABLE)
    hint = f"a key of role metrics with --key or {METRICS_KEY_VARIABLE} (`pagemill keys add NAME --role metrics`)"
    missing = "give the address of a Pagemill server that is not older than this program, or its admin port"
    return Server(url or DEFAULT_URL, key, what="a server", key_hint=hint, missing=missing), admin


def _in_tokens(tenant: dict[str, Any], size: int) -> dict[str, Any]:
    cap = tenant["cap"]
    return {
        "tenant": str(tenant["tenant"]),
        "kept": int(tenant["used"]) * size,
        "active": (int(tenant["used"]) - int(tenant["cached"])) * size,
        "cached": int(tenant["cached"]) * size,
        "pinned": int(tenant["pinned"]) * size,
        "floor": int(tenant["floor"]) * size,
        "cap": None if cap is None else int(cap) * size,
    }


class _Asking(threading.Thread):
    """Asks a server at intervals, so that keys are answered while it is slow. Mutated by itself: latest, history.

    latest: what is to be shown, and a number that grows with it. history: tokens generated a second.
    """

    def __init__(self, watch: Watch, first: dict[str, Any], interval_s: float) -> None:
        super().__init__(name="pagemill-top", daemon=True)
        self._watch = watch
        self._interval_s = interval_s
        self._over = threading.Event()
        self._seen_s = time.monotonic()
        self.latest: tuple[int, dict[str, Any]] = (0, first)
        self.history: tuple[float, ...] = ()

    def run(self) -> None:
        while not self._over.wait(self._interval_s):
            number, last = self.latest
            try:
                shown = self._watch.look()
                self._seen_s = time.monotonic()
                rate = shown["tokens"]["generated_per_s"] or 0.0
                self.history = (*self.history, rate)[-MOST_SPARKS:]
            except PagemillError as error:
                stale_s = time.monotonic() - self._seen_s
                shown = last | {"status": "no answer", "error": str(error), "stale_s": round(stale_s, 1)}
            self.latest = (number + 1, shown)

    def end(self) -> None:
        """No more questions; one that is under way is not waited for."""
        self._over.set()


def _live(watch: Watch, console: Console, interval_s: float) -> int:
    """The picture on the terminal's other screen until q is typed. Raises ServerError where nothing answers first."""
    asking = _Asking(watch, watch.look(), interval_s)
    ascii_only = console.options.ascii_only
    asking.start()
    drawn: tuple[int, int, int] | None = None
    try:
        with _ending_by_signal(), _keys() as typed, Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                number, shown = asking.latest
                state = (number, *console.size)
                if state != drawn:
                    most = max(1, console.height - NUM_LINES - _OTHER_LINES)
                    picture = view(
                        shown, history=asking.history, ascii_only=ascii_only, hint="q quits", num_tenants=most
                    )
                    live.update(picture, refresh=True)
                    drawn = state
                if typed(_KEY_WAIT_S):
                    return 0
    finally:
        asking.end()


@contextmanager
def _keys() -> Iterator[Callable[[float], bool]]:
    """Keys one by one, without echo; the terminal is as before afterwards. Yields a function that waits so many seconds
    at the most, and is true when q was typed or the terminal is gone."""
    if not sys.stdin.isatty():

        def no_keys(wait_s: float) -> bool:
            time.sleep(wait_s)
            return False

        yield no_keys
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)

    def typed(wait_s: float) -> bool:
        ready, _, _ = select.select([descriptor], [], [], wait_s)
        if not ready:
            return False
        try:
            pressed = os.read(descriptor, 64)
        except OSError:
            return True
        return not pressed or any(each in b"qQ" for each in pressed)

    tty.setcbreak(descriptor)
    try:
        yield typed
    finally:
        termios.tcsetattr(descriptor, termios.TCSAFLUSH, before)


@contextmanager
def _ending_by_signal() -> Iterator[None]:
    """SIGTERM and SIGHUP end it as q does, with their exit code: the terminal is not left on the other screen."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {each: signal.signal(each, end) for each in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
