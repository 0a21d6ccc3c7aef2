"""Requests that begin alike share what the first one computed; tenants share nothing; the cache tells what it did."""

from __future__ import annotations

from pagemill import LLM, SamplingParams

MANUAL = "A water mill has a wheel, a shaft, two stones and a hopper. The miller opens the sluice, it turns, " * 4
QUESTIONS = ("What turns the stones?", "What does the miller open?", "Where does the grain go in?")


def main() -> None:
    """Ask three questions over one text, then the first of them as another tenant, then with another salt."""
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    with LLM(kv_cache_memory_bytes="64MiB", max_model_len=512) as llm:
        for question in QUESTIONS:
            [answer] = llm.generate(MANUAL + question, params)
            print(f"default tenant   {answer.receipt}")
        [other] = llm.generate(MANUAL + QUESTIONS[0], params, tenant="another shop")
        print(f"another tenant   {other.receipt}")
        assert other.num_cached_tokens == 0, "tenants share nothing"
        [salted] = llm.generate(MANUAL + QUESTIONS[0], params, cache_salt="private")
        print(f"another salt     {salted.receipt}")
        assert salted.num_cached_tokens == 0, "a salt keeps a text to those who know it"
        [again] = llm.generate(MANUAL + QUESTIONS[0], params)
        print(f"asked again      {again.receipt}")

        stats = llm.cache.stats()
        print(f"found {stats['tokens']['hit']} of {stats['tokens']['asked']} prompt tokens")
        for point in llm.cache.curve()["points"]:
            print(f"  a cache of {point['blocks']:6,} blocks would have hit {point['hit_ratio']:.0%}")
        print(f"{llm.cache.purge_tenant('another shop')} blocks of the other tenant purged and wiped")


if __name__ == "__main__":
    main()
