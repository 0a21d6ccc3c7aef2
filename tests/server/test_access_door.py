"""The door: who passes, what is refused and how, and what the log says. Over a small application of plain ASGI."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from pagemill.base.clock import VirtualClock
from pagemill.server.access import KeyRing, RefusedError
from pagemill.server.access_door import METRICS_ROUTE, Door, Message, Receive, Scope, Send, send_json, visit_of
from pagemill.server.access_keys import KeyEntry, make_key
from pagemill.server.access_listen import HostCheck
from pagemill.telemetry.logs import FIELDS
from pagemill.telemetry.metrics import Metrics


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Tells who came in."""
    visit = visit_of(scope)
    if scope["path"] == "/fail":
        raise ValueError("broken")
    if scope["path"] == "/refuse":
        raise RefusedError("not today", 429, "tokens", 2.5)
    if scope["path"] == "/full":
        visit.refused("queue")
    visit.charge(10)
    await send_json(send, 200, {"tenant": visit.tenant, "id": visit.request_id})


class House:
    """A door, its keys and its metrics. Mutated by requests."""

    def __init__(self, *, keys: dict[str, Any] | None = None, app: Any = echo, **options: Any) -> None:
        self.clock = VirtualClock()
        self.metrics = Metrics("tiny")
        self.keys: dict[str, str] = {}
        entries = []
        for name, changes in (keys or {}).items():
            self.keys[name], id, sha256 = make_key()
            entries.append(KeyEntry(name, id, sha256, **({"tenant": name} | changes)))
        ring = KeyRing(None, entries, self.clock)
        hosts = options.pop("hosts", HostCheck.of("127.0.0.1", has_keys=bool(keys), insecure=False))
        self.door = Door(app, ring, self.metrics, hosts=hosts, **options)

    def ask(self, method: str = "POST", path: str = "/v1/completions", **options: Any) -> httpx.Response:
        async def go() -> httpx.Response:
            transport = httpx.ASGITransport(self.door)
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
                return await client.request(method, path, **options)

        return asyncio.run(go())

    def ask_as(self, name: str, method: str = "POST", path: str = "/v1/completions") -> httpx.Response:
        return self.ask(method, path, headers={"Authorization": f"Bearer {self.keys[name]}"})

    def refused(self, reason: str) -> float:
        samples = self.metrics["pagemill:http_refused"].samples()
        return sum(each.value for each in samples if each.labels == (reason,))


def test_without_keys_everybody_is_the_default_tenant() -> None:
    assert House().ask().json()["tenant"] == "default"


def test_a_key_s_owner_comes_in_as_himself() -> None:
    house = House(keys={"alice": {}, "bob": {"tenant": "b"}})
    assert house.ask_as("alice").json()["tenant"] == "alice"
    assert house.ask("POST", headers={"x-api-key": house.keys["bob"]}).json()["tenant"] == "b"
    assert house.ask("POST", headers={"authorization": f"bearer   {house.keys['bob']} "}).json()["tenant"] == "b"


@pytest.mark.parametrize(
    "headers",
    [
        {}, {"Authorization": "Bearer x"}, {"Authorization": "Basic KEY"}, {"Authorization": "KEY"},
        {"Authorization": "Bearer"}, {"x-api-key": ""}, {"cookie": "key=KEY"},
    ],
)  # fmt: skip
def test_no_key_or_another_is_refused_in_openai_s_shape(headers: dict[str, str]) -> None:
    house = House(keys={"alice": {}})
    sent = {name: value.replace("KEY", house.keys["alice"]) for name, value in headers.items()}
    answer = house.ask(headers=sent)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.headers["connection"] == "close"
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
    assert house.keys["alice"] not in answer.text


def test_two_different_keys_count_as_none() -> None:
    house = House(keys={"alice": {}})
    good = f"Bearer {house.keys['alice']}"
    for sent in (
        [("authorization", good), ("authorization", "Bearer x")],
        [("authorization", "Bearer x"), ("authorization", good)],
    ):
        assert house.ask(headers=sent).status_code == 401  # type: ignore[arg-type]
    assert house.ask(headers=[("authorization", good), ("authorization", good)]).status_code == 200
    assert house.ask(headers={"authorization": good, "x-api-key": "x"}).status_code == 401
    assert house.ask(headers={"authorization": good, "x-api-key": house.keys["alice"]}).status_code == 200


def test_open_routes_need_no_key_and_no_others_are_open() -> None:
    house = House(keys={"alice": {}})
    assert [house.ask("GET", path).status_code for path in ("/health", "/version")] == [200, 200]
    for path in ("/", "/health/", "/Health", "//health", "/health/../v1/models", "/v1/models", "/metrics", "/docs"):
        assert house.ask("GET", path).status_code == 401, path


