"""Pagemill as a worker of `pagemill bench peers`, through `LLM.generate` as users call it."""

from typing import Any

from worker_protocol import serve

from pagemill import __version__
from pagemill.base.params import SamplingParams
from pagemill.llm import LLM


class Pagemill:
    """One engine. options: fields of its configuration."""

    def __init__(self, model: str, num_threads: int, options: dict[str, Any]) -> None:
        self._llm = LLM(model, num_threads=num_threads, enable_prefix_caching="off", **options)
        self.versions = {"pagemill": __version__}
        self.num_alternatives = 1

    def prepare(self, prompts: list[list[int]], num_tokens: int, alternative: int) -> None:
        """Nothing: the engine takes requests of every size."""

    def generate(self, prompts: list[list[int]], num_tokens: int, alternative: int) -> list[int]:
        params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
        answers = self._llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
        return [len(answer.outputs[0].token_ids) for answer in answers]


if __name__ == "__main__":
    serve(Pagemill)
