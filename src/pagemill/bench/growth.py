"""`bench growth`: what a decoding step takes by batch size and context, and whether it grows no faster than the machine
reads the keys and values that were added.

Owns the grid, the order of measuring and the measure of growth. Steps are `native_step`'s, bandwidth
`roofline_peaks`', the report `growth_report`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

from pagemill.base.config import EngineConfig
from pagemill.base.errors import ConfigError
from pagemill.base.kv_spec import KVSpec
from pagemill.base.units import format_bytes
from pagemill.bench.machine import CpuCounters, barrier_ns, read_counters
from pagemill.bench.native_step import NativeSteps, PackedModel, Work, demand, open_packed_model
from pagemill.bench.roofline_peaks import MEMORY, PAGES, PeakMeter, memory_buffer_bytes
from pagemill.kernels.target import choose_target
from pagemill.planner.machine import kernel_threads, this_machine

SECOND_MODEL = "llama-1b"
MAX_ROUNDS = 1000

_SAMPLE_S = 0.03
_KV_SHARE = 2  # an arena takes at the most free memory ÷ 2
_QUICK_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class Grid:
    """Which steps to take: every batch at every context, once for each KV codec. Contexts in rising order."""

    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    codecs: tuple[str, ...]


FULL = Grid((1, 2, 4, 8, 16, 32, 64), (128, 512, 1000, 2000, 4000, 8000), ("bf16", "int8"))
# For a model whose steps take ten times as long.
COARSE = Grid((1, 8, 32), (128, 2000, 8000), ("bf16", "int8"))
QUICK = Grid((1, 4), (32, 128), ("bf16", "int8"))


@dataclass(frozen=True, slots=True)
class Settings:
    """num_rounds: each takes a sample of every step; quick: few short contexts and small buffers, to try it out.
    Raises ConfigError for counts that cannot be."""

    num_rounds: int = 5
    quick: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.num_rounds <= MAX_ROUNDS:
            raise ConfigError(f"--rounds is {self.num_rounds}; give a number from 1 to {MAX_ROUNDS:,}")


@dataclass(slots=True)
class Cell:
    """One step and its samples in seconds. Mutated as rounds end. kv_bytes: keys and values that it reads."""

    codec: str
    work: Work
    kv_bytes: int
    samples: list[float] = field(default_factory=list)

    @property
    def best_s(self) -> float:
        """The fastest sample: what disturbs can only add."""
        return min(self.samples)


@dataclass(frozen=True, slots=True)
class Skipped:
    """A step that was not taken, and why."""

    codec: str
    work: Work
    reason: str


@dataclass(frozen=True, slots=True)
class Growth:
    """The step at the longest context against the one at the shortest, of one batch size.

    near_bytes_s: bandwidth over as much memory as the long step reads; memory_bytes_s: over much more than any cache;
    page_bytes_s: over that in single pages, each of another block, which is how keys and values lie.
    """

    codec: str
    num_seqs: int
    from_context: int
    to_context: int
    extra_s: float
    extra_bytes: int
    near_bytes_s: float
    memory_bytes_s: float
    page_bytes_s: float

    @property
    def ratio(self) -> float:
        """Extra seconds ÷ the seconds that reading the extra bytes takes; 1 is as fast as the machine reads."""
        return self.extra_s / (self.extra_bytes / self.near_bytes_s)

    @property
    def memory_ratio(self) -> float:
        """The same against the bandwidth beyond every cache."""
        return self.extra_s / (self.extra_bytes / self.memory_bytes_s)

    @property
    def page_ratio(self) -> float:
        """The same against the bandwidth in pages: what is left to gain without another order of keys and values."""
        return self.extra_s / (self.extra_bytes / self.page_bytes_s)


@dataclass(slots=True)
class ModelGrowth:
    """All that was measured of one model. Mutated as rounds end. bandwidth: (codec, batch) -> bytes per second over
    as much memory as the longest step of that batch reads. page_bytes_s: codec -> bytes per second page by page."""

    model: PackedModel
    codecs: dict[str, KVSpec] = field(default_factory=dict)
    cells: list[Cell] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    bandwidth: dict[tuple[str, int], float] = field(default_factory=dict)
    memory_bytes_s: float = 0.0
    page_bytes_s: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class Measurement:
    """The models measured so far. Mutated as they end. barriers_ns: of the thread pool, one for each round."""

    num_threads: int
    target: str
    models: list[ModelGrowth] = field(default_factory=list)
    barriers_ns: list[float] = field(default_factory=list)
    interrupted: bool = False
    before: CpuCounters | None = None
    after: CpuCounters | None = None


class Watcher(Protocol):
    """Is told how measuring goes, off the clock."""

    def loading(self, name: str) -> None:
        """A model is loaded and packed next."""
        ...

    def began(self, name: str, codec: str, index: int, count: int) -> None:
        """Round `index` of `count` begins."""
        ...


def subjects(config: EngineConfig, settings: Settings, *, model_given: bool) -> list[tuple[EngineConfig, Grid]]:
    """The models to measure, each with its grid: the one asked for, else the default one and a larger shape."""
    if config.executor != "native":
        raise ConfigError("--executor: this bench measures the native core; leave the option out")
    grid = QUICK if settings.quick else FULL
    chosen = [(config, grid)]
    if not model_given and not settings.quick:
        chosen.append((replace(config, model=SECOND_MODEL), COARSE))
    elif config.model == SECOND_MODEL and not settings.quick:
        chosen = [(config, COARSE)]
    if config.kv_cache_dtype != "auto":
        chosen = [(each, replace(known, codecs=(config.kv_cache_dtype,))) for each, known in chosen]
    return chosen


def measure(
    chosen: list[tuple[EngineConfig, Grid]],
    settings: Settings,
    watcher: Watcher,
    *,
    interrupted: Callable[[], bool] = lambda: False,
) -> Measurement:
    """Measure one model after the other. Steps and bandwidth take turns, round by round.

    interrupted: asked between steps; once True, what has been measured is returned. Raises ConfigError, ModelError and
    CapacityError as loading does.
    """
    config = chosen[0][0]
    found = Measurement(kernel_threads(config, this_machine()), choose_target(), before=read_counters())
    for each, grid in chosen:
        if interrupted():
            break
        watcher.loading(each.model)
        model = open_packed_model(each, found.target, max(grid.contexts))
        growth = ModelGrowth(model)
        found.models.append(growth)
        for codec in grid.codecs:
            if interrupted():
                break
            _measure_codec(growth, found, grid, codec, settings, watcher, interrupted)
    found.interrupted = interrupted()
    found.after = read_counters()
    return found


def _measure_codec(
    growth: ModelGrowth,
    found: Measurement,
    grid: Grid,
    codec: str,
    settings: Settings,
    watcher: Watcher,
    interrupted: Callable[[], bool],
) -> None:
    model, threads = growth.model, found.num_threads
    kv_spec = growth.codecs[codec] = KVSpec(model.plan.kv, codec=codec)
    works = _fitting(growth, grid, kv_spec)
    steps = NativeSteps(model, codec, max(_positions(work, kv_spec) for work in works), threads)
    steps.check_finite(works[0])
    cells = [Cell(codec, work, demand(model, kv_spec, work).kv_bytes) for work in works]
    growth.cells += cells
    buffers = {str(batch): size for batch, size in _longest(cells, model).items()}
    buffers[MEMORY] = _QUICK_BYTES if settings.quick else memory_buffer_bytes()
    meter = PeakMeter(found.target, {n: min(size, buffers[MEMORY]) for n, size in buffers.items()}, (threads,))
    for index in range(settings.num_rounds):
        watcher.began(model.name, codec, index + 1, settings.num_rounds)
        found.barriers_ns.append(barrier_ns(threads))
        meter.measure_reading(2)
        meter.measure_pages(2, kv_spec.page_bytes(0), kv_spec.block_bytes)
        for cell in cells:
            if interrupted():
                break
            _sample(steps, cell)
        if interrupted():
            break
    growth.page_bytes_s[codec] = meter.peaks.read_bytes.get((PAGES, threads), 0.0)
    for name in buffers:
        rate = meter.peaks.read_bytes.get((name, threads), 0.0)
        if name == MEMORY:
            growth.memory_bytes_s = max(rate, growth.memory_bytes_s)
        else:
            growth.bandwidth[codec, int(name)] = rate


def _fitting(growth: ModelGrowth, grid: Grid, kv_spec: KVSpec) -> list[Work]:
    """The grid's steps that memory and the model's context allow; the others are noted."""
    room, reach = this_machine().free_bytes // _KV_SHARE, growth.model.plan.max_positions
    works = []
    for batch in grid.batches:
        for context in grid.contexts:
            work = Work(batch, context)
            need = _positions(work, kv_spec) * kv_spec.bytes_per_token
            if context > reach:
                growth.skipped.append(Skipped(kv_spec.codec, work, f"the model reaches {reach:,} positions"))
            elif need > room:
                reason = f"its KV cache takes {format_bytes(need)}, and {format_bytes(room)} are half of what is free"
                growth.skipped.append(Skipped(kv_spec.codec, work, reason))
            else:
                works.append(work)
    if not works:
        reason = growth.skipped[0].reason
        raise ConfigError(f"{growth.model.name}: no step fits: {reason}; free some memory, or give another model")
    return works


def _positions(work: Work, kv_spec: KVSpec) -> int:
    return work.num_seqs * kv_spec.num_blocks(work.context) * kv_spec.block_size


def _longest(cells: list[Cell], model: PackedModel) -> dict[int, int]:
    """Batch -> bytes that its longest step reads."""
    sizes: dict[int, int] = {}
    for cell in cells:
        total = cell.kv_bytes + model.weight_bytes
        sizes[cell.work.num_seqs] = max(total, sizes.get(cell.work.num_seqs, 0))
    return sizes


def _sample(steps: NativeSteps, cell: Cell) -> None:
    """Short steps are sampled several times a round, as decoding would run them: one after the other."""
    spent = 0.0
    while spent < _SAMPLE_S:
        cell.samples.append(steps.seconds((cell.work,)))
        spent += cell.samples[-1]


def growths(found: ModelGrowth) -> list[Growth]:
    """The growth of each codec and batch between the shortest and the longest context that were measured."""
    rows = []
    for (codec, batch), near in found.bandwidth.items():
        cells = [each for each in found.cells if each.codec == codec and each.work.num_seqs == batch and each.samples]
        if len(cells) < 2:
            continue
        first, last = min(cells, key=_context), max(cells, key=_context)
        rows.append(
            Growth(
                codec=codec,
                num_seqs=batch,
                from_context=first.work.context,
                to_context=last.work.context,
                extra_s=last.best_s - first.best_s,
                extra_bytes=last.kv_bytes - first.kv_bytes,
                near_bytes_s=near,
                memory_bytes_s=found.memory_bytes_s,
                page_bytes_s=found.page_bytes_s[codec],
            )
        )
    return rows


def _context(cell: Cell) -> int:
    return cell.work.context
