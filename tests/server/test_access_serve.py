"""A whole server with keys, admin port, logs and traces, as a user starts it: who gets in (S13), where it listens
(S15), what tenants learn of one another (S5), and what it tells of prompts (S18)."""

from __future__ import annotations

import json
import os
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from prometheus_client.parser import text_string_to_metric_families

from pagemill.server.access_door import METRICS_ROUTE, OPEN_ROUTES
from pagemill.server.access_keys import KeyEntry, make_key, read_keys, write_keys
from pagemill.server.app import create_app
from pagemill.telemetry.catalog import CATALOG
from tests.fixtures.board import expressions
from tests.fixtures.certificate import make_certificate
from tests.fixtures.collector import Collector
from tests.fixtures.live_server import SETTINGS
from tests.fixtures.serve_process import ROOT, ServeProcess

CANARY = "canary-2c9e-secret"
PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@dataclass(slots=True)
class Served:
    """A running server, its keys and its collector. Mutated by tests: requests."""

    process: ServeProcess
    keys: dict[str, str]
    keys_path: Path
    collector: Collector

    def ask(self, who: str, prompt: str, **fields: Any) -> httpx.Response:
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 4, "temperature": 0, "ignore_eos": True, **fields}
        with self.process.client(self.keys[who]) as client:
            return client.post("/v1/completions", json=body)

    def scrape(self) -> str:
        with self.process.client(self.keys["prometheus"]) as client:
            return client.get("/metrics").text


def add_key(path: Path, name: str, **changes: Any) -> str:
    key, id, sha256 = make_key()
    before = read_keys(path) if path.exists() else ()
    write_keys(path, (*before, KeyEntry(name, id, sha256, **({"tenant": name} | changes))))
    return key


