"""S5 at the server: what one tenant is told over HTTP does not depend on what another one asks: answers, usage,
receipts, errors, headers, lists of models, and metrics.

Two worlds send the same requests by two keys to a server each. In one, the watched tenant uses the observer's own
texts, in the other texts of the same shape that have nothing in common with them. In two further worlds it asks nothing
at all, and each thing three times. All that the observer is told must be equal, but for ids and times; where the
watched key is the observer's own, something must differ: the control. Ids must be random, and times be times: nothing
else can be told in them. The names and labels of the metrics must be equal, too; their values are everybody's. And the
watched tenant's name, key and salt must be in nothing that the observer, or the reader of the metrics, is told.
"""

from __future__ import annotations

import os
import random
import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpx

from pagemill.server.access_keys import KeyEntry, make_key, write_keys
from tests.fixtures.serve_process import ROOT, ServeProcess
from tests.fixtures.tiny import tiny_llama
from tests.trust.figures import Figure

OBSERVER, CANARY, METRICS = "observer", "canary-tenant-7f3a", "metrics"
CANARY_SALT = "canary-salt-91c2"
NUM_REQUESTS = 40
MOVED = 100
IDS = ("id", "created", "date", "x-request-id", "content-length")
MODEL = "tiny"
_ID = re.compile(r"(?:cmpl|chatcmpl|req)-([0-9a-f]{24})", re.ASCII)
_ALIKE = 8  # hexadecimal digits that no two of a few hundred random ids begin with


@dataclass(slots=True)
class World:
    """One run of the requests. Mutated by `run`. num_times: how often the watched key asks each thing. since_s: when
    the server was started. told: all that the observer was told, scrubbed of ids and times; raw: as it came. series:
    names and labels of the metrics. ids: of the observer's answers. odd: ids and times that may tell something."""

    process: ServeProcess
    keys: dict[str, str]
    seed: int
    watched: str
    moved_by: int
    num_times: int = 1
    since_s: float = 0.0
    told: list[object] = field(default_factory=list)
    raw: list[str] = field(default_factory=list)
    series: set[str] = field(default_factory=set)
    ids: list[str] = field(default_factory=list)
    odd: list[str] = field(default_factory=list)

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
                if self.watched == CANARY:
                    body["user"] = CANARY
                    body |= {"cache_salt": CANARY_SALT} if "cache_salt" in body else {}
                for again in range(self.num_times):
                    if "prompt" in body:
                        body["prompt"] = [each + (self.moved_by, MOVED)[again % 2] for each in prompt]
                    other.post(path, json=body)
            for path in ("/v1/models", "/health", "/version", "/metrics", "/v1/models/x", "/tokenizer_info"):
                self._note(-1, mine.get(path))
        with self.process.client(self.keys[METRICS]) as reader:
            self.raw.append(reader.get("/metrics").text)
        self.series = {line.rpartition(" ")[0] for line in self.raw[-1].splitlines() if not line.startswith("#")}
        self.odd += alike(self.ids)
        return self

    def _note(self, number: int, answer: httpx.Response) -> None:
        self.raw.append(f"{answer.headers} {answer.text}")
        headers = {name: value for name, value in answer.headers.items() if name not in IDS}
        self.told.append((number, answer.status_code, sorted(answer.headers), headers, scrubbed(answer.json())))
        self.odd += odd_ids(answer.headers, answer.json(), len(answer.content), (self.since_s, time.time()))
        self.ids += [each for each in (answer.headers["x-request-id"], answer.json().get("id", MODEL)) if each != MODEL]


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
    """A value without what ids and times say; that they are there stays."""
    if isinstance(value, dict):
        return {name: "…" if name in IDS or _is_time(name) else scrubbed(each) for name, each in value.items()}
    return [scrubbed(each) for each in value] if isinstance(value, list) else value


def _is_time(name: str) -> bool:
    return name.endswith(("_ms", "_s"))


