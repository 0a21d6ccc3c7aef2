"""llama.cpp as a worker of `pagemill bench peers`, through the library calls of llama-cpp-python.

Alternatives: flash attention on and off, each with one KV buffer for all sequences and with one for each sequence.
Batches of 2,048, micro-batches of 512, decoding batched with one sequence id for each stream.
"""

import ctypes
from typing import Any

import llama_cpp
import numpy as np
from worker_protocol import serve

N_BATCH, N_UBATCH = 2048, 512
ROUND = 256


class LlamaCpp:
    """A model with the context of the last request's size, one for each alternative. Mutated by `prepare`."""

    def __init__(self, model: str, num_threads: int, options: dict[str, Any]) -> None:
        llama_cpp.llama_backend_init()
        self._silence = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._silence, ctypes.c_void_p(0))
        self._model = llama_cpp.llama_model_load_from_file(model.encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {model}")
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._num_threads = num_threads
        self._contexts: dict[tuple[int, int, int], Any] = {}
        self._batch = llama_cpp.llama_batch_init(N_BATCH, 0, 1)
        build = llama_cpp.llama_print_system_info().decode()
        self.versions = {"llama-cpp-python": llama_cpp.__version__, "build": build.strip(" |")}
        self.num_alternatives = 4

    def prepare(self, prompts: list[list[int]], num_tokens: int, alternative: int) -> None:
        longest = max(map(len, prompts)) + num_tokens
        key = (len(prompts), -(-longest // ROUND) * ROUND, alternative)
        if key in self._contexts:
            return
        for other in [each for each in self._contexts if each[:2] != key[:2]]:
            llama_cpp.llama_free(self._contexts.pop(other))
        params = llama_cpp.llama_context_default_params()
        params.n_seq_max, params.n_ctx = key[0], key[0] * key[1]
        params.n_batch, params.n_ubatch = N_BATCH, N_UBATCH
        params.n_threads = params.n_threads_batch = self._num_threads
        params.flash_attn_type = (
            llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED if alternative & 1 else llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        )
        params.kv_unified = not alternative & 2
        params.no_perf = True
        context = llama_cpp.llama_init_from_model(self._model, params)
        if not context:
            raise RuntimeError(f"llama.cpp cannot make a context of {params.n_ctx} tokens")
        self._contexts[key] = context

    def generate(self, prompts: list[list[int]], num_tokens: int, alternative: int) -> list[int]:
        longest = max(map(len, prompts)) + num_tokens
        context = self._contexts[(len(prompts), -(-longest // ROUND) * ROUND, alternative)]
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        last = self._read(context, prompts)
        positions = [len(prompt) for prompt in prompts]
        for _ in range(num_tokens - 1):
            rows = [(last[s], positions[s], s, True) for s in range(len(prompts))]
            self._decode(context, rows)
            last = [self._most_likely(context, index) for index in range(len(rows))]
            positions = [position + 1 for position in positions]
        return [position + 1 - len(prompt) for position, prompt in zip(positions, prompts, strict=True)]

    def _read(self, context: Any, prompts: list[list[int]]) -> list[int]:
        """Read all prompts in batches of N_BATCH; returns the token that follows each."""
        rows = [
            (token, position, stream, position == len(prompt) - 1)
            for stream, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        first: list[int] = []
        for begin in range(0, len(rows), N_BATCH):
            batch = rows[begin : begin + N_BATCH]
            self._decode(context, batch)
            first += [self._most_likely(context, index) for index, row in enumerate(batch) if row[3]]
        return first

    def _decode(self, context: Any, rows: list[tuple[int, int, int, bool]]) -> None:
        batch = self._batch
        batch.n_tokens = len(rows)
        for index, (token, position, stream, wanted) in enumerate(rows):
            batch.token[index] = token
            batch.pos[index] = position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = stream
            batch.logits[index] = wanted
        code = llama_cpp.llama_decode(context, batch)
        if code:
            raise RuntimeError(f"llama_decode returned {code}")

    def _most_likely(self, context: Any, index: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(context, index)
        return int(np.ctypeslib.as_array(logits, (self._vocab_size,)).argmax())


if __name__ == "__main__":
    serve(LlamaCpp)
