"""What `pagemill top` makes of scrapes: rates, quantiles, restarts, and scrapes that are none."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from pagemill.base.errors import RequestError
from pagemill.cli.top_figures import Scrape, figures, quantile, read_scrape, restarted
from pagemill.cli.top_view import NUM_LINES, view
from pagemill.telemetry.export import Exporter
from pagemill.telemetry.metrics import Metrics

Fill = Callable[[Metrics], None]


def scrape(at_s: float, fill: Fill = lambda metrics: None) -> Scrape:
    """What a server's own exporter says of metrics that `fill` has filled."""
    metrics = Metrics("tiny")
    fill(metrics)
    return read_scrape(Exporter(metrics).render("")[0].decode(), at_s)


def shown(found: dict[str, Any], width: int = 80, **options: Any) -> str:
    console = Console(width=width, height=24, color_system=None, record=True, file=None, force_terminal=False)
    whole = {"url": "http://h", "status": "ready", "error": None, "stale_s": 0.0, "tenants": None} | found
    with console.capture() as capture:
        console.print(view(whole, **options))
    return capture.get()


def test_rates_are_those_between_the_scrapes() -> None:
    def first(metrics: Metrics) -> None:
        metrics["vllm:prompt_tokens"].add(100)
        metrics["vllm:generation_tokens"].add(50)

    def second(metrics: Metrics) -> None:
        metrics["vllm:prompt_tokens"].add(300)
        metrics["vllm:generation_tokens"].add(60)

    found = figures(scrape(10.0, first), scrape(14.0, second))["tokens"]
    assert (found["prompt"], found["generated"]) == (300, 60)
    assert (found["prompt_per_s"], found["generated_per_s"]) == (50.0, 2.5)


def test_one_scrape_has_totals_and_no_rates() -> None:
    found = figures(None, scrape(0.0, lambda metrics: metrics["vllm:generation_tokens"].add(9)))
    assert found["tokens"]["generated"] == 9
    assert found["tokens"]["generated_per_s"] is None
    assert found["window_s"] is None
    assert "9 out" in shown(found, 200)


def test_two_scrapes_at_one_time_have_no_rates() -> None:
    assert figures(scrape(1.0), scrape(1.0))["tokens"]["generated_per_s"] is None


def test_recent_latencies_leave_out_what_was_before() -> None:
    def before(metrics: Metrics) -> None:
        metrics["vllm:time_to_first_token_seconds"].observe([50.0] * 100)

    def after(metrics: Metrics) -> None:
        metrics["vllm:time_to_first_token_seconds"].observe([50.0] * 100 + [0.03] * 20)

    found = figures(scrape(0.0, before), scrape(5.0, after))["latency_s"]["ttft"]
    assert found["recent"]["count"] == 20
    assert 0.02 < found["recent"]["p50"] <= found["recent"]["p99"] <= 0.04
    assert found["since_start"]["count"] == 120
    assert found["since_start"]["p50"] > 40


@pytest.mark.parametrize(
    ("buckets", "q", "value"),
    [
        ({}, 0.5, None),
        ({1.0: 0.0, math.inf: 0.0}, 0.5, None),
        ({1.0: 5.0}, 0.5, None),
        ({1.0: 10.0, 2.0: 10.0, math.inf: 10.0}, 0.5, 0.5),
        ({1.0: 5.0, 2.0: 10.0, math.inf: 10.0}, 0.75, 1.5),
        ({1.0: 0.0, 2.0: 10.0, math.inf: 10.0}, 0.1, 1.1),
        ({1.0: 5.0, 2.0: 5.0, math.inf: 10.0}, 0.99, 2.0),
        ({math.inf: 10.0}, 0.5, 0.0),
    ],
)
def test_quantiles_are_those_of_prometheus(buckets: dict[float, float], q: float, value: float | None) -> None:
    found = quantile(buckets, q)
    assert found == value if value is None else found == pytest.approx(value)


def test_a_server_that_began_anew_is_noticed() -> None:
    old = scrape(0.0, lambda metrics: metrics["vllm:generation_tokens"].add(50))
    assert restarted(old, scrape(1.0))
    assert not restarted(old, scrape(1.0, lambda metrics: metrics["vllm:generation_tokens"].add(51)))
    told = "vllm:generation_tokens_total 9\nprocess_start_time_seconds {}\n"
    assert restarted(read_scrape(told.format(1), 0.0), read_scrape(told.format(2), 1.0))


