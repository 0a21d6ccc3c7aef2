"""`pagemill demo`: a tour of under a minute on the default model. Every number is measured there and then."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from pagemill.base.params import SamplingParams
from pagemill.base.units import format_bytes, format_seconds
from pagemill.cli.demo_server import ask, served
from pagemill.cli.generate import open_llm
from pagemill.cli.terminal import BOLD, DIM, paint
from pagemill.llm import LLM

QUESTION = "Explain in three sentences why a language model keeps a cache of keys and values."
STORY = "Once upon a time, a miller who lived beside a slow river decided to"
TOPICS = (
    "the sea", "a lighthouse", "the moon", "a clockmaker", "winter", "an orchard", "a river", "an old library",
)  # fmt: skip

NUM_ANSWER_TOKENS = 96
NUM_BATCH_TOKENS = 48
NUM_SERVED_TOKENS = 24
MIN_STORY_TOKENS, MAX_STORY_TOKENS = 32, 256
OFF_BUDGET_S = 12.0  # what generating without a cache may take; it decides how many tokens both modes generate
_ENDS = 16  # tokens at each end of the story whose time is shown


@dataclass(frozen=True, slots=True)
class Timed:
    """Tokens of one stream and the seconds from each to the next (the first: from the call)."""

    token_ids: list[int]
    seconds: list[float]

    @property
    def tpot_s(self) -> float:
        return median(self.seconds[1:])

    @property
    def total_s(self) -> float:
        return sum(self.seconds)


def run(*, engine: dict[str, Any]) -> None:
    """The tour: a streamed answer, the cache off and on, several prompts at once, one table."""
    began = time.perf_counter()
    with open_llm(engine, quiet=False) as llm:
        loaded_s = time.perf_counter() - began
        built = llm.built
        _say(f"{built.spec.name} from {built.path.name}, {format_bytes(built.weight_bytes)} of weights")
        _say(
            f"{built.num_threads} threads, KV cache of {built.num_blocks * built.kv_spec.block_size:,} tokens, "
            f"{format_bytes(built.kv_spec.bytes_per_token)} each; loaded in {format_seconds(loaded_s)}"
        )
        _title(f"A streamed answer: {QUESTION}")
        question: Any = QUESTION
        if built.vocab.chat_template is not None:
            question = llm.chat_prompt([{"role": "user", "content": QUESTION}])
        answer = _timed(llm, question, NUM_ANSWER_TOKENS, echo=True)
        num_tokens = _affordable_tokens(llm)
        cold, warm = _cold_and_warm(llm)
        _title(f"The cache on: {num_tokens} tokens, each reading the keys and values of those before it")
        with_cache = _timed(llm, STORY, num_tokens, echo=True, ignore_eos=True)
        _title(f"Several prompts at once: {len(TOPICS)} stories of {NUM_BATCH_TOKENS} tokens")
        alone_rate = _rate(llm, TOPICS[:1])
        batch_rate = _rate(llm, TOPICS)
        _say(f"one: {alone_rate:.0f} tokens/s   {len(TOPICS)} together: {batch_rate:.0f} tokens/s")
    _title("The cache off: the same text, every token recomputing all before it")
    off = {**engine, "arguments": {**engine["arguments"], "kv_cache": "none"}}
    with open_llm(off, quiet=False) as llm:
        without_cache = _timed(llm, STORY, num_tokens, echo=False, ignore_eos=True)
    same = "the same tokens" if without_cache.token_ids == with_cache.token_ids else "OTHER TOKENS (report this)"
    _say(f"{num_tokens} tokens in {format_seconds(without_cache.total_s)}: {same}")
    if built.vocab.chat_template is not None:
        _serve_and_ask_twice(engine)
    print()
    _print_table(answer, with_cache, without_cache, alone_rate, batch_rate, (cold, warm))
    _say(f"all of it took {format_seconds(time.perf_counter() - began)}")


def _timed(llm: LLM, prompt: Any, max_tokens: int, *, echo: bool, ignore_eos: bool = False) -> Timed:
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=ignore_eos)
    token_ids: list[int] = []
    seconds: list[float] = []
    last = time.perf_counter()
    for delta in llm.stream(prompt, params):
        now = time.perf_counter()
        token_ids += delta.token_ids
        seconds.append(now - last)
        if echo:
            sys.stdout.write(delta.text)
            sys.stdout.flush()
        last = time.perf_counter()
    if echo:
        print()
    return Timed(token_ids, seconds)


def _affordable_tokens(llm: LLM) -> int:
    """Tokens that mode `none` generates within its budget, from the rate at which a prompt is read here and now."""
    num_prompt = min(256, llm.built.max_model_len - 1)
    began = time.perf_counter()
    ids = [7 + index % 997 for index in range(num_prompt)]
    llm.generate({"prompt_token_ids": ids}, SamplingParams(temperature=0, max_tokens=1))
    rate = num_prompt / (time.perf_counter() - began)
    start = len(llm.tokenizer.encode(STORY))
    longest = min(MAX_STORY_TOKENS, llm.built.max_model_len - start)
    count = MIN_STORY_TOKENS
    while count + 32 <= longest and sum(range(start, start + count + 32)) / rate < OFF_BUDGET_S:
        count += 32
    return min(count, longest)


def _rate(llm: LLM, topics: Sequence[str]) -> float:
    """Tokens per second of all prompts together, from the first token of the last to begin to the end of all."""
    params = SamplingParams(temperature=0, max_tokens=NUM_BATCH_TOKENS, ignore_eos=True)
    began = time.perf_counter()
    answers = llm.generate([f"Write a story about {topic}. {STORY}" for topic in topics], params)
    elapsed = time.perf_counter() - began
    return sum(len(each.outputs[0].token_ids) for each in answers) / elapsed


def _cold_and_warm(llm: LLM) -> tuple[float, float]:
    """Seconds to the first token of a long prompt, the first time and the second."""
    num_prompt = min(384, llm.built.max_model_len - 8)
    _title(f"A prompt of {num_prompt} tokens, read for the first time and found again")
    vocab_size = llm.built.spec.vocab_size
    ids = {"prompt_token_ids": [(11 + 7 * index % 991) % vocab_size for index in range(num_prompt)]}
    seconds = []
    for _ in range(2):
        [found] = llm.generate(ids, SamplingParams(temperature=0, max_tokens=1))
        seconds.append(found.timing.ttft_s or 0.0)
        _say(f"first token after {format_seconds(seconds[-1])}. {found.receipt or 'nothing is shared'}")
    return seconds[0], seconds[1]


def _serve_and_ask_twice(engine: dict[str, Any]) -> None:
    """The same question to `pagemill serve`, twice, with what the cache did as a client is told it."""
    with served(engine) as (url, ready):
        _title(f"The same over HTTP: {ready}")
        for times in ("the first time", "again"):
            found = ask(url, QUESTION, NUM_SERVED_TOKENS)
            _say(
                f"{times}: {format_seconds(found.seconds)} for {NUM_SERVED_TOKENS} tokens, {found.num_cached_tokens} "
                f"of {found.num_prompt_tokens} prompt tokens cached. receipt: {json.dumps(found.cache)}"
            )


def _print_table(
    answer: Timed, on: Timed, off: Timed, alone_rate: float, batch_rate: float, prompt: tuple[float, float]
) -> None:
    table = Table(title="measured on this machine, just now", title_justify="left", pad_edge=False)
    table.add_column("what")
    for heading in ("cache off", "cache on", "ratio"):
        table.add_column(heading, justify="right")
    last = len(on.seconds)

    def row(what: str, before: float, after: float) -> None:
        table.add_row(what, format_seconds(before), format_seconds(after), f"{before / after:.1f}×")

    row(f"time per token, tokens 2-{_ENDS}", median(off.seconds[1:_ENDS]), median(on.seconds[1:_ENDS]))
    row(f"time per token, tokens {last - _ENDS + 1}-{last}", median(off.seconds[-_ENDS:]), median(on.seconds[-_ENDS:]))
    row(f"{last} tokens in all", off.total_s, on.total_s)
    table.add_section()
    cold, warm = prompt
    table.add_row(
        "first token, prompt cold and warm",
        format_seconds(cold),
        format_seconds(warm),
        f"{cold / max(warm, 1e-9):.1f}×",
    )
    table.add_section()
    table.add_row("first token of the answer", "", format_seconds(answer.seconds[0]), "")
    table.add_row("streamed answer", "", f"{1 / answer.tpot_s:.0f} tok/s", "")
    table.add_section()
    table.add_row("1 prompt alone", "", f"{alone_rate:.0f} tok/s", "")
    table.add_row(f"{len(TOPICS)} prompts at once", "", f"{batch_rate:.0f} tok/s", f"{batch_rate / alone_rate:.1f}×")
    Console(highlight=False).print(table)


def _title(text: str) -> None:
    print(f"\n{paint(text, BOLD, sys.stdout)}")


def _say(text: str) -> None:
    print(paint(text, DIM, sys.stdout))
