"""What an operator says of the prefix cache: tenants, quotas, public namespaces, wiping; and what names the weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pagemill import LLM, CacheOptions, CapacityError, ConfigError, PagemillError, RequestError, Retain, SamplingParams
from pagemill.cache.entry import Removed, Stored
from pagemill.cache.keys import Fingerprint
from pagemill.kernels._native import NativePolicy
from tests.fixtures.tiny import tiny_llama

GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
PROMPT = {"prompt_token_ids": [(7 * i * i + 3 * i) % 250 for i in range(70)]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_llama(tmp_path_factory.mktemp("tiny")))


def make(model: str, **options: object) -> LLM:
    return LLM(model, **{"kv_cache_memory_bytes": "4MiB", "packed_weights_cache": "off", **options})


def fingerprint(model: str, **options: object) -> Fingerprint:
    with make(model, **options) as llm:
        shared = llm.built.engine.cache.shared
        assert shared is not None
        return shared._config.fingerprint


def test_tenants_of_the_file_have_their_quotas(model: str, tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text(
        'known_tenants_only = "on"\npublic_namespaces = "docs"\n'
        "[tenants.small]\nfloor_tokens = 20\ncap_tokens = 63\n[tenants.big]\n"
    )
    with make(model, config_file=str(file)) as llm:
        shared = llm.built.engine.cache.shared
        assert shared is not None
        account = shared.account_of(CacheOptions("small"))
        assert (account.floor, account.cap) == (2, 3), "a floor is rounded up to blocks of 16, a cap down"
        with pytest.raises(CapacityError, match=r"tenant 'small' may have 3"):
            llm.generate(PROMPT, GREEDY, tenant="small")
        llm.generate(PROMPT, GREEDY, cache=CacheOptions("big", public="docs"))
        [found] = llm.generate(PROMPT, GREEDY, cache=CacheOptions("small", public="docs"))
        assert found.num_cached_tokens == 69
        for options in (None, "stranger"):
            with pytest.raises(RequestError, match="is unknown") as caught:
                llm.generate(PROMPT, GREEDY, tenant=options)
            assert caught.value.status == 403
        with pytest.raises(RequestError, match="no public namespace 'other'"):
            llm.generate(PROMPT, GREEDY, cache=CacheOptions("big", public="other"))
        assert llm.cache.remove_tenant("big") == 0
        with pytest.raises(RequestError, match="'big' is unknown"):
            llm.generate(PROMPT, GREEDY, tenant="big")


@pytest.mark.parametrize(
    ("tenants", "message"),
    [
        (
            {"a": {"floor_tokens": "64M"}},
            "of 67,108,864 tokens .* of the cache; lower it or raise kv_cache_memory_bytes",
        ),
        ({"a": {"cap_tokens": "64M"}}, "is 67,108,864 tokens .* and the cache has .* tokens .*; lower it"),
        ({"a": {"cap_tokens": 5}}, "tenant 'a': the cap is less than a block; give at least 16 tokens"),
    ],
)
def test_quotas_beyond_the_memory_end_the_start_with_what_to_do(model: str, tenants: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(model, tenants=tenants)


def test_floors_that_only_together_exceed_the_memory_are_refused(model: str) -> None:
    with make(model) as llm:
        half = llm.stats().cache.num_blocks * 16 // 2
    make(model, tenants={"a": {"floor_tokens": half}, "b": {"floor_tokens": half - 32}}).close()
    with pytest.raises(ConfigError, match="promised to others"):
        make(model, tenants={"a": {"floor_tokens": half}, "b": {"floor_tokens": half + 32}})


def test_a_quota_is_changed_while_the_engine_runs(model: str) -> None:
    with make(model) as llm:
        llm.generate(PROMPT, GREEDY, tenant="a")
        llm.cache.set_quota("a", cap_tokens=32)
        assert llm.stats().cache.num_cached_blocks == 2
        with pytest.raises(ConfigError, match="cap_tokens is '5'"):
            llm.cache.set_quota("a", cap_tokens="5")  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="floor_tokens is -5; give 0 or more tokens"):
            llm.cache.set_quota("a", floor_tokens=-5)
        for cap_tokens in (0, -5, 5):
            with pytest.raises(ConfigError, match=r"give at least (a block of )?16 tokens"):
                llm.cache.set_quota("a", cap_tokens=cap_tokens)
        with pytest.raises(ConfigError, match=r"the cap, 16 tokens \(1 block\), is below the floor, 32 tokens"):
            llm.cache.set_quota("a", floor_tokens=17, cap_tokens=31)
        with pytest.raises(CapacityError, match="tenant 'a' may have 2"):
            llm.generate(PROMPT, GREEDY, tenant="a")


def test_pins_beyond_a_cap_are_refused_and_change_nothing(model: str) -> None:
    with make(model) as llm:
        llm.generate(PROMPT, GREEDY, tenant="a")
        pin = llm.cache.pin(PROMPT, 60.0, CacheOptions("a"))
        llm.cache.set_quota("a", cap_tokens=48)
        before = llm.stats().cache
        with pytest.raises(CapacityError, match=r"exceeds the cap of tenant 'a', 3 blocks; unpin some"):
            llm.cache.pin(PROMPT, 60.0, CacheOptions("a"))
        assert llm.stats().cache == before
        assert llm.cache.unpin(pin)
        assert llm.stats().cache.num_cached_blocks == 3, "the cap takes effect as soon as nothing is held"


@pytest.mark.parametrize("wiping", ["on", "off"])
def test_dropped_pages_are_wiped_unless_the_operator_says_otherwise(model: str, wiping: str) -> None:
    with make(model, kv_cache_wiping=wiping) as llm:
        [first] = llm.generate(PROMPT, GREEDY)
        assert llm.cache.purge_tenant("default") == 5
        pages = llm.built.executor.model._pages._blocks  # type: ignore[attr-defined]
        assert np.any(pages) == (wiping == "off")
        [again] = llm.generate(PROMPT, GREEDY)
        assert again.outputs[0].token_ids == first.outputs[0].token_ids
        assert again.num_cached_tokens == 0


def test_a_retained_range_outside_the_prompt_is_refused(model: str) -> None:
    with make(model) as llm, pytest.raises(RequestError, match="end it at 70 at the most"):
        llm.generate(PROMPT, GREEDY, cache=CacheOptions(retain=(Retain(0, 71),)))


def test_a_listener_is_told_of_every_block_until_it_is_taken_away(model: str) -> None:
    with make(model) as llm:
        index: dict[bytes, int] = {}

        def told(event: Stored | Removed) -> None:
            if isinstance(event, Stored):
                index[event.key] = event.block
            else:
                del index[event.key]

        llm.cache.listen(told)
        llm.generate(PROMPT, GREEDY)
        shared = llm.built.engine.cache.shared
        assert shared is not None
        assert index == {key: node.block for key, node in shared.tree.index.items()}
        assert len(index) == 5
        llm.cache.purge_tenant("default")
        assert index == {}
        llm.cache.listen(None)
        llm.generate(PROMPT, GREEDY)
        assert index == {}


def test_weights_have_the_same_name_after_a_restart_however_they_are_loaded(model: str, tmp_path: Path) -> None:
    kept = {"packed_weights_cache": str(tmp_path) + "/"}
    names = [fingerprint(model).weights for _ in range(2)]
    names += [fingerprint(model, **kept).weights for _ in range(2)]
    names.append(fingerprint(model, executor="reference").weights)
    assert len(set(names)) == 1
    assert len(names[0].split("/")[0]) == 64


@pytest.mark.parametrize("name", ["lru", "adaptive"])
def test_an_engine_evicts_by_native_policies(model: str, name: str) -> None:
    with make(model, cache_policy=name, kv_cache_memory_bytes="256KiB") as llm:
        shared = llm.built.engine.cache.shared
        assert shared is not None
        assert [type(each) for each in shared.shelves._policies.values()] == [NativePolicy]
        for at in range(12):  # there is room for four of these
            llm.generate({"prompt_token_ids": [(at + 7 * i * i) % 250 for i in range(400)]}, GREEDY)
        assert llm.built.engine.cache.stats().num_evicted_blocks > 0
        shared.verify()


def test_whatever_changes_the_bytes_of_a_block_changes_the_fingerprint(model: str, tmp_path: Path) -> None:
    base = fingerprint(model)
    assert fingerprint(model) == base
    others = [
        fingerprint(str(tiny_llama(tmp_path / "other", seed=5))),
        fingerprint(model, dtype="float32"),
        fingerprint(model, weight_format="q8_0"),
        fingerprint(model, kv_cache_dtype="f16"),
        fingerprint(model, block_size=32),
        fingerprint(model, executor="reference"),
    ]
    assert len({base, *others}) == 1 + len(others)
    assert base.positions.startswith("RopeSpec(")


WRONG_CALLS: list[tuple[Callable[[LLM], object], str]] = [
    (lambda llm: llm.cache.pin("A text.", "60"), "seconds is '60'"),  # type: ignore[arg-type]
    (lambda llm: llm.cache.pin("A text.", True), "seconds is True"),
    (lambda llm: llm.cache.pin("A text.", float("nan")), "a lease of nan seconds"),
    (lambda llm: llm.cache.unpin(1), "a pin is a int"),  # type: ignore[arg-type]
    (lambda llm: llm.cache.set_quota([], floor_tokens=16), r"a tenant is named \[\]"),  # type: ignore[arg-type]
    (lambda llm: llm.cache.set_quota("", floor_tokens=16), "a tenant is named ''"),
    (lambda llm: llm.cache.set_quota("t" * 257), "1 to 256 letters"),
    (lambda llm: llm.cache.declare_public(5), "a public namespace is named 5"),  # type: ignore[arg-type]
    (lambda llm: llm.cache.purge_tenant([]), r"a tenant is named \[\]"),  # type: ignore[arg-type]
    (lambda llm: llm.cache.remove_tenant(""), "a tenant is named ''"),
    (lambda llm: llm.cache.purge_namespace("bakery"), "options is a str"),  # type: ignore[arg-type]
    (lambda llm: llm.cache.purge("A text.", "bakery"), "options is a str"),  # type: ignore[arg-type]
    (lambda llm: llm.cache.purge({"prompt_token_ids": [2**31]}), "no 32-bit numbers"),
    (lambda llm: llm.cache.curve(5), "sizes of the cache are a int"),  # type: ignore[arg-type]
    (lambda llm: llm.cache.curve([float("nan")]), "a size of the cache is nan"),  # type: ignore[list-item]
    (lambda llm: llm.cache.stats([True]), "a size of the cache is True"),
    (lambda llm: llm.cache.curve([0]), "give sizes from 1"),
    (lambda llm: llm.cache.listen(5), "a listener is a int"),  # type: ignore[arg-type]
    (
        lambda llm: llm.resize_kv_cache("1KiB"),
        r"holds no block of the KV cache; give at least [1-9][\d,]+ bytes \(1 block\)",
    ),
    (lambda llm: llm.session().restore("0"), "no snapshot '0'"),  # type: ignore[arg-type]
    (lambda llm: llm.session().restore(False), "no snapshot False"),
]


@pytest.mark.parametrize(("call", "message"), WRONG_CALLS)
def test_what_a_caller_must_not_give_is_refused_and_changes_nothing(
    model: str, call: Callable[[LLM], object], message: str
) -> None:
    with make(model) as llm:
        llm.generate("A text.", GREEDY)
        before = llm.cache.stats()
        with pytest.raises(PagemillError, match=message):
            call(llm)
        assert llm.cache.stats() == before
