"""Who enters next: between tenants, within a queue, and what one tenant's limits may not do to another."""

from __future__ import annotations

from array import array

import pytest

from pagemill.base.params import CacheOptions
from pagemill.cache.block import Node
from pagemill.cache.entry import SharingConfig
from pagemill.cache.sharing import SharedBlocks
from pagemill.engine.entering import LOOKAHEAD, MOST_PASSED
from tests.fixtures.fake_engine import STEP_S, Rig
from tests.fixtures.fake_executor import answer

A, B = CacheOptions(tenant="a"), CacheOptions(tenant="b")


def prompt(length: int, first: int = 1) -> list[int]:
    return [(first + 7 * i) % 256 for i in range(length)]


def entered(rig: Rig, *names: str) -> list[str]:
    """Names in the order in which they entered."""
    marks = {name: rig.answers[name, 0].deltas[0].marks.scheduled_s or 0.0 for name in names}
    return sorted(names, key=lambda name: marks[name])


def shared(**options: object) -> Rig:
    return Rig(sharing=SharingConfig(), **options)  # type: ignore[arg-type]


# Between tenants


def test_tenants_take_turns_however_many_one_of_them_brings() -> None:
    rig = Rig(max_num_seqs=1, max_num_batched_tokens=64)
    for index in range(6):
        rig.add(f"a{index}", prompt(4, index), A, max_tokens=4)
    for index in range(3):
        rig.add(f"b{index}", prompt(4, 90 + index), B, max_tokens=4)
    rig.run()
    names = [f"a{i}" for i in range(6)] + [f"b{i}" for i in range(3)]
    assert entered(rig, *names)[:6] == ["a0", "b0", "a1", "b1", "a2", "b2"]


def test_weights_and_priorities_of_tenants_are_kept() -> None:
    rig = Rig(max_num_seqs=1, max_num_batched_tokens=64)
    rig.engine.grant("a", priority=-1)
    for index in range(10):
        rig.add(f"a{index}", prompt(4, index), A, max_tokens=4)
        rig.add(f"b{index}", prompt(4, 90 + index), B, max_tokens=4)
    rig.run()
    order = entered(rig, *(f"{t}{i}" for t in "ab" for i in range(10)))
    assert [name[0] for name in order[:10]].count("a") == 8


def test_a_newcomer_displaces_the_last_of_who_has_more_than_its_part() -> None:
    rig = shared(num_blocks=64, max_num_seqs=4, max_num_batched_tokens=64)
    for index in range(8):
        rig.add(f"a{index}", prompt(4, index), A, max_tokens=40)
    for _ in range(5):
        rig.step()
    rig.add("b", prompt(4, 200), B, max_tokens=4)
    rig.run()
    marks = rig.answers["b", 0].deltas[0].marks
    assert marks.first_token_s is not None
    assert marks.first_token_s - marks.arrival_s <= 2 * STEP_S, "it waits for nobody's end"
    assert rig.engine.stats().num_preemptions == 1
    for index in range(8):
        assert rig.tokens(f"a{index}") == answer(prompt(4, index), 40, 256)


def test_nobody_is_displaced_for_the_same_tenant_or_for_one_that_has_its_part() -> None:
    rig = shared(num_blocks=64, max_num_seqs=4, max_num_batched_tokens=64)
    for tenant, options in (("a", A), ("b", B)):
        for index in range(5):
            rig.add(f"{tenant}{index}", prompt(4, ord(tenant) + 31 * index), options, max_tokens=20)
    rig.run()
    assert rig.engine.stats().num_preemptions == 0


def test_a_flood_leaves_the_others_prompts_their_turn() -> None:
    rig = shared(num_blocks=512, max_num_seqs=16, max_num_batched_tokens=16, max_model_len=256)
    for index in range(8):
        rig.add(f"a{index}", prompt(100, 3 * index), A, max_tokens=4)
    for _ in range(4):
        rig.step()
    rig.add("b", prompt(20, 200), B, max_tokens=4)
    rig.run()
    marks = rig.answers["b", 0].deltas[0].marks
    assert (marks.first_token_s or 0.0) - marks.arrival_s <= 5 * STEP_S, "800 tokens of the flood were before it"


# A tenant at its cap, and room that is short


