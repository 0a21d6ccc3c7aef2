"""S3: nobody can tell by time what another tenant has asked. A victim primes prompts; an attacker probes them and ones
that nobody has asked; the victim probes its own again, and ones that nobody has asked (the control). A lot decides the
order of all probes; priming is not timed.

The figure is the chance that probes of the one kind take longer than those of the other (AUC): one half where time
tells nothing. Other work of the machine only ever adds to a time, so that an attacker would repeat himself and take
the least: so does this, with another prompt of the same kind, since a second probe of one meets the first one's blocks.
"""

from __future__ import annotations

import http.client
import json
import random
import tempfile
import time
from dataclasses import dataclass
from math import inf, sqrt
from pathlib import Path

from pagemill.server.access_keys import KeyEntry, make_key, write_keys
from tests.fixtures.serve_process import ServeProcess
from tests.fixtures.tiny import tiny_llama
from tests.trust.figures import Figure

NUM_TOKENS = 512
LESS_THAN_A_BLOCK = 16
CONTROL_AUC = 0.95
REPEATS = 2  # probes of which the least counts


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


@dataclass(slots=True)
class Found:
    """What was measured. Mutated by `measure`. crossed, control: AUC of the attacker's and the victim's own arms.
    leaked: the most tokens that the attacker was told to be cached: a few, for prompts of his own that begin alike by
    chance. num_own_hits: probes of the victim that were told of a hit."""

    crossed: float = 0.5
    control: float = 0.5
    leaked: int = 0
    num_own_hits: int = 0


def measure(victim: Prober, attacker: Prober, lot: random.Random, per_arm: int) -> Found:
    """`per_arm` times the least of REPEATS probes, in each arm."""
    found = Found()
    times: dict[str, list[float]] = {"primed": [], "fresh": [], "own": [], "own fresh": []}

    def fresh() -> list[int]:
        return [lot.randrange(3, 250) for _ in range(NUM_TOKENS)]

    for _ in range(per_arm):
        least = dict.fromkeys(times, inf)
        probes = []
        for _ in range(REPEATS):
            primed = fresh()
            victim.ask(primed)
            probes += [("primed", attacker, primed), ("fresh", attacker, fresh())]
            probes += [("own", victim, primed), ("own fresh", victim, fresh())]
        lot.shuffle(probes)
        for arm, prober, prompt in probes:
            took, cached = prober.ask(prompt)
            least[arm] = min(least[arm], took)
            if prober is attacker:
                found.leaked = max(found.leaked, cached)
            elif arm == "own":
                found.num_own_hits += cached >= NUM_TOKENS - LESS_THAN_A_BLOCK
        for arm, took in least.items():
            times[arm].append(took)
    found.crossed = auc(times["fresh"], times["primed"])
    found.control = auc(times["own fresh"], times["own"])
    return found


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
            failed = []
            for attempt in range(2):
                found = measure(victim, attacker, random.Random(attempt), per_arm)
                bound = upper_bound(max(found.crossed, 1 - found.crossed), per_arm)
                leaks = found.leaked >= LESS_THAN_A_BLOCK
                wrong = bound > most_auc or found.control < CONTROL_AUC or leaks
                told = f"AUC across tenants {found.crossed:.3f}, upper bound {bound:.3f}, control {found.control:.3f}"
                failed = [f"{told}, {found.leaked} tokens told as cached"] if wrong else []
                if not wrong or leaks:
                    break
            victim.close()
            attacker.close()
    num_probes = REPEATS * per_arm
    also = {"probes an arm": num_probes, "of the control's that hit": found.num_own_hits, "repeats": attempt}
    return Figure("S3", "prompts of another tenant told by time", len(failed), 1, "timings", also, failed, told)
