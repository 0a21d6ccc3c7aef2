"""Which requests are refused, with which words, and what the open choices of the others become."""

from __future__ import annotations

from array import array
from dataclasses import replace

import pytest

from pagemill.base.errors import CapacityError, ConfigError, LengthError, RequestError
from pagemill.base.params import CacheOptions, Retain, SamplingParams
from pagemill.cache.entry import SharingConfig
from pagemill.cache.manager import CacheManager, CacheMode
from pagemill.engine.admission import Admission, EngineLimits, derive_seed
from pagemill.engine.request import Request

LIMITS = EngineLimits(max_model_len=64, vocab_size=100, eos_token_ids=(7, 8))
GREEDY = SamplingParams(temperature=0.0, max_tokens=10)


def admit(
    prompt: object,
    params: SamplingParams = GREEDY,
    *,
    limits: EngineLimits = LIMITS,
    num_blocks: int = 32,
    mode: CacheMode = "paged",
) -> Request:
    admission = Admission(limits, CacheManager(num_blocks, 4, mode))
    return admission.admit("r", prompt, params, 99, 0.0)  # type: ignore[arg-type]


def test_empty_prompt_is_refused() -> None:
    with pytest.raises(RequestError, match="prompt is empty") as caught:
        admit([])
    assert caught.value.status == 400


@pytest.mark.parametrize("length", [64, 65, 5000])
def test_prompt_without_room_for_an_answer_is_refused_with_the_numbers(length: int) -> None:
    with pytest.raises(RequestError, match=f"{length:,} tokens and max_model_len is 64.*63 tokens or raise"):
        admit([1] * length)


def test_longest_prompt_that_fits_gets_one_token() -> None:
    assert admit([1] * 63).max_tokens == 1


@pytest.mark.parametrize("wrong", [-1, 100, 2**31, -(2**40), 1.5, "a", None])
def test_token_outside_the_vocabulary_is_named_with_its_place(wrong: object) -> None:
    with pytest.raises(RequestError, match=r"token 2 is .*ids from 0 to 99"):
        admit([5, 6, wrong, 3])


def test_prompt_of_text_is_refused_as_no_token_ids() -> None:
    with pytest.raises(RequestError, match="token 0 is 'h'"):
        admit("hello")


@pytest.mark.parametrize("prompt", [[1, 2], (1, 2), array("i", [1, 2]), array("q", [1, 2]), b"\x01\x02", range(1, 3)])
def test_any_sequence_of_whole_numbers_is_a_prompt(prompt: object) -> None:
    assert list(admit(prompt).prompt_token_ids) == [1, 2]


def test_admitted_prompt_is_a_copy() -> None:
    prompt = array("i", [1, 2, 3])
    request = admit(prompt)
    prompt[0] = 50
    assert list(request.prompt_token_ids) == [1, 2, 3]


def test_max_tokens_is_cut_at_the_end_of_the_context() -> None:
    assert admit([1] * 60, SamplingParams(max_tokens=1000)).max_tokens == 4


def test_no_max_tokens_means_up_to_the_end_of_the_context() -> None:
    assert admit([1] * 10, SamplingParams(max_tokens=None)).max_tokens == 54


def test_no_max_tokens_means_up_to_the_end_of_a_small_cache() -> None:
    request = admit([1] * 10, SamplingParams(max_tokens=None), num_blocks=5)
    assert request.max_tokens == 11
    assert request.longest == 20


def test_max_tokens_beyond_the_whole_cache_are_refused_with_the_most_that_fit() -> None:
    told = (
        r"max_tokens is 12 and the prompt has 10 tokens.* \(5 blocks of 4 tokens, 20 tokens\) has room for 11; give "
        r"max_tokens of 11 at the most or raise kv_cache_memory_bytes"
    )
    with pytest.raises(CapacityError, match=told) as caught:
        admit([1] * 10, SamplingParams(max_tokens=12), num_blocks=5)
    assert (caught.value.param, caught.value.retry_after_s) == ("max_tokens", None)
    with pytest.raises(CapacityError, match="max_tokens is 1,000"):
        admit([1] * 10, SamplingParams(max_tokens=1000), num_blocks=5)
    assert admit([1] * 10, SamplingParams(max_tokens=11), num_blocks=5).longest == 20
    assert admit([1] * 20, SamplingParams(max_tokens=1), num_blocks=5).longest == 20


def test_the_default_max_tokens_is_cut_where_the_same_number_asked_for_is_refused() -> None:
    assert admit([1] * 10, SamplingParams(), num_blocks=5).max_tokens == 11
    assert admit([1] * 10, replace(SamplingParams(), temperature=0.0), num_blocks=5).max_tokens == 11
    assert admit([1] * 4, SamplingParams(), num_blocks=5).max_tokens == 16
    with pytest.raises(CapacityError, match="max_tokens is 16"):
        admit([1] * 10, SamplingParams(max_tokens=16), num_blocks=5)
    assert SamplingParams() == SamplingParams(max_tokens=16)


def test_a_tenants_cap_still_cuts_what_the_cache_could_not_hold() -> None:
    cache = CacheManager(8, 4, sharing=SharingConfig())
    cache.grant("small", cap_tokens=20)
    admission = Admission(LIMITS, cache)
    params = SamplingParams(max_tokens=1000)
    assert admission.admit("r", [1] * 10, params, 99, 0.0, CacheOptions("small")).max_tokens == 11
    with pytest.raises(CapacityError, match="max_tokens of 23 at the most"):
        admission.admit("r", [1] * 10, params, 99, 0.0, CacheOptions("other"))