def test_a_tenant_at_its_cap_holds_up_nobody_else() -> None:
    rig = shared(num_blocks=64, max_num_batched_tokens=64)
    assert rig.cache.shared is not None
    rig.cache.shared.set_quota("a", 0, 4)
    rig.add("a0", prompt(12, 1), A, max_tokens=5)
    rig.add("a1", prompt(12, 50), A, max_tokens=5)
    rig.add("b0", prompt(12, 90), B, max_tokens=5)
    rig.step()
    assert [row.seq_id for row in rig.rows[0]] == [1, 3]
    rig.run()
    assert rig.tokens("a1") == answer(prompt(12, 50), 5, 256)


def test_room_is_held_for_whoever_is_first_against_small_ones_of_other_tenants() -> None:
    rig = shared(num_blocks=16, max_num_batched_tokens=128)
    rig.add("runs", prompt(40), A, max_tokens=8)  # 10 of 16 blocks
    rig.step()
    rig.add("large", prompt(44, 99), B, max_tokens=2)
    for index in range(20):
        rig.add(f"small{index}", prompt(2, index), A, max_tokens=2)
    rig.run()
    assert entered(rig, "large", *(f"small{i}" for i in range(20)))[0] == "large"


def test_a_tenant_within_its_floor_enters_while_another_waits_for_room() -> None:
    rig = shared(num_blocks=16, max_num_batched_tokens=128)
    assert rig.cache.shared is not None
    rig.cache.shared.set_quota("b", 4, None)
    rig.add("warm", prompt(15, 77), B, max_tokens=1)  # leaves four blocks that only b may take
    rig.run()
    rig.add("runs", prompt(33, 30), CacheOptions(tenant="c"), max_tokens=14)  # 9 blocks, 12 in the end
    rig.step()
    rig.add("large", prompt(40, 99), A, max_tokens=2)
    rig.add("within", prompt(8, 200), B, max_tokens=2)
    rig.run()
    assert entered(rig, "large", "within") == ["within", "large"]


def test_whoever_can_never_fit_fails_and_holds_up_nobody() -> None:
    rig = shared(num_blocks=16, max_num_batched_tokens=64)
    assert rig.cache.shared is not None
    rig.add("a0", prompt(20, 1), A, max_tokens=8)
    rig.cache.shared.set_quota("a", 0, 4)  # lowered after it was let in
    rig.add("b0", prompt(8, 90), B, max_tokens=8)
    rig.run()
    assert "tenant 'a' may have 4" in str(rig.answers["a0", 0].deltas[-1].error)
    assert rig.answers["b0", 0].finish_reason == "length"


def _floor_of_twelve(rig: Rig) -> None:
    """Tenant a has 12 of 16 blocks by its floor, all of them cached."""
    assert rig.cache.shared is not None
    rig.cache.shared.set_quota("a", 12, None)
    for index in range(3):
        rig.add(f"fill{index}", [index + 1] * 15, A, max_tokens=2)
    rig.run()


def test_whoever_finds_no_room_beside_floors_fails_and_holds_up_nobody_while_the_floored_run_on() -> None:
    rig = shared(num_blocks=16, max_model_len=64)
    _floor_of_twelve(rig)
    rig.add("a0", [1] * 15, A, max_tokens=40)
    rig.step()
    rig.add("large", prompt(30, 90), B, max_tokens=2)
    rig.add("small", prompt(3, 200), CacheOptions(tenant="c"), max_tokens=2)
    for _ in range(20):
        rig.step()
    assert rig.answers["small", 0].finish_reason == "length"
    assert "more than the floors of other tenants leave" in str(rig.answers["large", 0].deltas[-1].error)
    rig.run()
    assert rig.answers["a0", 0].finish_reason == "length"


def test_whoever_outgrows_what_floors_leave_fails_and_takes_nobodys_blocks() -> None:
    rig = shared(num_blocks=16, max_model_len=64)
    _floor_of_twelve(rig)
    rig.add("grows", prompt(10, 90), B, max_tokens=20)
    rig.step()
    rig.add("a0", [1] * 15, A, max_tokens=30)
    rig.run()
    assert "more than the floors of other tenants leave" in str(rig.answers["grows", 0].deltas[-1].error)
    assert rig.answers["a0", 0].finish_reason == "length"
    assert rig.engine.stats().num_preemptions == 0


# Within a queue: what the cache holds


def test_a_text_that_is_in_the_cache_goes_before_one_that_is_not() -> None:
    rig = shared(max_num_seqs=1)
    rig.add("warm", prompt(17, 5), A, max_tokens=1)
    rig.run()
    rig.add("cold", prompt(17, 150), A, max_tokens=2)
    rig.add("hot", [*prompt(17, 5), 9], A, max_tokens=2)
    rig.run()
    assert entered(rig, "cold", "hot") == ["hot", "cold"]


