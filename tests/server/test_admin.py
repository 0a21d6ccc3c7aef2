"""The admin port over a real engine and cache with a fake executor: what it shows, what it changes, what it refuses."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any, TypeVar

import httpx
import pytest

from pagemill.base.clock import VirtualClock
from pagemill.base.errors import ConfigError
from pagemill.base.params import CacheOptions
from pagemill.cache.entry import SharingConfig
from pagemill.cache.windows import WindowSpec
from pagemill.engine.engine import Engine
from pagemill.server import admin_cache
from pagemill.server.access import KeyRing
from pagemill.server.access_keys import KeyEntry, make_key
from pagemill.server.access_listen import HostCheck
from pagemill.server.admin import admin_app, admin_key, admin_key_of
from pagemill.server.admin_metrics import EngineFigures
from pagemill.server.limits import Limits
from pagemill.telemetry.metrics import Metrics
from pagemill.telemetry.observe import EngineObserver
from tests.fixtures.fake_engine import Rig

_T = TypeVar("_T")
TEXT = list(range(1, 41))  # ten blocks of four


class Side:
    """The engine as the admin port sees it. Mutated by tests: status."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.status = "ready"

    async def call(self, function: Callable[[Engine], _T]) -> _T:
        return function(self.rig.engine)

    async def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        return list(text.encode())


class Life:
    """The server's life. Mutated by `drain`."""

    is_draining = False
    num_open = 3

    def drain(self) -> None:
        self.is_draining = True


