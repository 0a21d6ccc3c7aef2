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
        answers = {**{(request_id, 0): [] for request_id in ending.asks}, **tally.answers}
        texts = []
        for (request_id, _), answer in answers.items():
            ids, _, options = ending.asks[request_id]
            texts.append((array("i", [*ids, *answer]), options))
        task = asyncio.ensure_future(ending.service.serving.call(lambda engine: _purge(engine, texts)))
        _purges.add(task)
        task.add_done_callback(_purged)


def _purge(engine: Engine, texts: Sequence[tuple[array[int], CacheOptions]]) -> int:
    """On the engine's thread: drop prompts with their answers, but not what other texts share with them."""
    shared = engine.cache.shared
    if shared is None:
        return 0
    engine.advance_clock()
    count = sum(shared.purge_text(options, tokens) for tokens, options in texts)
    engine.settle()
    return count


def _purged(task: asyncio.Task[int]) -> None:
    _purges.discard(task)
    if not task.cancelled() and task.exception() is not None:
        _LOG.error("a text could not be dropped from the cache: %s", type(task.exception()).__name__)
