"""What `pagemill top` knows of a server: scrapes of /metrics, and the figures between two of them. Owns reading the
exposition and the arithmetic; asks nobody and prints nothing.

Names of metrics are those of `telemetry/catalog.py`. Where a server lacks one, its figure is None.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from prometheus_client.parser import text_string_to_metric_families

from pagemill.base.errors import RequestError

Labels = tuple[tuple[str, str], ...]

LATENCIES: Final = {
    "ttft": "vllm:time_to_first_token_seconds",
    "itl": "vllm:inter_token_latency_seconds",
    "e2e": "vllm:e2e_request_latency_seconds",
    "queue": "vllm:request_queue_time_seconds",
}
QUANTILES: Final = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
EVICTIONS: Final = ("capacity", "quota", "resize")
BLOCK_STATES: Final = ("free", "active", "cached", "held", "pinned")

_FAMILIES: Final = ("vllm:", "pagemill:")
_BASE_LABELS: Final = frozenset({"model_name", "engine"})
_DIGITS: Final = 6
_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB")
_SIZE: Final = re.compile(
    rf"([0-9][0-9,]{{0,15}}(?:\.[0-9]{{1,6}})?) ({'|'.join(_UNITS)})"
)  # as base/units.py writes it


@dataclass(frozen=True, slots=True)
class Scrape:
    """One reading. at_s: of a monotonic clock. samples: sample name -> (labels beside model_name and engine, sorted) ->
    value, the sum over engines. model_names, config: of the labels."""

    at_s: float
    samples: Mapping[str, Mapping[Labels, float]]
    model_names: tuple[str, ...]
    config: Mapping[str, str]

    def value(self, name: str, **labels: str) -> float | None:
        """One sample's value, None where there is none."""
        return self.samples.get(name, {}).get(tuple(sorted(labels.items())))

    def by(self, name: str, label: str) -> dict[str, float]:
        """Values by one label, summed over the others."""
        found: dict[str, float] = {}
        for labels, value in self.samples.get(name, {}).items():
            key = dict(labels).get(label)
            if key is not None:
                found[key] = found.get(key, 0.0) + value
        return found

    def total(self, name: str) -> float | None:
        """The sum over all label sets, None where there are none."""
        values = self.samples.get(name)
        return None if not values else sum(values.values())


def read_scrape(text: str, at_s: float) -> Scrape:
    """A scrape in Prometheus' text format. Raises RequestError for what is none, or not of a server of models."""
    samples: dict[str, dict[Labels, float]] = {}
    models: dict[str, None] = {}
    config: dict[str, str] = {}
    known = False
    try:
        for family in text_string_to_metric_families(text):
            known = known or family.name.startswith(_FAMILIES)
            for sample in family.samples:
                if not math.isfinite(sample.value):
                    continue
                labels = dict(sample.labels)
                if name := labels.get("model_name"):
                    models[name] = None
                own = tuple(sorted((key, value) for key, value in labels.items() if key not in _BASE_LABELS))
                if sample.name == "vllm:cache_config_info":
                    config = dict(own)
                kept = samples.setdefault(sample.name, {})
                kept[own] = kept.get(own, 0.0) + float(sample.value)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise RequestError("its /metrics is not in Prometheus' format; give the address of a server") from None
    if not known:
        raise RequestError("its /metrics tells nothing of a model; give the address of a server of models")
    return Scrape(at_s, samples, tuple(models), config)


def restarted(before: Scrape, now: Scrape) -> bool:
    """Whether the server has begun anew between two scrapes, so that totals cannot be compared."""
    began = [each.value("process_start_time_seconds") for each in (before, now)]
    if None not in began and began[0] != began[1]:
        return True
    names = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:prefix_cache_queries_total")
    return any((now.total(name) or 0.0) < (before.total(name) or 0.0) for name in names)


def quantile(buckets: Mapping[float, float], q: float) -> float | None:
    """The q-th quantile of a histogram by cumulative counts up to each bound, straight lines inside a bucket, as
    Prometheus' histogram_quantile; None without observations. Beyond the last finite bound: that bound."""
    bounds = sorted(buckets)
    if not bounds or bounds[-1] != math.inf or not buckets[math.inf] > 0:
        return None
    rank = q * buckets[math.inf]
    below, least = 0.0, 0.0
    for bound in bounds:
        if buckets[bound] >= rank:
            if bound == math.inf:
                return least
            inside = buckets[bound] - below
            return bound if inside <= 0 else least + (bound - least) * (rank - below) / inside
        below, least = buckets[bound], bound
    return least


