"""Log-probabilities as OpenAI's two routes write them, and as vLLM writes those of a prompt. Owns their shapes.

A logarithm of zero is written as -9999, since JSON has no infinity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pagemill.base.step import PositionLogprobs, TokenLogprob

Token = Callable[[int], tuple[str, bytes]]
LEAST = -9999.0


def _number(value: float) -> float:
    return value if value > LEAST else LEAST  # NaN compares as false, too


class CompletionLogprobs:
    """`choices[].logprobs` of /v1/completions. Mutated by `add`: text offsets count on over chunks."""

    __slots__ = ("_offset", "_token")

    def __init__(self, token: Token) -> None:
        self._token = token
        self._offset = 0

    def of(self, positions: Sequence[PositionLogprobs | None], token_ids: Sequence[int], wanted: int) -> dict[str, Any]:
        """Of positions side by side; None where nothing is known, as of a prompt's first token."""
        tokens: list[str] = []
        values: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        offsets: list[int] = []
        for position, token_id in zip(positions, token_ids, strict=True):
            text = self._token(token_id)[0]
            tokens.append(text)
            offsets.append(self._offset)
            self._offset += len(text)
            values.append(None if position is None else _number(position.sampled.logprob))
            tops.append(None if position is None or not wanted else self._tops(position))
        return {
            "tokens": tokens,
            "token_logprobs": values,
            "top_logprobs": tops if wanted else None,
            "text_offset": offsets,
        }

    def _tops(self, position: PositionLogprobs) -> dict[str, float]:
        """The most likely tokens and the one that stands there, by text; of equal texts the most likely."""
        found: dict[str, float] = {}
        for each in (*position.top, position.sampled):
            found.setdefault(self._token(each.token_id)[0], _number(each.logprob))
        return found


def chat_logprobs(positions: Sequence[PositionLogprobs], token: Token) -> dict[str, Any]:
    """`choices[].logprobs` of /v1/chat/completions."""

    def entry(each: TokenLogprob) -> dict[str, Any]:
        text, raw = token(each.token_id)
        return {"token": text, "logprob": _number(each.logprob), "bytes": list(raw)}

    return {
        "content": [
            entry(position.sampled) | {"top_logprobs": [entry(each) for each in position.top]} for position in positions
        ],
        "refusal": None,
    }


def prompt_logprobs(positions: Sequence[PositionLogprobs], token: Token) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: by token id, for each token of the prompt, the first without."""
    return [
        None,
        *(
            {
                str(each.token_id): {
                    "logprob": _number(each.logprob),
                    "rank": each.rank,
                    "decoded_token": token(each.token_id)[0],
                }
                for each in (position.sampled, *position.top)
            }
            for position in positions
        ),
    ]
