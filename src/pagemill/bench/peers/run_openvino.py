"""OpenVINO GenAI as a worker of `pagemill bench peers`: its GGUF reader, continuous batching, prefix caching off."""

from typing import Any

import numpy as np
import openvino
import openvino_genai
from worker_protocol import serve


class OpenVino:
    """One pipeline."""

    def __init__(self, model: str, num_threads: int, options: dict[str, Any]) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = 4
        scheduler.max_num_batched_tokens = 4096
        scheduler.max_num_seqs = 64
        scheduler.enable_prefix_caching = False
        self._pipeline = openvino_genai.LLMPipeline(
            model, "CPU", scheduler_config=scheduler, INFERENCE_NUM_THREADS=num_threads
        )
        self.versions = {"openvino-genai": openvino_genai.__version__, "openvino": openvino.__version__}
        self.num_alternatives = 1

    def prepare(self, prompts: list[list[int]], num_tokens: int, alternative: int) -> None:
        """Nothing: the pipeline takes requests of every size."""

    def generate(self, prompts: list[list[int]], num_tokens: int, alternative: int) -> list[int]:
        ids = np.array(prompts, dtype=np.int64)
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        config = openvino_genai.GenerationConfig(
            max_new_tokens=num_tokens, min_new_tokens=num_tokens, ignore_eos=True, do_sample=False
        )
        return [len(tokens) for tokens in self._pipeline.generate(inputs, config).tokens]


if __name__ == "__main__":
    serve(OpenVino)
