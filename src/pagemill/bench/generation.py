"""One generation of forced length, timed token by token through `LLM.stream`; and what such runs will take.

Owns the clock readings and the estimate. Which runs are compared, and how, is each bench's own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pagemill.base.clock import MonotonicClock
from pagemill.base.params import SamplingParams
from pagemill.build import Built
from pagemill.cache.manager import CacheManager, CacheMode
from pagemill.engine.engine import Engine
from pagemill.llm import LLM

_PROBE_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Generation:
    """One run. seconds: for each token, from asking for it to having it (the first: reading the prompt). complete:
    False where it was interrupted. barrier_ns: of the thread pool, just before."""

    mode: str
    token_ids: tuple[int, ...]
    seconds: tuple[float, ...]
    complete: bool
    barrier_ns: float

    def total_s(self, num_tokens: int | None = None) -> float:
        """Seconds of the first `num_tokens` tokens, of all unless given."""
        return float(sum(self.seconds[:num_tokens]))


def second_engine(built: Built, mode: CacheMode) -> LLM:
    """An LLM over the same executor, weights and arena as `built`, with a scheduler and cache manager of its own in
    another mode. The two must take turns by whole requests, for both count the arena's blocks as theirs; only between
    two steps in mode none, which keeps nothing there, may the other one run a request."""
    tokenizer = built.tokenizer

    def decode(token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        return "" if tokenizer is None else tokenizer.decode(token_ids, skip_special=skip_special_tokens)

    config = replace(built.config, kv_cache=mode)
    cache = CacheManager(built.num_blocks, config.block_size, mode)
    engine = Engine(built.executor, cache, built.engine.limits, decode, MonotonicClock(), seed=config.seed)
    return LLM.from_built(replace(built, config=config, engine=engine))


def generate_timed(
    llm: LLM,
    prompt: Sequence[int],
    num_tokens: int,
    *,
    mode: str,
    barrier_ns: float = 0.0,
    after_token: Callable[[int, float], bool] | None = None,
) -> Generation:
    """Generate `num_tokens` greedily, past any end of text. after_token(index, seconds) runs between two tokens, off
    the clock; it returns False to end the run there."""
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    token_ids: list[int] = []
    seconds: list[float] = []
    stream = llm.stream({"prompt_token_ids": list(prompt)}, params)
    began = time.perf_counter()
    for delta in stream:
        seconds.append(time.perf_counter() - began)
        token_ids += delta.token_ids
        if after_token is not None and not after_token(len(seconds) - 1, seconds[-1]):
            break
        began = time.perf_counter()
    stream.close()
    return Generation(mode, tuple(token_ids), tuple(seconds), len(token_ids) == num_tokens, barrier_ns)


@dataclass(frozen=True, slots=True)
class Estimate:
    """Expected seconds of each token of one run; expected[i] is token i's."""

    expected: tuple[float, ...]

    @property
    def total_s(self) -> float:
        return sum(self.expected)


def estimate(llm: LLM, prompt: Sequence[int], num_tokens: int, *, recompute: bool) -> Estimate:
    """What a run will take, from a few positions: the longest first, which also warms up code and scratch memory.

    recompute: True in mode none, where one step at a length is one prompt of that length; else a few tokens are
    decoded behind prompts of each length.
    """
    first, last = len(prompt), len(prompt) + num_tokens - 1
    lengths = sorted({last, (first + last) // 2, first}, reverse=True)
    costs: dict[int, float] = {}
    for length in (lengths[0], *lengths):
        costs[length] = _step_s(llm, stretched(prompt, length), recompute, last + 1)
    known = sorted(costs)
    expected = np.interp(np.arange(first, last + 1), known, [costs[each] for each in known])
    return Estimate(tuple(float(each) for each in expected))


def stretched(prompt: Sequence[int], length: int) -> list[int]:
    """`length` ids: the prompt over and over, or its beginning."""
    return [prompt[index % len(prompt)] for index in range(length)]


def _step_s(llm: LLM, prompt: list[int], recompute: bool, longest: int) -> float:
    if recompute:
        return generate_timed(llm, prompt, 1, mode="").seconds[0]
    count = min(_PROBE_TOKENS, longest - 1)
    probe = prompt[: longest - count]
    seconds = generate_timed(llm, probe, count, mode="").seconds
    return float(np.median(seconds[1:] or seconds))
