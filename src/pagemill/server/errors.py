"""Errors as OpenAI's clients read them. Owns which error has which status, and what is said of a body that does not fit
the schema; other messages come with errors, and the shape is in `error_shape.py`.

400 a wrong value, a field of a wrong type or no JSON · 404 no such route or model · 413 too large · 429 too many
requests of one's own · 503 loading, draining, full or out of memory, with Retry-After · 500 ours. OpenAI answers a body
that does not fit its schema with 400, which its clients raise as BadRequestError; FastAPI's own 422 is never sent.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pagemill.base.errors import CapacityError, LengthError, ModelError, PagemillError, RequestError
from pagemill.server.error_shape import error_body
from pagemill.server.schema import CacheRequest, PromptCacheOptions, ResponseFormat, RetainRange, StructuredOutputs

_LOG: Final = logging.getLogger(__name__)
MEMORY_RETRY_S: Final = 1.0
IN_LOG: Final = "internal error; the server's log has it"  # said where the failure was logged, as by the engine
TOO_LONG: Final = "context_length_exceeded"  # OpenAI's code of a prompt that is too long
_UNIONS: Final = {
    "prompt": "a text, token ids, or a list of either",
    "stop": "a text or a list of texts",
    "content": "a text or a list of parts",
    "tool_choice": 'none, auto, required or {"type": "function", "function": {"name": …}}',
    "ttl": "seconds, or a time such as 30m",
    "schema": "a JSON schema",
    "json": "a JSON schema",
    "guided_json": "a JSON schema",
}
_CLOSED: Final[Mapping[str, type[BaseModel]]] = {
    "cache": CacheRequest,
    "retain": RetainRange,
    "prompt_cache_options": PromptCacheOptions,
    "response_format": ResponseFormat,
    "structured_outputs": StructuredOutputs,
}
# What is said of a value that does not fit, by pydantic's name of the error.
_SAID: Final[Mapping[str, str]] = {
    "missing": "it is missing; give it",
    "string_type": "give a text",
    "string_unicode": "give a text of whole characters; it holds half of a surrogate pair",
    "string_too_short": "it is empty; give a text, or leave it out",
    "string_too_long": "give a text of at most {max_length:,} characters",
    "int_type": "give a whole number",
    "int_parsing": "give a whole number",
    "int_parsing_size": "give a whole number that is smaller",
    "int_from_float": "give a whole number",
    "float_type": "give a number",
    "float_parsing": "give a number",
    "bool_type": "give true or false",
    "bool_parsing": "give true or false",
    "list_type": "give a list",
    "dict_type": "give an object",
    "model_type": "give an object",
    "model_attributes_type": "give an object",
    "literal_error": "give one of {expected}",
    "too_short": "it is empty; give at least {min_length:,}",
    "too_long": "give a list of at most {max_length:,}",
}
_UNFIT: Final = "the value does not fit this field; /openapi.json says what does"
_ALTERNATIVE: Final = re.compile(
    r"(?:str|int|float|bool|(?:list|dict|literal|function-before)\[.*\]|[A-Z]\w*)", re.ASCII
)


class UnavailableError(PagemillError):
    """The server cannot answer yet, or no more. Answered with 503 and Retry-After."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.status = 503


class FieldError(RequestError):
    """A field has a wrong value; `param` names it as the request does. `code`: a word for programs."""

    def __init__(self, message: str, *, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message, status=status, param=param)
        self.code = code


def named(error: PagemillError, param: str | None) -> PagemillError:
    """The error as one of this field, where it is a refusal (400) of a request and names no field of one itself: what
    it calls a parameter in Python is not what the request does."""
    is_refusal = isinstance(error, RequestError | CapacityError) and status_of(error) == 400
    if param is None or not is_refusal or (isinstance(error, FieldError) and error.param is not None):
        return error
    return FieldError(str(error), param=param, code=code_of(error))


@contextmanager
def about(param: str | None) -> Iterator[None]:
    """What is refused within is this field's fault, unless the error names another (`named`)."""
    try:
        yield
    except RequestError as error:
        raise named(error, param) from None


def status_of(error: BaseException) -> int:
    """The HTTP status that an error is answered with."""
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return status
    if isinstance(error, CapacityError):
        return 400 if error.retry_after_s is None else 503
    if isinstance(error, MemoryError):
        return 503
    return 400 if isinstance(error, ModelError) else 500


def code_of(error: BaseException) -> str | None:
    """What programs know an error by; a prompt that is too long has OpenAI's word."""
    if isinstance(error, LengthError):
        return TOO_LONG
    code: str | None = getattr(error, "code", None)
    return code


