"""How long steps with prompts may make others wait: on a machine made of numbers, so that every step is known."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from pagemill.engine.budget import (
    FEW,
    PROBE_STEPS,
    SHORTEST_S,
    SMALLEST_CHUNK,
    TILE_ROWS,
    UNKNOWN_CHUNK,
    StepBudget,
    shortest_s,
)  # fmt: skip


class Machine:
    """A step takes base + rows * row + tokens * token seconds. Mutated by `step`, which tells the budget."""

    def __init__(self, base_s: float, row_s: float, token_s: float) -> None:
        self.base_s, self.row_s, self.token_s = base_s, row_s, token_s

    def seconds(self, rows: int, tokens: int) -> float:
        return self.base_s + rows * self.row_s + tokens * self.token_s

    def step(self, budget: StepBudget, rows: int, tokens: int) -> float:
        seconds = self.seconds(rows, tokens)
        budget.saw(rows, tokens, seconds)
        return seconds


MACHINES = [Machine(0.005, 0.0004, 0.0003), Machine(0.2, 0.01, 0.005), Machine(0.001, 0.003, 0.0001)]


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("rows", [8, 32, 200])
@pytest.mark.parametrize("percent", [150, 180, 300])
def test_mixed_steps_settle_within_the_bound_and_use_it(machine: Machine, rows: int, percent: int) -> None:
    budget = StepBudget(4096, percent)
    machine.step(budget, rows, 0)
    seen = []
    for _ in range(60):
        seen.append(machine.step(budget, rows, budget.for_prompts(rows)))
    bound = max(percent / 100 * machine.seconds(rows, 0), shortest_s(rows))
    least = machine.seconds(rows, SMALLEST_CHUNK)
    assert max(seen[20:]) <= max(bound, least) * 1.02
    assert min(seen[20:]) >= min(0.8 * bound, machine.seconds(rows, 4096 - rows)), "no more caution than asked for"


def test_the_more_wait_the_shorter_a_step_may_be_held() -> None:
    """Twice as many who wait, half as long: and beyond what decoding takes nothing is left of it."""
    assert shortest_s(1) == shortest_s(FEW) == SHORTEST_S
    assert shortest_s(2 * FEW) == SHORTEST_S / 2
    machine = Machine(0.002, 0.0001, 0.0002)
    chunks = []
    for rows in (FEW // 2, 2 * FEW):
        budget = StepBudget(4096, 180)
        for chunk in (0, 64, 64, 64):
            machine.step(budget, rows, chunk)
        chunks.append(budget.for_prompts(rows))
    assert chunks[0] > 2 * chunks[1] > 0


def test_without_decode_rows_or_bound_a_step_is_as_large_as_allowed() -> None:
    assert StepBudget(512, 150).for_prompts(0) == 512
    assert StepBudget(512, None).for_prompts(32) == 480
    assert StepBudget(16, None).for_prompts(32) == 0


def test_the_first_step_with_decode_rows_has_no_prompt_and_tells_what_decoding_takes() -> None:
    budget = StepBudget(2048, 180)
    assert budget.for_prompts(0) == 2048
    assert budget.for_prompts(32) == 0
    budget.saw(32, 0, 0.03)
    assert budget.for_prompts(32) > 0


@pytest.mark.parametrize("rows", [1, 8, 32])
def test_the_first_chunk_stays_within_the_bound_where_a_prompt_token_costs_no_more_than_a_row(rows: int) -> None:
    machine = Machine(0.008, 0.0006, 0.0006)
    budget = StepBudget(4096, 180)
    alone_s = machine.step(budget, rows, 0)
    assert machine.step(budget, rows, budget.for_prompts(rows)) <= max(1.8 * alone_s, shortest_s(rows))


def test_steps_are_measured_by_all_who_will_decode_once_their_prompts_are_read() -> None:
    machine = Machine(0.009, 0.0007, 0.0003)
    budget = StepBudget(4096, 180)
    for rows in (4, 32):
        machine.step(budget, rows, 0)
        machine.step(budget, rows, 64)
    few, many = budget.for_prompts(4), budget.for_prompts(4, 28)
    assert many > 1.5 * few
    assert machine.seconds(4, many) <= 1.8 * machine.seconds(32, 0) * 1.02
    assert budget.for_prompts(32, 0) == budget.for_prompts(32)


def test_a_strange_first_step_of_a_number_of_streams_is_held_to_what_is_known_of_others() -> None:
    machine = Machine(0.009, 0.0007, 0.0003)
    budget = StepBudget(4096, 180)
    for rows in (8, 12, 24):
        machine.step(budget, rows, 0)
    budget.saw(32, 0, 2.0)
    assert budget.alone_s(32) <= 2.5 * machine.seconds(32, 0)


def test_numbers_of_streams_that_differ_little_are_learned_together() -> None:
    machine = Machine(0.009, 0.0007, 0.0003)
    budget = StepBudget(4096, 180)
    for rows in (32, 33, 34, 35, 36, 37, 38, 39):
        machine.step(budget, rows, 0)
    for rows in (32, 35, 39):
        assert budget.alone_s(rows) == pytest.approx(machine.seconds(rows, 0), rel=0.05)


def test_a_prompt_is_never_cut_to_nothing_for_long() -> None:
    machine = Machine(0.1, 0.0, 10.0)
    budget = StepBudget(512, 110)
    machine.step(budget, 4, 0)
    chunks = []
    for _ in range(3 * PROBE_STEPS):
        chunks.append(budget.for_prompts(4))
        machine.step(budget, 4, chunks[-1])
    assert chunks.count(0) == 2, "a step now and then tells what decoding takes"
    assert min(chunk for chunk in chunks[1:] if chunk) == SMALLEST_CHUNK


def test_short_prompts_read_alone_do_not_tell_what_a_token_costs() -> None:
    """Most of such a step's time is its own: long prompts would be cut far too small for a while."""
    machine = Machine(0.02, 0.0005, 0.0005)
    fresh, taught = StepBudget(2048, 180), StepBudget(2048, 180)
    for _ in range(20):
        machine.step(taught, 0, 9)
    for budget in (fresh, taught):
        machine.step(budget, 16, 0)
    assert taught.for_prompts(16) == fresh.for_prompts(16) > 0


