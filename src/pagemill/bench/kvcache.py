"""`bench kvcache`: the same generation with the KV cache (mode paged) and without it (mode none), token by token.

Owns the choice of model and prompt, the interleaving of runs, and the check that both modes gave the same tokens. The
report is `kvcache_report`'s, the drawing `plots`'; the terminal is the command line's.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Protocol

from pagemill.base.config import EngineConfig
from pagemill.base.errors import CapacityError, ConfigError, IntegrityError, ModelError
from pagemill.base.units import format_bytes
from pagemill.bench.generation import Estimate, Generation, estimate, generate_timed, second_engine, stretched
from pagemill.bench.machine import CpuCounters, barrier_ns, read_counters
from pagemill.build import Built, assemble, longest_sequence, tokenizer_of
from pagemill.llm import LLM
from pagemill.models.checkpoint import Checkpoint, open_checkpoint
from pagemill.models.hub import KNOWN_MODELS, Progress, resolve
from pagemill.models.random_init import SHAPES, random_checkpoint, shape
from pagemill.models.registry import build_plan
from pagemill.planner.machine import this_machine

WITH, WITHOUT = "with", "without"
DEFAULT_PROMPT = "Explain KV caching in transformers"
# DEFAULT_PROMPT under GPT-2's byte-level BPE (encoder.json and vocab.bpe as OpenAI published them with GPT-2).
GPT2_PROMPT_IDS = (18438, 391, 509, 53, 40918, 287, 6121, 364)
MAX_RUNS = 1000
WEIGHTS_SEED = 0

_PREFILL_TOKENS = 512
_NUM_READINGS = 9


@dataclass(frozen=True, slots=True)
class Settings:
    """What to compare. num_tokens: generated in each run (≥ 2). num_runs: with the cache; num_runs_without: without.

    prompt: text, None for the default one. Raises ConfigError for counts that cannot be.
    """

    num_tokens: int = 200
    num_runs: int = 3
    num_runs_without: int = 3
    prompt: str | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.num_tokens <= 2**24:
            raise ConfigError(f"--tokens is {self.num_tokens}; give at least 2: one reads the prompt, the rest decode")
        for flag, count in (("--runs", self.num_runs), ("--runs-without", self.num_runs_without)):
            if not 1 <= count <= MAX_RUNS:
                raise ConfigError(f"{flag} is {count}; give a number of runs from 1 to {MAX_RUNS:,}")
        if self.prompt is not None and not self.prompt.strip():
            raise ConfigError("--prompt is empty; give a text, or leave it out")

    def runs_of(self, mode: str) -> int:
        """Runs of a mode."""
        return self.num_runs if mode == WITH else self.num_runs_without


@dataclass(frozen=True, slots=True)
class Subject:
    """The model under test: two engines over the same weights and arena. random: its weights were drawn."""

    built: Built
    engines: dict[str, LLM]
    prompt: tuple[int, ...]
    random: bool

    @property
    def name(self) -> str:
        """The model as it was asked for; of a path, the last part."""
        return Path(self.built.config.model).name or self.built.spec.name

    @property
    def dtype(self) -> str:
        """The weights' format, or what the checkpoint's was converted to."""
        weights = self.built.config.weights
        if weights == "auto":
            return "bfloat16" if self.random else "checkpoint"
        return {"f32": "float32", "bf16": "bfloat16"}.get(weights, weights)


@dataclass(frozen=True, slots=True)
class Reading:
    """The same number of tokens read twice, one right after the other. without_s: as a step without the cache, which
    recomputes them. with_s: as a prompt with the cache."""

    num_tokens: int
    without_s: float
    with_s: float


@dataclass(slots=True)
class Measurement:
    """All that was measured so far. Mutated as runs end. readings: for each run without the cache, of histories of up
    to `num_prefill` tokens."""

    estimates: dict[str, Estimate]
    num_prefill: int
    runs: list[Generation] = field(default_factory=list)
    readings: list[list[Reading]] = field(default_factory=list)
    interrupted: bool = False
    before: CpuCounters | None = None
    after: CpuCounters | None = None

    def of(self, mode: str) -> list[Generation]:
        """The runs of a mode, in order."""
        return [run for run in self.runs if run.mode == mode]


class Watcher(Protocol):
    """Is told how the comparison goes, off the clock."""

    def estimated(self, total_s: float, estimates: dict[str, Estimate]) -> None:
        """What all runs will take."""
        ...

    def began(self, mode: str, index: int, count: int) -> None:
        """Run `index` of `count` of a mode begins."""
        ...

    def advanced(self, expected_s: float) -> None:
        """A token came, for which `expected_s` had been expected."""
        ...

    def ended(self, run: Generation) -> None:
        """A run ended, whole or interrupted."""
        ...


def open_subject(config: EngineConfig, settings: Settings, *, progress: Progress | None = None) -> Subject:
    """Load or draw the model and build both engines, with room for just this generation unless max_model_len is set.

    config.model: a name or a path as everywhere, or the name of a shape, whose weights are drawn here and now.
    Raises ConfigError where the length does not fit the model's context, else as `build` does.
    """
    name = config.model
    random = name in SHAPES and name not in KNOWN_MODELS and not os.path.exists(name)
    checkpoint = _draw(config) if random else _open(name, progress)
    tokenizer = tokenizer_of(checkpoint.vocab)
    if tokenizer is not None:
        prompt = tuple(tokenizer.encode(settings.prompt or DEFAULT_PROMPT))
    else:
        prompt = _ids_without_vocabulary(checkpoint, settings)
    longest = len(prompt) + settings.num_tokens
    limit = longest_sequence(config, checkpoint.spec)
    if longest > limit:
        fits = f"lower --tokens to {limit - len(prompt):,}" if limit - len(prompt) >= 2 else "shorten the prompt"
        raise ConfigError(
            f"{len(prompt):,} prompt tokens + {settings.num_tokens:,} generated are more than the {limit:,} positions "
            f"of {checkpoint.spec.name}; {fits}"
        )
    if config.max_model_len is None:
        config = replace(config, max_model_len=longest)
    # Nothing is shared: both engines count the blocks as theirs, and each round is to compute its prompt.
    built = assemble(replace(config, kv_cache="paged", enable_prefix_caching="off"), checkpoint, tokenizer)
    engines = {WITH: LLM.from_built(built), WITHOUT: second_engine(built, "none")}
    return Subject(built, engines, prompt, random)


def measure(
    subject: Subject, settings: Settings, watcher: Watcher, *, interrupted: Callable[[], bool] = lambda: False
) -> Measurement:
    """Warm up and estimate, then run with and without the cache in turns: A B A B.

    A run takes minutes in which a machine's speed changes, so what is to show that both modes read alike is measured in
    turns of one step each: between two steps without the cache, a prompt as long as the last one is read with it.

    interrupted: asked between tokens; once True, what has been measured is returned as it is. Raises IntegrityError
    where two runs gave different tokens, since their times would then be of different work.
    """
    prompt, num_tokens = subject.prompt, settings.num_tokens
    estimates = {
        mode: estimate(llm, prompt, num_tokens, recompute=mode == WITHOUT) for mode, llm in subject.engines.items()
    }
    num_prefill = max(len(prompt), min(_PREFILL_TOKENS, len(prompt) + num_tokens - 1))
    found = Measurement(estimates, num_prefill, before=read_counters())
    watcher.estimated(sum(settings.runs_of(mode) * each.total_s for mode, each in estimates.items()), estimates)
    for index in range(max(settings.num_runs, settings.num_runs_without)):
        for mode in (WITH, WITHOUT):
            if index < settings.runs_of(mode) and not found.interrupted:
                watcher.began(mode, index + 1, settings.runs_of(mode))
                _run(subject, mode, found, num_tokens, watcher, interrupted)
    found.after = read_counters()
    return found


def _run(
    subject: Subject,
    mode: str,
    found: Measurement,
    num_tokens: int,
    watcher: Watcher,
    interrupted: Callable[[], bool],
) -> None:
    expected, prompt = found.estimates[mode].expected, subject.prompt
    readings: list[Reading] = []
    if mode == WITHOUT:
        found.readings.append(readings)

    def after_token(index: int, seconds: float) -> bool:
        watcher.advanced(expected[index])
        length = len(prompt) + index
        if mode == WITHOUT and found.num_prefill - _NUM_READINGS < length <= found.num_prefill:
            read = generate_timed(subject.engines[WITH], stretched(prompt, length), 1, mode=WITH)
            readings.append(Reading(length, seconds, read.seconds[0]))
        found.interrupted = interrupted()
        return not found.interrupted

    run = generate_timed(
        subject.engines[mode],
        prompt,
        num_tokens,
        mode=mode,
        barrier_ns=barrier_ns(subject.built.num_threads),
        after_token=after_token,
    )
    check_same_tokens([*found.runs, run])
    found.runs.append(run)
    watcher.ended(run)


def check_same_tokens(runs: Sequence[Generation]) -> None:
    """Raise IntegrityError unless the last run's tokens are the first run's, as far as both go."""
    first, last = runs[0], runs[-1]
    pairs = zip(first.token_ids, last.token_ids, strict=False)
    for index, (wanted, got) in enumerate(pairs):
        if wanted != got:
            raise IntegrityError(
                f"run 1 ({first.mode} the cache) and run {len(runs)} ({last.mode} the cache) differ from token "
                f"{index + 1} on ({wanted} and {got}), so their times cannot be compared: a defect of Pagemill; "
                "please report it with the model and these options"
            )


def _open(name: str, progress: Progress | None) -> Checkpoint:
    try:
        return open_checkpoint(resolve(name, progress=progress))
    except ModelError as error:
        near = get_close_matches(name.casefold(), SHAPES, n=1)
        if not near:
            raise
        raise ModelError(f"{error} {near[0]!r} is a shape that this bench knows, with random weights.") from None


def _draw(config: EngineConfig) -> Checkpoint:
    """A shape with seeded random weights in f32 or bf16, as `config` loads them. Raises CapacityError."""
    spec = shape(config.model)
    weight_format, value_bytes = ("f32", 4) if config.weights == "f32" else ("bf16", 2)
    num_parameters = sum(math.prod(each.shape) for each in build_plan(spec, max_positions=1).weights.values())
    need, free = 2 * num_parameters * value_bytes, this_machine().free_bytes
    if need > free:
        raise CapacityError(
            f"not enough memory: {spec.name} has {num_parameters:,} weights × {value_bytes} bytes, drawn and then "
            f"packed = {format_bytes(need)}, and {format_bytes(free)} are free; take --dtype bfloat16 or another model"
        )
    return random_checkpoint(spec, seed=WEIGHTS_SEED, weight_format=weight_format)


def _ids_without_vocabulary(checkpoint: Checkpoint, settings: Settings) -> tuple[int, ...]:
    if settings.prompt not in (None, DEFAULT_PROMPT):
        raise ConfigError(
            f"{checkpoint.spec.name} brings no vocabulary, so --prompt cannot be read; leave it out: the ids of "
            f"{DEFAULT_PROMPT!r} under GPT-2's vocabulary are taken"
        )
    return tuple(token % checkpoint.spec.vocab_size for token in GPT2_PROMPT_IDS)
