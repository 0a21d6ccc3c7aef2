"""Loading, leaving, failing and draining: what happens to requests and to their blocks."""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from pagemill.base.errors import ModelError
from pagemill.base.step import Sample, StepPlan, StepResult
from pagemill.build import Built
from pagemill.engine.engine import EngineStats
from pagemill.engine.output import Delta, Output
from pagemill.engine.request import Sequence
from tests.fixtures.live_server import LiveServer, wait_until

LONG: dict[str, Any] = {"prompt": "Go on", "max_tokens": 1200, "ignore_eos": True, "temperature": 1, "seed": 1}


def stats(server: LiveServer) -> EngineStats:
    return server.call(lambda engine: engine.stats())


def _post(body: bytes) -> bytes:
    head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: "
    return f"{head}{len(body)}\r\n\r\n".encode() + body


def num_busy(server: LiveServer) -> int:
    found = stats(server)
    return found.num_running + found.num_waiting


def slow_down(server: LiveServer, seconds: float = 0.005) -> None:
    """Let each step take so much longer, so that what happens between two steps does not depend on the machine."""
    run = server.llm.built.executor.run

    def slowly(plan: StepPlan) -> StepResult:
        time.sleep(seconds)
        return run(plan)

    server.call(lambda engine: setattr(server.llm.built.executor, "run", slowly))


def is_idle(server: LiveServer) -> bool:
    """No request, no block held, and the pool's books are straight."""
    server.call(lambda engine: engine.cache.check())
    return num_busy(server) == 0 and server.llm.num_open == 0


def test_models_and_health_answer_while_the_model_loads(tiny_model: Path) -> None:
    go = threading.Event()

    def late(build_it: Callable[[], Built]) -> Built:
        go.wait(30)
        return build_it()

    with LiveServer(str(tiny_model), make=late, wait=False) as server, server.client() as client:
        health = client.get("/health")
        assert (health.status_code, health.json()) == (503, {"status": "loading"})
        [card] = client.get("/v1/models").json()["data"]
        assert (card["id"], card["status"]) == ("tiny", "loading")
        refused = client.post("/v1/completions", json={"prompt": "x"})
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "overloaded_error"
        go.set()
        server.wait_ready()
        assert client.get("/health").json() == {"status": "ready"}
        assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 200


def test_a_model_that_cannot_be_loaded_is_told(tiny_model: Path) -> None:
    def broken(build_it: Callable[[], Built]) -> Built:
        raise ModelError("the file is damaged; fetch it again")

    with LiveServer(str(tiny_model), make=broken, wait=False) as server, server.client() as client:
        with pytest.raises(ModelError, match="damaged"):
            server.wait_ready()
        assert client.get("/health").json() == {"status": "failed"}
        assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 503


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_blocks(live: LiveServer, stream: bool) -> None:
    before = stats(live).num_steps
    body = json.dumps({**LONG, "stream": stream}).encode()
    with socket.create_connection(("127.0.0.1", live.port)) as client:
        client.sendall(_post(body))
        assert wait_until(lambda: stats(live).num_running == 1)
    assert wait_until(lambda: is_idle(live))
    assert stats(live).num_steps - before < 1200, "it was not read to its end"


@pytest.mark.parametrize("reads", [True, False])
def test_a_client_that_leaves_leaves_nothing_of_what_was_to_be_purged(tiny_model: Path, reads: bool) -> None:
    """Also where the engine had gone on from what the client took."""
    settings = {"slow_client_s": 0.3}
    body = {**LONG, "stream": True, "n": 8, "stream_options": {"continuous_usage_stats": True}, "logprobs": 20}
    data = json.dumps({**body, "cache": {"purge_on_end": True}}).encode()
    with LiveServer(str(tiny_model), settings=settings, max_num_seqs=8) as server, socket.socket() as client:
        slow_down(server)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", server.port))
        client.sendall(_post(data))
        assert wait_until(lambda: stats(server).num_running == 8)
        if reads:
            client.recv(65536)
            client.close()
        assert wait_until(lambda: is_idle(server), 60)
        assert stats(server).num_steps < 1200, "it was not read to its end"
        assert wait_until(lambda: stats(server).cache.num_cached_blocks == 0, 5), stats(server).cache


