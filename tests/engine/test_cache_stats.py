"""The cache's figures as an operator is shown them, and its curve fed by the look-ups of a whole engine."""

from __future__ import annotations

import json

import pytest

from pagemill.base.errors import ConfigError
from pagemill.base.kv_spec import KVSpec, LayerKV
from pagemill.base.params import CacheOptions, SamplingParams
from pagemill.cache.entry import SharingConfig
from pagemill.cache.manager import CacheManager
from pagemill.engine.cache_stats import cache_curve, cache_stats
from tests.fixtures.fake_engine import Rig

SIZE = 4


def make(num_blocks: int = 64) -> Rig:
    return Rig(num_blocks, SIZE, vocab_size=1000, sharing=SharingConfig())


def ask(rig: Rig, name: str, prompt: list[int], options: CacheOptions | None = None, max_tokens: int = 1) -> None:
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, seed=0)
    rig.engine.add_request(name, prompt, params, cache=options or CacheOptions())
    rig.run()


def test_a_prompt_asked_twice_is_half_of_what_was_asked() -> None:
    rig = make()
    for name in ("cold", "warm"):
        ask(rig, name, list(range(17)))
    stats = cache_stats(rig.engine)
    assert stats["tokens"] == {"asked": 32, "hit": 16, "hit_ratio": 0.5, "asked_again": 0, "hit_again": 0}
    assert stats["curve"]["recorded_blocks"] == 8
    assert stats["curve"]["points"][-1] == {"blocks": 512, "tokens": 2048, "hit_ratio": 0.5}
    assert stats["blocks"]["total"] == 64 == stats["blocks"]["free"] + stats["blocks"]["cached"]


def test_points_tell_memory_where_it_is_known_what_a_block_takes() -> None:
    kv_spec = KVSpec((LayerKV(2, 16),), 16)
    cache = CacheManager(64, 16, sharing=SharingConfig(), kv_spec=kv_spec)
    points = cache_curve(cache, [16, 512])["points"]
    assert [each["bytes"] for each in points] == [16 * 2048, 512 * 2048] == [kv_spec.block_bytes * n for n in (16, 512)]
    assert "bytes" not in cache_curve(make().cache, [16])["points"][0]


def test_points_of_a_cache_with_windows_take_their_pages_in_proportion() -> None:
    kv_spec = KVSpec((LayerKV(2, 16), LayerKV(2, 16, "window", 16)), 16, window_pages=(10,))
    cache = CacheManager(64, 16, sharing=SharingConfig(), kv_spec=kv_spec)
    points = cache_curve(cache, [32, 64])["points"]
    assert [each["bytes"] for each in points] == [37 * 2048, 74 * 2048]


def test_who_was_put_off_and_comes_again_counts_once_and_apart() -> None:
    rig = Rig(num_blocks=8, max_num_batched_tokens=64, sharing=SharingConfig())
    for index in range(2):
        rig.add(f"r{index}", [101 * index + each for each in range(4)], max_tokens=22)
    rig.run()
    assert rig.engine.stats().num_preemptions > 0
    tokens = cache_stats(rig.engine)["tokens"]
    assert (tokens["asked"], tokens["hit"], tokens["hit_ratio"]) == (2 * 3, 0, 0.0)
    assert tokens["asked_again"] > tokens["hit_again"] > 0


def test_the_curve_tells_what_a_smaller_cache_would_have_hit() -> None:
    rig = make()
    for index in range(3):
        for text in range(4):
            ask(rig, f"{index} {text}", [100 * text + each for each in range(17)])
    points = cache_curve(rig.cache, [4, 12, 16, 17])["points"]
    assert [each["hit_ratio"] for each in points] == pytest.approx([0, 0, 2 / 3, 2 / 3], abs=1e-6)


def test_an_answer_that_is_asked_for_in_the_next_turn_counts_as_hit() -> None:
    rig = make()
    prompt = list(range(9))
    ask(rig, "first", prompt, max_tokens=12)
    ask(rig, "second", prompt + rig.tokens("first") + [7])
    # 2 blocks, then 5 of which all were there: 2 of the prompt and 3 of the answer.
    assert cache_curve(rig.cache, [16])["points"][0]["hit_ratio"] == pytest.approx(5 / 7, abs=1e-6)


def test_a_request_that_goes_past_the_cache_is_no_use_of_it() -> None:
    rig = make()
    ask(rig, "past", list(range(17)), CacheOptions(bypass=True))
    assert cache_stats(rig.engine)["curve"]["recorded_blocks"] == 0


def test_tenants_with_blocks_or_a_quota_are_listed() -> None:
    rig = make()
    assert rig.cache.shared is not None
    rig.cache.shared.set_quota("promised", 8, 16)
    ask(rig, "a", list(range(17)), CacheOptions("user"))
    tenants = {each["tenant"]: each for each in cache_stats(rig.engine)["tenants"]}
    assert tenants.keys() == {"promised", "user"}
    assert (tenants["promised"]["floor"], tenants["promised"]["cap"], tenants["promised"]["used"]) == (8, 16, 0)
    assert tenants["user"]["used"] == tenants["user"]["cached"] > 0


def test_an_engine_that_shares_nothing_has_no_curve() -> None:
    rig = Rig(16, SIZE, "contiguous", max_model_len=32)
    stats = cache_stats(rig.engine)
    assert (stats["sharing"], stats["curve"], stats["tenants"], stats["policy"]) == (False, None, [], None)
    assert stats["tokens"]["hit_ratio"] is None


def test_the_object_is_json() -> None:
    rig = make(3)
    text = json.dumps(cache_stats(rig.engine), allow_nan=False)
    assert [each["blocks"] for each in json.loads(text)["curve"]["points"]] == [1, 3, 6, 12, 24]


@pytest.mark.parametrize("sizes", [[], [0], [4] * 257])
def test_sizes_that_are_none_are_refused(sizes: list[int]) -> None:
    with pytest.raises(ConfigError, match="size"):
        cache_curve(make().cache, sizes)
