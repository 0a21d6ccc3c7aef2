"""What users ask in `pagemill bench serve`: sessions of turns, made from a seed or from a trace. Owns their shapes.

A turn's prompt is all that was said in its session before, answers included, and the turn's text. Texts are words that
are one token each, so that lengths are known before anything is sent. All engines get the same sessions.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import accumulate

from pagemill.base.errors import ConfigError
from pagemill.simulator.trace import Trace
from pagemill.text.tokenizer import Tokenizer

DISTINCT, SHARED = "distinct", "shared"
TRACE = "trace"
BLOCK_WORDS = 16  # that stand for one block of a trace

_WORD = re.compile(r" [a-z]{3,10}")
_LEAST_WORDS = 200
_MOST_WORDS = 4096
_SLACK = 1.1  # answers that are read again may be cut into more tokens than they were made of
_SPARE = 32


@dataclass(frozen=True, slots=True)
class Turn:
    """text: appended to what was said. think_s: between the last answer and this turn."""

    text: str
    num_tokens: int
    max_tokens: int
    think_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Session:
    """Turns of one user. at_s: when it begins, where sessions begin by the clock."""

    turns: tuple[Turn, ...]
    at_s: float = 0.0

    @property
    def num_positions(self) -> int:
        """The longest sequence of its requests, with some room for answers that are cut otherwise when read again."""
        said = sum(each.num_tokens for each in self.turns)
        answers = sum(each.max_tokens for each in self.turns)
        return said + round(_SLACK * answers) + _SPARE


@dataclass(frozen=True, slots=True)
class Words:
    """Texts of a given number of tokens. pieces: each one token, wherever it stands."""

    pieces: tuple[str, ...]

    def draw(self, rng: random.Random, count: int) -> str:
        """A text of `count` tokens."""
        return "".join(rng.choices(self.pieces, k=count))


def plain_words(tokenizer: Tokenizer) -> Words:
    """The vocabulary's plain words; letters where it has too few of them, whose texts have as many tokens or fewer."""
    found: list[str] = []
    for token in range(tokenizer.vocab_size):
        text = tokenizer.token_bytes(token).decode(errors="replace")
        if _WORD.fullmatch(text) and tokenizer.encode(text, add_special=False) == [token]:
            found.append(text)
            if len(found) == _MOST_WORDS:
                break
    return Words(tuple(found) if len(found) >= _LEAST_WORDS else tuple(map(chr, range(ord("a"), ord("z") + 1))))


@dataclass(frozen=True, slots=True)
class Writer:
    """What a workload is made with. scale: of all lengths."""

    rng: random.Random
    words: Words
    scale: float

    def size(self, tokens: int) -> int:
        """A length, scaled."""
        return max(1, round(self.scale * tokens))

    def between(self, low: int, high: int) -> int:
        """A random length, scaled."""
        return self.size(self.rng.randint(low, high))

    def text(self, tokens: int) -> str:
        """Words that no other text has in this order."""
        return self.words.draw(self.rng, tokens)

    def turn(
        self, tokens: int, max_tokens: int, *, before: str = "", num_before: int = 0, think_s: float = 0.0
    ) -> Turn:
        """A turn of `tokens` new words after `before`, which has num_before."""
        return Turn(before + self.text(tokens), num_before + tokens, max_tokens, think_s)


def _distinct(writer: Writer, count: int) -> list[Session]:
    """Prompts of 256 tokens that have nothing in common, answers of 48 to 80."""
    return [Session((writer.turn(writer.size(256), writer.between(48, 80)),)) for _ in range(count)]


def _shared(writer: Writer, count: int) -> list[Session]:
    """One prefix of 1,024 tokens before 32 of one's own, answers of 48 to 80."""
    length = writer.size(1024)
    prefix = writer.text(length)
    return [
        Session((writer.turn(writer.size(32), writer.between(48, 80), before=prefix, num_before=length),))
        for _ in range(count)
    ]


def _chat(writer: Writer, count: int) -> list[Session]:
    """Conversations of 2 to 5 turns behind one system prompt of 256 tokens; users think for about a second."""
    length = writer.size(256)
    system = writer.text(length)
    found = []
    for _ in range(count):
        turns = [writer.turn(writer.between(32, 128), writer.between(48, 96), before=system, num_before=length)]
        for _ in range(writer.rng.randint(1, 4)):
            think_s = min(5.0, writer.rng.expovariate(1.0))
            turns.append(writer.turn(writer.between(32, 128), writer.between(48, 96), think_s=think_s))
        found.append(Session(tuple(turns)))
    return found


