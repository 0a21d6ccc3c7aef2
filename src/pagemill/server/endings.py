"""What is done when an answer has ended, however it did: tokens are charged, texts are dropped that were to be. Owns
the order; the accounts are the door's and the cache is the engine's."""

from __future__ import annotations

import asyncio
import logging
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from pagemill.base.params import CacheOptions
from pagemill.engine.engine import Engine
from pagemill.engine.purging import purge
from pagemill.server.ports import Ask, Visitor
from pagemill.server.schema import GenerationBody
from pagemill.server.service import Service
from pagemill.server.usage import Tally

_LOG: Final = logging.getLogger(__name__)
_purges: set[asyncio.Task[int]] = set()  # kept until they are done, as asyncio asks


@dataclass(frozen=True, slots=True)
class Ending:
    """An answer, and what is to be done in its end. asks: by the id of the engine's request."""

    service: Service
    visitor: Visitor
    tally: Tally
    body: GenerationBody
    asks: Mapping[str, Ask]


@dataclass(frozen=True, slots=True)
class _Text:
    """A prompt with its answer. whole: False where the answer was left or failed: the engine may have gone further."""

    tokens: array[int]
    options: CacheOptions
    whole: bool


def keeps_text(body: GenerationBody) -> bool:
    """True where the answer's text is needed in the end."""
    return body.cache is not None and body.cache.purge_on_end


def end_of(ending: Ending) -> None:
    """The answer has ended or was left."""
    tally = ending.tally
    ending.visitor.charge(tally.num_prompt_tokens + tally.num_generated)
    if hasattr(ending.visitor, "num_cached_tokens"):
        ending.visitor.num_cached_tokens = tally.num_cached_tokens
    if keeps_text(ending.body):
        texts = []
        for request_id, (ids, params, options) in ending.asks.items():
            for choice in ((request_id, index) for index in range(params.n)):
                tokens = array("i", [*ids, *tally.answers.get(choice, ())])
                texts.append(_Text(tokens, options, choice in tally.ended))
        task = asyncio.ensure_future(ending.service.serving.call(lambda engine: _purge(engine, texts)))
        _purges.add(task)
        task.add_done_callback(_purged)


def _purge(engine: Engine, texts: Sequence[_Text]) -> int:
    """On the engine's thread: drop prompts with their answers, but not what other texts share with them. Behind an
    answer that is not known to its end, everything goes: other texts that go on from there are computed again."""
    shared = engine.cache.shared
    if shared is None:
        return 0

    def drop() -> int:
        count = sum(shared.purge_prefix(each.options, each.tokens) for each in texts if not each.whole)
        return count + sum(shared.purge_text(each.options, each.tokens) for each in texts)

    return purge(engine, shared, drop)


def _purged(task: asyncio.Task[int]) -> None:
    _purges.discard(task)
    if not task.cancelled() and task.exception() is not None:
        _LOG.error("a text could not be dropped from the cache: %s", type(task.exception()).__name__)
