"""transformers as a worker of `pagemill bench peers`: `generate` with its KV cache, in bf16 or fp32."""

from typing import Any

import torch
import transformers
from worker_protocol import serve


class Transformers:
    """One model. options: {"dtype": "bfloat16" or "float32"}."""

    def __init__(self, model: str, num_threads: int, options: dict[str, Any]) -> None:
        torch.set_num_threads(num_threads)
        dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[options["dtype"]]
        self._model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype, local_files_only=True)
        self._model.eval()
        self.versions = {"transformers": transformers.__version__, "torch": torch.__version__}
        self.num_alternatives = 1

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
                use_cache=True,
                eos_token_id=None,
                pad_token_id=0,
            )
        return [len(answer) - ids.shape[1] for answer in answers]


if __name__ == "__main__":
    serve(Transformers)