def test_cache_misses_and_curve_are_shown() -> None:
    def fill(metrics: Metrics) -> None:
        metrics["vllm:cache_config_info"].set(1, "16", "100", "int8", "on", "lru")
        for state, count in (("free", 50), ("active", 25), ("cached", 25), ("held", 0), ("pinned", 7)):
            metrics["pagemill:kv_blocks"].set(count, "hot", state)
        metrics["vllm:prefix_cache_queries"].add(400)
        metrics["vllm:prefix_cache_hits"].add(100)
        metrics["pagemill:kv_miss"].add(3, "not_seen")
        for memory, ratio in (("1.5 GiB", 0.9), ("1024 KiB", 0.1), ("64 MiB", 0.5), ("nonsense", 1.0)):
            metrics["pagemill:kv_hit_ratio_at"].set(ratio, memory)
        metrics["pagemill:kv_leaked_blocks"].set(2)

    found = figures(None, scrape(0.0, fill))
    assert [each["memory"] for each in found["curve"]] == ["1024 KiB", "64 MiB", "1.5 GiB"]
    assert found["hits"]["ratio"] == 0.25
    printed = shown(found)
    for text in ("25.0% in use, 25.0% cached, 7 blocks pinned", "not seen 3", "64 MiB", "90.0%", "2 blocks leaked"):
        assert text in printed
    lines = printed.splitlines()
    assert len(lines) == NUM_LINES + 1, "and one alarm"
    assert max(map(len, lines)) <= 80


def test_before_anything_is_loaded_or_asked_the_picture_is_whole() -> None:
    found = figures(None, scrape(0.0))
    printed = shown(found | {"status": "loading"}, ascii_only=True)
    for text in ("loading", "requests", "tokens/s", "first token", "KV cache", "hits", "misses"):
        assert text in printed


def test_a_server_of_another_make_is_shown_as_far_as_it_tells() -> None:
    text = (
        'vllm:num_requests_running{engine="0",model_name="m"} 2.0\n'
        'vllm:num_requests_running{engine="1",model_name="m"} 3.0\n'
        'vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25\n'
    )
    found = figures(None, read_scrape(text, 0.0))
    assert found["model"] == "m"
    assert found["requests"]["running"] == 5
    assert found["requests"]["waiting"] is None
    assert "25.0% in use" in shown(found)


@pytest.mark.parametrize(
    "text", ["", "<html>nothing</html>", "a{b 1", 'x{a="b} 1\n', "up 1\n", "vllm:prompt_tokens_total many\n"]
)
def test_what_is_no_scrape_of_a_model_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match=r"its /metrics"):
        read_scrape(text, 0.0)


def test_values_that_are_no_numbers_are_left_out() -> None:
    text = (
        "vllm:num_requests_running NaN\nvllm:generation_tokens_total +Inf\nvllm:prompt_tokens_total 3\n"
        'pagemill:kv_miss_total{reason="x"} NaN\n'
        'vllm:time_to_first_token_seconds_bucket{le="+Inf"} NaN\n'
    )
    found = figures(None, read_scrape(text, 0.0))
    assert found["requests"]["running"] is None
    assert found["tokens"] | {"prompt": 3, "generated": None} == found["tokens"]
    assert found["misses"] == {}
    assert found["latency_s"]["ttft"]["since_start"] is None


def test_labels_cannot_steer_the_terminal() -> None:
    text = 'pagemill:kv_miss_total{reason="a\x1b[2Jb",model_name="[red]x\x1b]0;t\x07"} 1\n'
    printed = shown(figures(None, read_scrape(text, 0.0)))
    assert "\x1b" not in printed
    assert "[red]x" in printed


def test_the_fullest_tenants_come_first_and_the_rest_is_counted() -> None:
    kept = {"active": 0, "cached": 0, "pinned": 0, "floor": 0, "cap": 100}
    tenants = [{"tenant": f"t{number}", "kept": number} | kept for number in range(9)]
    printed = shown(figures(None, scrape(0.0)) | {"tenants": tenants}, num_tenants=3)
    lines = [line.split()[0] for line in printed.splitlines() if line.startswith("t") and "%" in line]
    assert lines == ["t8", "t7", "t6"]
    assert "and 6 more" in printed


def test_the_rate_of_the_last_looks_is_drawn() -> None:
    found = figures(None, scrape(0.0))
    assert "▁▅█" in shown(found, history=(0.0, 5.0, 10.0))
    assert "_*@" in shown(found, history=(0.0, 5.0, 10.0), ascii_only=True)
