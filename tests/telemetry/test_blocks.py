"""How long blocks live, on a sample, told by a real cache's events."""

from __future__ import annotations

import hashlib

from pagemill.telemetry.blocks import SAMPLED_OF_256, BlockLives
from pagemill.telemetry.metrics import Metrics

KEYS = [hashlib.sha256(str(number).encode()).digest() for number in range(1024)]
SAMPLED = [key for key in KEYS if key[0] < SAMPLED_OF_256]


def observed(metrics: Metrics, name: str) -> tuple[int, float]:
    [sample] = metrics[name].samples()
    return sum(sample.counts), sample.value


def test_a_block_s_life_its_idle_end_and_its_gaps() -> None:
    metrics = Metrics("tiny")
    lives = BlockLives(metrics)
    key = SAMPLED[0]
    lives.stored(key, 10.0)
    lives.used([key], 12.0)
    lives.used([key], 17.0)
    lives.removed(key, evicted=True, now_s=20.0)
    assert observed(metrics, "vllm:kv_block_lifetime_seconds") == (1, 10.0)
    assert observed(metrics, "vllm:kv_block_idle_before_evict_seconds") == (1, 3.0)
    assert observed(metrics, "vllm:kv_block_reuse_gap_seconds") == (2, 7.0)
    assert lives.num_followed == 0


def test_a_purge_says_nothing_of_how_long_blocks_last() -> None:
    metrics = Metrics("tiny")
    lives = BlockLives(metrics)
    lives.stored(SAMPLED[0], 10.0)
    lives.removed(SAMPLED[0], evicted=False, now_s=11.0)
    assert observed(metrics, "vllm:kv_block_lifetime_seconds") == (0, 0.0)
    assert lives.num_followed == 0


def test_about_an_eighth_of_the_blocks_is_followed() -> None:
    lives = BlockLives(Metrics("tiny"))
    for key in KEYS:
        lives.stored(key, 0.0)
    assert lives.num_followed == len(SAMPLED)
    assert 80 < len(SAMPLED) < 180


def test_blocks_that_are_not_followed_are_no_trouble() -> None:
    metrics = Metrics("tiny")
    lives = BlockLives(metrics)
    lives.used(KEYS, 1.0)
    for key in KEYS:
        lives.removed(key, evicted=True, now_s=2.0)
    assert observed(metrics, "vllm:kv_block_lifetime_seconds") == (0, 0.0)
