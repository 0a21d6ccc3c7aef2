"""What `bench cache` is made of: its settings, its figures with their goals, and engines over one loaded model.

Owns no measurement; each group of rows has a file of its own.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pagemill.base.clock import Clock
from pagemill.base.errors import CapacityError, ConfigError
from pagemill.base.step import Executor
from pagemill.base.units import format_bytes
from pagemill.bench.report import Row
from pagemill.build import Built
from pagemill.cache.entry import SharingConfig
from pagemill.cache.manager import CacheManager
from pagemill.engine.admission import EngineLimits
from pagemill.engine.engine import Engine
from pagemill.execution.runner import Runner
from pagemill.kernels.native import NativeExecutor
from pagemill.kernels.policies import POLICIES
from pagemill.planner.machine import this_machine

MAX_RUNS = 1000
_SETTLED_S = 10.0
_PLAIN_IDS = 256  # below, vocabularies keep special tokens and bytes

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Settings:
    """rows: names of groups, in order. num_runs: samples of what is repeated. quick: small sizes, without goals.

    cpu_time: seconds are those of this process's CPU time, on one kernel thread, for a machine that others use too.
    trace: file of block ids for the hit ratio, lengths: file of lengths for the unused positions; None for generated
    ones. Raises ConfigError for a number of runs that cannot be.
    """

    rows: tuple[str, ...]
    num_runs: int = 5
    quick: bool = False
    cpu_time: bool = False
    trace: str | None = None
    lengths: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.num_runs <= MAX_RUNS:
            raise ConfigError(f"--runs is {self.num_runs}; give a number from 1 to {MAX_RUNS:,}")

    def size(self, full: int, quick: int) -> int:
        """One of two sizes."""
        return quick if self.quick else full


@dataclass(frozen=True, slots=True)
class Figure:
    """A row and what it is to reach. group: of rows. at_most, at_least: goals for its median. more: fields beside
    those of every bench's rows."""

    group: str
    row: Row
    at_most: float | None = None
    at_least: float | None = None
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        """Whether the median reaches the goal; None without one."""
        if self.at_most is None and self.at_least is None:
            return None
        median = self.row.median
        return (self.at_most is None or median <= self.at_most) and (self.at_least is None or median >= self.at_least)

    def as_json(self) -> dict[str, Any]:
        """The row in the schema of every bench, with its goal."""
        goal = {"at_most": self.at_most, "at_least": self.at_least}
        given = {name: value for name, value in goal.items() if value is not None}
        return {"group": self.group} | self.row.as_json() | {"goal": given or None, "met": self.met} | self.more


class WallClock:
    """Seconds that pass, to the nanosecond."""

    def now(self) -> float:
        return time.perf_counter()


class CpuClock:
    """CPU seconds of this process, all its threads."""

    def now(self) -> float:
        return time.process_time()


class Subject:
    """One loaded model and engines of any size over it, of which only the last one made may run. Mutated by `engine`,
    which gives the arena another size. clock: of everything that is timed, and of the engines.

    Raises ConfigError where layers keep pages of their own.
    """

    def __init__(self, built: Built, settings: Settings) -> None:
        if built.kv_spec.window_pages:
            raise ConfigError(
                f"layers of {built.spec.name} read a window and keep pages of their own, and bench cache measures "
                "blocks that all layers share; take a model without sliding windows, or one whose window is as long as "
                "max_model_len"
            )
        self.built = built
        self.clock: Clock = CpuClock() if settings.cpu_time else WallClock()
        self._random = random.Random(settings.seed)

    def longest(self, wanted: int) -> int:
        """Positions of a sequence: as many as wanted, or as the model and the options allow."""
        return min(wanted, self.built.max_model_len)

    def prompt(self, num_tokens: int) -> list[int]:
        """Random token ids, different each time."""
        return random_ids(self._random, num_tokens, self.built.spec.vocab_size)

    def engine(
        self,
        num_tokens: int,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        mixed_step_percent: int | None = None,
        cache: Callable[[int], CacheManager] | None = None,
        executor: Executor | None = None,
    ) -> Engine:
        """An engine whose KV cache holds `num_tokens` positions. cache: makes another cache manager from a number of
        blocks. executor: another one, around the model's. Raises CapacityError where memory is short."""
        built = self.built
        num_blocks = built.kv_spec.num_blocks(num_tokens)
        need, free = num_blocks * built.kv_spec.block_bytes, this_machine().free_bytes
        if need > free:
            raise CapacityError(
                f"{num_tokens:,} token positions need {format_bytes(need)} and {format_bytes(free)} are free; leave "
                "these --rows out, or take --quick"
            )
        (executor or built.executor).resize(num_blocks)
        limits = EngineLimits(
            max_model_len=built.max_model_len,
            vocab_size=built.spec.vocab_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            mixed_step_percent=mixed_step_percent,
            eos_token_ids=(),
        )
        manager = self.shared_cache(num_blocks) if cache is None else cache(num_blocks)
        return Engine(executor or built.executor, manager, limits, decode_nothing, self.clock, seed=0)

    def settle(self) -> None:
        """Wait until the memory that comes next is there, as it is in an engine that has been up for a while: right
        after the start one measures what the system takes to find it."""
        executor = self.built.executor
        if isinstance(executor, Runner) and isinstance(executor.model, NativeExecutor):
            executor.model.wait_prefaulted(_SETTLED_S)

    def shared_cache(self, num_blocks: int) -> CacheManager:
        """A prefix cache as the options ask for it."""
        return CacheManager(num_blocks, self.built.kv_spec.block_size, "paged", self.sharing())

    def sharing(self) -> SharingConfig:
        """How that one shares blocks."""
        built = self.built
        return SharingConfig(built.config.cache_policy, page_bytes=built.kv_spec.block_bytes, makers=POLICIES)


def random_ids(source: random.Random, num_tokens: int, vocab_size: int) -> list[int]:
    """Token ids, plain ones where the vocabulary is large enough to tell."""
    lowest = min(_PLAIN_IDS, vocab_size // 2)
    return [source.randrange(lowest, vocab_size) for _ in range(num_tokens)]


def decode_nothing(token_ids: Sequence[int], skip_special_tokens: bool) -> str:
    """For engines whose answers nobody reads."""
    return ""


def raise_failures(deltas: Sequence[Any]) -> None:
    """Raise the error of a request that failed: a figure of fewer requests than were asked would be wrong."""
    for delta in deltas:
        if delta.error is not None:
            raise delta.error
