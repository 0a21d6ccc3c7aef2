"""The three modes of the KV cache give the same tokens; time and memory differ."""

from __future__ import annotations

import time

from pagemill import LLM, SamplingParams

PROMPT = "Once upon a time, a miller who lived beside a slow river decided to"


def main() -> None:
    """Generate the same text in each mode and print what it took on this machine."""
    params = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
    texts = set()
    for mode in ("none", "contiguous", "paged"):
        with LLM(kv_cache=mode, kv_cache_memory_bytes="64MiB", max_model_len=256) as llm:
            began = time.perf_counter()
            [answer] = llm.generate(PROMPT, params)
            print(f"{mode:10} {time.perf_counter() - began:6.3f} s")
            texts.add(answer.outputs[0].text)
    assert len(texts) == 1, "the modes must agree"
    print(PROMPT + texts.pop())


if __name__ == "__main__":
    main()