def body_of(error: BaseException) -> dict[str, Any]:
    """The error in OpenAI's shape. What is not ours to tell is not told."""
    told = isinstance(error, PagemillError)
    message = str(error) if told else IN_LOG
    if isinstance(error, MemoryError):
        message = "the server is out of memory; try again soon"
    return error_body(message, status_of(error), code_of(error), getattr(error, "param", None))


def error_response(error: BaseException) -> Response:
    """The same as a response, with Retry-After where waiting helps."""
    headers = {}
    retry_after_s = getattr(error, "retry_after_s", None)
    if retry_after_s is None and isinstance(error, MemoryError):
        retry_after_s = MEMORY_RETRY_S
    if retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(retry_after_s)))
    status = status_of(error)
    has_words = isinstance(error, PagemillError)
    if (status >= 500 and not has_words) or (status == 500 and str(error) != IN_LOG):
        _LOG.error("a request failed: %s", type(error).__name__, exc_info=error)
    body = json.dumps(body_of(error)).encode()  # which escapes what is no Unicode text
    return Response(body, status, headers, "application/json")


def install_errors(app: FastAPI) -> None:
    """Answer every error of the routes in this shape."""
    app.add_exception_handler(PagemillError, _answer)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_middleware(_OwnFailures)


class _OwnFailures:
    """ASGI: answers what no handler took, and lets it end there. Starlette's handler of every exception raises it again
    behind its answer, so that it is logged twice. Where an answer has begun, uvicorn logs it and cuts the connection.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_begun = False

        async def noticed(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, receive, noticed)
        except Exception as error:
            if has_begun:
                raise
            await error_response(error)(scope, receive, send)


async def _answer(request: Request, error: Exception) -> Response:
    return error_response(error)


async def _answer_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first.get("type") == "json_invalid":
        return error_response(json_fault(error.body, int(first["loc"][1]), str(first["ctx"]["error"])))
    if len(first.get("loc", ())) < 2:
        return error_response(_of_no_object(request, is_empty=first.get("type") == "missing"))
    return error_response(_of_validation(error.errors()))


async def _answer_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = str(error.detail)
    if error.status_code == 404:
        message = f"there is no {request.method} {request.url.path[:200]}; see /openapi.json"
    elif error.status_code == 405:
        message = f"{request.url.path[:200]} does not take {request.method[:20]}"
    elif error.status_code == 400:  # of a body in no encoding that there is
        message = "the body cannot be read as JSON; send a JSON object in UTF-8"
    response = error_response(FieldError(message, status=error.status_code))
    response.headers.update(error.headers or {})
    return response


def json_fault(text: str, at: int, why: str) -> FieldError:
    """Where a text ceases to be JSON, and why, in the words of Python's reader; nothing of it is repeated."""
    line, column = text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at)
    told = why[:1].lower() + why[1:]
    return FieldError(f"the body is no JSON: line {line:,}, column {column:,}: {told}; mend it there")


def _of_no_object(request: Request, *, is_empty: bool) -> FieldError:
    if is_empty:
        return FieldError("the body is empty, which is no JSON object; send one")
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind.startswith("application/") and kind.endswith(("/json", "+json")):
        return FieldError("the body is JSON and no JSON object; send one")
    told = f"says content-type: {kind[:60]!r}" if kind else "names no content-type"
    return FieldError(f"the request {told}; send a JSON object with content-type: application/json")


def _of_validation(errors: Sequence[Any]) -> FieldError:
    """The first of pydantic's errors in a sentence. Values are not repeated: they may be a prompt."""
    first = errors[0]
    places = [_place_of(each.get("loc", ())) for each in errors]
    place = places[0]
    others = len(set(map(tuple, places))) - 1
    more = f" (and {others} more)" if others else ""
    said = _SAID.get(first.get("type", ""), _UNFIT).format(**first.get("ctx", {}))
    if first.get("type") == "extra_forbidden":
        said = f"unknown field; {_known_beside(place)}"
    if len(place) < len(first["loc"]) - 1:  # one of several types, each with an error of its own
        said = f"give {_UNIONS[place[-1]]}" if place[-1] in _UNIONS else _UNFIT
    return FieldError(f"{'.'.join(place)[:200]}: {said}{more}", param=place[0][:200])


def _known_beside(place: Sequence[str]) -> str:
    """Which fields there are where an unknown one was found."""
    holder = next((each for each in reversed(place[:-1]) if each in _CLOSED), None)
    if holder is None:
        return "leave it out"
    names = [field.alias or name for name, field in _CLOSED[holder].model_fields.items()]
    return f"there is {', '.join(names)}"


def _place_of(location: Sequence[Any]) -> list[str]:
    """The names that lead to a field, without those that pydantic gives to the alternatives of its type."""
    names = [str(each) for each in location[1:]]
    for index, name in enumerate(names):
        if index and _ALTERNATIVE.fullmatch(name):
            return names[:index]
    return names