def test_metrics_are_for_keys_of_that_role_and_users_see_none() -> None:
    roles = {"role": "metrics", "tenant": None}
    house = House(keys={"alice": {}, "prometheus": roles, "root": {"role": "admin", "tenant": None}})
    found = {name: house.ask_as(name, "GET", "/metrics").status_code for name in house.keys}
    assert found == {"alice": 403, "prometheus": 200, "root": 200}
    assert house.ask_as("prometheus").status_code == 403
    assert house.ask_as("root").status_code == 403, "an admin's key has no tenant, hence generates nothing"
    told = house.ask_as("root").json()["error"]["message"]
    assert told == "this takes a key of role user, and yours is of role admin"
    told = house.ask_as("alice", "GET", "/metrics").json()["error"]["message"]
    assert told == "this takes a key of role metrics or admin, and yours is of role user"


def test_no_spelling_of_its_path_leads_a_user_to_the_metrics() -> None:
    app = Starlette(routes=[Route(METRICS_ROUTE, lambda request: Response("figures"))])
    house = House(keys={"alice": {}, "prometheus": {"role": "metrics", "tenant": None}}, app=app)
    assert house.ask_as("prometheus", "GET", "/metrics").text == "figures"
    for path in ("/metrics%0A", "/metrics/", "/%6Detrics", "//metrics", "/metrics%00", "/metrics%0D%0A", "/metrics?a"):
        assert "figures" not in house.ask_as("alice", "GET", path).text, path


def test_without_a_key_no_body_is_read() -> None:
    house = House(keys={"alice": {}})
    for path in ("/health", "/version"):
        for method in ("POST", "PUT", "PATCH", "DELETE"):
            answer = house.ask(method, path, content=b"x" * 100)
            assert (answer.status_code, answer.headers["connection"]) == (405, "close")
        assert house.ask("HEAD", path).status_code == 200
    assert house.refused("method") == 8


def test_the_admin_door_opens_to_admins_alone() -> None:
    house = House(keys={"alice": {}, "root": {"role": "admin", "tenant": None}}, role="admin", open_routes=frozenset())
    assert house.ask_as("alice", "GET", "/admin/tenants").status_code == 403
    assert house.ask_as("root", "GET", "/admin/tenants").status_code == 200
    assert house.ask("GET", "/health").status_code == 401


def test_other_hosts_and_origins_are_refused_without_keys() -> None:
    house = House()
    assert house.ask(headers={"host": "evil.example"}).status_code == 421
    assert house.ask("GET", "/health", headers={"host": "evil.example"}).status_code == 421
    assert house.ask(headers={"origin": "https://evil.example"}).status_code == 403
    assert house.ask(headers=[("host", "127.0.0.1"), ("host", "evil.example")]).status_code == 421  # type: ignore[arg-type]
    assert (house.refused("host"), house.refused("origin")) == (3, 1)


@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_no_cors_header_is_ever_sent(method: str) -> None:
    for house in (House(), House(keys={"alice": {}})):
        for origin in ("https://evil.example", "http://localhost:3000"):
            headers = {"origin": origin, "access-control-request-method": "POST"}
            answer = house.ask(method, headers=headers)
            assert not [name for name in answer.headers if name.startswith("access-control-")]


def test_limits_of_a_key_are_told_with_the_time_to_wait() -> None:
    house = House(keys={"alice": {"requests_per_minute": 2}})
    assert [house.ask_as("alice").status_code for _ in range(3)] == [200, 200, 429]
    answer = house.ask_as("alice")
    assert answer.headers["retry-after"] == "30"
    assert answer.json()["error"]["code"] == "rate_limit_exceeded"
    assert house.refused("requests") == 2
    assert house.ask_as("alice", "GET", "/v1/models").status_code == 200, "asking for nothing costly is not counted"
    house.clock.advance(30)
    assert house.ask_as("alice").status_code == 200


def test_tokens_that_a_route_charges_count() -> None:
    house = House(keys={"alice": {"tokens_per_minute": 15}})
    assert [house.ask_as("alice").status_code for _ in range(3)] == [200, 200, 429]
    assert house.refused("tokens") == 1


def test_what_a_route_refuses_is_answered_as_a_refusal() -> None:
    house = House()
    answer = house.ask(path="/refuse")
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "3")


@pytest.mark.parametrize("path", ["/v1/completions", "/fail", "/refuse"])
def test_whoever_came_in_goes_out_whatever_happens(path: str) -> None:
    house = House(keys={"alice": {"max_streams": 1}})
    for _ in range(3):
        try:
            house.ask_as("alice", path=path)
        except ValueError:
            assert path == "/fail"
    assert house.door.num_open == 0
    assert house.ask_as("alice").status_code == 200


