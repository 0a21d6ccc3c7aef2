"""llama.cpp as a worker of `pagemill bench quality`: how likely it finds the tokens of a window, with the settings of
`run_llama_cpp.py` (flash attention, KV cache in f16) and logits in f32 as it gives them.

    {"do": "generate", "prompts": [window, …], "tokens": first, "alternative": 0} -> {"tokens": [[nats, count], …], …}

Of each window, run alone from position 0, the logits of positions first … len - 2 are scored on the token that follows:
the sum of negative log-likelihoods (softmax in float64) and their number.
"""

from typing import Any

import llama_cpp
import numpy as np
from run_llama_cpp import LlamaCpp  # type: ignore[import-not-found]
from worker_protocol import serve

N_ROWS = 512  # positions run at once, so that their logits stay small


class ScoringLlamaCpp(LlamaCpp):  # type: ignore[misc]
    """One window at a time. Mutated by every request."""

    def __init__(self, model: str, num_threads: int, options: dict[str, Any]) -> None:
        super().__init__(model, num_threads, options)
        self.num_alternatives = 1

    def prepare(self, prompts: list[list[int]], num_tokens: int, alternative: int) -> None:
        """Nothing: contexts are made as windows come, off nobody's clock."""

    def generate(self, prompts: list[list[int]], num_tokens: int, alternative: int) -> list[Any]:
        """[nats, count] of each window; num_tokens: the first position that is scored."""
        return [self._score(window, num_tokens, alternative) for window in prompts]

    def _score(self, window: list[int], first: int, alternative: int) -> list[float]:
        super().prepare([window], 0, alternative)
        [context] = [made for key, made in self._contexts.items() if key[2] == alternative]
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        nats, last = 0.0, len(window) - 1
        for start in range(0, last, N_ROWS):
            stop = min(start + N_ROWS, last)
            self._decode(context, [(window[at], at, 0, at >= first) for at in range(start, stop)])
            for at in range(max(start, first), stop):
                nats += self._nats(context, at - start, window[at + 1])
        return [nats, max(0, last - first)]

    def _nats(self, context: Any, index: int, target: int) -> float:
        row = llama_cpp.llama_get_logits_ith(context, index)
        logits = np.ctypeslib.as_array(row, (self._vocab_size,)).astype(np.float64)
        most = logits.max()
        return float(most + np.log(np.exp(logits - most).sum()) - logits[target])


if __name__ == "__main__":
    serve(ScoringLlamaCpp)