def odd_ids(headers: Mapping[str, str], body: Any, num_bytes: int, span: tuple[float, float]) -> list[str]:
    """What is scrubbed and may tell something: ids of another shape than random ones, times that are none or lie out of
    the span (seconds since 1970, whole ones of it), a length that is not the body's."""
    first, last = int(span[0]), span[1] + 1
    odd = [] if _ID.fullmatch(headers["x-request-id"]) else [f"x-request-id: {headers['x-request-id']}"]
    odd += [] if headers["content-length"] == str(num_bytes) else [f"content-length: {headers['content-length']}"]
    date = parsedate_to_datetime(headers["date"]).timestamp()
    odd += [] if first <= date <= last else [f"date: {headers['date']}"]
    for name, value in _pairs(body):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if name == "id" and value != MODEL and not _ID.fullmatch(str(value)):
            odd.append(f"id: {value}")
        elif name == "created" and not (is_number and first <= value <= last):
            odd.append(f"created: {value}")
        elif _is_time(name) and value is not None and not is_number:
            odd.append(f"{name}: {value}")
    return odd


def _pairs(value: Any) -> Iterator[tuple[str, Any]]:
    """Every name with its value, however deep."""
    if isinstance(value, dict):
        yield from value.items()
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _pairs(each)


def alike(ids: Sequence[str]) -> list[str]:
    """Ids that begin like another one: they count, tell a time, or come twice."""
    seen: dict[str, str] = {}
    found = []
    for each in ids:
        begin = each.rpartition("-")[2][:_ALIKE]
        if begin in seen:
            found.append(f"{each} begins like {seen[begin]}")
        seen[begin] = each
    return found


@contextmanager
def served(further: str = "") -> Iterator[tuple[ServeProcess, dict[str, str]]]:
    """A server with the keys of all three. further: code that runs in its process before anything else."""
    keys, entries = {}, []
    for name in (OBSERVER, CANARY, METRICS):
        keys[name], id, sha256 = make_key()
        role: Any = "metrics" if name == METRICS else "user"
        entries.append(KeyEntry(name, id, sha256, role=role, tenant=None if name == METRICS else name))
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        write_keys(place / "keys.toml", tuple(entries))
        model = str(tiny_llama(place))
        (place / "sitecustomize.py").write_text(further)
        path = {"PYTHONPATH": os.pathsep.join([str(place), str(ROOT / "src")])}
        with ServeProcess(
            place, model, "--kv-cache-memory-bytes", "16MiB", "--packed-weights-cache", "off",
            "--served-model-name", MODEL, "--keys", str(place / "keys.toml"), "--log-level", "error", variables=path,
        ) as process:  # fmt: skip
            yield process, keys


def world(seed: int, watched: str, moved_by: int, num_times: int = 1, further: str = "") -> World:
    """One world, on a server of its own."""
    since_s = time.time()
    with served(further) as (process, keys):
        return World(process, keys, seed, watched, moved_by, num_times, since_s).run()


def leak(one: World, other: World) -> str:
    """What tells two worlds apart, names the watched tenant, or may tell something in an id; empty for nothing."""
    for mine, theirs in zip(one.told, other.told, strict=True):
        if mine != theirs:
            return f"{mine} beside {theirs}"
    if one.num_times == other.num_times and one.series != other.series:
        return f"metrics: {sorted(one.series ^ other.series)[:4]}"
    if odd := one.odd + other.odd:
        return odd[0]
    for each in (one, other):
        secrets = (CANARY, CANARY_SALT, each.keys[CANARY], each.keys[CANARY].split("-")[1][:16])
        named = [text for text in each.raw for secret in secrets if secret in text]
        if named:
            return f"the other tenant is named: {named[0]:.200}"
    return ""


def volume_leak(seed: int, further: str = "") -> str:
    """What the observer is told of the watched tenant's asking three times as against not at all."""
    return leak(*(world(seed, CANARY, 0, num_times, further) for num_times in (0, 3)))


def count(seeds: range) -> Figure:
    """Pairs of worlds over HTTP, and how many of the controls differ."""
    found, controls, told = [], 0, 0
    for seed in seeds:
        one, other = world(seed, CANARY, 0), world(seed, CANARY, MOVED)
        if wrong := leak(one, other) or volume_leak(seed):
            found.append(f"seed {seed}: {wrong:.400}")
        controls += bool(leak(world(seed, OBSERVER, 0), world(seed, OBSERVER, MOVED)))
        told += len(one.told)
    also = {"things told over HTTP": told, "controls that differ (same key)": controls}
    return Figure("S5", "differences told over HTTP", len(found), len(seeds), "pairs of servers", also, found)
