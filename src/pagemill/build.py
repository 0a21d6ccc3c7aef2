"""The composition root: which object gets which. From a configuration to an engine that is ready to step.

Owns the wiring and nothing of what runs afterwards; the arithmetic of memory is the planner's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pagemill.base.clock import Clock, MonotonicClock
from pagemill.base.config import EngineConfig
from pagemill.base.errors import ConfigError
from pagemill.base.kv_spec import KVSpec
from pagemill.base.model_spec import ModelSpec, VocabSpec
from pagemill.base.step import Executor
from pagemill.cache.manager import CacheManager
from pagemill.engine.admission import EngineLimits
from pagemill.engine.engine import Engine
from pagemill.execution.loader import kv_codec_for, kv_spec_for, load_executor
from pagemill.models.checkpoint import Checkpoint, open_checkpoint
from pagemill.models.hub import Progress, resolve
from pagemill.planner.machine import kernel_threads, this_machine
from pagemill.planner.memory import blocks_that_fit
from pagemill.text.tokenizer import Tokenizer, build_tokenizer

LoadProgress = Progress

_F32_BYTES, _BF16_BYTES = 4, 2


@dataclass(frozen=True, slots=True)
class Built:
    """An engine and what it was made of. max_model_len: longest sequence in tokens. tokenizer: None for a checkpoint
    without a vocabulary, which takes token ids only."""

    config: EngineConfig
    engine: Engine
    executor: Executor
    tokenizer: Tokenizer | None
    spec: ModelSpec
    vocab: VocabSpec
    kv_spec: KVSpec
    num_blocks: int
    max_model_len: int
    num_threads: int
    weight_bytes: int
    path: Path


def build(config: EngineConfig, *, progress: LoadProgress | None = None, clock: Clock | None = None) -> Built:
    """Fetch the model if need be, load it, size the cache, and wire the engine.

    progress: called with (stage, bytes done, bytes in all or None) while a model is fetched. clock: the machine's
    unless given. Raises ConfigError, ModelError and CapacityError as the parts do.
    """
    path = resolve(config.model, progress=progress)
    checkpoint = open_checkpoint(path)
    return assemble(config, checkpoint, tokenizer_of(checkpoint.vocab), clock=clock)


def tokenizer_of(vocab: VocabSpec) -> Tokenizer | None:
    """The tokeniser that a checkpoint brings, None where it brings ids only."""
    return build_tokenizer(vocab) if vocab.tokens or vocab.tokenizer_json is not None else None


def assemble(
    config: EngineConfig, checkpoint: Checkpoint, tokenizer: Tokenizer | None, *, clock: Clock | None = None
) -> Built:
    """Wire an engine around a checkpoint that is open already, such as one made in memory."""
    spec = checkpoint.spec
    machine = this_machine()
    max_model_len = longest_sequence(config, spec)
    codec = kv_codec_for(config.dtype, config.kv_cache_dtype)
    kv_spec = kv_spec_for(checkpoint, codec, config.block_size)
    weight_bytes = loaded_weight_bytes(checkpoint, config.dtype)
    num_blocks = blocks_that_fit(config, kv_spec, max_model_len, weight_bytes, machine.free_bytes)
    num_threads = kernel_threads(config, machine)
    executor = load_executor(
        checkpoint,
        dtype=config.dtype,
        kv_codec=codec,
        block_size=config.block_size,
        num_blocks=num_blocks,
        max_model_len=max_model_len,
        num_threads=num_threads,
        executor=config.executor,
        packed_weights_cache=config.packed_weights_cache,
    )
    limits = EngineLimits(
        max_model_len=max_model_len,
        vocab_size=spec.vocab_size,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        eos_token_ids=tuple(sorted(tokenizer.stop_ids)) if tokenizer is not None else checkpoint.vocab.stop_ids,
    )
    cache = CacheManager(num_blocks, config.block_size, config.kv_cache)  # type: ignore[arg-type]

    def decode(token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        return "" if tokenizer is None else tokenizer.decode(token_ids, skip_special=skip_special_tokens)

    engine = Engine(executor, cache, limits, decode, clock or MonotonicClock(), seed=config.seed)
    return Built(
        config=config,
        engine=engine,
        executor=executor,
        tokenizer=tokenizer,
        spec=spec,
        vocab=checkpoint.vocab,
        kv_spec=kv_spec,
        num_blocks=num_blocks,
        max_model_len=max_model_len,
        num_threads=num_threads,
        weight_bytes=weight_bytes,
        path=Path(checkpoint.path),
    )


def longest_sequence(config: EngineConfig, spec: ModelSpec) -> int:
    """max_model_len, or the model's context. Raises ConfigError where the model cannot go so far."""
    if config.max_model_len is None:
        return spec.context_length
    if config.max_model_len > spec.context_length:
        raise ConfigError(
            f"max_model_len is {config.max_model_len:,} and {spec.name} reaches {spec.context_length:,} tokens; "
            f"lower max_model_len to {spec.context_length:,} or leave it out"
        )
    return config.max_model_len


def loaded_weight_bytes(checkpoint: Checkpoint, dtype: str) -> int:
    """Bytes of the weights once loaded: as stored, or converted where dtype asks for it."""
    if dtype == "auto":
        return sum(tensor.data.nbytes for tensor in checkpoint.tensors.values())
    return checkpoint.num_parameters * (_F32_BYTES if dtype == "float32" else _BF16_BYTES)