@pytest.mark.parametrize("options", [B, CacheOptions(tenant="a", salt="x"), CacheOptions(tenant="a", bypass=True)])
def test_what_another_namespace_holds_changes_no_order(options: CacheOptions) -> None:
    rig = shared(max_num_seqs=1)
    rig.add("warm", prompt(17, 5), A, max_tokens=1)
    rig.run()
    rig.add("cold", prompt(17, 150), options, max_tokens=2)
    rig.add("same text", [*prompt(17, 5), 9], options, max_tokens=2)
    rig.run()
    assert entered(rig, "cold", "same text") == ["cold", "same text"]


def test_a_better_priority_is_not_passed_for_a_hit() -> None:
    rig = shared(max_num_seqs=1)
    rig.add("warm", prompt(17, 5), A, max_tokens=1)
    rig.run()
    rig.add("cold", prompt(17, 150), A, max_tokens=2, priority=-1)
    rig.add("hot", [*prompt(17, 5), 9], A, max_tokens=2)
    rig.run()
    assert entered(rig, "cold", "hot") == ["cold", "hot"]


def test_one_without_hits_is_passed_only_so_often() -> None:
    rig = shared(max_num_seqs=1, num_blocks=256)
    rig.add("warm", prompt(17, 5), A, max_tokens=1)
    rig.run()
    rig.add("cold", prompt(17, 150), A, max_tokens=2)
    names = [f"hot{index}" for index in range(3 * MOST_PASSED)]
    for index, name in enumerate(names):
        rig.add(name, [*prompt(17, 5), index], A, max_tokens=2)
    rig.run()
    assert entered(rig, "cold", *names).index("cold") == MOST_PASSED


# Within a queue: what is being read


def long_pair(rig: Rig, other: CacheOptions = A) -> None:
    rig.add("first", [*prompt(200, 5), 1, 2, 3], A, max_tokens=3)
    rig.add("second", [*prompt(200, 5), 7, 8, 9], other, max_tokens=3)
    rig.run()
    for name, end in (("first", [1, 2, 3]), ("second", [7, 8, 9])):
        assert rig.tokens(name) == answer([*prompt(200, 5), *end], 3, 256)


def test_a_prompt_that_is_just_being_read_is_not_read_twice() -> None:
    rig = shared(num_blocks=256, max_num_batched_tokens=64, max_model_len=256)
    long_pair(rig)
    assert rig.answers["second", 0].deltas[-1].num_cached_tokens == 192
    assert rig.engine.stats().num_computed_tokens == 203 + 2 + 203 - 192 + 2


@pytest.mark.parametrize("other", [B, CacheOptions(tenant="a", salt="x"), CacheOptions(tenant="a", bypass=True)])
def test_another_namespace_neither_waits_nor_hits(other: CacheOptions) -> None:
    rig = shared(num_blocks=256, max_num_batched_tokens=256, max_model_len=256)
    long_pair(rig, other)
    assert rig.answers["second", 0].deltas[-1].num_cached_tokens == 0
    assert len(rig.rows[0]) == 2, "there is room for both in the first step"


def test_others_enter_while_one_waits_for_a_prompt_that_is_being_read() -> None:
    rig = shared(num_blocks=256, max_num_batched_tokens=64, max_model_len=256)
    rig.add("first", [*prompt(200, 5), 1, 2, 3], A, max_tokens=3)
    rig.step()
    rig.add("second", [*prompt(200, 5), 7, 8, 9], A, max_tokens=3)
    rig.add("third", prompt(10, 99), A, max_tokens=3)
    rig.run()
    assert entered(rig, "second", "third") == ["third", "second"]


def test_whoever_waited_for_a_prompt_reads_it_when_its_reader_is_gone() -> None:
    rig = shared(num_blocks=256, max_num_batched_tokens=32, max_model_len=256)
    rig.add("first", [*prompt(200, 5), 1, 2, 3], A, max_tokens=3)
    rig.add("second", [*prompt(200, 5), 7, 8, 9], A, max_tokens=3)
    for _ in range(2):
        rig.step()
    rig.abort("first")
    rig.run()
    assert rig.tokens("second") == answer([*prompt(200, 5), 7, 8, 9], 3, 256)
    assert rig.answers["second", 0].deltas[-1].num_cached_tokens == 64, "and finds what it left"


# Prompts beside each other


