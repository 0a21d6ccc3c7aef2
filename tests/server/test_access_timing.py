"""Nobody can tell by time what another tenant has asked (S3): a victim primes a prompt, an attacker probes it and one
that nobody has asked, in an order by lot; the control is the victim's own probe, which time does tell apart."""

from __future__ import annotations

import http.client
import json
import os
import random
import time
from math import sqrt
from pathlib import Path

import pytest

from pagemill.server.access_keys import KeyEntry, make_key, write_keys
from tests.fixtures.serve_process import ServeProcess
from tests.fixtures.tiny import tiny_llama

NUM_TRIALS = int(os.environ.get("PAGEMILL_TIMING_TRIALS", "200"))
NUM_TOKENS = 512
MOST_AUC = 0.60
CONTROL_AUC = 0.95


def auc(slow: list[float], fast: list[float]) -> float:
    """The chance that one of `slow` is longer than one of `fast` (Mann and Whitney, 1947)."""
    ranked = sorted([(value, 1) for value in slow] + [(value, 0) for value in fast])
    seen = wins = 0.0
    for _, is_slow in ranked:
        if is_slow:
            wins += seen
        else:
            seen += 1
    return wins / (len(slow) * len(fast))


def upper_bound(value: float, count: int) -> float:
    """One-sided 95 % upper bound of an AUC with `count` in each arm (Hanley and McNeil, Radiology 143, 1982)."""
    q1, q2 = value / (2 - value), 2 * value**2 / (1 + value)
    variance = value * (1 - value) + (count - 1) * (q1 - value**2) + (count - 1) * (q2 - value**2)
    return value + 1.645 * sqrt(variance) / count


def test_the_statistic_is_the_one_that_it_says() -> None:
    assert auc([3, 4], [1, 2]) == 1.0
    assert auc([1, 2], [3, 4]) == 0.0
    assert auc([1, 4], [2, 3]) == 0.5
    assert upper_bound(0.5, 400) == pytest.approx(0.534, abs=0.002)


class Prober:
    """One tenant's connection. Mutated by requests."""

    def __init__(self, url: str, key: str) -> None:
        self._connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
        self._headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}

    def ask(self, prompt: list[int]) -> tuple[float, int]:
        """Seconds until the answer's only token is here, and how many tokens its usage says were cached."""
        body = json.dumps({"prompt": prompt, "max_tokens": 1, "temperature": 0, "ignore_eos": True})
        began = time.perf_counter()
        self._connection.request("POST", "/v1/completions", body, self._headers)
        answer = json.loads(self._connection.getresponse().read())
        took = time.perf_counter() - began
        return took, answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    def close(self) -> None:
        """End the connection."""
        self._connection.close()


def measure(victim: Prober, attacker: Prober, lot: random.Random) -> tuple[float, float, int]:
    """AUC of the attacker's arms, of the control's, and the most tokens that the attacker was told to be cached: a few,
    for prompts of his own that begin alike by chance."""
    times: dict[str, list[float]] = {"primed": [], "fresh": [], "own": [], "own fresh": []}
    leaked = 0

    def fresh() -> list[int]:
        return [lot.randrange(3, 250) for _ in range(NUM_TOKENS)]

    for _ in range(NUM_TRIALS):
        primed = fresh()
        victim.ask(primed)
        probes = [("primed", attacker, primed), ("fresh", attacker, fresh())]
        probes += [("own", victim, primed), ("own fresh", victim, fresh())]
        lot.shuffle(probes)
        for arm, prober, prompt in probes:
            took, cached = prober.ask(prompt)
            times[arm].append(took)
            leaked = max(leaked, cached) if prober is attacker else leaked
    return auc(times["fresh"], times["primed"]), auc(times["own fresh"], times["own"]), leaked


def test_time_tells_a_tenant_s_own_texts_and_no_others(tmp_path: Path) -> None:
    # A prefill takes about ten times what HTTP does, so that the control holds beside other work on the machine.
    model = tiny_llama(tmp_path, context=1024, hidden=256, layers=2, ffn=768)
    keys, entries = {}, []
    for name in ("victim", "attacker"):
        keys[name], id, sha256 = make_key()
        entries.append(KeyEntry(name, id, sha256, tenant=name))
    write_keys(tmp_path / "keys.toml", tuple(entries))
    with ServeProcess(
        tmp_path, str(model), "--kv-cache-memory-bytes", "32MiB", "--packed-weights-cache", "off",
        "--keys", str(tmp_path / "keys.toml"),
    ) as process:  # fmt: skip
        victim, attacker = (Prober(process.url, keys[name]) for name in ("victim", "attacker"))
        for attempt in range(2):  # one repeat
            crossed, control, leaked = measure(victim, attacker, random.Random(attempt))
            bound = upper_bound(max(crossed, 1 - crossed), NUM_TRIALS)
            print(f"S3: {NUM_TRIALS} per arm: across tenants AUC {crossed:.3f} (≤ {bound:.3f}), control {control:.3f}")
            assert leaked < 16, "less than a block, of his own"
            if bound <= MOST_AUC and control >= CONTROL_AUC:
                break
        victim.close()
        attacker.close()
    assert control >= CONTROL_AUC, "the control must see what it should see"
    assert bound <= MOST_AUC
