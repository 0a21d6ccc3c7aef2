"""What a scrape shows of the engine: gauges and totals read on its thread, blocks' lives, and requests as their deltas
come. Owns the reading; names are in `telemetry/catalog.py`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol, TypeVar

from pagemill.base.clock import Clock
from pagemill.base.units import format_bytes
from pagemill.engine.cache_stats import cache_stats
from pagemill.engine.engine import Engine
from pagemill.engine.output import Delta
from pagemill.telemetry.blocks import BlockLives
from pagemill.telemetry.export import Exporter
from pagemill.telemetry.metrics import Metrics
from pagemill.telemetry.observe import EngineObserver

_T = TypeVar("_T")
_LOG: Final = logging.getLogger(__name__)
READ_TIMEOUT_S: Final = 1.0
FRESH_S: Final = 0.5  # scrapes that come sooner see the same figures
MAX_LEFT: Final = 65_536
HOT: Final = "hot"


class EngineSide(Protocol):
    """A model that loads or is loaded (`server/ports.py`), as far as a scrape needs it."""

    @property
    def status(self) -> str: ...
    async def call(self, function: Callable[[Engine], _T]) -> _T: ...


class EngineFigures:
    """Fills the metrics from one engine. Mutated by `attach`, `saw` and `render`.

    block_bytes: of a block, then of a page of each window group; none until they are known. tenant_names: show each
    tenant's use of its cap by name.
    """

    def __init__(self, metrics: Metrics, observer: EngineObserver, clock: Clock, *, tenant_names: bool = False) -> None:
        self._metrics = metrics
        self._observer = observer
        self._clock = clock
        self._tenant_names = tenant_names
        self._exporter = Exporter(metrics)
        self._block_bytes: Sequence[int] = ()
        self._bytes_a_block = 0.0  # of all groups
        self._read_s: float | None = None
        self._reading: asyncio.Task[None] | None = None
        self._left: dict[str, float] = {}  # request id -> when its client left

    async def attach(self, side: EngineSide, facts: Mapping[str, Any]) -> None:
        """The model is loaded: follow its cache. facts: block_size, num_blocks, block_bytes, kv_cache_dtype,
        enable_prefix_caching and cache_policy; window_pages, how many pages each window group has."""
        self._block_bytes = facts["block_bytes"]
        counts = (facts["num_blocks"], *facts["window_pages"])
        memory = sum(count * size for count, size in zip(counts, self._block_bytes, strict=True))
        self._bytes_a_block = memory / facts["num_blocks"]
        self._metrics["vllm:cache_config_info"].set(
            1,
            str(facts["block_size"]),
            str(facts["num_blocks"]),
            str(facts["kv_cache_dtype"]),
            str(facts["enable_prefix_caching"]),
            str(facts["cache_policy"]),
        )
        lives = BlockLives(self._metrics)
        await side.call(lambda engine: _follow(engine, lives, self._metrics, self._clock))

    def saw(self, deltas: Sequence[Delta]) -> None:
        """Deltas of a step or of an abort; must not fail, for the engine's loop calls it."""
        now_s = self._clock.now()
        for delta in deltas if self._left else ():
            if delta.finish_reason is not None and (left_s := self._left.pop(delta.request_id, None)) is not None:
                self._metrics["pagemill:kv_disconnect_free_seconds"].observe((now_s - left_s,))
        try:
            self._observer.stepped(deltas, now_s)
        except Exception as error:
            _LOG.error("a step was not counted", exc_info=error)

    def left(self, request_ids: Sequence[str]) -> None:
        """Clients have left these requests, whose blocks are free when the engine tells their end."""
        self._left |= dict.fromkeys(request_ids, self._clock.now())
        while len(self._left) > MAX_LEFT:  # those that never entered are told by nobody
            del self._left[next(iter(self._left))]

    async def render(self, side: EngineSide, accept: str = "") -> tuple[bytes, str]:
        """The body and the content type of a scrape. While the model loads, or where the engine does not answer in
        time, with the figures as last read."""
        now_s = self._clock.now()
        if side.status == "ready" and (self._read_s is None or now_s - self._read_s >= FRESH_S):
            if self._reading is None or self._reading.done():
                self._reading = asyncio.create_task(self._read(side))
            await asyncio.wait({self._reading}, timeout=READ_TIMEOUT_S)
        return await asyncio.to_thread(self._exporter.render, accept)

    async def _read(self, side: EngineSide) -> None:
        try:
            figures = await side.call(_figures)
        except Exception as error:
            _LOG.warning("the engine's figures cannot be read", exc_info=error)
            return
        self._read_s = self._clock.now()
        self._show(figures)

    def _show(self, figures: _Figures) -> None:
        stats, cache, metrics = figures.stats, figures.stats.cache, self._metrics
        metrics["vllm:num_requests_running"].set(stats.num_running)
        metrics["vllm:num_requests_waiting"].set(stats.num_waiting)
        metrics["vllm:kv_cache_usage_perc"].set(cache.num_active_blocks / max(cache.num_blocks, 1))
        metrics["vllm:num_preemptions"].raise_to(stats.num_preemptions)
        metrics["vllm:prefix_cache_queries"].raise_to(cache.num_asked_tokens)
        metrics["vllm:prefix_cache_hits"].raise_to(cache.num_hit_tokens)
        blocks = metrics["pagemill:kv_blocks"]
        for state in ("free", "active", "cached", "held", "pinned"):
            blocks.set(figures.told["blocks"][state], HOT, state)
        kept = (cache.num_active_blocks + cache.num_cached_blocks, *figures.num_pages)
        metrics["pagemill:kv_bytes"].set(self._bytes(kept), HOT)
        for reason, count in cache.num_left_blocks.items():
            metrics["pagemill:kv_evictions"].raise_to(count, HOT, reason)
        metrics["pagemill:kv_block_corrupt"].raise_to(cache.num_quarantined_blocks)
        metrics["pagemill:kv_leaked_blocks"].set(cache.num_leaked_blocks)
        metrics["pagemill:kv_wiped_bytes"].raise_to(self._bytes(figures.num_wiped))
        self._show_curve(figures.told["curve"])
        self._show_tenants(figures.told["tenants"])

    def _bytes(self, counts: Sequence[int]) -> int:
        """Of so many blocks, and pages of each window group."""
        return sum(count * size for count, size in zip(counts, self._block_bytes, strict=False))

    def _show_curve(self, curve: Mapping[str, Any] | None) -> None:
        """The expected hit ratio by memory; none before anything was looked up."""
        if curve is None or not curve["recorded_blocks"]:
            return
        gauge = self._metrics["pagemill:kv_hit_ratio_at"]
        gauge.clear()  # the sizes are other ones after the cache was resized
        for point in curve["points"]:
            gauge.set(point["hit_ratio"], format_bytes(round(point["blocks"] * self._bytes_a_block)))

    def _show_tenants(self, tenants: Sequence[Mapping[str, Any]]) -> None:
        gauge = self._metrics["pagemill:tenant_quota_ratio"]
        ratios = {each["tenant"]: each["used"] / each["cap"] for each in tenants if each["cap"]}
        gauge.clear()
        gauge.set(max(ratios.values(), default=0.0), "")
        for tenant, ratio in ratios.items() if self._tenant_names else ():
            gauge.set(ratio, tenant)


