"""The composition root: which object gets which. From a configuration to an engine that is ready to step.

Owns the wiring and nothing of what runs afterwards; the arithmetic of memory is the planner's.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import Final

from pagemill.base.clock import Clock, MonotonicClock
from pagemill.base.config import EngineConfig
from pagemill.base.errors import ConfigError
from pagemill.base.kv_spec import KVSpec
from pagemill.base.model_spec import ModelSpec, VocabSpec
from pagemill.base.step import Executor
from pagemill.cache.entry import SharingConfig
from pagemill.cache.keys import Fingerprint
from pagemill.cache.manager import CacheManager
from pagemill.cache.policies.registry import make_policy
from pagemill.engine.admission import EngineLimits
from pagemill.engine.engine import Engine
from pagemill.execution.convert import loaded_format
from pagemill.execution.loader import kv_codec_for, kv_spec_for, load_executor
from pagemill.kernels.target import choose_target, numerics_id
from pagemill.kernels.tensors import BLOCK_BYTES, Tensor
from pagemill.models.checkpoint import Checkpoint, open_checkpoint
from pagemill.models.hub import Progress, resolve
from pagemill.planner.machine import kernel_threads, this_machine, thread_notice
from pagemill.planner.memory import blocks_that_fit
from pagemill.text.tokenizer import Tokenizer, build_tokenizer

LoadProgress = Progress

_LOG: Final = logging.getLogger(__name__)


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
    make_policy(config.cache_policy, 1)  # a name that there is not is told before anything is fetched or loaded
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
    codec = kv_codec_for(config.weights, config.kv_cache_dtype)
    kv_spec = kv_spec_for(checkpoint, codec, config.block_size)
    weight_bytes = loaded_weight_bytes(checkpoint, config.weights)
    num_blocks = blocks_that_fit(config, kv_spec, max_model_len, weight_bytes, machine.free_bytes)
    num_threads = kernel_threads(config, machine)
    if (notice := thread_notice(num_threads, machine)) is not None:
        _LOG.warning(notice)
    executor = load_executor(
        checkpoint,
        dtype=config.dtype,
        weight_format=config.weight_format,
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
    sharing = sharing_of(config, kv_spec) if config.enable_prefix_caching == "on" else None
    cache = CacheManager(num_blocks, config.block_size, config.kv_cache, sharing)  # type: ignore[arg-type]

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


def sharing_of(config: EngineConfig, kv_spec: KVSpec) -> SharingConfig:
    """What makes two blocks of this engine the same. Blocks do not outlive the engine, so that its weights are named by
    a random number instead of a digest over all of them."""
    fingerprint = Fingerprint(
        weights=token_hex(16),
        weight_format=config.weight_format,
        compute_dtype=config.dtype,
        numerics=numerics_id(choose_target()) if config.executor == "native" else config.executor,
        codec=kv_spec.codec,
        block_size=kv_spec.block_size,
    )
    return SharingConfig(config.cache_policy, fingerprint, kv_spec.block_bytes)


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


def loaded_weight_bytes(checkpoint: Checkpoint, weight_format: str) -> int:
    """Bytes of the weights once loaded: as stored (auto), or converted (`EngineConfig.weights`)."""
    if weight_format == "auto":
        return checkpoint.num_bytes
    return sum(_converted_bytes(tensor, weight_format) for tensor in checkpoint.tensors.values())


def _converted_bytes(tensor: Tensor, weight_format: str) -> int:
    values, size = BLOCK_BYTES[loaded_format(tensor, weight_format)]
    return tensor.num_rows * tensor.shape[-1] // values * size
