"""Values of metrics, the catalogue they come from, and what a scrape shows of them."""

from __future__ import annotations

import threading

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pagemill.base.errors import ConfigError
from pagemill.telemetry.catalog import CATALOG, MAX_LABEL_SETS, MetricSpec, exposed_names
from pagemill.telemetry.export import Exporter
from pagemill.telemetry.metrics import OTHER, Metrics

# The contract with boards that exist: vLLM's names, as docs/observe.md promises them.
VLLM_NAMES = {
    "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "cache_config_info", "prompt_tokens",
    "generation_tokens", "request_success", "num_preemptions", "prefix_cache_queries", "prefix_cache_hits",
    "prompt_tokens_by_source", "time_to_first_token_seconds", "inter_token_latency_seconds",
    "e2e_request_latency_seconds", "request_queue_time_seconds", "request_prefill_time_seconds",
    "request_decode_time_seconds", "request_inference_time_seconds", "request_prompt_tokens",
    "request_generation_tokens", "iteration_tokens_total", "kv_block_lifetime_seconds",
    "kv_block_idle_before_evict_seconds", "kv_block_reuse_gap_seconds",
}  # fmt: skip
OWN_NAMES = {
    "kv_blocks", "kv_bytes", "kv_lookup_tokens", "kv_miss", "kv_evictions", "kv_block_corrupt",
    "kv_saved_prefill_seconds", "kv_hit_ratio_at", "kv_disconnect_free_seconds", "kv_leaked_blocks", "kv_wiped_bytes",
    "tenant_quota_ratio",
}  # fmt: skip


def scraped(metrics: Metrics) -> dict[str, dict[tuple[str, ...], float]]:
    """Sample name -> values of its labels without the first two -> value."""
    found: dict[str, dict[tuple[str, ...], float]] = {}
    text, _ = Exporter(metrics).render()
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            if sample.name.startswith("process_"):
                continue
            labels = dict(sample.labels)
            assert (labels.pop("model_name"), labels.pop("engine")) == (metrics.model_name, metrics.engine)
            found.setdefault(sample.name, {})[tuple(labels.values())] = sample.value
    return found


def test_every_promised_name_is_declared() -> None:
    assert {f"vllm:{name}" for name in VLLM_NAMES} | {f"pagemill:{name}" for name in OWN_NAMES} <= CATALOG.keys()


def test_no_label_holds_a_request_s_text_or_a_tenant_by_default() -> None:
    labels = {label for spec in CATALOG.values() for label in spec.labels}
    assert not labels & {"prompt", "text", "key", "user", "request_id", "path"}
    assert [spec.name for spec in CATALOG.values() if "tenant" in spec.labels] == ["pagemill:tenant_quota_ratio"]


def test_a_scrape_shows_what_was_counted() -> None:
    metrics = Metrics("tiny", "3")
    metrics["vllm:prompt_tokens"].add(7)
    metrics["vllm:prompt_tokens"].add(5)
    metrics["pagemill:kv_miss"].add(2, "evicted")
    metrics["vllm:num_requests_running"].set(4)
    metrics["pagemill:http_open_requests"].shift(3)
    metrics["pagemill:http_open_requests"].shift(-1)
    metrics["vllm:num_preemptions"].raise_to(9)
    metrics["vllm:num_preemptions"].raise_to(4)
    found = scraped(metrics)
    assert found["vllm:prompt_tokens_total"] == {(): 12}
    assert found["pagemill:kv_miss_total"] == {("evicted",): 2}
    assert found["vllm:num_requests_running"] == {(): 4}
    assert found["pagemill:http_open_requests"] == {(): 2}
    assert found["vllm:num_preemptions_total"] == {(): 9}


