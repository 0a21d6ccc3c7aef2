"""S13: every route of both ports is walked without a key that is known; open are exactly those of the allow-list. And
keys are compared in constant time: whatever is wrong with one, the same comparisons are made.
"""

from __future__ import annotations

import hmac
import http.client
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from pagemill.base.clock import MonotonicClock
from pagemill.server.access import KeyRing, RefusedError
from pagemill.server.access_door import OPEN_ROUTES
from pagemill.server.access_keys import KeyEntry, make_key, write_keys
from pagemill.server.access_listen import HostCheck
from pagemill.server.admin import admin_app
from pagemill.server.app import create_app
from pagemill.server.limits import Limits
from pagemill.telemetry.metrics import Metrics
from tests.fixtures.live_server import SETTINGS
from tests.fixtures.serve_process import ServeProcess
from tests.fixtures.tiny import tiny_llama
from tests.trust.figures import Figure

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW")
# How a path may be written so that a door and a router could read it differently.
SPELLINGS = ("{}", "{}/", "/{}", "{}?x=1", "/health/..{}", "/health;{}", "{}%0a", "{}%00", "/.{}", "/%2e%2e{}")
NO_SUCH = ("/nowhere", "/admin", "/docs", "/redoc", "/static/x", "/", "/health/x", "/version/x", "/healthz")


def public_paths() -> set[str]:
    """Paths of the public port's route table, parameters filled in, with the metrics that `pagemill serve` adds."""
    routes = create_app(None, SETTINGS).routes  # type: ignore[arg-type]
    return {_filled(route) for route in routes if hasattr(route, "path")} | _described() | {"/metrics"}


def _described() -> set[str]:
    """Paths of the published schema."""
    paths = create_app(None, SETTINGS).openapi()["paths"]  # type: ignore[arg-type]
    return {path.replace("{name}", "tiny") for path in paths}


def admin_paths() -> set[str]:
    """Paths of the admin port's route table."""
    ring, anything = KeyRing(None, [], MonotonicClock()), None
    door: Any = admin_app(
        anything, anything, ring, ring, Metrics("x"), hosts=HostCheck(), limits=Limits(), render_metrics=anything  # type: ignore[arg-type]
    )  # fmt: skip
    return {_filled(route) for route in door._app._app.routes}


def _filled(route: Any) -> str:
    path = re.sub(r":\w+}", "}", route.path)
    return path.replace("{name}", "tiny").replace("{tenant}", "alice").replace("{pin_id}", "1")


@dataclass(slots=True)
class Walk:
    """Requests without a key that is known. Mutated by `ask`. opened: paths, as asked, that were not refused with 401
    or, on an open route, for their method. wrong: what ought not to be."""

    num_requests: int = 0
    num_refused: int = 0
    opened: set[str] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)

    def ask(self, url: str, method: str, path: str, headers: dict[str, str], open_routes: frozenset[str]) -> None:
        """One request, on a connection of its own: the path goes out as it is written."""
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
        try:
            connection.putrequest(method, path, skip_accept_encoding=True)
            for name, value in headers.items():
                connection.putheader(name, value)
            connection.endheaders()
            answer = connection.getresponse()
            answer.read()
        finally:
            connection.close()
        self.num_requests += 1
        told = f"{answer.status} for {method} {path} {sorted(headers)}"
        bare = path.partition("?")[0]
        if bare in open_routes:
            self.opened.add(bare)
            if answer.status not in (200, 400, 405):
                self.wrong.append(told)
        elif answer.status == 401:
            self.num_refused += 1
        elif answer.status != 400:  # what is no HTTP is refused before anybody is asked for a key
            self.wrong.append(told)


