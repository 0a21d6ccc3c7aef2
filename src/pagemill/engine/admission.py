"""Which requests may enter, and what their open choices resolve to. Owns the limits of an engine and their messages."""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from pagemill.base.errors import CapacityError, ConfigError, LengthError, RequestError
from pagemill.base.params import DEFAULT_CACHE_OPTIONS, CacheOptions, SamplingParams, Unsaid
from pagemill.cache.manager import CacheManager
from pagemill.engine.request import Request


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """Sizes that requests are held to. Raises ConfigError on values below 1.

    max_model_len: longest sequence, prompt and answer together. eos_token_ids: the model's own end-of-text ids.
    max_num_seqs: sequences that run at a time. max_num_batched_tokens: tokens computed in a step. mixed_step_percent:
    how long a step that reads prompts may make those wait who decode, in percent of a step without (None: no bound).
    max_queued_requests: requests of one tenant that may wait (None: no bound). target_itl_s: time between tokens
    that steps which read prompts are held to instead of mixed_step_percent (None: none).
    """

    max_model_len: int
    vocab_size: int
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    eos_token_ids: tuple[int, ...] = ()
    mixed_step_percent: int | None = None
    max_queued_requests: int | None = None
    target_itl_s: float | None = None

    def __post_init__(self) -> None:
        for name in ("max_model_len", "vocab_size", "max_num_seqs", "max_num_batched_tokens"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"{name} is {value}; give at least 1")
        if self.mixed_step_percent is not None and self.mixed_step_percent <= 100:
            raise ConfigError(f"mixed_step_percent is {self.mixed_step_percent}; give more than 100, or None")
        if self.max_queued_requests is not None and self.max_queued_requests < 1:
            raise ConfigError(f"max_queued_requests is {self.max_queued_requests}; give at least 1, or None")
        if self.target_itl_s is not None and not 0 < self.target_itl_s < 1e6:
            raise ConfigError(f"target_itl_s is {self.target_itl_s}; give seconds above 0, or None")
        if self.max_model_len < 2:
            raise ConfigError("max_model_len is 1; give at least 2: one token of prompt and one of answer")


def derive_seed(engine_seed: int, request_number: int) -> int:
    """The 64-bit seed of the request_number-th request of an engine that brings none (BLAKE2b of both numbers)."""
    data = struct.pack("<QQ", engine_seed % 2**64, request_number)
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, person=b"pagemill-seed").digest(), "little")


