"""transformers as a worker of `pagemill bench peers`, in bf16 or fp32: `generate` of a checkpoint; or of
GPT-2's shape with seeded random weights, which is made in memory and also runs without its KV cache."""

from typing import Any

import torch
import transformers
from worker_protocol import serve


class Transformers:
    """One model. options: {"dtype": "bfloat16" or "float32"}; with "config" (GPT2Config's own keys) and "seed" of the
    weights, nothing is read, `model` is a name, and alternative 1 generates without the KV cache."""

    def __init__(self, model: str, num_threads: int, options: dict[str, Any]) -> None:
        torch.set_num_threads(num_threads)
        dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[options["dtype"]]
        if "config" in options:
            torch.manual_seed(options["seed"])
            config = transformers.GPT2Config(**options["config"], bos_token_id=None, eos_token_id=None)
            self._model = transformers.GPT2LMHeadModel(config).to(dtype)
            self.num_alternatives = 2
        else:
            self._model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype, local_files_only=True)
            self.num_alternatives = 1
        self._model.eval()
        self.versions = {
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "threads": str(torch.get_num_threads()),
            "parameters": str(self._model.num_parameters()),
        }

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
    serve(Transformers)
