"""Failures of ours: answered, and logged once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

import httpx
import pytest
from fastapi import FastAPI
from starlette.responses import StreamingResponse

from pagemill.base.errors import (
    CapacityError,
    DeadlineError,
    IntegrityError,
    LengthError,
    PagemillError,
    RequestError,
)
from pagemill.server.errors import IN_LOG, FieldError, about, body_of, error_response, install_errors


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


@pytest.mark.parametrize(
    ("error", "param", "code"),
    [
        (RequestError("temperature is too warm; open a window"), None, None),
        (RequestError("n: 5 prompts"), None, None),
        (RequestError("the prompt has 5 tokens of another kind"), None, None),
        (FieldError("too warm", param="temperature"), "temperature", None),
        (RequestError("too warm", param="temperature"), "temperature", None),
        (CapacityError("too much", param="max_tokens"), "max_tokens", None),
        (LengthError("too much", param="prompt"), "prompt", "context_length_exceeded"),
        (FieldError("gone", param="model", status=404, code="model_not_found"), "model", "model_not_found"),
    ],
    ids=str,
)
def test_the_field_is_the_one_that_the_error_carries_and_never_a_word_of_its_message(
    error: Exception, param: str | None, code: str | None
) -> None:
    told = body_of(error)["error"]
    assert (told["param"], told["code"]) == (param, code)


def test_a_field_takes_the_place_of_a_parameter_and_not_of_a_field() -> None:
    for raised, param, code in (
        (RequestError("wrong", param="retain"), "cache", None),
        (LengthError("long", param="prompt"), "cache", "context_length_exceeded"),
        (FieldError("wrong", param="messages"), "messages", None),
    ):
        with pytest.raises(RequestError) as caught, about("cache"):
            raise raised
        told = body_of(caught.value)["error"]
        assert (told["param"], told["code"]) == (param, code)
