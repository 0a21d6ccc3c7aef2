"""Every metric, declared once: name, kind, unit, labels, help. Owns no values.

Names under `vllm:` mean what they mean in vLLM (docs.vllm.ai, "Production metrics"), so that boards made for it work;
names under `pagemill:` are of the cache. Names are given without the `_total` that the exposition appends to counters.
Every metric has the labels `model_name` and `engine` beside its own. No label ever holds text of a request, nor a
tenant's name unless the operator asks for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from pagemill.base.errors import ConfigError

Kind = Literal["counter", "gauge", "histogram"]

BASE_LABELS: Final = ("model_name", "engine")
MAX_LABEL_SETS: Final = 512


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """One metric. buckets: upper bounds of a histogram, ascending, without +Inf. max_sets: label sets kept at the most;
    a gauge of ours never needs more, whatever clients send. Raises ConfigError for a declaration that does not fit."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    max_sets: int = MAX_LABEL_SETS

    def __post_init__(self) -> None:
        if (self.kind == "histogram") != bool(self.buckets):
            raise ConfigError(f"metric {self.name}: a histogram has buckets and nothing else has; mend the catalogue")
        if list(self.buckets) != sorted(set(self.buckets)):
            raise ConfigError(f"metric {self.name}: buckets must ascend; mend the catalogue")


_TTFT: Final = (
    0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0, 160.0,
)  # fmt: skip
_BETWEEN_TOKENS: Final = (
    0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5,
    5.0,
)  # fmt: skip
_REQUEST: Final = (
    0.005, 0.01, 0.025, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0,
    120.0, 240.0, 480.0, 960.0,
)  # fmt: skip
_TOKENS: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000)
_STEP_TOKENS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16_384)
_BLOCK_LIFE: Final = (
    0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1200.0, 1800.0, 3600.0,
)  # fmt: skip
_FREED: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)

