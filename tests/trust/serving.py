"""What the trust tests of serving share: requests as bytes, answers read from a socket, and the forms that a request
has. Owns no server: those are in `tests/fixtures/live_server.py` and `serve_process.py`."""

from __future__ import annotations

import asyncio
import json
import socket
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from pagemill.base.clock import MonotonicClock
from pagemill.server.access import KeyRing
from pagemill.server.access_door import Door
from pagemill.server.access_listen import HostCheck
from pagemill.server.limits import Limits
from pagemill.server.limits_body import BodyLimits
from pagemill.server.limits_connection import guarded_protocol
from pagemill.telemetry.metrics import Metrics
from tests.fixtures.live_server import LiveServer
from tests.fixtures.tiny import tiny_llama

ANSWER_S: Final = 120.0  # after which an answer counts as none

_FUNCTION: Final = {
    "type": "function",
    "function": {
        "name": "find",
        "description": "finds things",
        "parameters": {"type": "object", "properties": {"what": {"type": "string"}}, "required": ["what"]},
    },
}
_SCHEMA: Final = {"type": "array", "items": {"type": "integer"}, "minItems": 400}
_CHAT: Final = {"messages": [{"role": "user", "content": "Tell me of the mill. " * 4}]}
_TEXT: Final = {"prompt": "The wheel goes round and round. " * 4}

# Name -> path and body of requests that go on for long, each with another part of the server on its way.
FORMS: Final[Mapping[str, tuple[str, dict[str, Any]]]] = {
    "text": ("/v1/completions", {**_TEXT, "ignore_eos": True}),
    "several": ("/v1/completions", {**_TEXT, "n": 3, "ignore_eos": True, "logprobs": 3}),
    "batch": ("/v1/completions", {"prompt": ["one " * 30, "two " * 30], "ignore_eos": True}),
    "ids": ("/v1/completions", {"prompt": [[7] * 130, [8] * 120], "ignore_eos": True, "n": 2}),
    "echoed": ("/v1/completions", {**_TEXT, "echo": True, "logprobs": 1, "ignore_eos": True}),
    "purged": (
        "/v1/completions",
        {**_TEXT, "ignore_eos": True, "cache": {"purge_on_end": True}, "cache_salt": "s", "presence_penalty": 1},
    ),
    "regex": ("/v1/completions", {**_TEXT, "response_format": {"type": "regex", "regex": "[a-z ]{2000,}"}}),
    "chat": ("/v1/chat/completions", {**_CHAT, "ignore_eos": True, "logprobs": True, "top_logprobs": 2}),
    "schema": (
        "/v1/chat/completions",
        {**_CHAT, "response_format": {"type": "json_schema", "json_schema": {"name": "many", "schema": _SCHEMA}}},
    ),
    "tools": ("/v1/chat/completions", {**_CHAT, "tools": [_FUNCTION], "ignore_eos": True}),
    "called": ("/v1/chat/completions", {**_CHAT, "tools": [_FUNCTION], "tool_choice": "required"}),
}
WITH_GRAMMAR: Final = ("regex", "schema", "called")


def own_words(form: str, number: int) -> tuple[str, dict[str, Any]]:
    """A form's path and body, with a beginning of its own, so that the cache holds nothing of it."""
    path, body = FORMS[form]
    if "messages" in body:
        [message] = body["messages"]
        return path, {**body, "messages": [{**message, "content": f"{number}: {message['content']}"}]}
    prompt = body["prompt"]
    if isinstance(prompt, str):
        return path, {**body, "prompt": f"{number}: {prompt}"}
    digits = [ord(each) % 200 for each in str(number)]
    return path, {
        **body,
        "prompt": [f"{number}: {each}" if isinstance(each, str) else digits + each for each in prompt],
    }


