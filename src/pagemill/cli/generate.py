"""`pagemill generate`: go on from a prompt, streamed, or as one JSON object."""

from __future__ import annotations

import sys
from typing import Any

from pagemill.base.config import resolve_config
from pagemill.base.errors import ConfigError, RequestError
from pagemill.base.params import CacheOptions, SamplingParams
from pagemill.base.units import format_seconds
from pagemill.cli.progress import byte_progress
from pagemill.cli.terminal import BOLD, note, paint, print_json
from pagemill.llm import LLM, CompletionOutput, RequestOutput

MOST_REPEATS = 1000


def run(
    *,
    prompt: str,
    repeat: int,
    sampling: dict[str, Any],
    cache: dict[str, Any],
    as_json: bool,
    engine: dict[str, Any],
) -> None:
    """Generate from one prompt ("-": stdin) and print text as it comes, or one JSON object; `repeat` times over, one
    after the other on one engine, whose cache then has the prompt. cache: fields of CacheOptions."""
    if not 1 <= repeat <= MOST_REPEATS:
        raise ConfigError(f"--repeat is {repeat}; give a number of times from 1 to {MOST_REPEATS:,}")
    params, options = SamplingParams(**sampling), CacheOptions(**cache)
    text = read_stdin() if prompt == "-" else prompt
    with open_llm(engine, quiet=as_json) as llm:
        if as_json:
            answers = [describe(_answer(llm, text, params, options)) for _ in range(repeat)]
            print_json(answers[0] if repeat == 1 else {"answers": answers})
            return
        for _ in range(repeat):
            if params.n > 1 or params.logprobs is not None:
                for choice in _answer(llm, text, params, options).outputs:
                    _print_choice(choice, several=params.n > 1)
            else:
                _stream(llm, text, params, options)


def _answer(llm: LLM, text: str, params: SamplingParams, options: CacheOptions) -> RequestOutput:
    [answer] = llm.generate(text, params, cache=options)
    if answer.error is not None:
        raise answer.error
    return answer


def open_llm(engine: dict[str, Any], *, quiet: bool, defaults: dict[str, object] | None = None) -> LLM:
    """The LLM that the command line asks for; fetching a model shows its progress on stderr unless `quiet`.

    defaults: values for options that nobody gave.
    """
    resolved = resolve_config(engine["arguments"], file=engine["file"], origin="command line")
    missing = {
        name: value for name, value in (defaults or {}).items() if resolved.origins[name] == "default"
    }  # fmt: skip
    if missing:
        resolved = resolve_config({**engine["arguments"], **missing}, file=engine["file"], origin="command line")
    with byte_progress(quiet=quiet) as report:
        return LLM.from_config(resolved.config, load_progress=report)


def read_stdin() -> str:
    """All of stdin as UTF-8 text, less one newline at its end. Raises RequestError where it is not text."""
    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise RequestError(f"stdin is not UTF-8 text (byte {error.start}); convert it first") from None


def describe(answer: RequestOutput) -> dict[str, Any]:
    """An answer as `--json` prints it: the first choice, counts, times; all choices where there are several."""
    first = answer.outputs[0]
    found: dict[str, Any] = {
        "text": first.text,
        "token_ids": first.token_ids,
        "finish_reason": first.finish_reason,
        "usage": {
            "prompt_tokens": len(answer.prompt_token_ids),
            "completion_tokens": sum(len(each.token_ids) for each in answer.outputs),
            "cached_tokens": answer.num_cached_tokens,
        },
        "timing": {"ttft_s": answer.timing.ttft_s, "tpot_s": answer.tpot_s},
        "receipt": None if answer.receipt is None else answer.receipt.describe(),
    }
    if first.logprobs is not None:
        found["logprobs"] = _logprobs(first)
    if len(answer.outputs) > 1:
        found["choices"] = [
            {"text": each.text, "token_ids": each.token_ids, "finish_reason": each.finish_reason}
            | ({"logprobs": _logprobs(each)} if each.logprobs is not None else {})
            for each in answer.outputs
        ]
    return found


def _logprobs(choice: CompletionOutput) -> list[list[dict[str, Any]]]:
    """For each position the token taken and the most likely ones, by rank."""
    return [
        [
            {"token_id": token, "token": each.decoded_token, "logprob": each.logprob, "rank": each.rank}
            for token, each in sorted(position.items(), key=lambda item: item[1].rank)
        ]
        for position in choice.logprobs or []
    ]


def _print_choice(choice: CompletionOutput, *, several: bool) -> None:
    if several:
        print(paint(f"[{choice.index}]", BOLD, sys.stdout))
    print(choice.text)
    if choice.logprobs is None:
        return
    for token, position in zip(choice.token_ids, choice.logprobs, strict=True):
        ranked = sorted(position.items(), key=lambda item: item[1].rank)
        shown = "  ".join(f"{each.decoded_token!r} {each.logprob:.3f}" for _, each in ranked)
        print(f"{position[token].decoded_token!r} {position[token].logprob:.3f} | {shown}")


def _stream(llm: LLM, text: str, params: SamplingParams, options: CacheOptions) -> None:
    num_tokens, marks, receipt = 0, None, None
    for delta in llm.stream(text, params, cache=options):
        num_tokens += len(delta.token_ids)
        marks, receipt = delta.marks, delta.receipt
        sys.stdout.write(delta.text)
        sys.stdout.flush()
    print()
    if marks is None or marks.first_token_s is None or marks.finished_s is None or not sys.stderr.isatty():
        return
    line = f"{num_tokens} tokens, first after {format_seconds(marks.first_token_s - marks.arrival_s)}"
    if num_tokens > 1:
        line += f", then {(num_tokens - 1) / (marks.finished_s - marks.first_token_s):.1f} tokens/s"
    note(line)
    if receipt is not None:
        note(str(receipt))
