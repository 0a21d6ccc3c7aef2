"""However a request ends, also one that dies before it enters the engine's batch, the metrics count it once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pagemill.base.clock import MonotonicClock
from pagemill.server.access import KeyRing
from pagemill.server.access_door import Door
from pagemill.server.access_listen import HostCheck
from pagemill.server.admin_metrics import EngineFigures
from pagemill.telemetry.metrics import Metrics
from pagemill.telemetry.observe import EngineObserver
from tests.fixtures.live_server import LiveServer, wait_until
from tests.server.test_life import slow_down

LONG: dict[str, Any] = {"prompt": "Go on", "max_tokens": 1200, "ignore_eos": True, "temperature": 1, "stream": True}


class Counted:
    """A server of one place and one waiting request, whose requests are counted. Mutated by requests."""

    def __init__(self, model: str) -> None:
        self.metrics = Metrics("tiny")
        clock = MonotonicClock()
        observer = EngineObserver(self.metrics)
        hosts, ring = HostCheck(), KeyRing(None, [], clock)
        self.server = LiveServer(
            model,
            wrappers=[lambda app: Door(app, ring, self.metrics, hosts=hosts)],
            max_num_seqs=1,
            max_queued_requests=1,
        )
        figures = EngineFigures(self.metrics, observer, clock)
        self.server.llm.observe, self.server.llm.leaving = figures.saw, figures.left

        def opened(request_ids: Any, asks: Any, visitor: Any) -> None:
            for request_id, (token_ids, params, _) in zip(request_ids, asks, strict=True):
                observer.added(request_id, len(token_ids), params.n)

        self.server.service.opened = opened

    def values(self, name: str) -> dict[str, float]:
        return {each.labels[-1]: each.value for each in self.metrics[name].samples() if each.value}

    @property
    def num_waiting(self) -> int:
        return self.server.call(lambda engine: engine.stats()).num_waiting


@pytest.fixture
def counted(tiny_model: Path) -> Iterator[Counted]:
    made = Counted(str(tiny_model))
    slow_down(made.server)
    yield made
    made.server.stop()


@pytest.mark.parametrize("n", [1, 2])
def test_requests_that_end_before_they_enter_are_counted_by_how_they_end(counted: Counted, n: int) -> None:
    with counted.server.client() as client, client.stream("POST", "/v1/completions", json=LONG) as running:
        chunks = running.iter_bytes()
        next(chunks)  # it has the only place
        late = client.post("/v1/completions", json={"prompt": "x", "n": n, "deadline_s": 0.05})
        assert late.status_code == 504
        with client.stream("POST", "/v1/completions", json={**LONG, "n": n}):  # the only one that may wait
            assert wait_until(lambda: counted.num_waiting == n)
            refused = [client.post("/v1/completions", json={"prompt": ["x", "y"], "n": n}) for _ in range(3)]
            assert [each.status_code for each in refused] == [429] * 3
        assert wait_until(lambda: counted.num_waiting == 0), "it was left"
    assert wait_until(lambda: sum(counted.values("vllm:request_success").values()) == 3)
    assert counted.values("vllm:request_success") == {"error": 1, "abort": 2}
    assert counted.values("pagemill:http_refused") == {"queue": 3}
    assert counted.values("pagemill:kv_lookup_tokens") == {"miss": len(LONG["prompt"])}, "of the one that entered"
