"""vLLM on a CPU as a worker of `pagemill bench peers`: bf16, in-process engine, prefix caching off."""

import os
from typing import Any

from worker_protocol import serve

os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="2",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_NO_USAGE_STATS="1",
    HF_HUB_OFFLINE="1",
)


class Vllm:
    """One in-process engine."""

    def __init__(self, model: str, num_threads: int, options: dict[str, Any]) -> None:
        cores = sorted(os.sched_getaffinity(0))[:num_threads]
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
        os.environ["OMP_NUM_THREADS"] = str(num_threads)
        # After the variables above, which the library reads as it is imported.
        import torch
        import vllm

        self._params = vllm.SamplingParams
        self._llm = vllm.LLM(
            model=model,
            dtype="bfloat16",
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
            disable_log_stats=True,
        )
        self.versions = {"vllm": vllm.__version__, "torch": torch.__version__}
        self.num_alternatives = 1

    def prepare(self, prompts: list[list[int]], num_tokens: int, alternative: int) -> None:
        """Nothing: the engine takes requests of every size."""

    def generate(self, prompts: list[list[int]], num_tokens: int, alternative: int) -> list[int]:
        params = self._params(max_tokens=num_tokens, temperature=0.0, ignore_eos=True, detokenize=False)
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        return [len(answer.outputs[0].token_ids) for answer in self._llm.generate(requests, params, use_tqdm=False)]


if __name__ == "__main__":
    serve(Vllm)
