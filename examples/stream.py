"""A streamed answer that stops at a sentence's end, and one that the caller leaves early."""

from __future__ import annotations

from pagemill import LLM, SamplingParams


def main() -> None:
    """Stream two answers; leaving the loop aborts the request and frees its blocks."""
    with LLM(kv_cache_memory_bytes="256MiB") as llm:
        sentence = SamplingParams(temperature=0, max_tokens=48, stop=(".",), include_stop_str_in_output=True)
        for delta in llm.stream("The sea is", sentence):
            print(delta.text, end="", flush=True)
        print(f"  [{delta.finish_reason}: {delta.stop_reason!r}]")

        num_tokens = 0
        for delta in llm.stream("Count: one, two, three,", SamplingParams(temperature=0, max_tokens=1000)):
            print(delta.text, end="", flush=True)
            num_tokens += len(delta.token_ids)
            if num_tokens == 12:
                break
        print(f"  [left after {num_tokens} tokens; {llm.stats().cache.num_active_blocks} blocks in use]")


if __name__ == "__main__":
    main()