def test_rows_and_chunk_fill_whole_tiles() -> None:
    machine = Machine(0.02, 0.0005, 0.0003)
    budget = StepBudget(512, 180)
    for rows in (9, 9, 31):
        machine.step(budget, rows, 0)
        machine.step(budget, rows, 64)
        assert (rows + budget.for_prompts(rows)) % TILE_ROWS == 0


def test_a_chunk_that_a_tile_of_rows_would_make_too_long_is_smaller_than_that() -> None:
    machine = Machine(0.02, 0.0005, 0.005)
    budget = StepBudget(512, 180)
    for _ in range(30):
        machine.step(budget, 31, 0)
        machine.step(budget, 31, max(budget.for_prompts(31), 1))
    assert SMALLEST_CHUNK <= budget.for_prompts(31) < TILE_ROWS
    assert machine.seconds(31, budget.for_prompts(31)) <= 1.8 * machine.seconds(31, 0) * 1.02


def test_a_token_costs_more_the_further_back_its_text_reaches() -> None:
    """As a prompt is read its chunks shrink so that steps stay as long; the next prompt begins with large ones."""

    def seconds(rows: int, tokens: int, position: int) -> float:
        return 0.02 + rows * 0.0005 + tokens * (0.0003 + 4e-7 * (position + tokens / 2))

    budget = StepBudget(4096, 180)
    budget.saw(32, 0, seconds(32, 0, 0))
    chunks: list[list[int]] = []
    took: list[float] = []
    for _ in range(3):
        position, chunks = 0, [*chunks, []]
        while position < 6000:
            count = budget.for_prompts(32, 1, position)
            chunks[-1].append(count)
            took.append(seconds(32, count, position))
            budget.saw(32, count, took[-1], count * (position + count / 2))
            position += count
            if not count:
                budget.saw(32, 0, took[-1])
    bound_s = 1.8 * seconds(32, 0, 0)
    assert max(took[len(chunks[0]) :]) <= 1.1 * bound_s
    first, *_, last = chunks[-1]
    assert first > 3 * last
    assert first == max(chunks[-1]), "and it is known from the first chunk of the third prompt on"


def test_the_bound_follows_the_number_of_streams_and_their_length() -> None:
    machine = Machine(0.02, 0.001, 0.0003)
    budget = StepBudget(4096, 180)
    for rows in (1, 64):
        machine.step(budget, rows, 0)
        machine.step(budget, rows, 64)
    assert budget.for_prompts(64) > 1.5 * budget.for_prompts(1)
    assert budget.alone_s(1) < budget.alone_s(20) < budget.alone_s(64) < budget.alone_s(100)
    before = budget.for_prompts(64)
    slower = Machine(0.04, 0.002, 0.0003)  # longer texts: more to read in each step
    for _ in range(20):
        slower.step(budget, 64, 0)
    assert budget.for_prompts(64) > 1.5 * before


def test_one_strange_step_changes_little() -> None:
    machine = Machine(0.02, 0.001, 0.0003)
    budget = StepBudget(4096, 180)
    for _ in range(5):
        machine.step(budget, 32, 0)
        machine.step(budget, 32, 64)
    before = budget.for_prompts(32)
    budget.saw(32, 0, 5.0)
    assert budget.for_prompts(32) <= 1.3 * before
    budget.saw(32, 64, 9.0)
    assert budget.for_prompts(32) >= 0.7 * before


def test_a_clock_that_stands_still_teaches_nothing() -> None:
    budget = StepBudget(512, 180)
    budget.saw(32, 0, 0.0)
    budget.saw(32, 64, 0.0)
    assert budget.alone_s(32) == 0.0, "and prompts are read all the same"
    assert budget.for_prompts(32) == UNKNOWN_CHUNK


