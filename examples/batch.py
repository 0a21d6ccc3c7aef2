"""Many prompts at once: answers come back in the order of the prompts, whatever their lengths."""

from __future__ import annotations

from pagemill import LLM, SamplingParams

PROMPTS = [
    "The capital of France is",
    "A recipe for bread begins with",
    "The three primary colours are",
    "In the year 1969,",
]


def main() -> None:
    """Answer all prompts in one call and print each with its counts."""
    params = SamplingParams(temperature=0, max_tokens=24)
    with LLM(kv_cache_memory_bytes="256MiB") as llm:
        for answer in llm.generate(PROMPTS, params):
            choice = answer.outputs[0]
            print(f"{answer.prompt}{choice.text!r}")
            print(f"  {len(answer.prompt_token_ids)} + {len(choice.token_ids)} tokens, ended by {choice.finish_reason}")
        stats = llm.stats()
        print(f"{stats.num_steps} steps computed {stats.num_computed_tokens} tokens")


if __name__ == "__main__":
    main()
