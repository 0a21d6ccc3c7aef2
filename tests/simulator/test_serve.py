"""A trace served in virtual time: counts and times that follow from the cost of a step, and fairness under a flood."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from pagemill.base.errors import ConfigError
from pagemill.simulator.serve import Served, ServeSettings, StepCost, percentiles, serve
from pagemill.simulator.trace import Request, Trace
from pagemill.simulator.workload import generate

COST = StepCost(base_s=0.004, row_s=0.0004, token_s=0.0003, read_s=1e-8)
LINE = StepCost(base_s=0.01, row_s=0.0, token_s=0.001, read_s=0.0)


def lengths(*requests: tuple[float, int, int]) -> Trace:
    return Trace("lengths", 0, tuple(Request(time_s, num_in, num_out, ()) for time_s, num_in, num_out in requests))


def test_times_of_one_request_are_those_of_its_steps() -> None:
    served = serve(lengths((2.0, 100, 4)), LINE, ServeSettings(num_blocks=100))
    assert served.num_finished == 1
    assert served.ttft_s["default"][0] == pytest.approx(0.01 + 100 * 0.001)
    assert list(served.gaps_s) == pytest.approx([0.01] * 3)
    assert served.e2e_s["default"][0] == pytest.approx(0.11 + 3 * 0.01)
    assert served.seconds == pytest.approx(2.14)
    assert served.busy_s == pytest.approx(0.14)


def test_pace_stretches_the_times_between_requests() -> None:
    trace = lengths((0.0, 16, 2), (1.0, 16, 2), (2.0, 16, 2))
    slow = serve(trace, LINE, ServeSettings(num_blocks=100, pace=10.0))
    assert slow.seconds == pytest.approx(20.0 + 0.01 + 0.016 + 0.01)


def test_prompts_that_begin_alike_hit_and_others_do_not() -> None:
    trace = Trace(
        "shared",
        16,
        (
            Request(0.0, 48, 2, (7, 8, 9)),
            Request(1.0, 48, 2, (7, 8, 10)),
            Request(2.0, 40, 2, (11, 8, 9)),
        ),
    )
    served = serve(trace, COST, ServeSettings(num_blocks=100))
    assert served.num_cached_tokens == 32
    assert served.num_prompt_tokens == 48 + 48 + 40


def test_requests_that_the_cache_cannot_hold_are_told_apart_from_those_that_a_full_queue_refuses() -> None:
    trace = lengths((0.0, 10_000, 2), *((0.0, 16, 50) for _ in range(20)))
    settings = ServeSettings(num_blocks=100, max_num_seqs=2, max_queued_requests=5)
    served = serve(trace, COST, settings)
    assert served.num_too_large == 1
    assert served.num_refused == 20 - 2 - 5
    assert served.num_finished == 7


def test_the_same_trace_is_served_the_same_way_again() -> None:
    trace = generate("chat", 60, 3)
    assert serve(trace, COST, ServeSettings(200)) == serve(trace, COST, ServeSettings(200))


def test_the_report_is_json_with_every_percentile() -> None:
    described = serve(generate("agents", 30, 0), COST, ServeSettings(400)).describe()
    assert described["num_finished"] == 30
    assert described["ttft_s"].keys() == described["itl_s"].keys() == {"p50", "p90", "p99"}
    assert 0 < described["token_hit_ratio"] < 1


def test_percentiles_of_nothing_are_zero() -> None:
    assert percentiles(Served().gaps_s) == {"p50": 0.0, "p90": 0.0, "p99": 0.0}


@pytest.mark.parametrize("figures", [(0, 0, 0, 0), (-1, 1, 1, 1), (float("nan"), 1, 1, 1), (1e9, 0, 0, 0)])
def test_a_cost_model_that_is_none_is_refused(figures: tuple[float, float, float, float]) -> None:
    with pytest.raises(ConfigError, match="give seconds"):
        StepCost(*figures)


def test_a_trace_or_pace_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="no requests"):
        serve(lengths(), COST, ServeSettings(10))
    with pytest.raises(ConfigError, match="pace is"):
        serve(lengths((0.0, 1, 1)), COST, ServeSettings(10, pace=0.0))
    with pytest.raises(ConfigError):
        serve(lengths((0.0, 1, 1)), COST, ServeSettings(10, policy="none such"))


# What the scheduler promises under load


def test_a_long_prompt_makes_those_who_decode_wait_no_more_than_allowed() -> None:
    cost = StepCost(base_s=0.02, row_s=0.0005, token_s=0.0003, read_s=0.0)
    streams = [(0.0, 32, 400) for _ in range(32)]
    trace = lengths(*streams, (2.0, 4096, 1))
    settings = ServeSettings(num_blocks=2000, max_num_batched_tokens=8192)
    alone = serve(lengths(*streams), cost, settings)
    bounded = serve(trace, cost, settings)
    unbounded = serve(trace, cost, replace(settings, mixed_step_percent=None))
    alone_s = percentiles(alone.gaps_s)["p99"]
    assert percentiles(bounded.gaps_s)["p99"] <= 2.0 * alone_s
    assert max(unbounded.gaps_s) > 20 * alone_s, "read at once it stops everybody"
    assert unbounded.seconds / bounded.seconds >= 0.9


@pytest.mark.parametrize("read_s", [2.5e-7, 5e-7])
def test_a_prompt_whose_tokens_cost_more_and_more_keeps_to_the_same_bound(read_s: float) -> None:
    """Attention of a chunk behind thousands of tokens costs several times what the chunk itself does."""
    cost = StepCost(base_s=0.009, row_s=0.0007, token_s=0.0003, read_s=read_s)
    streams = [(0.0, 16, 600) for _ in range(32)]
    trace = lengths(*streams, (2.0, 4096, 1))
    settings = ServeSettings(num_blocks=2000, max_num_batched_tokens=8192, max_num_seqs=33)
    bounded = serve(trace, cost, settings)
    unbounded = serve(trace, cost, replace(settings, mixed_step_percent=None))
    alone_s = percentiles(serve(lengths(*streams), cost, settings).gaps_s)["p50"]
    assert percentiles(bounded.gaps_s)["p99"] <= 2.0 * alone_s
    assert unbounded.seconds / bounded.seconds >= 0.9


@pytest.mark.parametrize(("num_input", "num_output", "least"), [(256, 64, 0.93), (64, 64, 0.95), (1000, 64, 0.865)])
def test_prompts_in_small_chunks_cost_little_of_the_throughput_of_many_users(
    num_input: int, num_output: int, least: float
) -> None:
    """More requests than can run at any time: as many tokens in all as where prompts are read at once."""
    cost = StepCost(base_s=0.009, row_s=0.0007, token_s=0.00033, read_s=0.0)
    trace = lengths(*((0.0, num_input, num_output + index % 16) for index in range(160)))
    settings = ServeSettings(num_blocks=4000, max_num_seqs=32)
    bounded = serve(trace, cost, settings)
    unbounded = serve(trace, cost, replace(settings, mixed_step_percent=None))
    assert unbounded.seconds / bounded.seconds >= least
    alone_s = cost.base_s + 32 * cost.row_s
    assert percentiles(bounded.gaps_s)["p99"] <= 2.0 * alone_s
    assert percentiles(unbounded.gaps_s)["p99"] > 2.0 * alone_s, "that is what it is paid for"


# A time between tokens that the operator named, where a step takes 6 ms, .9 ms a row and .3 ms a prompt token

NEAR = StepCost(base_s=0.006, row_s=0.0009, token_s=0.0003, read_s=1e-7)


@pytest.mark.parametrize("target_s", [0.018, 0.025, 0.05])
def test_a_long_prompt_is_read_within_the_time_between_tokens_that_was_asked_for(target_s: float) -> None:
    streams = [(0.0, 32, 400) for _ in range(8)]
    served = serve(lengths(*streams, (2.0, 4096, 1)), NEAR, ServeSettings(num_blocks=2000, target_itl_s=target_s))
    assert quantile(served, 0.99) <= 1.01 * target_s < quantile(served, 0.99) + 0.005
    alone_s = NEAR.base_s + 8 * NEAR.row_s
    least_s = 4096 * NEAR.token_s / (1 - alone_s / target_s)
    assert max(served.ttft_s["default"]) < 2.2 * least_s, "and it is not held up for longer than that costs"


@pytest.mark.parametrize("target_s", [0.02, 0.025, 0.04])
@pytest.mark.parametrize("places", [8, 32])
@pytest.mark.parametrize("num_input", [256, 1500])
def test_more_requests_than_can_run_keep_to_the_target_and_all_are_served(
    num_input: int, places: int, target_s: float
) -> None:
    """However many places: while steps are full few prompts are read, and so few decode as leave room for them."""
    trace = lengths(*((0.0, num_input, 48 + index % 33) for index in range(60)))
    settings = ServeSettings(num_blocks=4000, max_num_seqs=places)
    served = serve(trace, NEAR, replace(settings, target_itl_s=target_s))
    assert served.num_finished == 60
    assert quantile(served, 0.95) <= 1.002 * target_s
    usual = serve(trace, NEAR, settings)
    assert quantile(usual, 0.95) > 1.2 * target_s or target_s == 0.04, "it asks for something"
    assert usual.seconds > 0.7 * served.seconds


def test_streams_beyond_the_target_by_themselves_go_on_while_prompts_are_read() -> None:
    """32 of them take 35 ms a step: what prompts add is the least there is, and nobody starves."""
    streams = [(0.0, 32, 300) for _ in range(32)]
    trace = lengths(*streams, *((1.5, 64, 4) for _ in range(8)))
    served = serve(trace, NEAR, ServeSettings(num_blocks=2000, target_itl_s=0.02))
    assert served.num_finished == 40
    alone_s = NEAR.base_s + 40 * (NEAR.row_s + 350 * NEAR.read_s)
    assert quantile(served, 0.99) < alone_s + 4 * NEAR.token_s
    assert max(served.ttft_s["default"]) < (32 * 32 + 8 * 64) / 4 * alone_s


def quantile(served: Served, share: float) -> float:
    """Of the times between tokens."""
    ordered = sorted(served.gaps_s)
    return ordered[int(share * (len(ordered) - 1))]


def loads(victim_rate: float, flood_rate: float, seconds: float) -> Trace:
    """A victim and a flood, each with so many requests a second at random times: 100 tokens in and 30 out are the
    victim's, 200 and 60 the flood's."""
    rng = random.Random(5)
    requests = []
    for rate, num_in, num_out in ((victim_rate, 100, 30), (flood_rate, 200, 60)):
        time_s = rng.expovariate(rate)
        while time_s < seconds:
            requests.append((time_s, num_in, num_out))
            time_s += rng.expovariate(rate)
    return lengths(*sorted(requests))


def served_to_two(trace: Trace, max_queued: int = 100) -> Served:
    tenants = ["victim" if each.num_input_tokens == 100 else "flood" for each in trace.requests]
    return serve(
        trace,
        COST,
        ServeSettings(num_blocks=4000, max_num_seqs=32, tenant_of=tenants.__getitem__, max_queued_requests=max_queued),
    )


# What COST serves of the flood alone is about ten requests a second.


def test_a_flood_costs_the_other_tenant_little() -> None:
    """The flood at ten times what the machine can serve, against the same load with the flood held to its half."""
    held, flooded = served_to_two(loads(1.5, 5.0, 15.0)), served_to_two(loads(1.5, 100.0, 15.0))
    assert flooded.num_refused > 500, "it is no flood"
    assert len(flooded.ttft_s["victim"]) == len(held.ttft_s["victim"]) > 15, "the victim is never refused"
    held_s, flooded_s = (percentiles(each.ttft_s["victim"])["p99"] for each in (held, flooded))
    assert flooded_s <= 1.5 * held_s


def test_ten_times_the_load_costs_little_of_the_throughput() -> None:
    peak, flooded = (served_to_two(loads(1.5, rate, 10.0)).describe() for rate in (10.0, 100.0))
    assert flooded["num_refused"] > 10 * peak["num_refused"]
    assert flooded["generated_tokens_per_s"] >= 0.9 * peak["generated_tokens_per_s"]


def asked_for(seconds: float, times: float) -> tuple[Trace, float]:
    """Mixed requests at random times, so many times as many as COST serves; and how many a second it serves."""
    rng = random.Random(3)
    sizes = [(rng.choice([64, 128, 256, 512]), rng.choice([16, 32, 64])) for _ in range(2000)]
    settings = ServeSettings(num_blocks=8000, max_num_seqs=32)
    peak = serve(lengths(*((0.0, *each) for each in sizes[:200])), COST, settings).describe()["finished_per_s"]
    time_s = 0.0
    requests: list[tuple[float, int, int]] = []
    while time_s < seconds:
        requests.append((time_s, *sizes[len(requests)]))
        time_s += rng.expovariate(times * peak)
    return lengths(*requests), peak


@pytest.mark.parametrize("times", [1.5, 3.0])
def test_beyond_what_can_be_served_most_of_the_time_goes_to_answers_that_come_within_their_deadline(
    times: float,
) -> None:
    """In the order of arrival alone .57 and .27 of what can be served came in time."""
    trace, peak = asked_for(30.0, times)
    settings = ServeSettings(num_blocks=8000, max_num_seqs=32, deadline_s=8.0)
    served = serve(trace, COST, settings)
    assert served.num_expired > (times - 1) / times * 0.4 * served.num_requests, "it is no overload"
    assert served.num_expired == served.num_failed
    assert served.num_finished / served.seconds >= 0.95 * peak
    assert max(served.e2e_s["default"]) <= 8.0 + 0.2, "a step more at the most"
    assert serve(trace, COST, settings) == served


def test_within_what_can_be_served_deadlines_that_all_can_meet_change_nothing() -> None:
    trace, _ = asked_for(20.0, 0.7)
    settings = ServeSettings(num_blocks=8000, max_num_seqs=32)
    assert serve(trace, COST, replace(settings, deadline_s=20.0)) == serve(trace, COST, settings)
