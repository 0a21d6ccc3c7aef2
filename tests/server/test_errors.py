"""Failures of ours: answered, and logged once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

import httpx
import pytest
from fastapi import FastAPI
from starlette.responses import StreamingResponse

from pagemill.base.errors import CapacityError, DeadlineError, IntegrityError, PagemillError, RequestError
from pagemill.server.errors import IN_LOG, error_response, install_errors


def ask(app: FastAPI, path: str) -> httpx.Response:
    """As uvicorn would: what the application raises is raised here, where uvicorn logs it."""

    async def once() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://a") as client:
            return await client.get(path)

    return asyncio.run(once())


@pytest.fixture
def app() -> FastAPI:
    app = FastAPI()

    @app.get("/early")
    async def early() -> None:
        raise ValueError("what a client sent")

    @app.get("/late")
    async def late() -> StreamingResponse:
        async def events() -> AsyncIterator[bytes]:
            yield b"begun"
            raise ValueError("what a client sent")

        return StreamingResponse(events())

    install_errors(app)
    return app


def test_a_failure_of_ours_is_answered_and_logged_once(app: FastAPI, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        answer = ask(app, "/early")
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "internal error; the server's log has it"
    [record] = caplog.records
    assert record.getMessage() == "a request failed: ValueError"
    assert record.exc_info is not None


@pytest.mark.parametrize(
    ("error", "status", "num_logged"),
    [
        (RequestError("logits are NaN", status=500), 500, 1),
        (IntegrityError("a block"), 500, 1),
        (PagemillError("ended"), 500, 1),
        (RequestError(IN_LOG, status=500), 500, 0),
        (RequestError("wrong"), 400, 0),
        (DeadlineError("late"), 504, 0),
        (CapacityError("full", retry_after_s=1.0), 503, 0),
        (MemoryError(), 503, 1),
    ],
    ids=str,
)
def test_what_is_answered_with_500_is_in_the_log_once(
    caplog: pytest.LogCaptureFixture, error: Exception, status: int, num_logged: int
) -> None:
    with caplog.at_level(logging.ERROR):
        assert error_response(error).status_code == status
    assert len(caplog.records) == num_logged


def test_a_failure_behind_the_beginning_of_an_answer_is_left_to_the_server(
    app: FastAPI, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR), pytest.raises(ValueError, match="what a client sent"):
        ask(app, "/late")
    assert not caplog.records, "uvicorn logs it"