class Office:
    """An admin port over a rig. Mutated by requests."""

    def __init__(
        self,
        *,
        shares: bool = True,
        num_blocks: int = 64,
        windows: tuple[WindowSpec, ...] = (),
        public: KeyRing | None = None,
    ) -> None:
        sharing = SharingConfig(windows=windows) if shares else None
        self.rig = Rig(num_blocks, 4, sharing=sharing)
        self.side, self.life = Side(self.rig), Life()
        self.key, entry = admin_key()
        self.public = public or KeyRing(None, [KeyEntry("alice", *make_key()[1:], tenant="alice")], VirtualClock())
        self.metrics = Metrics("tiny")
        self.figures = EngineFigures(self.metrics, EngineObserver(self.metrics), self.rig.clock, tenant_names=True)
        self.app = admin_app(
            self.side,
            self.life,
            KeyRing(None, [entry], VirtualClock()),
            self.public,
            self.metrics,
            hosts=HostCheck(),
            limits=Limits(),
            render_metrics=lambda accept: self.figures.render(self.side, accept),
        )

    def fill(self, tenant: str = "default", text: list[int] = TEXT, salt: str | None = None) -> list[int]:
        """Leave a text in the cache, its answer behind it. Returns all of it that is kept."""
        name = f"r{len(self.rig.answers)}{tenant}{salt}{text[0]}"
        self.rig.add(name, text, CacheOptions(tenant, salt), max_tokens=2)
        self.rig.run()
        return [*text, self.rig.answers[name, 0].token_ids[0]]

    def ask(self, method: str, path: str, *, content: bytes | None = None, **body: Any) -> httpx.Response:
        async def go() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            headers = {"authorization": f"Bearer {self.key}"}
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=headers) as client:
                data = json.dumps(body).encode() if body else content  # httpx itself refuses halves of pairs
                return await client.request(method, path, content=data)

        return asyncio.run(go())

    def get(self, path: str) -> Any:
        answer = self.ask("GET", path)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def post(self, path: str, **body: Any) -> Any:
        answer = self.ask("POST", path, **body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    @property
    def num_cached(self) -> int:
        return self.rig.cache.stats().num_cached_blocks


def test_stats_are_those_of_the_command_line() -> None:
    office = Office()
    office.fill()
    told = office.get("/admin/cache/stats?sizes=4,16")
    assert told["blocks"]["cached"] == office.num_cached
    assert [point["blocks"] for point in told["curve"]["points"]] == [4, 16]


def test_blocks_are_listed_page_by_page_without_their_tokens() -> None:
    office = Office()
    office.fill()
    found, after = [], -1
    while after is not None:
        page = office.get(f"/admin/cache/blocks?limit=3&after={after}")
        assert len(page["blocks"]) <= 3
        found += page["blocks"]
        after = page["next_after"]
    assert len(found) == office.num_cached
    assert len({each["block"] for each in found}) == len(found)
    assert {each["state"] for each in found} == {"cached"}
    assert sum(each["tokens"] for each in found) == len(TEXT) + 1, "the last token of the answer is not computed"
    by_key = {each["key"]: each for each in found}
    for each in found:
        assert each["parent"] is None or by_key[each["parent"]]["first_token"] == each["first_token"] - 4
    assert "token_ids" not in found[0]


def test_a_page_of_blocks_looks_at_no_more_than_its_part(monkeypatch: pytest.MonkeyPatch) -> None:
    office = Office()
    office.fill()
    monkeypatch.setattr(admin_cache, "MAX_LOOKED_AT", 2)
    pages, after = [], -1
    while after is not None:
        page = office.get(f"/admin/cache/blocks?after={after}")
        pages.append(page["blocks"])
        after = page["next_after"]
    assert max(map(len, pages)) <= 2
    assert sum(map(len, pages)) == office.num_cached


def test_blocks_in_use_are_active() -> None:
    office = Office()
    office.fill()
    office.rig.add("running", TEXT, max_tokens=20)
    office.rig.step()
    states = {each["state"] for each in office.get("/admin/cache/blocks")["blocks"]}
    assert "active" in states


def test_blocks_of_one_tenant_are_told_apart() -> None:
    office = Office()
    office.fill("a")
    office.fill("b", [90, 91, 92, 93, 94])
    found = office.get("/admin/cache/blocks?tenant=b")["blocks"]
    assert {each["tenant"] for each in found} == {"b"}
    assert len(found) == 2


def test_the_tree_shows_what_texts_have_in_common() -> None:
    office = Office()
    office.fill("a", [*TEXT[:20], *range(100, 110)])
    office.fill("a", [*TEXT[:20], *range(150, 160)])
    office.fill("a", [60, 61, 62, 63, 64], salt="x")
    told = office.get("/admin/cache/tree?depth=3")
    plain, salted = sorted(told["roots"], key=lambda each: each["salted"])
    [trunk] = plain["children"]
    assert (trunk["blocks"], trunk["tokens"], trunk["branches"]) == (5, 20, 2)
    assert [each["first_token"] for each in trunk["children"]] == [20, 20]
    assert salted["salted"]
    assert not told["truncated"]


def test_the_tree_is_cut_at_its_depth_and_at_its_number_of_entries() -> None:
    office = Office(num_blocks=256)
    for number in range(20):
        office.fill("a", [number + 1, *TEXT])
    assert office.get("/admin/cache/tree?limit=5")["truncated"]
    [root] = office.get("/admin/cache/tree?depth=1")["roots"]
    assert len(root["children"]) == 20
    assert all(each["children"] == [] for each in root["children"])


@pytest.mark.parametrize("what", ["text", "prefix", "namespace", "tenant"])
def test_a_purge_drops_what_it_names_and_wipes_it(what: str) -> None:
    office = Office()
    whole = office.fill("a", TEXT)
    office.fill("a", TEXT, salt="s")
    office.fill("b", TEXT)
    before = office.num_cached
    body: dict[str, Any] = {"what": what, "tenant": "a"}
    if what in ("text", "prefix"):
        body["prompt_token_ids"] = TEXT[:8] if what == "prefix" else whole
    dropped = office.post("/admin/cache/purge", **body)["blocks"]
    assert 0 < dropped == before - office.num_cached
    assert not office.rig.cache.moves().wipes, "pages are wiped before the answer"
    left = {each["tenant"] for each in office.get("/admin/cache/blocks")["blocks"]}
    assert left == ({"b"} if what == "tenant" else {"a", "b"})


def test_a_prompt_in_words_is_tokenised() -> None:
    office = Office()
    office.fill("default", list(b"hello there, hello"))
    assert office.post("/admin/cache/purge", prompt="hello there, hello")["blocks"] > 0


def test_a_pin_keeps_a_text_until_it_is_ended() -> None:
    office = Office()
    office.fill("a")
    told = office.post("/admin/cache/pin", tenant="a", prompt_token_ids=TEXT, seconds=60)
    assert told["tokens"] == len(TEXT)
    assert office.get("/admin/cache/stats")["blocks"]["pinned"] == told["blocks"]
    assert office.ask("DELETE", f"/admin/cache/pin/{told['pin']}").json() == {"pin": told["pin"], "ended": True}
    assert office.ask("DELETE", f"/admin/cache/pin/{told['pin']}").json()["ended"] is False
    assert office.get("/admin/cache/stats")["blocks"]["pinned"] == 0


def test_tenants_and_their_quotas() -> None:
    office = Office()
    office.fill("a")
    answer = office.ask("PUT", "/admin/tenants/a", floor_tokens=10, cap_tokens=100)
    assert answer.json() == {"tenant": "a", "floor": 3, "cap": 25}
    [told] = [each for each in office.get("/admin/tenants")["tenants"] if each["tenant"] == "a"]
    assert (told["floor"], told["cap"]) == (3, 25)
    refused = office.ask("PUT", "/admin/tenants/a", floor_tokens=10**6)
    assert refused.status_code == 400
    assert [e["floor"] for e in office.get("/admin/tenants")["tenants"] if e["tenant"] == "a"] == [3], "as it was"


def test_keys_are_shown_without_their_hash() -> None:
    [told] = Office().get("/admin/keys")["keys"]
    assert told["name"] == "alice"
    assert "sha256" not in told


def test_a_drain_is_begun_and_shown() -> None:
    office = Office()
    assert office.get("/admin/drain") == {"draining": False, "open_requests": 3}
    assert office.post("/admin/drain") == {"draining": True, "open_requests": 3}
    assert office.life.is_draining


@pytest.mark.parametrize(
    ("method", "path", "body", "what"),
    [
        ("GET", "/admin/cache/blocks?limit=0", {}, "1 to 10,000"),
        ("GET", "/admin/cache/blocks?limit=x", {}, "whole number"),
        ("GET", "/admin/cache/blocks?limit=99999999999999999999", {}, "1 to 10,000"),
        ("GET", "/admin/cache/blocks?limits=3", {}, "unknown parameter"),
        ("GET", "/admin/cache/tree?depth=1000", {}, "1 to 64"),
        ("GET", "/admin/cache/stats?sizes=0", {}, "give sizes from 1"),
        ("POST", "/admin/cache/purge", {"what": "all"}, "give text, prefix, namespace or tenant"),
        ("POST", "/admin/cache/purge", {"what": "text"}, "give prompt"),
        ("POST", "/admin/cache/purge", {"what": "tenant", "prompt": "x"}, "leave the prompt out"),
        ("POST", "/admin/cache/purge", {"prompt_token_ids": "abc"}, "list of token ids"),
        ("POST", "/admin/cache/purge", {"prompt_token_ids": [2**40]}, "list of token ids"),
        ("POST", "/admin/cache/purge", {"prompt_token_ids": [True]}, "list of token ids"),
        ("POST", "/admin/cache/purge", {"prompt": 5}, "give a text"),
        ("POST", "/admin/cache/purge", {"tenants": "a"}, "unknown field"),
        ("POST", "/admin/cache/purge", {"tenant": 5}, "tenant"),
        ("POST", "/admin/cache/purge", {"tenant": ""}, "tenant"),
        ("POST", "/admin/cache/purge", {"tenant": None}, "tenant"),
        ("POST", "/admin/cache/purge", {"tenant": {}}, "tenant"),
        ("POST", "/admin/cache/pin", {"tenant": "\ud800", "prompt_token_ids": [1], "seconds": 5}, "tenant"),
        ("POST", "/admin/cache/purge", {"what": "namespace", "public": "nobody"}, "no public namespace"),
        ("POST", "/admin/cache/purge", {"prompt": "x", "prompt_token_ids": [1]}, "both given"),
        ("POST", "/admin/cache/purge", {"prompt_token_ids": [-1]}, "0 or more"),
        ("POST", "/admin/cache/pin", {"prompt": "", "seconds": 5}, "prompt is empty"),
        ("PUT", "/admin/tenants/a", {"floor_tokens": False}, "whole number"),
        ("POST", "/admin/cache/pin", {"prompt": "x"}, "seconds is None"),
        ("POST", "/admin/cache/pin", {"prompt": "x", "seconds": -1}, "seconds is -1"),
        ("POST", "/admin/cache/pin", {"prompt": "x", "seconds": 1e18}, "seconds is"),
        ("POST", "/admin/cache/pin", {"seconds": 5}, "give prompt"),
        ("PUT", "/admin/tenants/a", {"floor_tokens": "many"}, "whole number"),
        ("PUT", "/admin/tenants/a", {"cap_tokens": -4}, "whole number"),
        ("PUT", "/admin/tenants/a", {"floor_tokens": 40, "cap_tokens": 4}, "below the floor"),
        ("POST", "/admin/nowhere", {}, "there is no POST"),
        ("GET", "/admin/cache/purge", {}, "there is no GET"),
        ("DELETE", "/admin/cache/pin/x", {}, "give the number"),
        ("DELETE", "/admin/cache/pin/-1", {}, "give the number"),
        ("DELETE", "/admin/cache/pin/²", {}, "give the number"),
        ("DELETE", "/admin/cache/pin/" + "9" * 40, {}, "give the number"),
        ("DELETE", "/admin/cache/pin/" + "9" * 5000, {}, "give the number"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_and_says_why(method: str, path: str, body: dict[str, Any], what: str) -> None:
    answer = Office().ask(method, path, **body)
    assert 400 <= answer.status_code < 500, answer.text
    assert what in answer.json()["error"]["message"]


def test_a_failure_of_ours_is_told_in_the_shape_of_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    office = Office()

    async def broken(function: Callable[[Engine], Any]) -> Any:
        raise ValueError("what a client sent")

    monkeypatch.setattr(office.side, "call", broken)
    answer = office.ask("GET", "/admin/tenants")
    assert answer.status_code == 500
    assert answer.json()["error"] == {
        "message": "internal error; the server's log has it", "type": "server_error", "param": None, "code": None,
    }  # fmt: skip


def test_a_wrong_method_is_told_which_one_is_right() -> None:
    answer = Office().ask("POST", "/admin/tenants")
    assert answer.status_code == 405
    assert "GET" in answer.headers["allow"]


def test_a_cache_that_shares_nothing_says_so() -> None:
    office = Office(shares=False)
    assert office.get("/admin/cache/stats")["sharing"] is False
    for path in ("/admin/cache/blocks", "/admin/cache/tree", "/admin/tenants"):
        assert office.ask("GET", path).status_code == 409


@pytest.mark.parametrize("status", ["loading", "failed"])
def test_without_a_model_the_cache_is_not_there_yet_and_the_rest_is(status: str) -> None:
    office = Office()
    office.side.status = status
    assert office.ask("GET", "/admin/cache/stats").status_code == 503
    assert office.get("/health")["status"] == status
    assert office.ask("GET", "/metrics").status_code == 200
    assert office.get("/admin/drain")["draining"] is False


@pytest.mark.parametrize("key", ["", "short", "a key with spaces in it"])
def test_an_admin_key_that_is_none_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match="16 or more"):
        admin_key_of(key)


# What a scrape shows


FACTS = {
    "block_size": 4, "num_blocks": 64, "block_bytes": [1000], "window_pages": [], "kv_cache_dtype": "int8",
    "enable_prefix_caching": "on",
    "cache_policy": "lru",
}  # fmt: skip


def values(office: Office, name: str) -> dict[tuple[str, ...], float]:
    return {each.labels: each.value for each in office.metrics[name].samples()}


def scraped(office: Office) -> str:
    office.rig.clock.advance(1.0)
    return office.ask("GET", "/metrics").text


def test_figures_are_the_cache_s_own() -> None:
    office = Office(num_blocks=16)
    asyncio.run(office.figures.attach(office.side, FACTS))
    for number in range(6):
        office.fill("a", [number + 1, *TEXT[:30]])
    office.fill("a", [6, *TEXT[:30]])
    office.ask("PUT", "/admin/tenants/a", cap_tokens=64)
    scraped(office)
    stats = office.rig.cache.stats()
    blocks = values(office, "pagemill:kv_blocks")
    assert blocks[("hot", "cached")] == stats.num_cached_blocks
    assert blocks[("hot", "free")] == stats.num_free_blocks
    assert values(office, "pagemill:kv_bytes")[("hot",)] == (stats.num_active_blocks + stats.num_cached_blocks) * 1000
    left = values(office, "pagemill:kv_evictions")
    assert {reason: count for (_, reason), count in left.items()} == dict(stats.num_left_blocks)
    assert left["hot", "capacity"] + left["hot", "quota"] == stats.num_evicted_blocks > 0
    assert values(office, "vllm:prefix_cache_hits")[()] == stats.num_hit_tokens > 0
    assert values(office, "vllm:prefix_cache_queries")[()] == stats.num_asked_tokens
    assert values(office, "pagemill:kv_wiped_bytes")[()] > 0
    assert values(office, "vllm:iteration_tokens_total")[()] == office.rig.engine.num_computed_tokens
    account_share = values(office, "pagemill:tenant_quota_ratio")
    assert account_share[("",)] == account_share[("a",)] > 0
    curve = values(office, "pagemill:kv_hit_ratio_at")
    assert len(curve) == 7
    assert list(curve.values()) == sorted(curve.values()), "a larger cache finds no less"


def test_bytes_are_of_blocks_and_of_pages_of_each_window() -> None:
    office = Office(num_blocks=16, windows=(WindowSpec(6, 20, chunk=512),))
    facts = {**FACTS, "num_blocks": 16, "block_bytes": [1000, 10], "window_pages": [20]}
    asyncio.run(office.figures.attach(office.side, facts))
    for number in range(6):
        office.fill("a", [number + 1, *TEXT[:30]])
    scraped(office)
    stats, shared = office.rig.cache.stats(), office.rig.cache.shared
    assert shared is not None
    assert shared.windows is not None
    [window] = shared.windows.groups
    kept = stats.num_active_blocks + stats.num_cached_blocks
    assert len(window.pages) > 0
    assert values(office, "pagemill:kv_bytes")[("hot",)] == 1000 * kept + 10 * len(window.pages)
    assert shared.num_wiped > 0
    assert window.num_wiped > 0
    assert values(office, "pagemill:kv_wiped_bytes")[()] == 1000 * shared.num_wiped + 10 * window.num_wiped


def test_a_reading_is_kept_for_half_a_second() -> None:
    office = Office()
    asyncio.run(office.figures.attach(office.side, FACTS))
    scraped(office)
    office.rig.add("b", [1, 2, 3, 4, 5], max_tokens=1)
    office.ask("GET", "/metrics")
    assert values(office, "vllm:num_requests_waiting")[()] == 0, "as last read"
    scraped(office)
    assert values(office, "vllm:num_requests_waiting")[()] == 1


def test_an_engine_that_does_not_answer_delays_no_scrape(monkeypatch: pytest.MonkeyPatch) -> None:
    office = Office()
    monkeypatch.setattr("pagemill.server.admin_metrics.READ_TIMEOUT_S", 0.05)

    async def never(function: Callable[[Engine], Any]) -> Any:
        await asyncio.sleep(3600)

    monkeypatch.setattr(office.side, "call", never)
    assert "vllm:prompt_tokens_total" in scraped(office)


def test_the_lives_of_blocks_are_observed_on_a_sample() -> None:
    office = Office(num_blocks=32)
    asyncio.run(office.figures.attach(office.side, FACTS))
    for number in range(60):
        office.rig.clock.advance(0.5)
        office.fill("a", [number % 7 + 1, *TEXT[:40]])
        office.fill("a", [number + 100, *TEXT[:40]])
    [life] = office.metrics["vllm:kv_block_lifetime_seconds"].samples()
    [gap] = office.metrics["vllm:kv_block_reuse_gap_seconds"].samples()
    [idle] = office.metrics["vllm:kv_block_idle_before_evict_seconds"].samples()
    evicted = office.rig.cache.stats().num_evicted_blocks
    assert 0.02 * evicted < sum(life.counts) < 0.4 * evicted
    assert idle.value <= life.value
    assert gap.value >= 0


def test_the_time_from_leaving_to_free_blocks_is_observed() -> None:
    office = Office()
    office.rig.add("a", TEXT, max_tokens=50)
    office.rig.step()
    office.figures.left(["a"])
    office.rig.clock.advance(0.004)
    office.figures.saw(office.rig.engine.abort("a"))
    [sample] = office.metrics["pagemill:kv_disconnect_free_seconds"].samples()
    assert (sum(sample.counts), sample.value) == (1, pytest.approx(0.004))


def test_counting_that_fails_fails_no_step(caplog: pytest.LogCaptureFixture) -> None:
    office = Office()
    office.figures.saw([object()])  # type: ignore[list-item]
    assert "was not counted" in caplog.text