# A time between tokens that the operator named


def run(budget: StepBudget, machine: Machine, rows: int, steps: int, lasts: Callable[[float], float]) -> list[float]:
    """Steps in a row with prompts that never end. lasts: from what a step takes to the time until the next begins.
    Returns those of steps that read prompts."""
    now_s, seen = 0.0, []
    for _ in range(steps):
        budget.began(now_s)
        tokens = budget.for_prompts(rows)
        took_s = lasts(machine.step(budget, rows, tokens))
        now_s += took_s
        if tokens:
            seen.append(took_s)
    budget.began(now_s)
    return seen


@pytest.mark.parametrize("rows", [1, 8, 16])
@pytest.mark.parametrize("target_s", [0.03, 0.1, 0.4])
@pytest.mark.parametrize("percent", [None, 180])
def test_steps_keep_to_the_target_and_use_it_whatever_the_percentage(
    rows: int, target_s: float, percent: int | None
) -> None:
    machine = Machine(0.006, 0.0009, 0.0003)
    seen = run(StepBudget(4096, percent, target_s), machine, rows, 100, lambda seconds: seconds)[20:]
    assert max(seen) <= 1.01 * target_s
    assert min(seen) >= target_s - TILE_ROWS * machine.token_s - 0.04 * target_s


@pytest.mark.parametrize(("between_s", "spread"), [(0.0, 0.1), (0.002, 0.02), (0.0015, 0.15)])
def test_19_of_20_steps_keep_to_the_target_where_other_work_and_chance_make_them_longer(
    between_s: float, spread: float
) -> None:
    rng, machine = random.Random(5), Machine(0.006, 0.0009, 0.0003)

    def lasts(seconds: float) -> float:
        return seconds * rng.lognormvariate(0, spread) + between_s

    seen = run(StepBudget(4096, None, 0.03), machine, 8, 6000, lasts)[500:]
    assert sum(each > 0.03 for each in seen) / len(seen) < 0.06
    assert sum(seen) / len(seen) > 0.75 * 0.03, "no more caution than asked for"


def test_after_a_disturbance_steps_use_the_whole_target_again() -> None:
    machine, budget = Machine(0.006, 0.0009, 0.0003), StepBudget(4096, None, 0.05)
    before = run(budget, machine, 8, 100, lambda seconds: seconds)[-1]
    run(budget, machine, 8, 50, lambda seconds: 2 * seconds)
    after = run(budget, machine, 8, 600, lambda seconds: seconds)
    assert after[0] < 0.75 * before
    assert after[-1] == pytest.approx(before, rel=0.01)


def test_prompts_go_on_in_the_smallest_chunks_where_decoding_leaves_nothing_of_the_target() -> None:
    machine, budget = Machine(0.006, 0.0009, 0.0003), StepBudget(4096, None, 0.02)
    machine.step(budget, 40, 0)
    chunks = []
    for index in range(3 * PROBE_STEPS):
        budget.began(index * 0.05)
        chunks.append(budget.for_prompts(40, 8, 3000))
        machine.step(budget, 40, chunks[-1])
    assert chunks.count(0) == 2, "a step now and then tells what decoding takes"
    assert {chunk for chunk in chunks if chunk} == {SMALLEST_CHUNK}
    assert budget.for_prompts(4) > 4 * SMALLEST_CHUNK, "prompts are read faster as soon as fewer decode"


@pytest.mark.parametrize("percent", [None, 150])
def test_a_target_that_one_stream_alone_does_not_keep_to_gives_way_to_the_percentage(percent: int | None) -> None:
    machine = Machine(0.05, 0.001, 0.0005)
    held, usual = StepBudget(4096, percent, 0.02), StepBudget(4096, percent or 180)
    seen = run(held, machine, 8, 50, lambda seconds: seconds)
    assert seen == run(usual, machine, 8, 50, lambda seconds: seconds)
    assert max(seen) > 1.3 * machine.seconds(8, 0)


def test_time_in_which_nobody_ran_tells_nothing_of_steps() -> None:
    machine, budget = Machine(0.006, 0.0009, 0.0003), StepBudget(4096, None, 0.05)
    run(budget, machine, 8, 60, lambda seconds: seconds)
    machine.step(budget, 8, 0)
    chunk = budget.for_prompts(8)
    for now_s in range(100, 150):
        machine.step(budget, 8, chunk)
        budget.began(None)
        budget.began(now_s)
    assert budget.for_prompts(8) == chunk


def test_without_a_target_the_times_of_steps_change_nothing() -> None:
    told, silent = StepBudget(512, 180), StepBudget(512, 180)
    machine = Machine(0.006, 0.0009, 0.0003)
    for index in range(200):
        told.began(index * 9.0)
        assert told.for_prompts(8, 3, 100) == silent.for_prompts(8, 3, 100)
        for budget in (told, silent):
            machine.step(budget, 8, silent.for_prompts(8, 3, 100))
