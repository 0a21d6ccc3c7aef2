"""What the generating routes share: from a request that was understood to its answer, streamed or whole. Owns the order
and the frame of an answer; what a choice looks like is `completions.py`'s and `chat.py`'s.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from fastapi import Request, Response

from pagemill.base.errors import PagemillError
from pagemill.engine.output import Delta
from pagemill.server.asking import fault_of
from pagemill.server.endings import Ending, end_of, keeps_text
from pagemill.server.events import EventStream, answer_whole
from pagemill.server.json_bytes import ChunkFrame, json_response
from pagemill.server.ports import Ask, Stream, Visitor
from pagemill.server.schema import GenerationBody
from pagemill.server.service import Service
from pagemill.server.usage import StreamUsage, Tally


class AnswerWriter(ABC):
    """Writes one answer. Mutated by `write` and `add`.

    head: the fields that it begins with, or each of its chunks. counts: tokens of the prompt by request. writes: False
    where the requests leave nothing in the cache.
    """

    def __init__(
        self, service: Service, body: GenerationBody, head: dict[str, Any], counts: dict[str, int], *, writes: bool
    ) -> None:
        self._token = service.serving.token
        self._asked = body
        self._head = head
        self._frame = ChunkFrame(head)
        self.tally = Tally(counts, writes=writes, keeps=keeps_text(body))
        self._usage = StreamUsage(body.stream_options, self.tally)

    def fault(self, error: Exception) -> Exception:
        """An error that ends the answer, as its client is told it."""
        return fault_of(error, self._asked)

    @abstractmethod
    def begin(self) -> bytes:
        """What comes before the first delta."""

    @abstractmethod
    def write(self, deltas: list[Delta]) -> bytes:
        """The chunks of some deltas."""

    @abstractmethod
    def _take(self, delta: Delta) -> object:
        """Count a delta and add it to its choice."""

    @abstractmethod
    def choices(self) -> list[dict[str, Any]]:
        """All choices, as far as they have come."""

    def beside(self) -> Mapping[str, Any]:
        """Further fields of a whole answer."""
        return {}

    def add(self, deltas: list[Delta]) -> None:
        """Keep deltas for `whole`."""
        for delta in deltas:
            self._take(delta)

    def end(self) -> bytes:
        """The usage, where it was asked for."""
        usage = self._usage.at_end()
        return b"" if usage is None else self._frame.chunk([], usage)

    def whole(self) -> Response:
        """The whole answer."""
        answer = {**self._head, "choices": self.choices(), "usage": self.tally.usage(), **self.beside()}
        header = self.tally.header()
        return json_response(answer, {"x-cache": header} if header else None)


async def respond(
    service: Service,
    visitor: Visitor,
    request: Request,
    body: GenerationBody,
    asks: Sequence[Ask],
    make_writer: Callable[[Stream], AnswerWriter],
) -> Response:
    """Let the requests in and answer, as a stream where `body` says so. Raises as `Serving.open` does."""
    try:
        stream = await service.open(asks, visitor)
    except PagemillError as error:
        raise fault_of(error, body) from None
    try:
        writer = make_writer(stream)
    except BaseException:
        stream.close()
        raise
    ending = Ending(service, visitor, writer.tally, body, dict(zip(stream.request_ids, asks, strict=True)))
    finished = partial(end_of, ending)
    if body.stream:
        return EventStream(stream, writer, slow_client_s=service.settings.slow_client_s, finished=finished)
    return await answer_whole(stream, writer, request, finished=finished)