def strangers(known: str) -> list[dict[str, str]]:
    """Headers of those who have no key: none, a wrong one, one whose public half is right, forms that are none."""
    half = known[: len(known) // 2]
    wrong = [make_key()[0], half + "x" * (len(known) - len(half)), known[:-1], known + "x", known.upper(), "", " ", "*"]
    bearers = [{"authorization": f"Bearer {each}"} for each in wrong]
    others = [{"x-api-key": wrong[0]}, {"authorization": f"Basic {known}"}, {"authorization": known}, {"cookie": known}]
    return [{}, *bearers, *others, {"authorization": f"Bearer {known}", "x-api-key": wrong[0]}, {"x-tenant": "alice"}]


@contextmanager
def served(place: Path) -> Iterator[tuple[ServeProcess, str]]:
    """A server with a user's key and an admin port, and that key."""
    (key, id, sha256), (_, root_id, root_sha) = make_key(), make_key()
    entries = (KeyEntry("alice", id, sha256, tenant="alice"), KeyEntry("root", root_id, root_sha, role="admin"))
    write_keys(place / "keys.toml", entries)
    with ServeProcess(
        place, str(tiny_llama(place)), "--kv-cache-memory-bytes", "8MiB", "--packed-weights-cache", "off",
        "--keys", str(place / "keys.toml"), "--admin-port", "0", "--log-level", "error",
    ) as process:  # fmt: skip
        yield process, key


def count() -> list[Figure]:
    """The walk, and the comparisons."""
    with tempfile.TemporaryDirectory() as directory, served(Path(directory)) as (process, key):
        public, admin = Walk(), Walk()
        paths = public_paths()
        for path in sorted(paths | set(NO_SUCH)):
            for method in METHODS:
                for spelling in SPELLINGS:
                    public.ask(process.url, method, spelling.format(path), {}, OPEN_ROUTES)
            for headers in strangers(key):
                for method in ("GET", "POST"):
                    public.ask(process.url, method, path, headers, OPEN_ROUTES)
        for path in sorted(admin_paths() | paths):
            for method in METHODS:
                admin.ask(process.admin_url, method, path, {}, frozenset())
            for headers in strangers(key):
                admin.ask(process.admin_url, "GET", path, headers, frozenset())
        wrong = [*public.wrong, *admin.wrong]
        with process.client(key) as client, process.client() as nobody:
            if (client.get("/v1/models").status_code, nobody.get("/v1/models").status_code) != (200, 401):
                wrong.append("the control: a known key opens what none opens")
        if public.opened != OPEN_ROUTES:
            wrong.append(f"open are {sorted(public.opened)}, and the allow-list has {sorted(OPEN_ROUTES)}")
        total = public.num_requests + admin.num_requests
    also = {"routes of both ports": len(paths) + len(admin_paths()), "open routes": len(public.opened)}
    return [
        Figure("S13", "closed routes open", len(wrong), total, "requests without a key", also, wrong[:5]),
        comparisons(),
    ]


def comparisons() -> Figure:
    """What is compared for a known key and for strangers: each time one hash, whole, by `hmac.compare_digest`."""
    key, id, sha256 = make_key()
    others = [KeyEntry(f"k{at}", *make_key()[1:], tenant="t") for at in range(20)]
    ring = KeyRing(None, [KeyEntry("alice", id, sha256, tenant="alice"), *others], MonotonicClock())
    same_half = f"{key[:-1]}{'x' if key[-1] != 'x' else 'y'}"
    kinds = {
        "known": key,
        "its public half": same_half,
        "none of it": make_key()[0],
        "no form": "abc",
        "long": "x" * 9999,
    }
    made: dict[str, list[tuple[int, int]]] = {}
    compare = hmac.compare_digest
    for name, given in kinds.items():
        seen: list[tuple[int, int]] = []

        def compared(one: Any, other: Any, seen: list[tuple[int, int]] = seen) -> bool:
            seen.append((len(one), len(other)))
            return compare(one, other)

        with patch("pagemill.server.access.hmac.compare_digest", compared):
            try:
                found = ring.find(given).name
            except RefusedError:
                found = None
        assert (found == "alice") == (name == "known")
        made[name] = seen
    wrong = [f"{name}: compared {seen}" for name, seen in made.items() if not seen or set(seen) != {(64, 64)}]
    return Figure("S13", "keys not compared in constant time", len(wrong), len(kinds), "kinds of keys", {}, wrong)
