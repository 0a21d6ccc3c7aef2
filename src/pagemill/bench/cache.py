"""`bench cache`: the KV cache in memory, row by row, each group beside its goals.

Owns the list of groups and their order; each is measured by a file of its own, on one loaded model or on none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from difflib import get_close_matches

from pagemill.base.errors import ConfigError
from pagemill.bench import cache_control, cache_cost, cache_streams, cache_ttft
from pagemill.bench.cache_figures import Figure, Settings, Subject, Tell
from pagemill.bench.cache_ttft import PeerSettings
from pagemill.bench.machine import CpuCounters, barrier_ns, read_counters

# Group -> whether it needs the model, and what it tells.
GROUPS: dict[str, tuple[bool, str]] = {
    cache_ttft.GROUP: (True, "first token of a prompt whose beginning is cached, cold and warm, beside llama.cpp"),
    cache_cost.BYTES: (True, "bytes of a token position beside f16"),
    cache_cost.OVERHEAD: (True, "cost where nothing is shared"),
    cache_cost.WIPE: (True, "wiping"),
    cache_control.UNUSED: (False, "unused positions of allocated blocks"),
    cache_control.HITS: (False, "block hit ratio by policy and size"),
    cache_control.EVICTION: (False, "time of an eviction decision at a million blocks"),
    cache_streams.LIVE: (True, "a thousand live sequences"),
    cache_streams.LATENCY: (True, "time between tokens while a long prompt arrives"),
}

_ON_MODEL: dict[str, Callable[[Subject, Settings, Tell], list[Figure]]] = {
    cache_cost.BYTES: cache_cost.measure_bytes,
    cache_cost.OVERHEAD: cache_cost.measure_overhead,
    cache_cost.WIPE: cache_cost.measure_wipe,
    cache_streams.LIVE: cache_streams.measure_live,
    cache_streams.LATENCY: cache_streams.measure_latency,
}
_ALONE: dict[str, Callable[[Settings, Tell], list[Figure]]] = {
    cache_control.UNUSED: cache_control.measure_unused,
    cache_control.HITS: cache_control.measure_hits,
    cache_control.EVICTION: cache_control.measure_eviction,
}


@dataclass(slots=True)
class Measurement:
    """All that was measured so far. Mutated as groups end. barriers_ns: of the thread pool, before each group."""

    figures: list[Figure] = field(default_factory=list)
    barriers_ns: list[float] = field(default_factory=list)
    interrupted: bool = False
    before: CpuCounters | None = None
    after: CpuCounters | None = None


def parse_rows(text: str | None) -> tuple[str, ...]:
    """Groups from `ttft,live`, all of them for None. Raises ConfigError for names that there are not."""
    if text is None:
        return tuple(GROUPS)
    names = tuple(dict.fromkeys(each.strip() for each in text.split(",") if each.strip()))
    for each in names:
        if each not in GROUPS:
            near = get_close_matches(each, GROUPS, n=1)
            meant = f" did you mean {near[0]}?" if near else ""
            raise ConfigError(f"--rows: there is no {each!r};{meant} choose among {', '.join(GROUPS)}")
    if not names:
        raise ConfigError(f"--rows names nothing; choose among {', '.join(GROUPS)}")
    return names


def needs_model(settings: Settings) -> bool:
    """True where one of the groups runs on a model."""
    return any(GROUPS[name][0] for name in settings.rows)


def measure(
    subject: Subject | None,
    settings: Settings,
    peer: PeerSettings | None,
    tell: Tell,
    *,
    interrupted: Callable[[], bool] = lambda: False,
) -> Measurement:
    """Measure the groups in order. subject: the model, needed as `needs_model` says; peer: with it.

    interrupted: asked between groups; once True, what has been measured is returned as it is. Raises what the groups
    raise: CapacityError for want of memory, IntegrityError where the engine did what it must not.
    """
    found = Measurement(before=read_counters())
    for name in settings.rows:
        if interrupted():
            found.interrupted = True
            break
        if name in _ALONE:
            found.figures += _ALONE[name](settings, tell)
            continue
        assert subject is not None
        assert peer is not None
        found.barriers_ns.append(barrier_ns(subject.built.num_threads))
        if name == cache_ttft.GROUP:
            found.figures += cache_ttft.measure(subject, settings, peer, tell)
        else:
            found.figures += _ON_MODEL[name](subject, settings, tell)
    found.after = read_counters()
    return found
