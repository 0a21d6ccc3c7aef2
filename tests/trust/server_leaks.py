"""S5 at the server: what one tenant is told over HTTP does not depend on what another one asks: answers, usage,
receipts, errors, headers, lists of models, and metrics.

Two worlds send the same requests by two keys to a server each. In one, the watched tenant uses the observer's own
texts, in the other texts of the same shape that have nothing in common with them. All that the observer is told must be
equal, but for ids and times; where the watched key is the observer's own, something must differ: the control. And the
watched tenant's name, key and salt must be in nothing that the observer, or the reader of the metrics, is told.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from pagemill.server.access_keys import KeyEntry, make_key, write_keys
from tests.fixtures.serve_process import ServeProcess
from tests.fixtures.tiny import tiny_llama
from tests.trust.figures import Figure

OBSERVER, CANARY, METRICS = "observer", "canary-tenant-7f3a", "metrics"
CANARY_SALT = "canary-salt-91c2"
NUM_REQUESTS = 40
MOVED = 100
IDS = ("id", "created", "date", "x-request-id", "content-length")


@dataclass(slots=True)
class World:
    """One run of the requests. Mutated by `run`. told: all that the observer was told, scrubbed of ids and times; raw:
    as it came."""

    process: ServeProcess
    keys: dict[str, str]
    seed: int
    watched: str
    moved_by: int
    told: list[object] = field(default_factory=list)
    raw: list[str] = field(default_factory=list)

    def run(self) -> World:
        """Send the requests."""
        draw = random.Random(self.seed)
        texts = [[draw.randrange(3, 90) for _ in range(80)] for _ in range(4)]
        with self.process.client(self.keys[OBSERVER]) as mine, self.process.client(self.keys[self.watched]) as other:
            for number in range(NUM_REQUESTS):
                prompt = draw.choice(texts)[: draw.choice((20, 48, 64, 80))] + [draw.randrange(3, 90)] * draw.randrange(
                    3
                )
                path, body = _request(draw, prompt)
                if draw.random() < 0.5:
                    self._note(number, mine.post(path, json=body))
                    continue
                if "prompt" in body:
                    body["prompt"] = [each + self.moved_by for each in prompt]
                if self.watched == CANARY:
                    body["user"] = CANARY
                    body |= {"cache_salt": CANARY_SALT} if "cache_salt" in body else {}
                other.post(path, json=body)
            for path in ("/v1/models", "/health", "/version", "/metrics", "/v1/models/x", "/tokenizer_info"):
                self._note(-1, mine.get(path))
        with self.process.client(self.keys[METRICS]) as reader:
            self.raw.append(reader.get("/metrics").text)
        return self

    def _note(self, number: int, answer: httpx.Response) -> None:
        self.raw.append(f"{answer.headers} {answer.text}")
        headers = {name: value for name, value in answer.headers.items() if name not in IDS}
        self.told.append((number, answer.status_code, headers, scrubbed(answer.json())))


def _request(draw: random.Random, prompt: list[int]) -> tuple[str, dict[str, Any]]:
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": draw.randint(1, 6), "temperature": 0, "ignore_eos": True}
    kind = draw.random()
    if kind < 0.1:
        return "/v1/completions", body | {"temperature": -1}
    if kind < 0.2:
        return "/detokenize", {"tokens": prompt}
    if kind < 0.35:
        return "/v1/completions", body | {"cache_salt": "s"}
    if kind < 0.45:
        return "/v1/completions", body | {"cache": {"retain": [{"from": 0, "ttl": "60s"}]}}
    return "/v1/completions", body


def scrubbed(value: Any) -> Any:
    """A value without ids and times."""
    if isinstance(value, dict):
        kept = {name: each for name, each in value.items() if name not in IDS and not name.endswith(("_ms", "_s"))}
        return {name: scrubbed(each) for name, each in kept.items()}
    return [scrubbed(each) for each in value] if isinstance(value, list) else value


@contextmanager
def served() -> Iterator[tuple[ServeProcess, dict[str, str]]]:
    """A server with the keys of all three."""
    keys, entries = {}, []
    for name in (OBSERVER, CANARY, METRICS):
        keys[name], id, sha256 = make_key()
        role: Any = "metrics" if name == METRICS else "user"
        entries.append(KeyEntry(name, id, sha256, role=role, tenant=None if name == METRICS else name))
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        write_keys(place / "keys.toml", tuple(entries))
        model = str(tiny_llama(place))
        with ServeProcess(
            place, model, "--kv-cache-memory-bytes", "16MiB", "--packed-weights-cache", "off",
            "--served-model-name", "tiny", "--keys", str(place / "keys.toml"), "--log-level", "error",
        ) as process:  # fmt: skip
            yield process, keys


def world(seed: int, watched: str, moved_by: int) -> World:
    """One world, on a server of its own."""
    with served() as (process, keys):
        return World(process, keys, seed, watched, moved_by).run()


def leak(one: World, other: World) -> str:
    """What tells two worlds apart, or names the watched tenant; empty for nothing."""
    for mine, theirs in zip(one.told, other.told, strict=True):
        if mine != theirs:
            return f"{mine} beside {theirs}"
    secrets = (CANARY, CANARY_SALT, one.keys[CANARY], one.keys[CANARY].split("-")[1][:16])
    named = [text for text in one.raw for secret in secrets if secret in text]
    return f"the other tenant is named: {named[0]:.200}" if named else ""


def count(seeds: range) -> Figure:
    """Pairs of worlds over HTTP, and how many of the controls differ."""
    found, controls, told = [], 0, 0
    for seed in seeds:
        one, other = world(seed, CANARY, 0), world(seed, CANARY, MOVED)
        if wrong := leak(one, other):
            found.append(f"seed {seed}: {wrong:.400}")
        controls += bool(leak(world(seed, OBSERVER, 0), world(seed, OBSERVER, MOVED)))
        told += len(one.told)
    also = {"things told over HTTP": told, "controls that differ (same key)": controls}
    return Figure("S5", "differences told over HTTP", len(found), len(seeds), "pairs of servers", also, found)
