"""`bench quality`: perplexity and KL divergence of weight formats and KV types against the engine's own float32.

llama.cpp's procedure (tools/perplexity): the text is tokenised once and cut into windows of n_ctx; each window runs
alone from position 0; the logits of positions n_ctx/2 … n_ctx - 2 are scored on the token that follows. Where the model
wants a BOS, it takes the place of each window's first token.

Owns executors, windows, and the interleaving. Modes and what each is held against are `quality_modes`', arithmetic on
logits is `quality_score`'s, the report `quality_report`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pagemill.base.config import EngineConfig
from pagemill.base.errors import CapacityError, ConfigError, ModelError
from pagemill.base.kv_spec import KVSpec
from pagemill.base.units import format_bytes
from pagemill.bench.machine import CpuCounters, read_counters
from pagemill.bench.quality_modes import WEIGHTS, Comparison, Mode, comparisons_of, modes_to_run
from pagemill.bench.quality_score import (
    Float32,
    Float64,
    divergence,
    log_softmax,
    negative_log_likelihood,
    same_top1,
)
from pagemill.build import loaded_weight_bytes, tokenizer_of
from pagemill.execution.loader import kv_spec_for, load_executor
from pagemill.kernels.batch import Batch, ModelExecutor
from pagemill.kernels.reference import ReferenceExecutor
from pagemill.models.checkpoint import Checkpoint, open_checkpoint
from pagemill.models.hub import Progress, resolve
from pagemill.planner.machine import kernel_threads, this_machine

MIN_CONTEXT = 4
MAX_WINDOWS = 1_000_000

# Positions run at once, so that the logits in memory stay small whatever n_ctx: chunks give the bits of one piece.
_CHUNK = 128
_SCORED_ROWS = 32

Int32 = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Settings:
    """What to measure. modes: in the order asked for. contexts: n_ctx, tokens of a window. windows: at the most, from
    the beginning of the text, for each n_ctx or one number for all. Raises ConfigError for numbers that cannot be."""

    text: Path
    modes: tuple[Mode, ...]
    contexts: tuple[int, ...] = (512,)
    windows: tuple[int, ...] = (40,)

    def __post_init__(self) -> None:
        assert self.modes
        if not self.contexts or min(self.contexts) < MIN_CONTEXT:
            raise ConfigError(
                f"--n-ctx is {', '.join(map(str, self.contexts)) or 'empty'}; give tokens of a window, at least "
                f"{MIN_CONTEXT}, such as 512 or 512,4096"
            )
        if len(set(self.contexts)) != len(self.contexts):
            raise ConfigError(f"--n-ctx names {', '.join(map(str, self.contexts))}; give each number once")
        if not self.windows or not all(1 <= each <= MAX_WINDOWS for each in self.windows):
            given = ", ".join(map(str, self.windows)) or "empty"
            raise ConfigError(f"--windows is {given}; give a number of windows from 1 to {MAX_WINDOWS:,}")
        if len(self.windows) not in (1, len(self.contexts)):
            raise ConfigError(
                f"--windows gives {len(self.windows)} numbers for {len(self.contexts)} of --n-ctx; give one for each, "
                "or one for all"
            )

    @property
    def windows_of(self) -> dict[int, int]:
        """Windows asked for, by n_ctx."""
        each = self.windows if len(self.windows) > 1 else self.windows * len(self.contexts)
        return dict(zip(self.contexts, each, strict=True))


@dataclass(frozen=True, slots=True)
class Subject:
    """The model and the text, ready to run. tokens: [n] i32, the whole text. bos: the token that begins a window, or
    None. executors: one for each mode, float32 first, with weights and KV memory of its own."""

    checkpoint: Checkpoint
    config: EngineConfig
    tokens: Int32
    bos: int | None
    executors: Mapping[Mode, ModelExecutor]
    num_threads: int

    @property
    def modes(self) -> tuple[Mode, ...]:
        """The modes that run, float32 first."""
        return tuple(self.executors)

    def window(self, n_ctx: int, index: int) -> Int32:
        """Tokens [n_ctx] of one window."""
        window = self.tokens[index * n_ctx : (index + 1) * n_ctx].copy()
        if self.bos is not None:
            window[0] = self.bos
        return window

    def num_windows(self, n_ctx: int, wanted: int) -> int:
        """Whole windows there are, at the most `wanted`."""
        return min(wanted, len(self.tokens) // n_ctx)


@dataclass(slots=True)
class Scores:
    """Scores of the windows of one n_ctx. Mutated by `add`: one entry per window, each [scored tokens] f64."""

    n_ctx: int
    nll: dict[Mode, list[Float64]] = field(default_factory=dict)
    kld: dict[Comparison, list[Float64]] = field(default_factory=dict)
    top1: dict[Comparison, list[Float64]] = field(default_factory=dict)

    @property
    def num_windows(self) -> int:
        """Windows that every mode has run."""
        return min((len(each) for each in self.nll.values()), default=0)

    def add(self, window: WindowScore) -> None:
        """Take in a whole window."""
        for mode, parts in window.nll.items():
            self.nll.setdefault(mode, []).append(np.concatenate(parts))
        for comparison, parts in window.kld.items():
            self.kld.setdefault(comparison, []).append(np.concatenate(parts))
        for comparison, parts in window.top1.items():
            self.top1.setdefault(comparison, []).append(np.concatenate(parts))


@dataclass(slots=True)
class WindowScore:
    """Scores of one window, slice by slice. Mutated as rows are scored."""

    nll: dict[Mode, list[Float64]]
    kld: dict[Comparison, list[Float64]]
    top1: dict[Comparison, list[Float64]]


@dataclass(slots=True)
class Measurement:
    """All that was measured so far. Mutated as windows end."""

    scores: list[Scores] = field(default_factory=list)
    interrupted: bool = False
    before: CpuCounters | None = None
    after: CpuCounters | None = None


class Watcher(Protocol):
    """Is told how the measurement goes."""

    def advanced(self, num_tokens: int) -> None:
        """So many tokens more were run, modes added up."""
        ...

    def ended(self, scores: Scores, num_windows: int) -> None:
        """One window more of `num_windows` is in `scores`."""
        ...


def open_subject(
    config: EngineConfig,
    settings: Settings,
    *,
    progress: Progress | None = None,
    loading: Callable[[Mode], None] = lambda _: None,
) -> Subject:
    """Read and tokenise the text, then load one executor per mode, each with KV memory of its own.

    Raises ConfigError where the text is missing, not UTF-8 or too short, or n_ctx exceeds the model's context;
    ModelError for a model without a vocabulary; CapacityError where the modes do not fit in memory together.
    """
    text = read_text(settings.text)
    checkpoint = open_checkpoint(resolve(config.model, progress=progress))
    tokenizer = tokenizer_of(checkpoint.vocab)
    if tokenizer is None:
        raise ModelError(
            f"{checkpoint.spec.name} brings no vocabulary, so the text cannot be tokenised; take a checkpoint with its "
            "tokenizer.json, or a GGUF file"
        )
    longest = max(settings.contexts)
    if longest > checkpoint.spec.context_length:
        raise ConfigError(
            f"--n-ctx is {longest:,} and {checkpoint.spec.name} reaches {checkpoint.spec.context_length:,} tokens; "
            f"lower --n-ctx to {checkpoint.spec.context_length:,}"
        )
    # Control tokens that the text spells out are text, as in llama.cpp.
    tokens = np.array(tokenizer.encode(text, parse_special=False), np.int32)
    if len(tokens) < longest:
        raise ConfigError(
            f"{settings.text} has {len(tokens):,} tokens and a single window needs {longest:,}; give a longer text, or "
            "lower --n-ctx"
        )
    num_threads = kernel_threads(config, this_machine())
    specs = {mode: kv_spec_for(checkpoint, mode.codec, config.block_size) for mode in modes_to_run(settings.modes)}
    _check_memory(checkpoint, specs, longest)
    executors: dict[Mode, ModelExecutor] = {}
    for mode, spec in specs.items():
        loading(mode)
        executors[mode] = _share_weights(mode, spec, executors, longest) or _load(
            mode, checkpoint, config, longest, num_threads
        )
    bos = tokenizer.bos_id if tokenizer.add_bos else None
    return Subject(checkpoint, config, tokens, bos, executors, num_threads)


def _load(mode: Mode, checkpoint: Checkpoint, config: EngineConfig, longest: int, num_threads: int) -> ModelExecutor:
    return load_executor(
        checkpoint,
        weight_format=WEIGHTS[mode.weights],
        kv_codec=mode.codec,
        block_size=config.block_size,
        num_blocks=-(-longest // config.block_size),
        max_model_len=longest,
        num_threads=num_threads,
        executor="reference" if mode.apart else config.executor,
    ).model


def _share_weights(
    mode: Mode, spec: KVSpec, executors: Mapping[Mode, ModelExecutor], longest: int
) -> ModelExecutor | None:
    """An executor in numpy beside the first one of the same weights; None where there is none yet."""
    first = executors.get(replace(mode, kv="f32"))
    if mode.apart and isinstance(first, ReferenceExecutor):
        return first.with_kv(spec, spec.num_blocks(longest), rounding=mode.rounding)
    return None


def read_text(path: Path) -> str:
    """A UTF-8 file as it is, line ends included. Raises ConfigError."""
    try:
        return path.read_bytes().decode()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; give a text file (--text)") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start:,}); convert it to UTF-8") from None


def total_tokens(subject: Subject, settings: Settings) -> int:
    """Tokens that the whole measurement runs, modes added up."""
    per_mode = sum(subject.num_windows(n_ctx, each) * (n_ctx - 1) for n_ctx, each in settings.windows_of.items())
    return per_mode * len(subject.modes)


def measure(
    subject: Subject, settings: Settings, watcher: Watcher, *, interrupted: Callable[[], bool] = lambda: False
) -> Measurement:
    """Run every window in every mode, modes in turns within a window.

    interrupted: asked between native calls; once True, the whole windows measured by then are returned.
    Raises ModelError where a mode gives logits that are not finite.
    """
    found = Measurement(before=read_counters())
    comparisons = comparisons_of(subject.modes)
    for n_ctx, wanted in settings.windows_of.items():
        scores = Scores(n_ctx)
        found.scores.append(scores)
        num_windows = subject.num_windows(n_ctx, wanted)
        for index in range(num_windows):
            window = _run_window(subject, comparisons, subject.window(n_ctx, index), watcher, interrupted)
            if window is None:
                found.interrupted = True
                break
            scores.add(window)
            watcher.ended(scores, num_windows)
        if found.interrupted:
            break
    found.after = read_counters()
    return found


def _run_window(
    subject: Subject,
    comparisons: Sequence[Comparison],
    window: Int32,
    watcher: Watcher,
    interrupted: Callable[[], bool],
) -> WindowScore | None:
    """Scores of one window; None where it was interrupted.

    positions  0 ………… first ………… n_ctx-2  n_ctx-1
               |-- read --|---- scored ----|  only predicted
    """
    score = WindowScore(
        {mode: [] for mode in subject.modes}, {c: [] for c in comparisons}, {c: [] for c in comparisons}
    )
    n_ctx = len(window)
    first, last = n_ctx // 2, n_ctx - 1
    for start in range(0, last, _CHUNK):
        stop = min(start + _CHUNK, last)
        scored = np.arange(max(start, first), stop)
        logits: dict[Mode, Float32] = {}
        for mode, executor in subject.executors.items():
            if interrupted():
                return None
            logits[mode] = executor.forward(_batch(window, start, stop, scored, executor.kv_spec))
            watcher.advanced(stop - start)
            if not np.isfinite(logits[mode]).all():
                raise ModelError(
                    f"{mode.name} gives logits that are not finite in the {n_ctx:,} tokens from {start:,} on; its "
                    "arithmetic overflows on this model: leave the mode out"
                )
        _score_rows(score, logits, window[scored + 1])
    return score


def _batch(window: Int32, start: int, stop: int, scored: NDArray[np.int64], spec: KVSpec) -> Batch:
    return Batch(
        tokens=np.ascontiguousarray(window[start:stop]),
        positions=np.arange(start, stop, dtype=np.int32),
        starts=np.array([0, stop - start], np.int32),
        tables=np.arange(spec.num_blocks(stop), dtype=np.int32)[None],
        logit_rows=(scored - start).astype(np.int32),
    )


def _score_rows(score: WindowScore, logits: Mapping[Mode, Float32], targets: Int32) -> None:
    for at in range(0, len(targets), _SCORED_ROWS):
        rows = slice(at, at + _SCORED_ROWS)
        logp = {mode: log_softmax(each[rows]) for mode, each in logits.items()}
        for mode, nll in score.nll.items():
            nll.append(negative_log_likelihood(logp[mode], targets[rows]))
        p = {against: np.exp(logp[against]) for against in dict.fromkeys(each.against for each in score.kld)}
        for comparison, kld in score.kld.items():
            kld.append(divergence(p[comparison.against], logp[comparison.against], logp[comparison.mode]))
        for comparison, top1 in score.top1.items():
            top1.append(same_top1(logp[comparison.against], logp[comparison.mode]))


def _check_memory(checkpoint: Checkpoint, specs: Mapping[Mode, KVSpec], longest: int) -> None:
    # The reference keeps one copy as stored and one in f32 for all its modes of the same weights, and its KV in f32.
    f32 = loaded_weight_bytes(checkpoint, "f32")
    weights = sum(loaded_weight_bytes(checkpoint, WEIGHTS[mode.weights]) for mode in specs if not mode.apart)
    weights += 2 * f32 * len({mode.weights for mode in specs if mode.apart})
    held = (replace(spec, codec="f32") if mode.apart else spec for mode, spec in specs.items())
    cache = sum(spec.num_blocks(longest) * spec.block_bytes for spec in held)
    logits = len(specs) * 4 * checkpoint.spec.vocab_size * (_CHUNK + 4 * _SCORED_ROWS)
    free = this_machine().free_bytes
    if weights + cache + logits > free:
        raise CapacityError(
            f"not enough memory: {len(specs)} modes side by side need {format_bytes(weights)} of weights + "
            f"{format_bytes(cache)} of KV cache + {format_bytes(logits)} of logits, and {format_bytes(free)} are free; "
            "give fewer modes (--dtype, --weight-format, --kv-cache-dtype, --apart), or a lower --n-ctx"
        )