def test_a_client_that_leaves_while_waiting_frees_its_place(tiny_model: Path) -> None:
    with LiveServer(str(tiny_model), max_num_seqs=1) as server, server.client() as first, server.client() as second:
        slow_down(server)
        with first.stream("POST", "/v1/completions", json={**LONG, "stream": True}):
            thread = threading.Thread(target=_ask_briefly, args=(second,))
            thread.start()
            assert wait_until(lambda: stats(server).num_waiting == 1)
            thread.join()
            assert wait_until(lambda: stats(server).num_waiting == 0)
            assert stats(server).num_running == 1
        assert wait_until(lambda: is_idle(server))


def _ask_briefly(client: httpx.Client) -> None:
    with pytest.raises(httpx.ReadTimeout):
        client.post("/v1/completions", json=LONG, timeout=0.5)


def test_a_failing_request_leaves_the_others_untouched(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = ["first", "second", "third"]
    body = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
    with LiveServer(str(tiny_model), max_num_seqs=8) as server, server.client() as client:
        expected = [client.post("/v1/completions", json={"prompt": each, **body}).json() for each in prompts]
        whole = Output.delta

        def broken(self: Output, sequence: Sequence, sample: Sample, num_generated: int, now_s: float) -> Delta:
            if sequence.request.params.seed == 666 and num_generated == 4:
                raise RuntimeError("the hook of one request")
            return whole(self, sequence, sample, num_generated, now_s)

        monkeypatch.setattr(Output, "delta", broken)
        answers: dict[int, httpx.Response] = {}

        def ask(index: int, **fields: Any) -> None:
            with server.client() as own:
                answers[index] = own.post("/v1/completions", json={**body, **fields})

        threads = [threading.Thread(target=ask, args=(i,), kwargs={"prompt": p}) for i, p in enumerate(prompts)]
        threads.append(threading.Thread(target=ask, args=(9,), kwargs={"prompt": "x", "seed": 666}))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers[9].status_code == 500
        assert answers[9].json()["error"]["message"] == "internal error; the server's log has it"
        texts = [answers[index].json()["choices"][0]["text"] for index in range(3)]
        assert texts == [each["choices"][0]["text"] for each in expected]
        assert wait_until(lambda: is_idle(server))


def test_a_step_that_fails_fails_what_runs_and_the_next_request_is_answered(tiny_model: Path) -> None:
    with LiveServer(str(tiny_model)) as server, server.client() as client:
        run = server.llm.built.executor.run
        failures = [RuntimeError("the step")]

        def once(plan: Any) -> Any:
            if failures and plan.sequences:
                raise failures.pop()
            return run(plan)

        server.call(lambda engine: setattr(server.llm.built.executor, "run", once))
        assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 500
        assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 200
        assert wait_until(lambda: is_idle(server))


def test_an_error_in_a_stream_is_an_event(tiny_model: Path) -> None:
    with LiveServer(str(tiny_model)) as server, server.client() as client:
        run = server.llm.built.executor.run
        calls: list[int] = []

        def fourth(plan: Any) -> Any:
            calls.append(1)
            if len(calls) == 4:
                raise RuntimeError("the step")
            return run(plan)

        server.call(lambda engine: setattr(server.llm.built.executor, "run", fourth))
        lines = client.post("/v1/completions", json={**LONG, "stream": True}).text.split("\n\n")
        assert json.loads(lines[-3].removeprefix("data: "))["error"]["type"] == "server_error"
        assert lines[-2:] == ["data: [DONE]", ""]


def test_draining_lets_requests_finish_and_refuses_new_ones(tiny_model: Path) -> None:
    server = LiveServer(str(tiny_model))
    slow_down(server)
    with server.client() as client, server.client() as late:
        late.get("/health")
        answers: list[dict[str, Any]] = []
        body = {**LONG, "max_tokens": 150}
        thread = threading.Thread(target=lambda: answers.append(client.post("/v1/completions", json=body).json()))
        thread.start()
        assert wait_until(lambda: stats(server).num_running == 1)
        server.service.drain()
        assert late.get("/health").json() == {"status": "draining"}
        assert late.post("/v1/completions", json={"prompt": "x"}).status_code == 503
        server.stop()
        thread.join()
        assert answers[0]["usage"]["completion_tokens"] == 150


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_that_the_end_of_the_server_cuts_ends_with_an_error(tiny_model: Path, stream: bool) -> None:
    with LiveServer(str(tiny_model)) as server, server.client() as client:
        slow_down(server)
        answers: list[httpx.Response] = []
        body = {**LONG, "stream": stream}
        thread = threading.Thread(target=lambda: answers.append(client.post("/v1/completions", json=body)))
        thread.start()
        assert wait_until(lambda: stats(server).num_running == 1)
        server.llm.shutdown(10)
        thread.join()
        [answer] = answers
        assert answer.status_code == (200 if stream else 503)
        lines = answer.text.split("\n\n")
        error = json.loads(lines[-3].removeprefix("data: ") if stream else answer.text)["error"]
        assert error["type"] == "overloaded_error"
        assert "shutting down" in error["message"]
        assert '"abort"' not in answer.text
        assert "data: [DONE]" in lines or not stream


def test_a_client_that_does_not_read_is_left(tiny_model: Path) -> None:
    settings = {"slow_client_s": 0.2}
    with LiveServer(str(tiny_model), settings=settings, max_num_seqs=8) as server, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", server.port))
        body = {**LONG, "stream": True, "n": 8, "stream_options": {"continuous_usage_stats": True}, "logprobs": 20}
        data = json.dumps(body).encode()
        client.sendall(_post(data))
        assert wait_until(lambda: stats(server).num_running == 8)
        assert wait_until(lambda: num_busy(server) == 0, 60)
        assert stats(server).num_steps < 1200, "it was not read to its end"


def test_many_streams_at_once_get_their_own_answers(live: LiveServer) -> None:
    prompts = [f"{index} is a number" for index in range(12)]
    body = {"temperature": 0, "max_tokens": 20, "ignore_eos": True}
    with live.client() as client:
        alone = [client.post("/v1/completions", json={"prompt": each, **body}).json() for each in prompts]
    found: dict[int, str] = {}

    def ask(index: int) -> None:
        with live.client() as client:
            text = client.post("/v1/completions", json={"prompt": prompts[index], "stream": True, **body}).text
        chunks = text.split("\n\n")[:-2]
        parts = [json.loads(each.removeprefix("data: "))["choices"][0]["text"] for each in chunks]
        found[index] = "".join(parts)

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(prompts))]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - began < 60
    assert [found[index] for index in range(len(prompts))] == [each["choices"][0]["text"] for each in alone]