def figures(before: Scrape | None, now: Scrape) -> dict[str, Any]:
    """All that is shown, as `top --json` prints it. before: an earlier scrape of the same life of the server, None for
    none; what is "recent" lies between the two, rates are None without it."""
    window_s = None if before is None or now.at_s <= before.at_s else now.at_s - before.at_s
    if window_s is None:
        before = None
    ended = now.by("vllm:request_success_total", "finished_reason")
    return {
        "model": ", ".join(now.model_names) or None,
        "window_s": _rounded(window_s),
        "requests": {
            "running": _whole(now.total("vllm:num_requests_running")),
            "waiting": _whole(now.total("vllm:num_requests_waiting")),
            "ended": {reason: int(count) for reason, count in ended.items()},
            "ended_per_s": _rate(before, now, window_s, "vllm:request_success_total"),
            "preemptions": _whole(now.total("vllm:num_preemptions_total")),
            "refused": {
                reason: int(count) for reason, count in now.by("pagemill:http_refused_total", "reason").items()
            },
        },
        "tokens": {
            "prompt": _whole(now.total("vllm:prompt_tokens_total")),
            "generated": _whole(now.total("vllm:generation_tokens_total")),
            "prompt_per_s": _rate(before, now, window_s, "vllm:prompt_tokens_total"),
            "cached_per_s": _rate(before, now, window_s, "vllm:prefix_cache_hits_total"),
            "generated_per_s": _rate(before, now, window_s, "vllm:generation_tokens_total"),
        },
        "latency_s": {name: _latency(before, now, metric) for name, metric in LATENCIES.items()},
        "kv": _kv(now),
        "hits": _hits(before, now),
        "misses": {reason: int(count) for reason, count in now.by("pagemill:kv_miss_total", "reason").items()},
        "curve": _curve(now),
    }


def _kv(now: Scrape) -> dict[str, Any]:
    blocks: dict[str, int] = {}
    for labels, value in now.samples.get("pagemill:kv_blocks", {}).items():
        told = dict(labels)
        if told.get("tier", "hot") == "hot" and told.get("state") in BLOCK_STATES:
            blocks[told["state"]] = int(value)
    return {
        "usage": _rounded(now.total("vllm:kv_cache_usage_perc")),
        "blocks": blocks,
        "total_blocks": _number(now.config.get("num_gpu_blocks")),
        "block_tokens": _number(now.config.get("block_size")),
        "bytes": _whole(now.total("pagemill:kv_bytes")),
        "dtype": now.config.get("cache_dtype"),
        "policy": now.config.get("cache_policy"),
        "evictions": _whole(_evictions(now)),
        "leaked_blocks": _whole(now.total("pagemill:kv_leaked_blocks")),
        "corrupt_blocks": _whole(now.total("pagemill:kv_block_corrupt_total")),
        "saved_prefill_s": _rounded(now.total("pagemill:kv_saved_prefill_seconds_total")),
    }


def _hits(before: Scrape | None, now: Scrape) -> dict[str, Any]:
    asked, hit = now.total("vllm:prefix_cache_queries_total"), now.total("vllm:prefix_cache_hits_total")
    recent = None
    if before is not None and asked is not None and hit is not None:
        fresh = asked - (before.total("vllm:prefix_cache_queries_total") or 0.0)
        found = hit - (before.total("vllm:prefix_cache_hits_total") or 0.0)
        recent = _rounded(found / fresh) if fresh > 0 else None
    ratio = _rounded(hit / asked) if asked and hit is not None else None
    return {"asked_tokens": _whole(asked), "hit_tokens": _whole(hit), "ratio": ratio, "recent_ratio": recent}


def _latency(before: Scrape | None, now: Scrape, metric: str) -> dict[str, Any]:
    """Quantiles of what was observed recently and since the server's start, in seconds."""
    total = _buckets(now, metric)
    recent = None
    if before is not None:
        earlier = _buckets(before, metric)
        recent = _told({bound: count - earlier.get(bound, 0.0) for bound, count in total.items()})
    return {"recent": recent, "since_start": _told(total)}


def _told(buckets: Mapping[float, float]) -> dict[str, Any] | None:
    count = buckets.get(math.inf, 0.0)
    if count <= 0:
        return None
    return {"count": int(count)} | {name: _rounded(quantile(buckets, q)) for name, q in QUANTILES.items()}


def _buckets(scrape: Scrape, metric: str) -> dict[float, float]:
    found = {}
    for bound, count in scrape.by(f"{metric}_bucket", "le").items():
        try:
            found[float(bound)] = count
        except ValueError:
            continue
    return found


def _curve(now: Scrape) -> list[dict[str, Any]]:
    """Expected hit ratio by size of the cache, the smallest first."""
    points = []
    for memory, ratio in now.by("pagemill:kv_hit_ratio_at", "memory").items():
        size = _SIZE.fullmatch(memory)
        if size is not None:
            amount = float(size[1].replace(",", "")) * 1024 ** _UNITS.index(size[2])
            points.append((amount, {"memory": memory, "hit_ratio": _rounded(ratio)}))
    return [point for _, point in sorted(points, key=lambda each: each[0])]


def _rate(before: Scrape | None, now: Scrape, window_s: float | None, name: str) -> float | None:
    total = now.total(name)
    if before is None or window_s is None or total is None:
        return None
    return _rounded((total - (before.total(name) or 0.0)) / window_s)


def _evictions(now: Scrape) -> float | None:
    """Blocks that left so that others could have their place; purges and the like are no evictions."""
    left = now.samples.get("pagemill:kv_evictions_total")
    if not left:
        return None
    return sum(count for labels, count in left.items() if dict(labels).get("reason") in EVICTIONS)


def _whole(value: float | None) -> int | None:
    return None if value is None or not math.isfinite(value) else int(value)


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, _DIGITS)


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() and len(text) < 19 else None