def test_no_max_tokens_means_up_to_the_end_of_a_tenants_part() -> None:
    cache = CacheManager(32, 4, sharing=SharingConfig())
    cache.grant("small", cap_tokens=20)
    admission, anything = Admission(LIMITS, cache), SamplingParams(max_tokens=None)
    longest = {
        tenant: admission.admit("r", [1] * 10, anything, 99, 0.0, CacheOptions(tenant)).max_tokens
        for tenant in ("small", "other")
    }
    assert longest == {"small": 11, "other": 54}


def test_max_tokens_is_cut_at_a_tenants_cap() -> None:
    cache = CacheManager(32, 4, sharing=SharingConfig())
    cache.grant("small", cap_tokens=20)
    admission = Admission(LIMITS, cache)
    for asked, got in ((5, 5), (11, 11), (12, 11), (1000, 11)):
        request = admission.admit("r", [1] * 10, SamplingParams(max_tokens=asked), 99, 0.0, CacheOptions("small"))
        assert request.max_tokens == got


def test_a_bias_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(RequestError, match="logit_bias names token 100; give ids from 0 to 99"):
        admit([1], SamplingParams(logit_bias={3: 1.0, 100: 1.0}))  # type: ignore[arg-type]
    admit([1], SamplingParams(logit_bias={99: 1.0}))  # type: ignore[arg-type]


def test_prompt_larger_than_the_whole_cache_is_refused_with_the_arithmetic() -> None:
    with pytest.raises(CapacityError, match=r"21 tokens need 6 blocks .* 5 blocks of 4 .*20 tokens.*kv_cache_memory"):
        admit([1] * 21, num_blocks=5)


def test_prompt_as_large_as_the_whole_cache_is_admitted() -> None:
    assert admit([1] * 20, SamplingParams(max_tokens=None), num_blocks=5).max_tokens == 1


def test_contiguous_cache_below_one_reservation_refuses_every_request() -> None:
    with pytest.raises(CapacityError, match=r"reserves 16 blocks for max_model_len \(64.*kv_cache to paged"):
        admit([1], num_blocks=15, mode="contiguous")
    assert admit([1], num_blocks=16, mode="contiguous").max_tokens == 10


def test_stop_ids_are_the_models_and_the_requests() -> None:
    assert admit([1], SamplingParams(stop_token_ids=(8, 20))).stop_token_ids == (7, 8, 20)
    assert admit([1], SamplingParams(stop_token_ids=(20,), ignore_eos=True)).stop_token_ids == (20,)


def test_stop_id_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(RequestError, match="stop_token_ids holds 100; give ids from 0 to 99"):
        admit([1], SamplingParams(stop_token_ids=(3, 100)))


def test_min_tokens_that_forbids_every_token_is_refused() -> None:
    limits = EngineLimits(max_model_len=8, vocab_size=3, eos_token_ids=(0,))
    with pytest.raises(RequestError, match="min_tokens forbids every token"):
        admit([1], SamplingParams(stop_token_ids=(1, 2), min_tokens=1), limits=limits)
    assert admit([1], SamplingParams(stop_token_ids=(1, 2)), limits=limits).stop_token_ids == (0, 1, 2)


def test_seed_of_the_request_outranks_the_derived_one() -> None:
    assert admit([1]).seed == 99
    assert admit([1], SamplingParams(seed=5)).seed == 5


def test_derived_seeds_differ_by_engine_and_request_and_repeat() -> None:
    seeds = [derive_seed(engine, number) for engine in (0, 1, 2**64 - 1) for number in range(50)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert derive_seed(0, 0) == seeds[0]


@pytest.mark.parametrize("name", ["max_model_len", "vocab_size", "max_num_seqs", "max_num_batched_tokens"])
def test_limits_below_one_are_refused_by_name(name: str) -> None:
    values = {"max_model_len": 8, "vocab_size": 8, "max_num_seqs": 1, "max_num_batched_tokens": 1, name: 0}
    with pytest.raises(ConfigError, match=f"{name} is 0"):
        EngineLimits(**values)


@pytest.mark.parametrize("target_s", [0.0, -0.02, float("nan"), float("inf")])
def test_a_time_between_tokens_that_is_none_is_refused(target_s: float) -> None:
    with pytest.raises(ConfigError, match="target_itl_s is"):
        EngineLimits(max_model_len=8, vocab_size=8, target_itl_s=target_s)


def test_context_of_one_token_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_model_len is 1"):
        EngineLimits(max_model_len=1, vocab_size=8)


@pytest.mark.parametrize(
    ("prompt", "params", "param"),
    [
        ([], GREEDY, "prompt"),
        ([1] * 64, GREEDY, "prompt"),
        ([100], GREEDY, "prompt"),
        ([1], SamplingParams(logit_bias=((100, 1.0),)), "logit_bias"),
        ([1], SamplingParams(stop_token_ids=(100,)), "stop_token_ids"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named(prompt: list[int], params: SamplingParams, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        admit(prompt, params)
    assert caught.value.param == param
    assert isinstance(caught.value, LengthError) == (len(prompt) == 64)


def test_a_prompt_or_a_range_beyond_what_there_is_is_named() -> None:
    with pytest.raises(CapacityError) as caught:
        admit([1] * 21, num_blocks=5)
    assert caught.value.param == "prompt"
    admission = Admission(LIMITS, CacheManager(32, 4, sharing=SharingConfig()))
    with pytest.raises(RequestError) as refused:
        admission.admit("r", [1] * 4, GREEDY, 99, 0.0, CacheOptions(retain=(Retain(0, 5),)))
    assert refused.value.param == "retain"
