"""S13: every route of both ports is walked without a key that is known; open are exactly those of the allow-list. And
keys are compared in constant time: whatever is wrong with one, the same comparisons are made.

Nothing but the missing key is wrong with a request: where a body is taken, a right one is sent, and in the end the same
bodies are answered to those who have a key. So a closed route answers with 401 and with nothing else. Only a method
that HTTP does not have is refused before anybody is asked for a key, by the parser and in its words.
"""

from __future__ import annotations

import hmac
import http.client
import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
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
from tests.fixtures.serve_process import ROOT, ServeProcess
from tests.fixtures.tiny import tiny_llama
from tests.trust.figures import Figure

NO_METHOD = "BREW"
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", NO_METHOD)
WITH_BODY = frozenset({"POST", "PUT", "PATCH", "DELETE"})
OF_THE_PARSER = (400, b"Invalid HTTP request received.")
# How a path may be written so that a door and a router could read it differently.
SPELLINGS = ("{}", "{}/", "/{}", "{}?x=1", "/health/..{}", "/health;{}", "{}%0a", "{}%00", "/.{}", "/%2e%2e{}")
# A right body of every route that takes one, in an order in which each can be answered: a text is there to be pinned,
# and what drains takes nothing more.
TEXT = "words that fill more than one block of the cache, so that it can be pinned and purged"
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": TEXT, "max_tokens": 1},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1},
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [1, 2]},
    "/admin/cache/pin": {"prompt": TEXT, "tenant": "alice", "seconds": 5},
    "/admin/cache/pin/1": {},
    "/admin/cache/purge": {"tenant": "alice", "what": "tenant"},
    "/admin/tenants/alice": {"floor_tokens": 0},
    "/admin/keys/reload": {},
    "/admin/drain": {},
}
NO_SUCH = ("/nowhere", "/admin", "/docs", "/redoc", "/static/x", "/", "/health/x", "/version/x", "/healthz")


def public_routes() -> dict[str, set[str]]:
    """Paths of the public port's route table, parameters filled in, and their methods; with the published schema and
    the metrics that `pagemill serve` adds."""
    app = create_app(None, SETTINGS)  # type: ignore[arg-type]
    found = _methods(route for route in app.routes if hasattr(route, "path"))
    for path, methods in app.openapi()["paths"].items():
        found.setdefault(path.replace("{name}", "tiny"), set()).update(each.upper() for each in methods)
    return found | {"/metrics": {"GET"}}


def admin_routes() -> dict[str, set[str]]:
    """The same of the admin port."""
    ring, anything = KeyRing(None, [], MonotonicClock()), None
    door: Any = admin_app(
        anything, anything, ring, ring, Metrics("x"), hosts=HostCheck(), limits=Limits(), render_metrics=anything  # type: ignore[arg-type]
    )  # fmt: skip
    return _methods(door._app._app.routes)


def _methods(routes: Iterable[Any]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for route in routes:
        found.setdefault(_filled(route), set()).update(route.methods)
    return found


def _filled(route: Any) -> str:
    path = re.sub(r":\w+}", "}", route.path)
    return path.replace("{name}", "tiny").replace("{tenant}", "alice").replace("{pin_id}", "1")


@dataclass(slots=True)
class Walk:
    """Requests without a key that is known. Mutated by `ask`. opened: paths, as asked, that were not refused with 401
    or, on an open route, for their method. wrong: what ought not to be. num_bodies: requests with a body."""

    num_requests: int = 0
    num_refused: int = 0
    num_bodies: int = 0
    opened: set[str] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)

    def ask(self, url: str, method: str, route: str, spelling: str, headers: dict[str, str], is_open: bool) -> None:
        """One request, on a connection of its own: the path goes out as it is written. route: whose body is sent."""
        path = spelling.format(route)
        body = json.dumps(BODIES.get(route, {})).encode() if method in WITH_BODY else b""
        self.num_requests += 1
        self.num_bodies += bool(body)
        told = f"{method} {path} {sorted(headers)}"
        try:
            answer = _answered(url, method, path, headers, body)
        except OSError as error:
            self.wrong.append(f"{error} for {told}")
            return
        if is_open and path.partition("?")[0] == route:
            self.opened.add(route)
            expected = 200 if method in ("GET", "HEAD") else 405
        else:
            expected = 401
            self.num_refused += answer[0] == 401
        if answer[0] != expected and not (method == NO_METHOD and answer == OF_THE_PARSER):
            self.wrong.append(f"{answer[0]} for {told}")


