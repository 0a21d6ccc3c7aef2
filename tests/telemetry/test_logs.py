"""Log lines: one a record, without what clients wrote."""

from __future__ import annotations

import asyncio
import gc
import io
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from pagemill.base.errors import ConfigError
from pagemill.telemetry.logs import FIELDS, JsonFormatter, TextFormatter, configure_logging, describe_error

CANARY = "canary-7f3a-prompt"


@pytest.fixture(autouse=True)
def untouched_logging() -> Iterator[None]:
    """The process's loggers and hooks are put back."""
    root = logging.getLogger()
    names = ("uvicorn", "uvicorn.error", "uvicorn.access", "fastapi", "opentelemetry", "asyncio", "httpx", "httpcore")
    before = {name: (logging.getLogger(name).level, logging.getLogger(name).disabled) for name in names}
    state = root.handlers[:], root.level, sys.excepthook, threading.excepthook
    yield
    root.handlers[:], root.level, sys.excepthook, threading.excepthook = state
    for name, (level, disabled) in before.items():
        logging.getLogger(name).setLevel(level)
        logging.getLogger(name).disabled = disabled


def lines(level: str = "info") -> tuple[logging.Logger, io.StringIO]:
    stream = io.StringIO()
    configure_logging(level, "json", stream)
    return logging.getLogger("pagemill.test"), stream


def told(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def fail(message: str) -> None:
    raise ValueError(message)


def test_a_line_is_one_json_object_with_its_fields() -> None:
    log, stream = lines()
    log.info("request %d", 7, extra={FIELDS: {"status": 200, "path": "/v1/models"}})
    [line] = told(stream)
    assert (line["message"], line["level"], line["logger"]) == ("request 7", "info", "pagemill.test")
    assert (line["status"], line["path"]) == (200, "/v1/models")
    assert line["time"].endswith("Z")


def test_what_asyncio_says_of_a_task_does_not_quote_its_error() -> None:
    _, stream = lines()

    async def lose() -> None:
        task = asyncio.ensure_future(asyncio.to_thread(fail, CANARY))
        await asyncio.wait({task})
        del task
        gc.collect()

    asyncio.run(lose())
    [line] = told(stream)
    assert line["message"] == "Task exception was never retrieved"
    assert line["error"]["type"] == "ValueError"
    assert CANARY not in stream.getvalue()


def test_what_asyncio_says_of_a_callback_does_not_quote_its_arguments() -> None:
    _, stream = lines()

    async def lose() -> None:
        asyncio.get_running_loop().call_soon(fail, CANARY)
        await asyncio.sleep(0)

    asyncio.run(lose())
    [line] = told(stream)
    assert line["message"].startswith("Exception in callback")
    assert line["error"]["type"] == "ValueError"
    assert CANARY[:10] not in stream.getvalue()


def test_no_value_begins_a_line_of_its_own_or_replaces_a_field() -> None:
    log, stream = lines()
    log.info("a\nb\u2028c\x1b[31m", extra={FIELDS: {"level": "forged", "path": '/"\n{"level":"x"}'}})
    [line] = told(stream)
    assert line["level"] == "info"
    assert len(stream.getvalue().splitlines()) == 1
    text = io.StringIO()
    configure_logging("info", "text", text)
    log.info("a\nb\x1b[31m", extra={FIELDS: {"path": "x\r\ny"}})
    assert len(text.getvalue().splitlines()) == 1
    assert "\x1b" not in text.getvalue()


def test_an_error_tells_its_type_and_places_but_not_its_words() -> None:
    log, stream = lines()
    try:
        fail(CANARY)
    except ValueError as error:
        try:
            raise RuntimeError(CANARY) from error
        except RuntimeError:
            log.exception("a step failed")
    [line] = told(stream)
    assert CANARY not in stream.getvalue()
    assert line["error"]["type"] == "RuntimeError"
    assert line["error"]["cause"] == "ValueError"
    assert "test_logs.py" in line["error"]["at"][-1]


def test_at_debug_the_words_are_there() -> None:
    log, stream = lines("debug")
    try:
        fail(CANARY)
    except ValueError:
        log.exception("a step failed")
    assert told(stream)[0]["error"]["message"] == CANARY


def test_a_library_s_arguments_are_left_out() -> None:
    _, stream = lines()
    logging.getLogger("somelibrary").warning("cannot read %s", CANARY)
    [line] = told(stream)
    assert line["message"] == "cannot read %s"


def test_a_message_that_does_not_fit_its_arguments_is_told_all_the_same() -> None:
    log, stream = lines()
    log.info("%d", "no number")
    assert told(stream)[0]["message"] == "%d"


def test_text_shows_fields_and_an_error_s_places() -> None:
    record = logging.LogRecord("pagemill", logging.ERROR, "f", 1, "failed", None, None)
    setattr(record, FIELDS, {"status": 500, "key": None})
    try:
        fail(CANARY)
    except ValueError:
        record.exc_info = sys.exc_info()
    text = TextFormatter().format(record)
    assert "failed status=500\n  ValueError\n" in text
    assert CANARY not in text
    assert CANARY in TextFormatter(messages=True).format(record)


def test_long_messages_and_deep_tracebacks_are_cut() -> None:
    def deeper(count: int) -> None:
        if count:
            deeper(count - 1)
        fail(CANARY)

    with pytest.raises(ValueError, match=CANARY) as caught:
        deeper(300)
    assert len(describe_error(caught.value)["at"]) <= 40
    record = logging.LogRecord("pagemill", logging.INFO, "f", 1, "x" * 100_000, None, None)
    assert len(JsonFormatter().format(record)) < 10_000


@pytest.mark.parametrize(("level", "format"), [("loud", "json"), ("info", "xml")])
def test_an_unknown_level_or_format_is_refused(level: str, format: str) -> None:
    with pytest.raises(ConfigError, match="choose"):
        configure_logging(level, format)  # type: ignore[arg-type]


@pytest.mark.parametrize("where", ["main", "thread"])
def test_the_text_of_a_crash_holds_no_words_of_the_error(where: str) -> None:
    program = f"""
import sys, threading
sys.path.insert(0, "src")
from pagemill.telemetry.logs import configure_logging
configure_logging("info", "json")
def crash(prompt):
    raise ValueError(f"cannot answer {{prompt}}")
if {where!r} == "thread":
    thread = threading.Thread(target=crash, args=("{CANARY}",), name="pagemill-engine")
    thread.start(); thread.join()
else:
    crash("{CANARY}")
"""
    ended = subprocess.run([sys.executable, "-"], input=program, capture_output=True, text=True, timeout=60)
    assert CANARY not in ended.stderr + ended.stdout
    line = json.loads(ended.stderr.splitlines()[0])
    assert (line["level"], line["error"]["type"]) == ("critical", "ValueError")
    assert ended.returncode == (1 if where == "main" else 0)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("/v1/models", "path=/v1/models"),
        ("/x status=200 key=root", 'path="/x status=200 key=root"'),
        ('/x"', 'path="/x\\""'),
        ("", 'path=""'),
        ("/x\nrequest", "path=/x\\nrequest"),
        (404, "path=404"),
    ],
)
def test_a_value_in_a_text_line_is_one_value(value: object, shown: str) -> None:
    record = logging.makeLogRecord({"name": "pagemill", "msg": "request", FIELDS: {"path": value, "status": 404}})
    assert TextFormatter().format(record).endswith(f"request {shown} status=404")
