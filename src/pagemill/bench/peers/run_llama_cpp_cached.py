"""llama.cpp as a worker of `pagemill bench cache`: as `run_llama_cpp.py`, but what a prompt has in common with the one
before it stays in the KV cache, as llama-server keeps it for a slot. No HTTP, no tokenising: its fastest way.
"""

from typing import Any

import llama_cpp
from run_llama_cpp import N_BATCH, ROUND, LlamaCpp  # type: ignore[import-not-found]
from worker_protocol import serve


class CachingLlamaCpp(LlamaCpp):  # type: ignore[misc]
    """One prompt at a time, each context keeping the last. Mutated by every request. Alternatives: flash attention on
    and off; a single sequence makes the KV buffers' form no difference."""

    def __init__(self, model: str, num_threads: int, options: dict[str, Any]) -> None:
        super().__init__(model, num_threads, options)
        self.num_alternatives = 2
        self._kept: dict[tuple[int, int, int], list[int]] = {}

    def prepare(self, prompts: list[list[int]], num_tokens: int, alternative: int) -> None:
        super().prepare(prompts, num_tokens, alternative)
        self._kept = {key: kept for key, kept in self._kept.items() if key in self._contexts}

    def generate(self, prompts: list[list[int]], num_tokens: int, alternative: int) -> list[int]:
        [prompt] = prompts
        if num_tokens != 1:
            raise ValueError("this worker measures first tokens")
        key = (1, -(-(len(prompt) + num_tokens) // ROUND) * ROUND, alternative)
        context, kept = self._contexts[key], self._kept.get(key, [])
        pairs = zip(prompt[:-1], kept, strict=False)
        common = next((at for at, (one, other) in enumerate(pairs) if one != other), min(len(prompt) - 1, len(kept)))
        llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(context), 0, common, -1)
        rows = [(prompt[at], at, 0, at == len(prompt) - 1) for at in range(common, len(prompt))]
        for begin in range(0, len(rows), N_BATCH):
            self._decode(context, rows[begin : begin + N_BATCH])
        self._most_likely(context, (len(rows) - 1) % N_BATCH)
        self._kept[key] = list(prompt)
        return [1]


if __name__ == "__main__":
    serve(CachingLlamaCpp)
