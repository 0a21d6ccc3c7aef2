"""Logs as JSON lines or plain text, without anything that a client wrote. Owns the format and what is left out of it.

A traceback names places and the error's type. Its message is left out, for messages quote values, and values can be a
prompt; at level DEBUG it is there. The same goes for exceptions that nothing catches and for those of threads.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import threading
import time
import traceback
from types import TracebackType
from typing import Any, Final, Literal, TextIO

from pagemill.base.errors import ConfigError

LogFormat = Literal["text", "json"]
LEVELS: Final = ("debug", "info", "warning", "error")
FIELDS: Final = "fields"  # key of `extra` that holds a dict for the line: log.info("…", extra={FIELDS: {…}})
MAX_MESSAGE_CHARS: Final = 4096
_MAX_FRAMES: Final = 40
_BARE: Final = re.compile(r'[^\s"=]+')


def configure_logging(level: str = "info", format: LogFormat = "text", stream: TextIO | None = None) -> None:
    """Send every logger of the process to `stream` (stderr) in one format; libraries' own handlers are taken away.

    Raises ConfigError for a level or a format that there is not.
    """
    if level not in LEVELS:
        raise ConfigError(f"the log level is {level!r}; choose one of {', '.join(LEVELS)}")
    if format not in ("text", "json"):
        raise ConfigError(f"the log format is {format!r}; choose text or json")
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    messages = level == "debug"
    handler.setFormatter(JsonFormatter(messages) if format == "json" else TextFormatter(messages))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "fastapi"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    logging.getLogger("uvicorn.access").disabled = True  # the door writes a line of its own, without queries
    for name in ("opentelemetry", "asyncio", "httpx", "httpcore"):
        logging.getLogger(name).setLevel("WARNING")
    sys.excepthook = _log_uncaught
    threading.excepthook = _log_uncaught_in_thread


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC, ISO 8601), level, logger, message, the fields given, and an error's type and
    places. messages: errors with their own words too."""

    def __init__(self, messages: bool = False) -> None:
        super().__init__()
        self._messages = messages

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": _time_of(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _message_of(record),
        }
        fields = getattr(record, FIELDS, None)
        if isinstance(fields, dict):
            line.update({name: value for name, value in fields.items() if name not in line})
        if record.exc_info and record.exc_info[1] is not None:
            line["error"] = describe_error(record.exc_info[1], self._messages)
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """One line for people: time, level, message, fields as name=value; an error's places below it."""

    def __init__(self, messages: bool = False) -> None:
        super().__init__()
        self._messages = messages

    def format(self, record: logging.LogRecord) -> str:
        line = f"{_time_of(record)} {record.levelname.lower():7} {_one_line(_message_of(record))}"
        fields = getattr(record, FIELDS, None)
        if isinstance(fields, dict):
            line += "".join(f" {name}={_as_value(str(value))}" for name, value in fields.items() if value is not None)
        if record.exc_info and record.exc_info[1] is not None:
            error = describe_error(record.exc_info[1], self._messages)
            line += "\n" + "\n".join([f"  {error['type']}: {error.get('message', '')}".rstrip(": "), *error["at"]])
        return line


def describe_error(error: BaseException, messages: bool = False) -> dict[str, Any]:
    """An error's type and places, the innermost last: {"type", "at": ["file:line function", …], "cause"}.

    messages: its words as well, which may quote what a client sent.
    """
    told: dict[str, Any] = {"type": type(error).__qualname__}
    if messages:
        told["message"] = str(error)[:MAX_MESSAGE_CHARS]
    frames = traceback.extract_tb(error.__traceback__)[-_MAX_FRAMES:]
    told["at"] = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if cause is not None:
        told["cause"] = type(cause).__qualname__
    return told


def _message_of(record: logging.LogRecord) -> str:
    """The message of our own loggers; of a library's, its template unless the level is DEBUG, without arguments, which
    may be a client's text; of asyncio's, the first line without arguments of a callback, for what follows quotes
    errors."""
    name = record.name.split(".")[0]
    if name == "asyncio":
        return str(record.msg).partition("\n")[0].partition("(")[0][:MAX_MESSAGE_CHARS]
    if name in ("pagemill", "uvicorn") or not record.args:
        try:
            return record.getMessage()[:MAX_MESSAGE_CHARS]
        except (TypeError, ValueError):  # a message and arguments that do not fit
            return str(record.msg)[:MAX_MESSAGE_CHARS]
    return str(record.msg)[:MAX_MESSAGE_CHARS]


def _time_of(record: logging.LogRecord) -> str:
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{seconds}.{int(record.msecs):03d}Z"


def _one_line(text: str) -> str:
    """Control characters are shown as such, so that no value can begin a line of its own or colour a terminal."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def _as_value(text: str) -> str:
    """In quotes where it could be taken for several fields, or for none."""
    shown = _one_line(text)
    return shown if _BARE.fullmatch(shown) else json.dumps(shown, ensure_ascii=False)


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        return
    logging.getLogger("pagemill").critical(
        "the process ends on an error that nothing caught", exc_info=(kind, error, trace)
    )


def _log_uncaught_in_thread(arguments: threading.ExceptHookArgs) -> None:
    if arguments.exc_value is None or issubclass(arguments.exc_type, SystemExit):
        return
    name = "unknown" if arguments.thread is None else arguments.thread.name
    logging.getLogger("pagemill").critical(
        f"the thread {name} ended on an error that nothing caught",
        exc_info=(arguments.exc_type, arguments.exc_value, arguments.exc_traceback),
    )