@pytest.fixture(scope="module")
def served(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    place = tmp_path_factory.mktemp("served")
    path = place / "keys.toml"
    keys = {name: add_key(path, name) for name in ("alice", "bob")}
    keys["prometheus"] = add_key(path, "prometheus", role="metrics", tenant=None)
    keys["root"] = add_key(path, "root", role="admin", tenant=None)
    with (
        Collector() as collector,
        ServeProcess(
            place, str(tiny_model), "--served-model-name", "tiny", "--kv-cache-memory-bytes", "8MiB",
            "--packed-weights-cache", "off", "--keys", str(path), "--admin-port", "0", "--log-level", "info",
            "--log-format", "json", "--otlp-traces-endpoint", collector.url,
        ) as process,
    ):  # fmt: skip
        yield Served(process, keys, path, collector)


def test_the_ready_line_says_who_may_enter_and_tells_no_key_that_the_operator_has(served: Served) -> None:
    line = served.process.out.read_text()
    assert "4 keys  admin http://127.0.0.1:" in line
    assert "pm-" not in line


# S13


def public_routes() -> list[tuple[str, str]]:
    """Method and path of every route of the application, parameters filled in, and some that there are not."""
    described = create_app(None, SETTINGS).openapi()["paths"]  # type: ignore[arg-type]
    found = [
        (method.upper(), path.replace("{name}", "tiny")) for path, methods in described.items() for method in methods
    ]
    return [*found, ("GET", METRICS_ROUTE), ("GET", "/openapi.json"), ("GET", "/admin/tenants"), ("GET", "/nowhere")]


def test_without_a_key_exactly_the_allow_list_is_open(served: Served) -> None:
    routes = public_routes()
    assert len(routes) >= 10
    with served.process.client() as client:
        answers = {(method, path): client.request(method, path).status_code for method, path in routes}
    open_routes = {path for (_, path), status in answers.items() if status != 401}
    assert open_routes == OPEN_ROUTES, answers


def test_the_public_port_has_no_admin_route_whatever_the_key(served: Served) -> None:
    for who in ("alice", "root"):
        with served.process.client(served.keys[who]) as client:
            for path in ("/admin/tenants", "/admin/drain", "/admin/cache/stats", "/admin/keys"):
                assert client.get(path).status_code in (403, 404), (who, path)
                assert client.post(path).status_code in (403, 404), (who, path)


def test_the_admin_port_opens_to_admins_alone(served: Served) -> None:
    paths = ["/health", "/metrics", "/admin/cache/stats", "/admin/cache/blocks", "/admin/tenants", "/admin/keys"]
    for key, expected in (("", 401), (served.keys["alice"], 403), (served.keys["prometheus"], 403)):
        with served.process.admin(key) as client:
            found = {path: client.get(path).status_code for path in paths}
        assert set(found.values()) <= {expected, 200 if key == served.keys["prometheus"] else expected}
        assert found["/admin/keys"] == expected
    with served.process.admin(served.keys["root"]) as client:
        assert {client.get(path).status_code for path in paths} == {200}
        assert client.get("/admin/tenants", headers={"host": "evil.example"}).status_code == 421


# S15


def test_one_socket_listens_on_loopback_and_one_for_the_admin(served: Served) -> None:
    addresses = served.process.listening()
    assert len(addresses) == 2
    assert {each.split(":")[0] for each in addresses} == {"0100007F"}


@pytest.mark.parametrize("arguments", [["--host", "0.0.0.0"], ["--host", "::"], ["--keys", "none.toml"]])
def test_a_server_that_would_be_open_to_others_does_not_start(arguments: list[str], tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", "pagemill", "serve", "--port", "0", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path, env=environment)
    assert ended.returncode == 2
    assert "pagemill keys add" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_an_admin_port_that_others_reach_does_not_start_without_tls(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", "pagemill", "serve", "--port", "0", "--admin-port", "0", "--admin-host", "0.0.0.0"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path, env=environment)
    assert ended.returncode == 2
    assert "the admin port would listen on 0.0.0.0 without TLS" in ended.stderr
    assert "Traceback" not in ended.stderr


# S5


def cached(answer: httpx.Response) -> int:
    assert answer.status_code == 200, answer.text
    return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])


def test_a_tenant_learns_nothing_of_what_others_have_asked(served: Served) -> None:
    prompt = "a text that both of them send " * 4
    assert cached(served.ask("alice", prompt)) == 0
    assert cached(served.ask("alice", prompt)) > 0, "the positive control: one's own text is found"
    answer = served.ask("bob", prompt)
    assert cached(answer) == 0
    assert answer.json()["usage"]["prompt_tokens_details"]["cache"]["miss"]["reason"] == "not seen recently"
    assert "alice" not in answer.text + str(answer.headers)
    with served.process.client(served.keys["bob"]) as client:
        assert client.get("/metrics").status_code == 403
        assert "alice" not in client.get("/v1/models").text


def test_ids_do_not_tell_how_many_others_ask(served: Served) -> None:
    ids = [served.ask(who, "x").json()["id"] for who in ("alice", "bob", "alice", "alice")]
    numbers = [int(each.split("-")[1], 16) for each in ids]
    assert len({number >> 32 for number in numbers}) == len(numbers), "no part of them counts"


def test_the_metrics_name_no_tenant_and_no_key(served: Served) -> None:
    served.ask("alice", "hello")
    text = served.scrape()
    assert not [name for name in ("alice", "bob", 'prometheus"', "root") if name in text]


# S18


def test_a_prompt_is_in_no_log_no_trace_no_metric_and_no_crash(served: Served) -> None:
    with served.process.client(served.keys["alice"]) as client:
        chat = {"model": "tiny", "max_tokens": 4, "messages": [{"role": "user", "content": CANARY}]}
        bodies: list[Any] = [
            {"model": "tiny", "prompt": CANARY, "max_tokens": 4},
            {"model": "tiny", "prompt": CANARY, "max_tokens": 4, "stream": True, "stop": CANARY},
            {"model": "tiny", "prompt": CANARY, "cache_salt": CANARY, "user": CANARY, "prompt_cache_key": CANARY},
            {"model": "tiny", "prompt": {"text": CANARY}},
            {"model": "tiny", "prompt": CANARY, "temperature": CANARY},
            {"model": "tiny", "prompt": CANARY, "temperature": -5, "max_tokens": 10**9},
            {"model": "tiny", "prompt": CANARY * 50_000},
            {"model": "tiny", "prompt": CANARY, "guided_regex": f"({CANARY}"},
            {"model": "tiny", "prompt": CANARY, "response_format": {"type": "json_schema", "json_schema": {
                "schema": {"type": CANARY}}}},
        ]  # fmt: skip
        for body in bodies:
            assert client.post("/v1/completions", json=body).status_code < 500
        tools = [{"type": "function", "function": {"name": "f", "description": CANARY}}]
        for changes in ({}, {"stream": True}, {"tools": tools}, {"messages": [{"role": CANARY, "content": CANARY}]}):
            assert client.post("/v1/chat/completions", json=chat | changes).status_code < 500
        broken = f'{{"prompt": "{CANARY}'
        headers = {"content-type": "application/json", "traceparent": PARENT}
        assert client.post(f"/v1/completions?{CANARY}=1", content=broken, headers=headers).status_code < 500
        assert client.post("/tokenize", json={"prompt": CANARY}).status_code == 200
    with served.process.admin(served.keys["root"]) as client:
        shown = "".join(
            client.get(f"/admin/{path}").text for path in ("cache/blocks", "cache/tree", "cache/stats", "tenants")
        )
    answers = served.scrape() + shown + served.process.told
    assert CANARY not in answers
    assert len(served.process.err.read_text().splitlines()) > 10, "the log is there, and was searched"
    for line in served.process.err.read_text().splitlines():
        json.loads(line)
    wait_for_spans(served)
    assert CANARY.encode() not in b"".join(served.collector.bodies)


def wait_for_spans(served: Served) -> list[Any]:
    """The spans that the collector has been sent, at least one."""
    end = time.monotonic() + 20
    spans: list[Any] = []
    while not spans and time.monotonic() < end:
        time.sleep(0.1)
        for body in list(served.collector.bodies):
            sent = ExportTraceServiceRequest()
            sent.ParseFromString(body)
            spans += [
                span for resource in sent.resource_spans for scope in resource.scope_spans for span in scope.spans
            ]
    assert spans
    return spans


def test_a_request_s_spans_are_in_its_caller_s_trace(served: Served) -> None:
    with served.process.client(served.keys["alice"]) as client:
        body = {"model": "tiny", "prompt": "hello", "max_tokens": 3}
        assert client.post("/v1/completions", json=body, headers={"traceparent": PARENT}).status_code == 200
    end = time.monotonic() + 20
    wanted = bytes.fromhex(PARENT[3:35])
    while time.monotonic() < end:
        mine = [span for span in wait_for_spans(served) if span.trace_id == wanted]
        if mine:
            break
    names = sorted(span.name for span in mine)
    assert names == ["decode", "prefill", "queue", "text_completion tiny"]


def test_each_prompt_of_a_request_has_a_span_of_its_own(served: Served) -> None:
    parent = PARENT.replace("4bf92f35", "5c002b46")
    with served.process.client(served.keys["alice"]) as client:
        body = {"model": "tiny", "prompt": ["hello", "bye"], "max_tokens": 3}
        assert client.post("/v1/completions", json=body, headers={"traceparent": parent}).status_code == 200
    end = time.monotonic() + 20
    mine: list[Any] = []
    while len(mine) < 8 and time.monotonic() < end:
        mine = [span for span in wait_for_spans(served) if span.trace_id == bytes.fromhex(parent[3:35])]
        time.sleep(0.1)
    assert len({span.span_id for span in mine}) == len(mine) == 8


# Metrics of a real server


def test_every_metric_of_the_catalogue_is_scraped(served: Served) -> None:
    for _ in range(2):
        served.ask("alice", "some words that are asked twice, so that there is a hit " * 2)
    time.sleep(0.6)  # figures that are older than half a second are read anew
    families = {family.name for family in text_string_to_metric_families(served.scrape())}
    missing = {name for name in CATALOG if name not in families and name.removesuffix("_total") not in families}
    unused = {"pagemill:http_connections_cut"}  # nobody was slow
    assert missing - unused == set()


def test_every_expression_of_the_board_finds_what_it_asks_for(served: Served) -> None:
    prompt = "words that are asked twice by one and that another one leaves " * 2
    for _ in range(2):
        served.ask("alice", prompt)
    assert served.ask("alice", "x", max_tokens=-1).status_code == 400
    with served.process.client("pm-wrong") as client:
        assert client.get("/v1/models").status_code == 401
    body = {"model": "tiny", "prompt": "y", "max_tokens": 400, "ignore_eos": True, "stream": True}
    with (
        served.process.client(served.keys["alice"]) as client,
        client.stream("POST", "/v1/completions", json=body) as answer,
    ):
        next(answer.iter_bytes())  # and leave
    time.sleep(1.0)
    samples = [s for family in text_string_to_metric_families(served.scrape()) for s in family.samples]
    names = {sample.name for sample in samples}
    never = {"pagemill:http_connections_cut_total"}  # nobody was slow
    for expression in expressions():
        for name, matchers in expression.selectors:
            assert name in names | never, (expression.panel, name)
            fixed = {(label, value) for label, value in matchers if not value.startswith("$")}
            assert name in never or any(s.name == name and fixed <= set(s.labels.items()) for s in samples), expression


def test_requests_are_counted_as_they_were(served: Served) -> None:
    def values() -> dict[str, float]:
        samples = [s for family in text_string_to_metric_families(served.scrape()) for s in family.samples]
        found: dict[str, float] = {}
        for sample in samples:
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
        return found

    before = values()
    usage = [served.ask("bob", f"prompt number {number}").json()["usage"] for number in range(3)]
    time.sleep(0.6)
    after = values()
    grown = {name: after[name] - before.get(name, 0.0) for name in after}
    assert grown["vllm:prompt_tokens_total"] == sum(each["prompt_tokens"] for each in usage)
    assert grown["vllm:generation_tokens_total"] == sum(each["completion_tokens"] for each in usage)
    assert grown["vllm:request_success_total"] == 3
    assert grown["vllm:iteration_tokens_total_sum"] > 0
    assert after["pagemill:kv_leaked_blocks"] == 0


# The file of keys changes while the server runs


def test_a_new_key_enters_and_a_removed_one_does_not_within_two_seconds(served: Served) -> None:
    served.keys["carol"] = add_key(served.keys_path, "carol")
    end = time.monotonic() + 5
    while served.ask("carol", "x").status_code == 401 and time.monotonic() < end:
        time.sleep(0.1)
    assert served.ask("carol", "x").status_code == 200
    write_keys(served.keys_path, tuple(each for each in read_keys(served.keys_path) if each.name != "carol"))
    end = time.monotonic() + 5
    while served.ask("carol", "x").status_code == 200 and time.monotonic() < end:
        time.sleep(0.1)
    assert served.ask("carol", "x").status_code == 401
    assert served.ask("alice", "x").status_code == 200


def test_a_drain_that_the_admin_asks_for_ends_the_process(tiny_model: Path, tmp_path: Path) -> None:
    with ServeProcess(
        tmp_path,
        str(tiny_model),
        "--kv-cache-memory-bytes",
        "8MiB",
        "--packed-weights-cache",
        "off",
        "--admin-port",
        "0",
    ) as process:
        assert process.admin_key.startswith("pm-"), "made at the start and told in the ready line"
        with process.admin() as client:
            assert client.post("/admin/drain").json()["draining"]
        assert process.process.wait(30) == 0


def test_tls_and_a_key_of_the_command_line(tiny_model: Path, tmp_path: Path) -> None:
    certificate, private = make_certificate(tmp_path)
    key = "a-key-that-is-long-enough"
    with ServeProcess(
        tmp_path, str(tiny_model), "--kv-cache-memory-bytes", "8MiB", "--packed-weights-cache", "off",
        "--host", "0.0.0.0", "--ssl-certfile", str(certificate), "--ssl-keyfile", str(private),
        variables={"PAGEMILL_API_KEY": key},
    ) as process:  # fmt: skip
        assert process.url.startswith("https://0.0.0.0:")
        url = process.url.replace("0.0.0.0", "127.0.0.1")
        trusted = ssl.create_default_context(cafile=str(certificate))
        with httpx.Client(base_url=url, verify=trusted, trust_env=False, timeout=60) as client:
            assert client.get("/v1/models").status_code == 401
            assert client.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200
        with (
            httpx.Client(base_url=url.replace("https", "http"), trust_env=False) as client,
            pytest.raises(httpx.HTTPError),
        ):
            client.get("/health")
        assert key not in process.told
        assert process.end() == 0