class Admission:
    """Checks requests against the limits and against the cache's size; no state of its own."""

    __slots__ = ("_cache", "limits")

    def __init__(self, limits: EngineLimits, cache: CacheManager) -> None:
        self.limits = limits
        self._cache = cache

    def admit(
        self,
        request_id: str,
        prompt: Sequence[int],
        params: SamplingParams,
        seed: int,
        arrival_s: float,
        cache: CacheOptions = DEFAULT_CACHE_OPTIONS,
    ) -> Request:
        """The checked request. `seed` is used where `params` brings none.

        Raises RequestError (status 400) for an empty or too long prompt, any ids outside the vocabulary and retained
        ranges outside the prompt, (403) for a namespace that is not to be had, and CapacityError where the whole cache,
        or the tenant's part, is too small for the prompt, or the cache for prompt and answer.
        """
        tokens = self._check_prompt(prompt)
        self._check_ids(params)
        self._check_cache(len(prompt))
        self._check_options(len(prompt), cache)
        return Request(
            request_id=request_id,
            prompt_token_ids=tokens,
            params=params,
            seed=seed if params.seed is None else params.seed,
            max_tokens=self._max_tokens(len(prompt), params, cache),
            stop_token_ids=self._stop_ids(params),
            arrival_s=arrival_s,
            cache=cache,
        )

    def _check_prompt(self, prompt: Sequence[int]) -> array[int]:
        longest = self.limits.max_model_len
        if not len(prompt):
            raise RequestError("the prompt is empty; give at least one token", param="prompt")
        if len(prompt) >= longest:
            raise LengthError(
                f"the prompt has {len(prompt):,} tokens and max_model_len is {longest:,}, of which one is needed for "
                f"the answer; shorten the prompt to {longest - 1:,} tokens or raise max_model_len if the model allows",
                param="prompt",
            )
        vocab_size = self.limits.vocab_size
        try:
            # As unsigned numbers, negative ids are refused while they are read. A list's own numbers are not made anew.
            unsigned = array("I", prompt if isinstance(prompt, list | tuple) else iter(prompt))
            wrong = max(prompt if isinstance(prompt, list) else unsigned) >= vocab_size
        except (TypeError, OverflowError):
            wrong = True
        if wrong:
            strays = ((i, t) for i, t in enumerate(prompt) if not hasattr(t, "__index__") or not 0 <= t < vocab_size)
            index, token = next(strays)
            raise RequestError(
                f"the prompt's token {index} is {token!r}; give ids from 0 to {vocab_size - 1:,}", param="prompt"
            )
        return array("i", unsigned.tobytes())

    def _check_ids(self, params: SamplingParams) -> None:
        size = self.limits.vocab_size
        wrong = next((token for token, _ in params.logit_bias if token >= size), None)
        if wrong is not None:
            raise RequestError(f"logit_bias names token {wrong}; give ids from 0 to {size - 1:,}", param="logit_bias")
        for token in params.stop_token_ids:
            if token >= size:
                raise RequestError(
                    f"stop_token_ids holds {token}; give ids from 0 to {size - 1:,}", param="stop_token_ids"
                )
        forbidden = set(self._stop_ids(params)) if params.min_tokens else set()
        if len(forbidden) >= self.limits.vocab_size:
            raise RequestError(
                "min_tokens forbids every token of the vocabulary; name fewer stop_token_ids", param="min_tokens"
            )

    def _check_cache(self, num_prompt_tokens: int) -> None:
        cache, longest = self._cache, self.limits.max_model_len
        size = self._size()
        if cache.mode == "contiguous" and cache.blocks_for(longest) > cache.num_blocks:
            raise CapacityError(
                f"kv_cache contiguous reserves {cache.blocks_for(longest):,} blocks for max_model_len ({longest:,} "
                f"tokens) and the KV cache has {size}; lower max_model_len, raise kv_cache_memory_bytes, or set "
                f"kv_cache to paged"
            )
        need = cache.blocks_for(num_prompt_tokens)
        if need > cache.num_blocks:
            raise CapacityError(
                f"the prompt's {num_prompt_tokens:,} tokens need {need:,} blocks and the whole KV cache has {size} "
                f"({cache.num_blocks * cache.block_size:,} tokens); shorten the prompt or raise kv_cache_memory_bytes",
                param="prompt",
            )

    def _check_options(self, num_prompt_tokens: int, options: CacheOptions) -> None:
        for each in options.retain:
            if each.end > num_prompt_tokens:
                raise RequestError(
                    f"a retained range is {each.start} to {each.end} and the prompt has {num_prompt_tokens:,} tokens; "
                    f"end it at {num_prompt_tokens:,} at the most",
                    param="retain",
                )
        self._cache.check_options(options)
        error = self._cache.cap_error(num_prompt_tokens, options)
        if error is not None:
            raise error

    def _max_tokens(self, num_prompt_tokens: int, params: SamplingParams, options: CacheOptions) -> int:
        """As asked, cut at the context's end and at the tenant's cap; without a wish also at the end of the cache, of
        which a wish may ask no more. The last position of a cap or a cache may be followed by one more token that is
        never computed. Raises CapacityError where that is not enough for what is asked."""
        cache, asked = self._cache, params.max_tokens
        room = self.limits.max_model_len - num_prompt_tokens
        cap = None if cache.shared is None else cache.shared.account_of(options).cap
        if cap is not None:
            room = min(room, cap * cache.block_size + 1 - num_prompt_tokens)
        room = room if asked is None else min(asked, room)
        most = cache.num_blocks * cache.block_size + 1 - num_prompt_tokens
        if room > most and asked is not None and not isinstance(asked, Unsaid):
            raise CapacityError(
                f"max_tokens is {asked:,} and the prompt has {num_prompt_tokens:,} tokens, behind which the whole KV "
                f"cache ({self._size()}, {cache.num_blocks * cache.block_size:,} tokens) has room for {most:,}; give "
                f"max_tokens of {most:,} at the most or raise kv_cache_memory_bytes",
                param="max_tokens",
            )
        return min(room, most)

    def _size(self) -> str:
        return f"{self._cache.num_blocks:,} blocks of {self._cache.block_size} tokens"

    def _stop_ids(self, params: SamplingParams) -> tuple[int, ...]:
        own = () if params.ignore_eos else self.limits.eos_token_ids
        return tuple(dict.fromkeys((*own, *params.stop_token_ids)))
