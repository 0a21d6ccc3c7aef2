"""From what a load generator noted to the figures of a run: throughput, first tokens, times between tokens, goodput,
hits. Owns these definitions; nothing is run here.

A run is judged within its window: from `warmup_s` after its begin to its end, or to the moment when a user found
nothing left to ask (from its begin, where that came before warmup_s). Tokens count when they come, a first token and a
time between two tokens where (the later of) them came in the window, a request where it ended in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from pagemill.base.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Objective:
    """When a request was served well: its first token within ttft_s of when it was due, and 95 of 100 of its times
    between tokens within itl_s. Raises ConfigError for times that are not above 0."""

    ttft_s: float
    itl_s: float

    def __post_init__(self) -> None:
        for flag, value in (("--slo-ttft", self.ttft_s), ("--slo-itl", self.itl_s)):
            if value <= 0:
                raise ConfigError(f"{flag} is {1e3 * value:g} ms; give a time above 0, as 2s or 100ms")


@dataclass(frozen=True, slots=True)
class LoadFigures:
    """Of one run. tokens_per_s: delivered. ttft_s, itl_s: of all requests. good_per_s: requests that met the objective;
    num_judged: those that met or missed it. num_waiting: had no token when the run ended. hit_ratio: cached ÷ prompt
    tokens of requests that ended, None where the server does not tell. errors: of failed requests, the first few.
    generator_s, server_s: CPU seconds of the whole run, which took run_s."""

    window_s: float
    tokens_per_s: float
    requests_per_s: float
    ttft_s: tuple[float, ...]
    itl_s: tuple[float, ...]
    num_good: int
    num_judged: int
    num_waiting: int
    num_failed: int
    hit_ratio: float | None
    errors: tuple[str, ...]
    generator_s: float
    server_s: float
    run_s: float
    latest_s: float

    @property
    def good_per_s(self) -> float:
        return self.num_good / self.window_s

    @property
    def good_share(self) -> float | None:
        """Of the requests that could be judged; None without any."""
        return self.num_good / self.num_judged if self.num_judged else None


def quantile_ms(seconds: tuple[float, ...], share: float) -> float | None:
    """A quantile in milliseconds, None without samples."""
    return 1e3 * float(np.quantile(seconds, share)) if seconds else None


def figures_of(told: dict[str, Any], warmup_s: float, objective: Objective, server_s: float) -> LoadFigures:
    """The figures of a run. told: what `serve_load.run_plan` returned; server_s: the server's CPU time."""
    end_s = told["end_s"] if told["idle_s"] is None else told["idle_s"]
    begin_s = told["begin_s"] + (warmup_s if told["begin_s"] + warmup_s < end_s else 0.0)
    window_s = max(end_s - begin_s, 1e-9)
    requests = told["requests"]
    tokens = 0.0
    ttft: list[float] = []
    itl: list[float] = []
    verdicts: list[bool] = []
    num_ended = num_prompt = num_cached = 0
    tells = False
    for each in requests:
        times = each["times"]
        inside = [time_s for time_s in times if begin_s < time_s <= end_s]
        tokens += len(inside) * _tokens_per_event(each)
        if times and begin_s < times[0] <= end_s:
            ttft.append(times[0] - each["due_s"])
        itl += [later - earlier for earlier, later in pairwise(times) if begin_s < later <= end_s]
        if (verdict := _verdict(each, objective, begin_s, end_s)) is not None:
            verdicts.append(verdict)
        if each["error"] is None and each["end_s"] is not None and begin_s < each["end_s"] <= end_s:
            num_ended += 1
            cached = _cached(each["usage"])
            if cached is not None:
                tells = True
                num_cached += cached
                num_prompt += each["usage"]["prompt_tokens"]
    errors = [each["error"] for each in requests if each["error"] is not None]
    return LoadFigures(
        window_s=window_s,
        tokens_per_s=tokens / window_s,
        requests_per_s=num_ended / window_s,
        ttft_s=tuple(ttft),
        itl_s=tuple(itl),
        num_good=sum(verdicts),
        num_judged=len(verdicts),
        num_waiting=sum(each["end_s"] is None and not each["times"] for each in requests),
        num_failed=len(errors),
        hit_ratio=num_cached / num_prompt if tells and num_prompt else None,
        errors=tuple(dict.fromkeys(errors))[:3],
        generator_s=told["cpu_s"],
        server_s=server_s,
        run_s=told["end_s"] - told["begin_s"],
        latest_s=max((each["sent_s"] - each["due_s"] for each in requests), default=0.0),
    )


def _tokens_per_event(request: dict[str, Any]) -> float:
    """How many tokens an event with text stands for: those that end within a character carry none. Of requests that
    were cut it is not known, and 1 is close."""
    events = len(request["times"])
    if not events or request["end_s"] is None:
        return 1.0
    usage = request["usage"]
    if usage is not None and usage.get("completion_tokens"):
        return float(usage["completion_tokens"]) / events
    return request["max_tokens"] / events if request["finish_reason"] == "length" else 1.0


def _cached(usage: dict[str, Any] | None) -> int | None:
    details = (usage or {}).get("prompt_tokens_details") or {}
    found = details.get("cached_tokens")
    return None if found is None else int(found)


def _verdict(request: dict[str, Any], objective: Objective, begin_s: float, end_s: float) -> bool | None:
    """Whether a request met the objective. None where that was not yet known when the run ended, and for requests that
    ended before the window or were missed before it."""
    due_s, times = request["due_s"], request["times"]
    limit_s = due_s + objective.ttft_s
    if request["error"] is not None:
        return False if request["end_s"] is None or begin_s < request["end_s"] <= end_s else None
    if request["end_s"] is None:
        is_late = (times[0] if times else end_s) > limit_s
        return False if is_late else None
    if not begin_s < request["end_s"] <= end_s:
        return None
    gaps = [later - earlier for earlier, later in pairwise(times)]
    return bool(times) and times[0] <= limit_s and (not gaps or float(np.quantile(gaps, 0.95)) <= objective.itl_s)