class _Figures:
    """What one reading brings from the engine's thread. num_wiped: blocks, then pages of each window group; num_pages:
    pages of each that are kept."""

    __slots__ = ("num_pages", "num_wiped", "stats", "told")

    def __init__(self, engine: Engine) -> None:
        self.stats = engine.stats()
        self.told = cache_stats(engine)
        shared: Any = engine.cache.shared
        groups = () if shared is None or shared.windows is None else shared.windows.groups
        self.num_pages = [len(group.pages) for group in groups]
        self.num_wiped = [0 if shared is None else shared.num_wiped, *(group.num_wiped for group in groups)]


def _figures(engine: Engine) -> _Figures:
    return _Figures(engine)


def _follow(engine: Engine, lives: BlockLives, metrics: Metrics, clock: Clock) -> None:
    """Count the tokens of each step, and tell `lives` of every block that is stored, found or removed; whoever listens
    already is told as before."""
    tokens, before = metrics["vllm:iteration_tokens_total"], engine.num_computed_tokens

    def stage(name: str) -> None:
        nonlocal before
        if name == "commit":
            total = engine.num_computed_tokens
            tokens.observe((total - before,))
            before = total

    engine.on_stage = stage
    shared: Any = engine.cache.shared
    if shared is None:
        return
    other = shared.on_event

    def event(told: Any) -> None:
        if other is not None:
            other(told)
        if hasattr(told, "evicted"):
            lives.removed(told.key, told.evicted, clock.now())
        else:
            lives.stored(told.key, clock.now())

    def used(nodes: Sequence[Any]) -> None:
        lives.used([node.key for node in nodes], clock.now())

    shared.on_event = event
    shared.on_used = used
