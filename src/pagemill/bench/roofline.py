"""`bench roofline`: the limits of this machine, and how near the native step comes to them (Williams, Waterman and
Patterson, "Roofline", 2009).

Owns the choice of works, the order of measuring and the arithmetic of limits. Peaks are `roofline_peaks`', steps
`native_step`'s, the report `roofline_report`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from pagemill.base.config import EngineConfig
from pagemill.base.errors import ConfigError
from pagemill.bench.machine import CpuCounters, read_counters
from pagemill.bench.native_step import Demand, NativeSteps, PackedModel, Work, demand, open_packed_model
from pagemill.bench.roofline_peaks import MEMORY, NEAR, PeakMeter, Peaks, memory_buffer_bytes, rate_of
from pagemill.execution.loader import kv_codec_for
from pagemill.kernels.target import choose_target
from pagemill.planner.machine import kernel_threads, this_machine

PREFILL_LENGTHS: tuple[int, ...] = (256, 2048)
DECODE_BATCHES: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
DECODE_CONTEXT = 320  # 256 prompt tokens, half of 128 generated
QUICK_PREFILL_LENGTHS = (64,)
QUICK_DECODE_BATCHES = (1, 4)
QUICK_CONTEXT = 64
MAX_ROUNDS = 1000
BANDWIDTH, ARITHMETIC = "bandwidth", "arithmetic"

_ARITHMETIC_SAMPLES, _READING_SAMPLES = 50, 2
_QUICK_BYTES = 32 << 20
_SAMPLE_S = 0.03


@dataclass(frozen=True, slots=True)
class Settings:
    """What to measure. num_rounds: each round takes a sample of every row and of every peak, the best of which
    counts. quick: few rows and small buffers, to try it out. Raises ConfigError for counts that cannot be."""

    num_rounds: int = 7
    quick: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.num_rounds <= MAX_ROUNDS:
            raise ConfigError(f"--rounds is {self.num_rounds}; give a number from 1 to {MAX_ROUNDS:,}")


@dataclass(frozen=True, slots=True)
class Target:
    """One row. steps: what is timed, in order: a long prompt is read in chunks. num_tokens: read or generated."""

    name: str
    phase: str
    steps: tuple[Work, ...]
    num_tokens: int
    demand: Demand


@dataclass(slots=True)
class Timed:
    """A row and its samples in seconds, all steps together. Mutated as rounds end."""

    target: Target
    samples: list[float] = field(default_factory=list)

    @property
    def best_s(self) -> float:
        """The fastest sample: what disturbs can only add."""
        return min(self.samples)


@dataclass(frozen=True, slots=True)
class Limit:
    """What holds a row back. bound: BANDWIDTH or ARITHMETIC, whichever alone takes longer; seconds: of that one."""

    bound: str
    memory_s: float
    arithmetic_s: float

    @property
    def seconds(self) -> float:
        """The least that the row can take on this machine."""
        return max(self.memory_s, self.arithmetic_s)


@dataclass(slots=True)
class Measurement:
    """All that was measured. Mutated as rounds end."""

    rows: list[Timed]
    meter: PeakMeter
    interrupted: bool = False
    before: CpuCounters | None = None
    after: CpuCounters | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """The model, its rows and an executor that can run them."""

    config: EngineConfig
    model: PackedModel
    steps: NativeSteps
    targets: tuple[Target, ...]
    num_threads: int


class Watcher(Protocol):
    """Is told how measuring goes, off the clock."""

    def began(self, index: int, count: int) -> None:
        """Round `index` of `count` begins."""
        ...


def open_subject(config: EngineConfig, settings: Settings) -> Subject:
    """Load and pack the model and fill its KV cache. Raises ConfigError, ModelError, CapacityError as loading does."""
    if config.executor != "native":
        raise ConfigError("--executor: this bench measures the native core; leave the option out")
    lengths, batches, context = PREFILL_LENGTHS, DECODE_BATCHES, DECODE_CONTEXT
    if settings.quick:
        lengths, batches, context = QUICK_PREFILL_LENGTHS, QUICK_DECODE_BATCHES, QUICK_CONTEXT
    model = open_packed_model(config, choose_target(), max(*lengths, context))
    reach = model.plan.max_positions
    num_threads = kernel_threads(config, this_machine())
    codec = kv_codec_for(config.weights, config.kv_cache_dtype)
    most = max(max(lengths), max(batches) * (min(context, reach) + config.block_size))
    steps = NativeSteps(model, codec, most, num_threads)
    chunk = config.max_num_batched_tokens
    targets = [_prefill(steps, length, chunk) for length in lengths if length <= reach]
    targets += [_decode(steps, batch, min(context, reach)) for batch in batches]
    return Subject(config, model, steps, tuple(targets), num_threads)


def _prefill(steps: NativeSteps, length: int, chunk: int) -> Target:
    works = tuple(Work(1, min(begin + chunk, length), min(chunk, length - begin)) for begin in range(0, length, chunk))
    total = _total([demand(steps.model, steps.kv_spec, each) for each in works])
    return Target(f"prefill {length:,}", "prefill", works, length, total)


def _decode(steps: NativeSteps, batch: int, context: int) -> Target:
    work = Work(batch, context)
    return Target(f"decode × {batch}", "decode", (work,), batch, demand(steps.model, steps.kv_spec, work))


def _total(demands: list[Demand]) -> Demand:
    counted: dict[str, int] = {}
    for each in demands:
        for arithmetic, number in each.multiply_adds.items():
            counted[arithmetic] = counted.get(arithmetic, 0) + number
    return Demand(counted, sum(each.weight_bytes for each in demands), sum(each.kv_bytes for each in demands))


def measure(
    subject: Subject, settings: Settings, watcher: Watcher, *, interrupted: Callable[[], bool] = lambda: False
) -> Measurement:
    """Measure peaks and rows in turns, round by round, so that a slow spell of the machine meets both.

    interrupted: asked between samples; once True, what has been measured is returned. The first round is always
    whole. Raises ConfigError where the filler gives logits that are no numbers.
    """
    buffers = {MEMORY: _QUICK_BYTES if settings.quick else memory_buffer_bytes(), NEAR: subject.model.weight_bytes}
    meter = PeakMeter(subject.model.target, buffers, (1, subject.num_threads))
    found = Measurement([Timed(each) for each in subject.targets], meter, before=read_counters())
    subject.steps.check_finite(subject.targets[0].steps[0])
    for index in range(settings.num_rounds):
        if index > 0 and interrupted():
            found.interrupted = True
            break
        watcher.began(index + 1, settings.num_rounds)
        meter.measure_arithmetic(_ARITHMETIC_SAMPLES)
        meter.measure_reading(_READING_SAMPLES)
        for row in found.rows:
            _sample(subject.steps, row)
            meter.measure_reading(1, (NEAR,))
    found.after = read_counters()
    return found


def _sample(steps: NativeSteps, row: Timed) -> None:
    """Short rows are sampled several times a round."""
    spent = 0.0
    while spent < _SAMPLE_S:
        row.samples.append(steps.seconds(row.target.steps))
        spent += row.samples[-1]


def limit_of(needed: Demand, peaks: Peaks, num_threads: int) -> Limit:
    """The least time that the machine needs: for the bytes at the bandwidth over as much memory as the weights take,
    and for the multiply-adds, each at the rate of its own arithmetic, with both going on at the same time."""
    memory_s = needed.num_bytes / peaks.read_bytes[NEAR, num_threads]
    arithmetic_s = sum(
        number / rate_of(peaks, arithmetic, num_threads) for arithmetic, number in needed.multiply_adds.items()
    )
    return Limit(BANDWIDTH if memory_s >= arithmetic_s else ARITHMETIC, memory_s, arithmetic_s)
