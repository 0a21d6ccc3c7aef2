"""What an answer cost: tokens of prompt and answer, and what the prefix cache did, in true numbers. Owns their shape.

cached_tokens are those whose keys and values were found; cache_write_tokens those that were computed and left for
others. `cache` is the receipt: hits by tier, estimated milliseconds saved, and why the rest was missed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from pagemill.engine.output import Delta
from pagemill.engine.receipt import Receipt
from pagemill.server.ports import Ask
from pagemill.server.schema import StreamOptions


def leaves_blocks(asks: Sequence[Ask]) -> bool:
    """True where the requests leave their prompts in the cache: unless they go past it."""
    return not all(options.bypass or params.prompt_logprobs is not None for _, params, options in asks)


class Tally:
    """Counts of the requests of one answer. Mutated by `add`.

    num_prompts: tokens of each prompt. writes: False where the requests leave nothing in the cache. answers: generated
    ids by request and choice, kept where `keeps`. ended: choices whose last delta was counted.
    """

    __slots__ = ("_keeps", "_num_prompts", "_receipts", "_writes", "answers", "ended", "num_generated")

    def __init__(self, num_prompts: dict[str, int], *, writes: bool, keeps: bool = False) -> None:
        self._num_prompts = num_prompts
        self._keeps = keeps
        self.answers: dict[tuple[str, int], list[int]] = {}
        self.ended: set[tuple[str, int]] = set()
        self._receipts: dict[str, Receipt] = {}
        self._writes = writes
        self.num_generated = 0

    def add(self, delta: Delta) -> None:
        """Count a delta. The receipt of a request is that of its first choice, which read the prompt."""
        self.num_generated += len(delta.token_ids)
        if self._keeps:
            self.answers.setdefault((delta.request_id, delta.choice), []).extend(delta.token_ids)
        if delta.finish_reason is not None:
            self.ended.add((delta.request_id, delta.choice))
        if delta.receipt is not None and (delta.choice == 0 or delta.request_id not in self._receipts):
            self._receipts[delta.request_id] = delta.receipt

    @property
    def num_prompt_tokens(self) -> int:
        return sum(self._num_prompts.values())

    @property
    def num_cached_tokens(self) -> int:
        return sum(each.num_cached_tokens for each in self._receipts.values())

    @property
    def knows_cache(self) -> bool:
        """True where the first choice of every request has ended, which tells what was found of its prompt."""
        return all((request_id, 0) in self.ended for request_id in self._num_prompts)

    def usage(self) -> dict[str, Any]:
        """As OpenAI's clients read it. Cached tokens are known once a request has ended, 0 before."""
        prompt, answer, cached = self.num_prompt_tokens, self.num_generated, self.num_cached_tokens
        known = bool(self._receipts)
        details: dict[str, Any] = {
            "cached_tokens": cached,
            "cache_write_tokens": prompt - cached if known and self._writes else 0,
        }
        if known:
            details["cache"] = self._cache()
        return {
            "prompt_tokens": prompt,
            "completion_tokens": answer,
            "total_tokens": prompt + answer,
            "prompt_tokens_details": details,
        }

    def header(self) -> str | None:
        """The value of `x-cache`: hit where all that could be found was, else partial or miss; None where nothing is
        shared."""
        if not self._receipts:
            return None
        cached = self.num_cached_tokens
        complete = all(each.miss is None for each in self._receipts.values())
        word = "miss" if not cached else "hit" if complete else "partial"
        return f"{word}; cached={cached}; computed={self.num_prompt_tokens - cached}"

    def _cache(self) -> dict[str, Any]:
        tiers: dict[str, int] = {}
        for receipt in self._receipts.values():
            for tier, count in receipt.tiers.items():
                tiers[tier] = tiers.get(tier, 0) + count
        saved_s = sum(receipt.saved_s for receipt in self._receipts.values())
        missed = next((each for each in self._receipts.values() if each.miss is not None), None)
        miss = None if missed is None else missed.describe()["miss"]
        return {"tiers": tiers, "saved_ms": round(1000 * saved_s, 3), "miss": miss}


class StreamUsage:
    """The `usage` field of a stream's chunks, as `stream_options` ask for it."""

    __slots__ = ("_at_end", "_tally", "is_running")

    def __init__(self, options: StreamOptions | None, tally: Tally) -> None:
        self._tally = tally
        self._at_end = options is not None and options.include_usage
        self.is_running = options is not None and options.continuous_usage_stats

    def beside(self) -> bytes | None:
        """In a chunk that has choices: the counts so far, null, or None for no such field. `prompt_tokens_details` is
        left out as long as it is not known."""
        if self.is_running:
            usage = self._tally.usage()
            if not self._tally.knows_cache:
                del usage["prompt_tokens_details"]
            return orjson.dumps(usage)
        return b"null" if self._at_end else None

    def at_end(self) -> bytes | None:
        """In a last chunk without choices; None for no such chunk."""
        return orjson.dumps(self._tally.usage()) if self._at_end else None
