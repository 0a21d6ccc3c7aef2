"""S3: nobody can tell by time what another tenant has asked. A victim primes a prompt; an attacker probes it and one
that nobody has asked, the victim probes the same two kinds (the control), and a lot decides the order of the four.

The figure is the chance that a probe of the one kind takes longer than one of the other (AUC): one half where time
tells nothing. A prefill takes about ten times what HTTP does, so that the control holds beside other work.
"""

from __future__ import annotations

import http.client
import json
import random
import tempfile
import time
from math import sqrt
from pathlib import Path

from pagemill.server.access_keys import KeyEntry, make_key, write_keys
from tests.fixtures.serve_process import ServeProcess
from tests.fixtures.tiny import tiny_llama
from tests.trust.figures import Figure

NUM_TOKENS = 512
LESS_THAN_A_BLOCK = 16
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


def measure(victim: Prober, attacker: Prober, lot: random.Random, per_arm: int) -> tuple[float, float, int]:
    """AUC of the attacker's arms, of the control's, and the most tokens that the attacker was told to be cached: a few,
    for prompts of his own that begin alike by chance."""
    times: dict[str, list[float]] = {"primed": [], "fresh": [], "own": [], "own fresh": []}
    leaked = 0

    def fresh() -> list[int]:
        return [lot.randrange(3, 250) for _ in range(NUM_TOKENS)]

    for _ in range(per_arm):
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


def count(per_arm: int, most_auc: float) -> Figure:
    """Whether time, or a usage number, tells a primed prompt from another one, with one repeat. `most_auc` bounds the
    upper bound of the AUC, whichever of the two kinds is the slower one."""
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        model = tiny_llama(place, context=1024, hidden=256, layers=2, ffn=512)
        keys, entries = {}, []
        for name in ("victim", "attacker"):
            keys[name], id, sha256 = make_key()
            entries.append(KeyEntry(name, id, sha256, tenant=name))
        write_keys(place / "keys.toml", tuple(entries))
        with ServeProcess(
            place, str(model), "--kv-cache-memory-bytes", "32MiB", "--packed-weights-cache", "off",
            "--keys", str(place / "keys.toml"),
        ) as process:  # fmt: skip
            victim, attacker = (Prober(process.url, keys[name]) for name in ("victim", "attacker"))
            found = []
            for attempt in range(2):
                crossed, control, leaked = measure(victim, attacker, random.Random(attempt), per_arm)
                bound = upper_bound(max(crossed, 1 - crossed), per_arm)
                wrong = bound > most_auc or control < CONTROL_AUC or leaked >= LESS_THAN_A_BLOCK
                told = f"AUC across tenants {crossed:.3f}, upper bound {bound:.3f}, control {control:.3f}"
                found = [f"{told}, {leaked} tokens told as cached"] if wrong else []
                if not wrong or leaked >= LESS_THAN_A_BLOCK:
                    break
            victim.close()
            attacker.close()
    also = {"probes an arm": per_arm, "repeats": attempt}
    return Figure("S3", "prompts of another tenant told by time", len(found), 1, "timings", also, found, told)
