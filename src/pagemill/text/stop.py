"""Stop strings, found in a text that arrives in pieces. Owns what is held back because it may begin a stop string;
stop token ids are the engine's. Standard library only.

The automaton is that of Aho and Corasick, "Efficient string matching" (CACM 18(6), 1975): its state after each
character is the longest end of the text that begins some stop string, which is exactly what must be held back.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True, slots=True)
class StopPush:
    """Text that may be shown, and the stop string that was found (None: none yet)."""

    text: str
    stopped: str | None = None


@dataclass(frozen=True, slots=True)
class _Node:
    """A state of the automaton, filled while it is built, read-only afterwards.

    depth: characters of the beginning of a stop string that it stands for. found: the longest stop string that ends
    here, or empty.
    """

    depth: int
    found: str
    children: dict[str, int]


@lru_cache(maxsize=256)
def _automaton(stops: tuple[str, ...]) -> tuple[tuple[_Node, ...], tuple[int, ...]]:
    """States and the fallback of each: the state of the longest proper end of its text that begins a stop string."""
    children: list[dict[str, int]] = [{}]
    depth, found, fallback = [0], [""], [0]
    for stop in stops:
        state = 0
        for character in stop:
            if character not in children[state]:
                children[state][character] = len(children)
                children.append({})
                depth.append(depth[state] + 1)
                found.append("")
                fallback.append(0)
            state = children[state][character]
        found[state] = stop
    queue = deque(children[0].values())
    while queue:
        state = queue.popleft()
        found[state] = found[state] or found[fallback[state]]
        for character, child in children[state].items():
            back = fallback[state]
            while back and character not in children[back]:
                back = fallback[back]
            fallback[child] = children[back].get(character, 0)
            queue.append(child)
    nodes = tuple(_Node(d, f, c) for d, f, c in zip(depth, found, children, strict=True))
    return nodes, tuple(fallback)


class StopMatcher:
    """Watches one choice's text for its stop strings. Mutated by `push` and `flush`.

    The match that ends first wins; of several that end at the same character, the longest. So the result does not
    depend on how the text was cut into pieces, and nothing is awaited once a stop string is complete.

    stops: strings of at least one character. include: whether the stop string stays at the end of the text.
    """

    def __init__(self, stops: tuple[str, ...], include: bool) -> None:
        assert all(stops), "SamplingParams refuses empty stop strings"
        self._nodes, self._fallback = _automaton(stops)
        self._include = include
        self._state = 0
        self._held = ""
        self._stopped: str | None = None

    def push(self, text: str) -> StopPush:
        """Add text. Returns what can no longer be part of a stop string; after a match, always nothing."""
        if self._stopped is not None:
            return StopPush("", self._stopped)
        nodes, fallback, state = self._nodes, self._fallback, self._state
        for index, character in enumerate(text):
            while state and character not in nodes[state].children:
                state = fallback[state]
            state = nodes[state].children.get(character, 0)
            if nodes[state].found:
                return self._stop(self._held + text[: index + 1], nodes[state].found)
        self._state = state
        seen = self._held + text
        final = len(seen) - nodes[state].depth
        self._held = seen[final:]
        return StopPush(seen[:final])

    def flush(self) -> str:
        """The end of the text: what was held back, which is no stop string after all."""
        held, self._held, self._state = self._held, "", 0
        return held

    def _stop(self, seen: str, stop: str) -> StopPush:
        self._stopped, self._held = stop, ""
        return StopPush(seen if self._include else seen[: len(seen) - len(stop)], stop)
