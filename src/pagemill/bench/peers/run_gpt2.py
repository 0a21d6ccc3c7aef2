"""transformers as a worker of `pagemill bench kvcache --beside`: GPT-2's shape with seeded random weights, made in
memory from transformers' own configuration, with its KV cache (alternative 0) or without it (alternative 1)."""

from typing import Any

import torch
import transformers
from worker_protocol import serve


class Gpt2:
    """One model. options: {"dtype": "bfloat16" or "float32", "seed": of the weights, "config": GPT2Config's own keys}.
    model: a name for messages; nothing is read."""

    def __init__(self, model: str, num_threads: int, options: dict[str, Any]) -> None:
        torch.set_num_threads(num_threads)
        torch.manual_seed(options["seed"])
        dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[options["dtype"]]
        config = transformers.GPT2Config(**options["config"], bos_token_id=None, eos_token_id=None)
        self._model = transformers.GPT2LMHeadModel(config).to(dtype)
        self._model.eval()
        self.versions = {
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "threads": str(torch.get_num_threads()),
            "parameters": str(self._model.num_parameters()),
        }
        self.num_alternatives = 2

    def prepare(self, prompts: list[list[int]], num_tokens: int, alternative: int) -> None:
        """Nothing: the model takes requests of every size."""

    def generate(self, prompts: list[list[int]], num_tokens: int, alternative: int) -> list[int]:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            answers = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                min_new_tokens=num_tokens,
                max_new_tokens=num_tokens,
                do_sample=False,
                use_cache=alternative == 0,
                eos_token_id=None,
                pad_token_id=0,
            )
        return [len(answer) - ids.shape[1] for answer in answers]


if __name__ == "__main__":
    serve(Gpt2)
