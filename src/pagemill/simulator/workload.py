"""Loads made from a seed, as traces: what eviction policies meet when no recording is at hand. Owns their shapes."""

from __future__ import annotations

import random
from collections.abc import Callable
from heapq import heapify, heappop, heappush
from itertools import accumulate, count

from pagemill.base.errors import ConfigError
from pagemill.simulator.trace import Request, Trace

BLOCK_TOKENS = 16


def _request(time_s: float, blocks: list[int]) -> Request:
    return Request(time_s, len(blocks) * BLOCK_TOKENS, BLOCK_TOKENS, tuple(blocks))


def chat(num_requests: int, rng: random.Random) -> list[Request]:
    """Conversations that grow turn by turn behind one system prompt; most end after one turn."""
    ids = count()
    system = [next(ids) for _ in range(4)]
    due: list[tuple[float, int, list[int]]] = []
    found: list[Request] = []
    now_s, order = 0.0, count()
    while len(found) < num_requests:
        now_s += rng.expovariate(1.0)
        heappush(due, (now_s, next(order), list(system)))
        while due and due[0][0] <= now_s and len(found) < num_requests:
            time_s, _, chain = heappop(due)
            chain = chain + [next(ids) for _ in range(rng.randint(2, 24))]
            found.append(_request(time_s, chain))
            if rng.random() < 0.45:
                heappush(due, (time_s + 20 + rng.expovariate(1 / 120), next(order), chain))
    return found


def agents(num_requests: int, rng: random.Random) -> list[Request]:
    """A few agents at a time, each a chain that grows at every call, call after call."""
    ids = count()
    tools = [next(ids) for _ in range(30)]
    running = [(rng.random() * 30, each, list(tools)) for each in range(40)]
    heapify(running)
    found: list[Request] = []
    while len(found) < num_requests:
        time_s, agent, chain = heappop(running)
        chain = chain + [next(ids) for _ in range(rng.randint(1, 4))]
        found.append(_request(time_s, chain))
        if len(chain) > 120:
            chain = list(tools)
        heappush(running, (time_s + 1 + rng.expovariate(1 / 8), agent, chain))
    return found


def documents(num_requests: int, rng: random.Random) -> list[Request]:
    """Questions about documents whose popularity follows Zipf's law, exponent 0.9; the popular ones change slowly."""
    num_documents, length = 1500, 24
    weights = list(accumulate(1 / (rank + 1) ** 0.9 for rank in range(num_documents)))
    ids = count(num_documents * length * 4)
    found = []
    for index in range(num_requests):
        rank = rng.choices(range(num_documents), cum_weights=weights)[0]
        document = (rank + index // 40) % (num_documents * 4)
        chain = [*range(document * length, (document + 1) * length), *(next(ids) for _ in range(rng.randint(1, 4)))]
        found.append(_request(float(index), chain))
    return found


def sweep(num_requests: int, rng: random.Random) -> list[Request]:
    """A chat that a batch job interrupts for a fifth of the time, with prompts that never come back."""
    ids = count(1 << 40)
    found = []
    for index, request in enumerate(chat(num_requests, rng)):
        flooded = index // 200 % 5 == 4
        blocks = [next(ids) for _ in range(60)] if flooded else list(request.blocks)
        found.append(_request(request.time_s, blocks))
    return found


def loop(num_requests: int, rng: random.Random) -> list[Request]:
    """The same prompts in the same order, over and over: what is used next is what was used longest ago."""
    length, prompts = 30, 240 + rng.randrange(4)
    return [
        _request(float(index), list(range(index % prompts * length, (index % prompts + 1) * length)))
        for index in range(num_requests)
    ]


def zipf(num_requests: int, rng: random.Random) -> list[Request]:
    """Short prompts whose popularity follows Zipf's law, exponent 1.0, each on its own, for ever the same."""
    num_prompts, length = 20_000, 3
    weights = list(accumulate(1 / (rank + 1) for rank in range(num_prompts)))
    ranks = rng.choices(range(num_prompts), cum_weights=weights, k=num_requests)
    return [_request(float(index), list(range(rank * length, (rank + 1) * length))) for index, rank in enumerate(ranks)]


def shifting(num_requests: int, rng: random.Random) -> list[Request]:
    """What is popular changes at once, again and again: a few documents, a loop, conversations, a scan, and so on."""
    phase = max(1, num_requests // 12)
    talks = iter(chat(num_requests, rng))
    ids = count(1 << 42)
    found = []
    for index in range(num_requests):
        kind, number = index // phase % 4, index // phase
        if kind == 0:
            start = (1 << 41) + (number * 400 + int(rng.paretovariate(0.7)) % 400) * 20
            blocks = list(range(start, start + 20))
        elif kind == 1:
            start = (1 << 43) + (number * 400 + index % 150) * 30
            blocks = list(range(start, start + 30))
        elif kind == 2:
            blocks = list(next(talks).blocks)
        else:
            blocks = [next(ids) for _ in range(25)]
        found.append(_request(float(index), blocks))
    return found


GENERATORS: dict[str, Callable[[int, random.Random], list[Request]]] = {
    each.__name__: each for each in (chat, agents, documents, sweep, loop, zipf, shifting)
}


def generate(name: str, num_requests: int, seed: int) -> Trace:
    """A trace of `num_requests` requests in blocks of 16 tokens. Raises ConfigError where the name is unknown."""
    maker = GENERATORS.get(name)
    if maker is None:
        raise ConfigError(f"load {name!r} is unknown; there are {', '.join(GENERATORS)}")
    return Trace(name, BLOCK_TOKENS, tuple(maker(num_requests, random.Random(seed))))