def test_a_short_prompt_is_not_held_up_by_a_long_one_before_it() -> None:
    rig = Rig(num_blocks=512, max_num_batched_tokens=20, max_model_len=1024)
    rig.add("long", prompt(800), max_tokens=2)
    rig.step()
    rig.add("short", prompt(10, 99), max_tokens=2)
    rig.run()
    marks = rig.answers["short", 0].deltas[0].marks
    assert (marks.first_token_s or 0.0) - marks.arrival_s <= 2 * STEP_S
    rows = [row.count for step in rig.rows for row in step if row.seq_id == 1]
    assert min(rows[:39]) >= 10, "the one in front has half of every step"


# What it costs to choose


def _calls(monkeypatch: pytest.MonkeyPatch, rig: Rig, name: str) -> list[object]:
    """What is appended to whenever the rig's prefix cache is asked so."""
    owner, calls = type(rig.cache.shared), []
    asked = getattr(owner, name)

    def counted(*arguments: object) -> object:
        calls.append(arguments[0])
        return asked(*arguments)

    monkeypatch.setattr(owner, name, counted)
    return calls


@pytest.mark.parametrize("num_tenants", [4, 200])
def test_where_blocks_are_short_and_no_floors_promised_only_whose_turn_it_is_is_looked_up(
    num_tenants: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = shared(num_blocks=16, max_num_batched_tokens=128)
    rig.add("runs", prompt(33, 30), A, max_tokens=14)
    rig.step()
    for index in range(num_tenants):
        rig.add(f"waits{index}", prompt(40, index), CacheOptions(tenant=f"t{index}"), max_tokens=2)
    looked_up = _calls(monkeypatch, rig, "entry")
    rig.step()
    assert 0 < len(looked_up) <= 4
    rig.run()
    assert {rig.answers[f"waits{index}", 0].finish_reason for index in range(num_tenants)} == {"length"}


def test_hits_of_those_who_wait_are_not_counted_anew_in_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = shared(num_blocks=64, max_num_batched_tokens=8)
    rig.add("reads", prompt(100, 30), A, max_tokens=2)
    for index in range(6):
        rig.add(f"waits{index}", prompt(60, 100 + index), A, max_tokens=2)
    counted = _calls(monkeypatch, rig, "chain_of")
    num_steps = 16
    for _ in range(num_steps):
        rig.step()
    assert 6 <= len(counted) <= 4 * 6, "six wait"
    rig.run()


def test_few_texts_that_wait_are_looked_up_anew_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = shared(max_num_seqs=2, num_blocks=256, max_num_batched_tokens=4)
    looked_up: list[int] = []
    chain_of = SharedBlocks.chain_of

    def counted(self: SharedBlocks, options: CacheOptions, tokens: array[int]) -> list[Node]:
        looked_up[-1] += 1
        return chain_of(self, options, tokens)

    monkeypatch.setattr(SharedBlocks, "chain_of", counted)
    rig.add("read", prompt(100), max_tokens=1)
    for index in range(12):
        rig.add(f"{index}", prompt(120, 2 + index), max_tokens=1)
    for _ in range(20):  # a choice each, for which no tokens are left
        looked_up.append(0)
        rig.step()
    assert looked_up[0] == LOOKAHEAD + 1, "and one more that came within reach"
    assert max(looked_up[1:]) == 2, "of those that were looked up long ago"
    assert sum(looked_up[1:]) >= LOOKAHEAD, "all in turn"
    rig.run()


def test_texts_of_every_tenant_are_looked_up_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four tenants at their caps, eight texts each: no turn is so late that what was counted once stands for ever."""
    rig = shared(num_blocks=256, max_num_batched_tokens=64)
    counted: dict[str, int] = {}
    chain_of = SharedBlocks.chain_of

    def count(self: SharedBlocks, options: CacheOptions, tokens: array[int]) -> list[Node]:
        counted[options.tenant] = counted.get(options.tenant, 0) + 1
        return chain_of(self, options, tokens)

    assert rig.cache.shared is not None
    for name in "wxyz":
        rig.cache.shared.set_quota(name, 0, 8)
        rig.add(f"{name} runs", prompt(20, 30), CacheOptions(tenant=name), max_tokens=12)
    rig.step()
    for index in range(8):
        for name in "wxyz":
            rig.add(f"{name}{index}", prompt(24, 100 + index), CacheOptions(tenant=name), max_tokens=2)
    rig.step()
    monkeypatch.setattr(SharedBlocks, "chain_of", count)
    for _ in range(9):
        rig.step()
    assert set(counted) == set("wxyz"), "while none of them can enter"
    rig.run()