def test_observers_that_fail_harm_no_request(tiny_model: Path) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("an observer")

    with LiveServer(str(tiny_model)) as server, server.client() as client:
        server.llm.observe, server.llm.leaving = broken, broken
        assert client.post("/v1/completions", json={**LONG, "max_tokens": 5}).json()["usage"]["completion_tokens"] == 5
        server.service.opened = broken
        assert client.post("/v1/completions", json=LONG).status_code == 500
        assert wait_until(lambda: is_idle(server))


FORMS: list[dict[str, Any]] = [
    {"stream": True},
    {},
    {"stream": True, "n": 3},
    {"prompt": ["one", "two", "three"]},
    {"prompt": "Long enough to be read in several chunks. " * 30},
    {"prompt": "Scored. " * 40, "prompt_logprobs": 1},
    {"response_format": {"type": "regex", "regex": "[a-z ]*"}, "ignore_eos": False, "logprobs": 2},
    {"cache": {"purge_on_end": True}, "cache_salt": "s"},
    {"presence_penalty": 1, "stream": True},
]


def test_clients_that_leave_at_any_moment_leave_nothing_behind(tiny_model: Path) -> None:
    options = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "kv_cache_memory_bytes": "1MiB"}
    with LiveServer(str(tiny_model), **options) as server:

        def come_and_go(number: int) -> None:
            rng = random.Random(number)
            for _ in range(8):
                data = json.dumps({**LONG, **rng.choice(FORMS)}).encode()
                with socket.create_connection(("127.0.0.1", server.port)) as client:
                    client.sendall(_post(data))
                    time.sleep(rng.choice([0, 0.001, 0.01, 0.05, 0.2]))

        threads = [threading.Thread(target=come_and_go, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wait_until(lambda: is_idle(server), 60)
        cache = stats(server).cache
        assert (cache.num_active_blocks, cache.num_leaked_blocks, cache.num_sequences, cache.num_rebuilds) == (
            0,
            0,
            0,
            0,
        )
        with server.client() as client:
            assert client.post("/v1/completions", json={**LONG, "max_tokens": 4}).status_code == 200
