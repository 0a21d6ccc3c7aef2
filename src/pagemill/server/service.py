"""What every route shares: the model, its names, whether it can answer now, and who asks. Owns these checks."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import Request

from pagemill.base.errors import QueueFullError
from pagemill.server.errors import FieldError, UnavailableError
from pagemill.server.ports import Ask, ServerSettings, Serving, Stream, Visitor

LOADING_RETRY_S = 1.0
DRAINING_RETRY_S = 5.0
QUEUE = "queue"  # why a request is refused that finds too many waiting, as metrics have it


class Anyone:
    """Who asks where there is no door, as in tests: the default tenant, uncounted."""

    tenant = "default"

    def charge(self, num_tokens: int) -> None:
        """Nothing is charged."""

    def refused(self, reason: str) -> None:
        """Nothing is counted."""


class Service:
    """The model and the routes' settings. Mutated by `drain`."""

    def __init__(self, serving: Serving, settings: ServerSettings) -> None:
        self.serving = serving
        self.settings = settings
        self.draining = False
        self.opened: Callable[[Sequence[str], Sequence[Ask], Visitor], None] | None = None

    @property
    def status(self) -> str:
        """loading, ready, draining or failed."""
        return "draining" if self.draining and self.serving.status == "ready" else self.serving.status

    def drain(self) -> None:
        """Take no new requests; what runs runs on."""
        self.draining = True

    async def open(self, asks: Sequence[Ask], visitor: Visitor) -> Stream:
        """Let a visitor's requests in, and tell `opened` under which names. Raises as `Serving.open` does."""
        try:
            stream = await self.serving.open(asks)
        except QueueFullError:
            visitor.refused(QUEUE)
            raise
        try:
            if self.opened is not None:
                self.opened(stream.request_ids, asks, visitor)
        except BaseException:
            stream.close()
            raise
        return stream

    def check_model(self, name: str | None) -> None:
        """Raise FieldError (404) for a model that is not served here."""
        if name is not None and name not in self.settings.served_names:
            known = ", ".join(self.settings.served_names)
            raise FieldError(
                f"the model {name[:200]!r} does not exist here; this server has {known}",
                param="model",
                status=404,
                code="model_not_found",
            )

    def check_ready(self) -> None:
        """Raise UnavailableError (503) unless requests can be answered now."""
        status = self.status
        if status == "loading":
            raise UnavailableError("the model is still being loaded; try again soon", LOADING_RETRY_S)
        if status == "draining":
            raise UnavailableError("the server is shutting down; ask another one", DRAINING_RETRY_S)
        if status != "ready":
            raise UnavailableError("the engine has failed; the server's log says why", DRAINING_RETRY_S)

    def new_id(self, prefix: str) -> str:
        """An id of an answer, such as cmpl-…; it says nothing of how many there were."""
        return f"{prefix}-{secrets.token_hex(12)}"

    def head(self, kind: str, prefix: str) -> dict[str, Any]:
        """The fields that begin an answer or each of its chunks."""
        return {
            "id": self.new_id(prefix),
            "object": kind,
            "created": int(time.time()),
            "model": self.settings.served_names[0],
        }


def service_of(request: Request) -> Service:
    """The application's service."""
    service: Service = request.app.state.service
    return service


def visitor_of(request: Request) -> Visitor:
    """Who asks, as the door left it in the scope's state."""
    visitor: Visitor | None = (request.scope.get("state") or {}).get("visit")
    return visitor or Anyone()


def priority_of(visitor: Visitor, asked: int | None) -> int:
    """The priority that a request gets, which an identity may bound."""
    identity = getattr(visitor, "identity", None)
    clamp = getattr(identity, "clamp_priority", None)
    return int(clamp(asked)) if clamp is not None else asked or 0