def _answered(url: str, method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
    try:
        connection.putrequest(method, path, skip_accept_encoding=True)
        for name, value in headers.items():
            connection.putheader(name, value)
        if body:
            connection.putheader("content-type", "application/json")
            connection.putheader("content-length", str(len(body)))
        connection.endheaders(body or None)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def strangers(known: str) -> list[dict[str, str]]:
    """Headers of those who have no key: none, a wrong one, one whose public half is right, forms that are none."""
    half = known[: len(known) // 2]
    wrong = [make_key()[0], half + "x" * (len(known) - len(half)), known[:-1], known + "x", known.upper(), "", " ", "*"]
    bearers = [{"authorization": f"Bearer {each}"} for each in wrong]
    others = [{"x-api-key": wrong[0]}, {"authorization": f"Basic {known}"}, {"authorization": known}, {"cookie": known}]
    return [{}, *bearers, *others, {"authorization": f"Bearer {known}", "x-api-key": wrong[0]}, {"x-tenant": "alice"}]


@contextmanager
def served(place: Path, further_path: str = "") -> Iterator[tuple[ServeProcess, str, str]]:
    """A server with an admin port, a user's key and an admin's. further_path: of modules of the server's process."""
    (key, id, sha256), (root, root_id, root_sha) = make_key(), make_key()
    entries = (KeyEntry("alice", id, sha256, tenant="alice"), KeyEntry("root", root_id, root_sha, role="admin"))
    write_keys(place / "keys.toml", entries)
    with ServeProcess(
        place, str(tiny_llama(place)), "--kv-cache-memory-bytes", "8MiB", "--packed-weights-cache", "off",
        "--keys", str(place / "keys.toml"), "--admin-port", "0", "--log-level", "error",
        variables={"PYTHONPATH": ":".join(filter(None, [further_path, str(ROOT / "src")]))},
    ) as process:  # fmt: skip
        yield process, key, root


def walked(process: ServeProcess, key: str, spellings: Sequence[str] = SPELLINGS) -> tuple[Walk, Walk]:
    """Every route of the public port and of the admin port, and there those of the public port too."""
    public, admin = Walk(), Walk()
    routes, closed = public_routes(), admin_routes()
    for path in sorted(routes.keys() | set(NO_SUCH)):
        _walk(public, process.url, path, routes.get(path, set()), spellings, key, is_open=path in OPEN_ROUTES)
    for path in sorted(closed.keys() | routes.keys()):
        how = spellings if path in closed else spellings[:1]
        _walk(admin, process.admin_url, path, closed.get(path, set()), how, key, is_open=False)
    return public, admin


def _walk(
    walk: Walk, url: str, path: str, methods: set[str], spellings: Sequence[str], key: str, *, is_open: bool
) -> None:
    for method in METHODS:
        for spelling in spellings:
            walk.ask(url, method, path, spelling, {}, is_open)
    for headers in strangers(key):
        for method in sorted(methods | {"GET", "POST"}):
            walk.ask(url, method, path, "{}", headers, is_open)


def not_let_in(process: ServeProcess, key: str, root: str) -> list[str]:
    """What is wrong with the control: to those who have a key the same bodies are answered. It drains the server."""
    wrong = []
    with process.client(key) as public, process.admin(root) as admin:
        for routes, client in ((public_routes(), public), (admin_routes(), admin)):
            asked = [(path, method) for path in BODIES if path in routes for method in routes[path] & WITH_BODY]
            for path, method in asked:
                answer = client.request(method, path, json=BODIES[path])
                if answer.status_code != 200:
                    wrong.append(f"the control: {answer.status_code} with a key for {method} {path}: {answer.text}")
    return wrong


def count() -> list[Figure]:
    """The walk, and the comparisons."""
    with tempfile.TemporaryDirectory() as directory, served(Path(directory)) as (process, key, root):
        public, admin = walked(process, key)
        wrong = [*public.wrong, *admin.wrong]
        if public.opened != OPEN_ROUTES:
            wrong.append(f"open are {sorted(public.opened)}, and the allow-list has {sorted(OPEN_ROUTES)}")
        wrong += not_let_in(process, key, root)
    also = {
        "routes of both ports": len(public_routes()) + len(admin_routes()),
        "open routes": len(public.opened),
        "with a right body": public.num_bodies + admin.num_bodies,
        "refused with 401": public.num_refused + admin.num_refused,
    }
    total = public.num_requests + admin.num_requests
    return [
        Figure("S13", "closed routes open", len(wrong), total, "requests without a key", also, wrong[:5]),
        comparisons(),
    ]


def comparisons() -> Figure:
    """What is compared for a known key and for strangers: each time one hash, once and whole, by
    `hmac.compare_digest`."""
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
    wrong = [f"{name}: compared {seen}" for name, seen in made.items() if seen != [(64, 64)]]
    return Figure("S13", "keys not compared in constant time", len(wrong), len(kinds), "kinds of keys", {}, wrong)