def _agents(writer: Writer, count: int) -> list[Session]:
    """Agents behind tool descriptions of 768 tokens: 5 to 10 short calls each, and what the tools say in between."""
    length = writer.size(768)
    tools = writer.text(length)
    found = []
    for _ in range(count):
        turns = [writer.turn(writer.between(48, 192), writer.between(16, 40), before=tools, num_before=length)]
        for _ in range(writer.rng.randint(4, 9)):
            turns.append(writer.turn(writer.between(48, 192), writer.between(16, 40), think_s=0.05))
        found.append(Session(tuple(turns)))
    return found


def _documents(writer: Writer, count: int) -> list[Session]:
    """Questions of 24 tokens about 12 documents of 3,000, some far more popular than others (Zipf, exponent 1)."""
    length = writer.size(3000)
    documents = [writer.text(length) for _ in range(12)]
    weights = list(accumulate(1 / (rank + 1) for rank in range(len(documents))))
    chosen = writer.rng.choices(documents, cum_weights=weights, k=count)
    return [
        Session((writer.turn(writer.size(24), writer.between(32, 64), before=each, num_before=length),))
        for each in chosen
    ]


WORKLOADS: dict[str, Callable[[Writer, int], list[Session]]] = {
    DISTINCT: _distinct,
    SHARED: _shared,
    "chat": _chat,
    "agents": _agents,
    "documents": _documents,
}


def parse_workloads(text: str) -> tuple[str, ...]:
    """Names from "distinct,chat" or "all". Raises ConfigError where one is unknown."""
    names = tuple(dict.fromkeys(each.strip() for each in text.split(",") if each.strip()))
    for name in names:
        if name not in WORKLOADS and name != "all":
            near = get_close_matches(name, WORKLOADS, n=1)
            said = f" did you mean {near[0]}?" if near else ""
            raise ConfigError(f"--workloads: unknown {name!r};{said} workloads: {', '.join(WORKLOADS)}, all")
    if not names:
        raise ConfigError(f"--workloads is empty; give some of {', '.join(WORKLOADS)}, or all")
    return tuple(WORKLOADS) if "all" in names else names


def make_sessions(
    name: str, words: Words, count: int, *, seed: Sequence[int], scale: float = 1.0, rate: float | None = None
) -> list[Session]:
    """Sessions of a workload. rate: sessions per second of a Poisson process; None: all at 0, for users who take the
    next when the last has ended."""
    rng = random.Random(":".join(map(str, (name, *seed))))
    made = WORKLOADS[name](Writer(rng, words, scale), count)
    if rate is None:
        return made
    times = accumulate(rng.expovariate(rate) for _ in made)
    return [Session(each.turns, at_s) for each, at_s in zip(made, times, strict=True)]


def trace_sessions(
    trace: Trace, words: Words, *, seed: Sequence[int], speed: float, duration_s: float, longest: int, most: int
) -> list[Session]:
    """A trace's requests of its first duration_s × speed seconds, at most `most`: one turn each.

    A block of the trace becomes BLOCK_WORDS words that are the same wherever it occurs, and lengths shrink alike, so
    that what is shared stays shared; a trace of lengths alone keeps them, with prompts that share nothing. What does
    not fit into `longest` tokens is cut at its end. Raises ConfigError where no request begins in time.
    """
    rng = random.Random(":".join(map(str, (TRACE, *seed))))
    shrink = BLOCK_WORDS / trace.block_tokens if trace.block_tokens else 1.0
    texts: dict[int, str] = {}
    found: list[Session] = []
    for request in trace.requests[:most]:
        if request.time_s >= duration_s * speed:
            break
        answer = max(1, min(round(shrink * request.num_output_tokens), longest // 4))
        room = longest - round(_SLACK * answer) - _SPARE
        length = max(1, min(round(shrink * request.num_input_tokens), room))
        pieces = []
        for block in request.blocks[: -(-length // BLOCK_WORDS)]:
            if block not in texts:
                texts[block] = words.draw(rng, BLOCK_WORDS)
            pieces.append(texts[block])
        num_tokens = BLOCK_WORDS * len(pieces)
        if num_tokens < length:
            pieces.append(words.draw(rng, length - num_tokens))
            num_tokens = length
        if num_tokens > room:  # the last block is part-filled
            pieces[-1] = words.draw(rng, BLOCK_WORDS - (num_tokens - room))
            num_tokens = room
        found.append(Session((Turn("".join(pieces), num_tokens, answer),), request.time_s / speed))
    if not found:
        raise ConfigError(
            f"{trace.name} has no request in its first {duration_s * speed:g} s; give a longer --duration or --speed"
        )
    return found