def test_requests_beyond_the_room_are_told_to_come_back() -> None:
    house = House(max_open=2)
    entered, leave = asyncio.Event(), asyncio.Event()

    async def wait(scope: Scope, receive: Receive, send: Send) -> None:
        entered.set()
        await leave.wait()
        await send_json(send, 200, {})

    house.door._app = wait

    async def go() -> tuple[httpx.Response, list[httpx.Response]]:
        transport = httpx.ASGITransport(house.door)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            inside = [asyncio.create_task(client.post("/v1/completions")) for _ in range(2)]
            while house.door.num_open < 2:
                await asyncio.sleep(0)
            third = await client.post("/v1/completions")
            leave.set()
            return third, await asyncio.gather(*inside)

    third, inside = asyncio.run(go())
    assert (third.status_code, third.headers["retry-after"]) == (503, "1")
    assert [each.status_code for each in inside] == [200, 200]
    assert house.refused("room") == 1


@pytest.mark.parametrize(("sent", "kept"), [("my-id:1", True), ("", False), ("x" * 65, False), ('a"b', False)])
def test_a_request_s_id_is_told_and_a_client_s_own_is_kept_where_it_is_one(sent: str, kept: bool) -> None:
    answer = House().ask(headers={"x-request-id": sent} if sent else {})
    assert answer.headers["x-request-id"] == answer.json()["id"]
    assert (answer.headers["x-request-id"] == sent) is kept


def test_the_log_has_a_line_a_request_without_query_or_key(caplog: pytest.LogCaptureFixture) -> None:
    house = House(keys={"alice": {}})
    with caplog.at_level(logging.INFO, "pagemill.http"):
        house.ask_as("alice", path="/v1/completions?secret=1")
        house.ask("POST", "/v1/x")
    first, second = (getattr(record, FIELDS) for record in caplog.records)
    assert first == {
        "request_id": first["request_id"], "method": "POST", "path": "/v1/completions", "status": 200,
        "seconds": first["seconds"], "key": "alice", "tenant": "alice", "tokens": 10,
    }  # fmt: skip
    assert second["status"] == 401
    assert house.keys["alice"] not in json.dumps([first, second])


def test_every_answer_is_counted_by_method_and_status() -> None:
    house = House(keys={"alice": {}})
    house.ask_as("alice")
    house.ask()
    house.ask("BREW", "/health")
    found = {each.labels: each.value for each in house.metrics["pagemill:http_requests"].samples()}
    assert found == {("POST", "200"): 1, ("POST", "401"): 1, ("other", "200"): 1}


def test_websockets_are_refused() -> None:
    told: list[Message] = []

    async def send(message: Message) -> None:
        told.append(message)

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    asyncio.run(House().door({"type": "websocket", "path": "/", "headers": []}, receive, send))
    assert [(each["type"], each["code"]) for each in told] == [("websocket.close", 1008)]


def test_a_stream_passes_as_if_the_door_were_not_there() -> None:
    order: list[str] = []

    async def stream(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for piece in (b"a", b"b", b"c"):
            order.append(f"made {piece!r}")
            await send({"type": "http.response.body", "body": piece, "more_body": piece != b"c"})

    async def sent(message: Message) -> None:
        if message["type"] == "http.response.body":
            order.append(f"sent {message['body']!r}")

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    scope = {"type": "http", "method": "GET", "path": "/v1/x", "headers": [(b"host", b"localhost")]}
    asyncio.run(House(app=stream).door(scope, receive, sent))
    assert order == [f"{what} {piece!r}" for piece in (b"a", b"b", b"c") for what in ("made", "sent")]


def test_the_caller_s_trace_is_handed_on() -> None:
    seen: list[Any] = []

    async def look(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(visit_of(scope).trace)
        await send_json(send, 200, {})

    house = House(app=look, operations={"/v1/chat/completions": "chat"})
    parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    house.ask(path="/v1/chat/completions", headers={"traceparent": parent})
    house.ask(path="/v1/other", headers={"traceparent": "nonsense"})
    assert (seen[0].operation, f"{seen[0].trace_id:x}") == ("chat", "4bf92f3577b34da6a3ce929d0e0e4736")
    assert (seen[1].operation, seen[1].parent) == ("http", None)


def test_a_request_that_the_engine_does_not_let_in_is_counted_once_with_its_reason() -> None:
    house = House()
    assert house.ask(path="/full").status_code == 200, "the route's own answer"
    assert house.ask().status_code == 200
    assert house.refused("queue") == 1