_METRICS: Final = (
    # Now
    MetricSpec("vllm:num_requests_running", "gauge", "Sequences in the running batch."),
    MetricSpec("vllm:num_requests_waiting", "gauge", "Sequences that wait to be run."),
    MetricSpec("vllm:kv_cache_usage_perc", "gauge", "KV cache in use by sequences and pins; 1 is all of it."),
    MetricSpec(
        "vllm:cache_config_info",
        "gauge",
        "Configuration of the KV cache, as labels of a constant 1.",
        ("block_size", "num_gpu_blocks", "cache_dtype", "enable_prefix_caching", "cache_policy"),
    ),
    # Since the start
    MetricSpec("vllm:prompt_tokens", "counter", "Prompt tokens of requests that began, cached ones included."),
    MetricSpec("vllm:generation_tokens", "counter", "Tokens generated."),
    MetricSpec("vllm:request_success", "counter", "Requests that ended, by reason.", ("finished_reason",)),
    MetricSpec("vllm:num_preemptions", "counter", "Times that a running sequence lost its place to an earlier one."),
    MetricSpec("vllm:prefix_cache_queries", "counter", "Prompt tokens looked for in the prefix cache."),
    MetricSpec("vllm:prefix_cache_hits", "counter", "Prompt tokens found in the prefix cache."),
    MetricSpec("vllm:prompt_tokens_by_source", "counter", "Prompt tokens by where their KV came from.", ("source",)),
    # Distributions
    MetricSpec("vllm:time_to_first_token_seconds", "histogram", "Arrival to first token.", (), _TTFT),
    MetricSpec("vllm:inter_token_latency_seconds", "histogram", "Between tokens of a choice.", (), _BETWEEN_TOKENS),
    MetricSpec("vllm:e2e_request_latency_seconds", "histogram", "Arrival to last token.", (), _REQUEST),
    MetricSpec("vllm:request_queue_time_seconds", "histogram", "Arrival to first scheduled.", (), _REQUEST),
    MetricSpec("vllm:request_prefill_time_seconds", "histogram", "Scheduled to first token.", (), _REQUEST),
    MetricSpec("vllm:request_decode_time_seconds", "histogram", "First to last token.", (), _REQUEST),
    MetricSpec("vllm:request_inference_time_seconds", "histogram", "Scheduled to last token.", (), _REQUEST),
    MetricSpec("vllm:request_prompt_tokens", "histogram", "Prompt tokens of a request.", (), _TOKENS),
    MetricSpec("vllm:request_generation_tokens", "histogram", "Tokens that a request generated.", (), _TOKENS),
    MetricSpec("vllm:iteration_tokens_total", "histogram", "Tokens computed in a step.", (), _STEP_TOKENS),
    MetricSpec("vllm:kv_block_lifetime_seconds", "histogram", "Block stored to evicted (sampled).", (), _BLOCK_LIFE),
    MetricSpec(
        "vllm:kv_block_idle_before_evict_seconds", "histogram", "Last use to evicted (sampled).", (), _BLOCK_LIFE
    ),
    MetricSpec("vllm:kv_block_reuse_gap_seconds", "histogram", "Between uses of a block (sampled).", (), _BLOCK_LIFE),
    # The cache's own
    MetricSpec(
        "pagemill:kv_blocks", "gauge", "Blocks by state: free, active, cached, held, pinned.", ("tier", "state")
    ),
    MetricSpec("pagemill:kv_bytes", "gauge", "Bytes of keys and values kept.", ("tier",)),
    MetricSpec("pagemill:kv_lookup_tokens", "counter", "Prompt tokens by what the look-up gave.", ("tier", "result")),
    MetricSpec("pagemill:kv_miss", "counter", "Look-ups that found less than all, by reason.", ("reason",)),
    MetricSpec("pagemill:kv_evictions", "counter", "Blocks that left the cache, by reason.", ("tier", "reason")),
    MetricSpec("pagemill:kv_block_corrupt", "counter", "Blocks that were not what was stored: recomputed."),
    MetricSpec("pagemill:kv_saved_prefill_seconds", "counter", "Estimated seconds of prefill that hits spared."),
    MetricSpec("pagemill:kv_hit_ratio_at", "gauge", "Expected hit ratio with another size of the cache.", ("memory",)),
    MetricSpec("pagemill:kv_disconnect_free_seconds", "histogram", "Disconnect seen to blocks free.", (), _FREED),
    MetricSpec("pagemill:kv_leaked_blocks", "gauge", "Active blocks that no sequence owns; anything above 0 is a bug."),
    MetricSpec("pagemill:kv_wiped_bytes", "counter", "Bytes of pages wiped after their text was dropped."),
    MetricSpec(
        "pagemill:tenant_quota_ratio",
        "gauge",
        "Blocks in use over the cap. Label tenant: that of the fullest, unnamed (empty), unless names are asked for.",
        ("tenant",),
    ),
    # The door
    MetricSpec("pagemill:http_requests", "counter", "HTTP requests answered.", ("method", "status")),
    MetricSpec("pagemill:http_refused", "counter", "HTTP requests refused at the door, by reason.", ("reason",)),
    MetricSpec("pagemill:http_open_requests", "gauge", "HTTP requests being answered."),
    MetricSpec("pagemill:http_connections_cut", "counter", "Connections cut: too slow, or too many.", ("reason",)),
    MetricSpec("pagemill:spans", "counter", "Trace spans by what became of them.", ("result",)),
)

CATALOG: Final[dict[str, MetricSpec]] = {each.name: each for each in _METRICS}


def exposed_names() -> dict[str, MetricSpec]:
    """Sample name, as a scrape shows it, -> its metric: with `_total`, `_bucket`, `_sum`, `_count`."""
    names: dict[str, MetricSpec] = {}
    for each in CATALOG.values():
        endings = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}[each.kind]
        names.update({each.name + ending: each for ending in endings})
    return names
