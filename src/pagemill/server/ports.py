"""What the server needs from the engine's side and from the door, as protocols. The product injects the real ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from pagemill.base.params import CacheOptions, SamplingParams
from pagemill.engine.engine import Engine
from pagemill.engine.output import Delta
from pagemill.text.conversation import PromptTokens

_T = TypeVar("_T")

# What is asked in one request: token ids, parameters, and whose cache.
Ask = tuple[Sequence[int], SamplingParams, CacheOptions]


class Stream(Protocol):
    """The deltas of requests that were opened together."""

    @property
    def request_ids(self) -> tuple[str, ...]:
        """In the order they were asked; each delta names its own."""
        ...

    @property
    def finished(self) -> bool:
        """True where every choice has ended and its last delta was taken."""
        ...

    async def next(self) -> list[Delta]:
        """All deltas since the last call, at least one; none once everything has ended."""
        ...

    def close(self) -> None:
        """Leave; what still runs is aborted before the next step."""
        ...


class Serving(Protocol):
    """A model that loads or is loaded. `status`: loading, ready or failed. `observe` is told every delta, on the event
    loop, before those who wait for it."""

    observe: Callable[[Sequence[Delta]], None] | None

    @property
    def status(self) -> str: ...
    @property
    def num_open(self) -> int: ...
    @property
    def facts(self) -> Mapping[str, Any]:
        """What is known of the loaded model; empty before: max_model_len, vocab_size, kv_cache_tokens, name."""
        ...

    async def open(self, asks: Sequence[Ask]) -> Stream:
        """Let requests in, all or none. Raises what is wrong with one of them, before anything runs."""
        ...

    async def call(self, function: Callable[[Engine], _T]) -> _T:
        """What `function` returns for the engine, on its thread between two steps."""
        ...

    async def encode(self, text: str, *, add_special: bool = True) -> list[int]: ...
    async def decode(self, token_ids: Sequence[int], *, skip_special: bool = False) -> str: ...
    def token(self, token_id: int) -> tuple[str, bytes]:
        """One token as text and as bytes."""
        ...

    async def chat_tokens(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        template: str | None = None,
        variables: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> PromptTokens:
        """A conversation as ids, through a chat template."""
        ...


class Visitor(Protocol):
    """Who asks, as the door found out."""

    @property
    def tenant(self) -> str: ...
    def charge(self, num_tokens: int) -> None:
        """Tokens were used, of prompt or answer."""
        ...

    def refused(self, reason: str) -> None:
        """The engine does not let the request in; reason: a word for metrics."""
        ...


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """What the routes go by. served_names: the model's names, the first is told. strict: refuse unknown fields.
    chat_template: in place of the model's own. slow_client_s: how long a client may leave an answer unread."""

    served_names: tuple[str, ...]
    version: str
    created_s: int
    strict: bool = False
    chat_template: str | None = None
    slow_client_s: float = 30.0
