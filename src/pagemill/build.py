"""The composition root: which object gets which. From a configuration to an engine that is ready to step.

Owns the wiring and nothing of what runs afterwards; the arithmetic of memory is the planner's.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
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
from pagemill.cache.tenancy import Tenancy, quota_blocks
from pagemill.cache.windows import WindowSpec
from pagemill.decoding.grammar import GrammarCompiler
from pagemill.engine.admission import EngineLimits
from pagemill.engine.engine import Engine
from pagemill.execution.loader import ConvertedWeights, kv_codec_for, kv_spec_for, load_executor
from pagemill.kernels.policies import POLICIES
from pagemill.kernels.target import arithmetic_of, choose_target, numerics_id
from pagemill.kernels.tensors import row_bytes
from pagemill.models.checkpoint import Checkpoint, open_checkpoint
from pagemill.models.hub import Progress, resolve
from pagemill.models.registry import build_plan
from pagemill.planner.machine import kernel_threads, this_machine, thread_notice
from pagemill.planner.memory import blocks_that_fit, window_pages
from pagemill.text.tokenizer import Tokenizer, build_tokenizer

LoadProgress = Progress

_LOG: Final = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Built:
    """An engine and what it was made of. max_model_len: longest sequence in tokens. tokenizer: None for a checkpoint
    without a vocabulary, which takes token ids only. grammars: compiles what requests bring, for `executor`."""

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
    grammars: GrammarCompiler


def build(config: EngineConfig, *, progress: LoadProgress | None = None, clock: Clock | None = None) -> Built:
    """Fetch the model if need be, load it, size the cache, and wire the engine.

    progress: called with (stage, bytes done, bytes in all or None) while a model is fetched. clock: the machine's
    unless given. Raises ConfigError, ModelError and CapacityError as the parts do.
    """
    make_policy(config.cache_policy, 1, POLICIES)  # an unknown name is told before anything is fetched or loaded
    path = resolve(config.model, progress=progress)
    checkpoint = open_checkpoint(path, check_values=False)  # `load_executor` does, but for what it does not read
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
    kv_spec = replace(kv_spec, window_pages=window_pages(config, kv_spec, max_model_len, num_blocks))
    check_quotas(config, num_blocks)
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
        window_pages=kv_spec.window_pages,
        max_model_len=max_model_len,
        num_threads=num_threads,
        executor=config.executor,
        packed_weights_cache=config.packed_weights_cache,
    )
    grammars = GrammarCompiler(tokenizer)
    executor.use_grammars(grammars)
    limits = EngineLimits(
        max_model_len=max_model_len,
        vocab_size=spec.vocab_size,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        mixed_step_percent=config.mixed_step_percent,
        target_itl_s=None if config.target_itl_ms is None else config.target_itl_ms / 1e3,
        max_queued_requests=config.max_queued_requests,
        eos_token_ids=tuple(sorted(tokenizer.stop_ids)) if tokenizer is not None else checkpoint.vocab.stop_ids,
    )
    shares = config.enable_prefix_caching == "on"
    sharing = sharing_of(config, kv_spec, spec, executor.weights_id) if shares else None
    cache = CacheManager(num_blocks, config.block_size, config.kv_cache, sharing, kv_spec)  # type: ignore[arg-type]
    for name in config.public_names:
        cache.declare_public(name)
    for tenant in config.tenants:
        cache.grant(tenant.name, tenant.floor_tokens, tenant.cap_tokens)

    def decode(token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        return "" if tokenizer is None else tokenizer.decode(token_ids, skip_special=skip_special_tokens)

    engine = Engine(executor, cache, limits, decode, clock or MonotonicClock(), seed=config.seed)
    for tenant in config.tenants:
        engine.grant(tenant.name, tenant.weight, tenant.priority)
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
        grammars=grammars,
    )


def check_quotas(config: EngineConfig, num_blocks: int) -> None:
    """Raise ConfigError where tenants are promised more than the cache has, before any weights are loaded."""
    tenancy = Tenancy(num_blocks, config.block_size)
    for tenant in config.tenants:
        tenancy.set_quota(tenant.name, *quota_blocks(tenant.floor_tokens, tenant.cap_tokens, config.block_size))


def sharing_of(config: EngineConfig, kv_spec: KVSpec, spec: ModelSpec, weights_id: str) -> SharingConfig:
    """How this engine shares blocks, and what makes two of them the same: all of it is the same after a restart."""
    target = choose_target()
    native = config.executor == "native"
    fingerprint = Fingerprint(
        weights=weights_id,
        weight_format=config.weights,
        compute_dtype=arithmetic_of(target),
        numerics=numerics_id(target if native else config.executor),
        codec=kv_spec.codec,
        positions=repr(spec.rope) if spec.window is None else repr((spec.rope, spec.window, spec.window_layers)),
        block_size=kv_spec.block_size,
    )
    return SharingConfig(
        policy=config.cache_policy,
        fingerprint=fingerprint,
        page_bytes=kv_spec.block_bytes,
        known_tenants_only=config.known_tenants_only == "on",
        wipes=config.kv_cache_wiping == "on",
        windows=tuple(
            WindowSpec(window, num_pages, config.max_num_batched_tokens)
            for window, num_pages in zip(kv_spec.windows, kv_spec.window_pages, strict=bool(kv_spec.window_pages))
        ),
        makers=POLICIES,
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


def loaded_weight_bytes(checkpoint: Checkpoint, weight_format: str) -> int:
    """Bytes of the weights once loaded, each in the format that `EngineConfig.weights` gives it."""
    plan = build_plan(checkpoint.spec, max_positions=1)
    weights = ConvertedWeights(plan, checkpoint.tensors, weight_format, choose_target())
    matrices = {handle for handle, each in plan.weights.items() if each.kind == "matrix"}
    return sum(
        each.num_rows * row_bytes(weights.format_of(handle) if handle in matrices else each.format, each.shape[-1])
        for handle, each in checkpoint.tensors.items()
    )