def test_a_histogram_s_buckets_add_up_and_a_bound_is_within_its_bucket() -> None:
    metrics = Metrics("tiny")
    metrics["vllm:request_prompt_tokens"].observe([1, 5, 5.5, 1e9])
    found = scraped(metrics)
    buckets = found["vllm:request_prompt_tokens_bucket"]
    assert [buckets[(bound,)] for bound in ("1.0", "2.0", "5.0", "10.0", "200000.0", "+Inf")] == [1, 1, 2, 3, 3, 4]
    assert found["vllm:request_prompt_tokens_count"] == {(): 4}
    assert found["vllm:request_prompt_tokens_sum"] == {(): 1e9 + 11.5}


def test_metrics_without_labels_are_there_before_anything_is_counted() -> None:
    found = scraped(Metrics("tiny"))
    for name, spec in exposed_names().items():
        assert (name in found) == (not spec.labels), name


def test_the_exposed_names_are_those_of_the_catalogue() -> None:
    metrics = Metrics("tiny")
    for spec in CATALOG.values():
        labels = ["x"] * len(spec.labels)
        if spec.kind == "counter":
            metrics[spec.name].add(1, *labels)
        elif spec.kind == "gauge":
            metrics[spec.name].set(1, *labels)
        else:
            metrics[spec.name].observe([1], *labels)
    assert scraped(metrics).keys() == exposed_names().keys()


def test_label_sets_are_bounded_whatever_comes() -> None:
    metrics = Metrics("tiny")
    for number in range(MAX_LABEL_SETS + 50):
        metrics["pagemill:http_refused"].add(1, f"reason {number}")
    found = scraped(metrics)["pagemill:http_refused_total"]
    assert len(found) == MAX_LABEL_SETS + 1
    assert found[(OTHER,)] == 50


@pytest.mark.parametrize("accept", ["application/openmetrics-text; version=1.0.0", "application/openmetrics-text"])
def test_open_metrics_is_told_where_it_is_asked_for(accept: str) -> None:
    body, content_type = Exporter(Metrics("tiny")).render(accept)
    assert content_type.startswith("application/openmetrics-text")
    assert body.endswith(b"# EOF\n")


@pytest.mark.parametrize(
    "accept", ["text/plain; version=x", "*/*", "", "text/plain;version=1.0.0;escaping=?", "a" * 9000]
)
def test_any_other_accept_header_gets_plain_text(accept: str) -> None:
    _, content_type = Exporter(Metrics("tiny")).render(accept)
    assert content_type.startswith("text/plain; version=0.0.4")


def test_the_model_s_name_is_escaped() -> None:
    metrics = Metrics('a"b\\c\nd')
    assert scraped(metrics)["vllm:prompt_tokens_total"] == {(): 0}


def test_threads_lose_no_count() -> None:
    metrics = Metrics("tiny")

    def count() -> None:
        for _ in range(2000):
            metrics["vllm:generation_tokens"].add(1)
            metrics["vllm:iteration_tokens_total"].observe((1,))

    threads = [threading.Thread(target=count) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    found = scraped(metrics)
    assert found["vllm:generation_tokens_total"] == {(): 8000}
    assert found["vllm:iteration_tokens_total_count"] == {(): 8000}


@pytest.mark.parametrize(
    ("kind", "buckets", "what"),
    [("counter", (1.0,), "has buckets"), ("histogram", (), "has buckets"), ("histogram", (2.0, 1.0), "ascend")],
)
def test_a_declaration_that_does_not_fit_is_refused(kind: str, buckets: tuple[float, ...], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        MetricSpec("x", kind, "help", (), buckets)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "mistake",
    [
        lambda m: m["vllm:prompt_tokens"].set(1),
        lambda m: m["vllm:prompt_tokens"].add(-1),
        lambda m: m["pagemill:kv_miss"].add(1),
        lambda m: m["vllm:num_requests_running"].observe([1]),
    ],
)
def test_a_wrong_use_of_a_metric_is_our_own_mistake(mistake: object) -> None:
    with pytest.raises(AssertionError):
        mistake(Metrics("tiny"))  # type: ignore[operator]