def request_bytes(path: str, body: object, key: str = "", *, method: str = "POST", close: bool = False) -> bytes:
    """An HTTP/1.1 request with a body of JSON. close: no further one will come on its connection."""
    data = b"" if body is None else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", "host: 127.0.0.1", "content-type: application/json"]
    lines += [f"authorization: Bearer {key}"] if key else []
    lines += ["connection: close"] if close else []
    return "\r\n".join([*lines, f"content-length: {len(data)}", "", ""]).encode() + data


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer. status: 0 where the connection was refused or ended before a head had come. is_whole: the body
    came to its end. sent: the request was taken off our hands."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    is_whole: bool = False

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The events of a stream; the last of a whole one is "[DONE]"."""
        pieces = [each.removeprefix("data: ") for each in self.body.decode().split("\n\n") if each]
        return [each if each == "[DONE]" else json.loads(each) for each in pieces]

    @property
    def retry_after_s(self) -> int:
        """Whole seconds of the header Retry-After; 0 where there is none or it is no such number."""
        told = self.headers.get("retry-after", "")
        return int(told) if told.isdecimal() else 0

    @property
    def is_refusal(self) -> bool:
        """True for 429 and 503 with an error in OpenAI's shape and a time after which to come again."""
        if self.status not in (429, 503) or not self.is_whole or self.retry_after_s < 1:
            return False
        kinds = {429: "rate_limit_error", 503: "overloaded_error"}
        return bool(self.json["error"]["type"] == kinds[self.status] and self.json["error"]["message"])


async def read_reply(reader: asyncio.StreamReader) -> Reply:
    """The next answer on a connection. What is cut off is told as far as it came."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, ConnectionError):
        return Reply(0)
    first, *lines = head.decode("latin-1").split("\r\n")[:-2]
    headers = {name.lower(): value.strip() for name, _, value in (each.partition(":") for each in lines)}
    status, pieces = int(first.split()[1]), []
    try:
        if "content-length" in headers:
            pieces.append(await reader.readexactly(int(headers["content-length"])))
        else:
            while size := int((await reader.readuntil(b"\r\n")).strip(), 16):
                pieces.append((await reader.readexactly(size + 2))[:-2])
            await reader.readuntil(b"\r\n")
    except asyncio.IncompleteReadError as error:
        return Reply(status, headers, b"".join([*pieces, error.partial]))
    except (ConnectionError, ValueError):
        return Reply(status, headers, b"".join(pieces))
    return Reply(status, headers, b"".join(pieces), is_whole=True)


async def ask(port: int, path: str, body: object, key: str = "", *, method: str = "POST") -> Reply:
    """One request on a connection of its own, and its answer. Raises TimeoutError after ANSWER_S."""
    async with asyncio.timeout(ANSWER_S):
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
        except ConnectionError:
            return Reply(0)
        try:
            writer.write(request_bytes(path, body, key, method=method, close=True))
            return await read_reply(reader)
        finally:
            writer.close()


def connect(port: int) -> socket.socket:
    """A connection to a server of this machine."""
    return socket.create_connection(("127.0.0.1", port), timeout=30)


def port_of(url: str) -> int:
    """The port of http://HOST:PORT."""
    return int(url.rpartition(":")[2])


@contextmanager
def tiny_model() -> Generator[str]:
    """A model for a shard of the release size."""
    with tempfile.TemporaryDirectory() as directory:
        yield str(tiny_llama(Path(directory), context=1536))


def guarded_server(model: str, **options: Any) -> LiveServer:
    """A server in this process with all that `pagemill serve` lays around its routes: door, limits, guarded
    connections. options: of the engine."""
    metrics, limits = Metrics("tiny"), Limits()
    ring = KeyRing(None, [], MonotonicClock())
    hosts = HostCheck.of("127.0.0.1", has_keys=False, insecure=False)

    def door(app: Any) -> Any:
        return Door(BodyLimits(app, lambda: limits, metrics), ring, metrics, hosts=hosts)

    return LiveServer(model, wrappers=[door], protocol=guarded_protocol(limits, metrics), **options)
