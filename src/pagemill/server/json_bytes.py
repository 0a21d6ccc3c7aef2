"""JSON as it goes over the wire. Owns the frame of an event and of a chunk, serialised once for each stream."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import orjson
from fastapi import Response


def event(value: object) -> bytes:
    """One server-sent event; what is no Unicode text in it is escaped."""
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def json_response(value: object, headers: dict[str, str] | None = None) -> Response:
    """A whole answer. Numbers that JSON lacks (NaN, infinities) become null."""
    return Response(orjson.dumps(value), 200, headers, "application/json")


class ChunkFrame:
    """The part of a stream's chunks that stays the same."""

    __slots__ = ("_begin",)

    def __init__(self, fields: dict[str, Any]) -> None:
        self._begin = b"data: " + orjson.dumps(fields)[:-1] + b',"choices":['

    def chunk(self, choices: Sequence[dict[str, Any]], usage: bytes | None = None) -> bytes:
        """One chunk. usage: as JSON, None where the stream tells none."""
        body = b",".join(map(orjson.dumps, choices))
        return self._begin + body + (b"]}\n\n" if usage is None else b'],"usage":' + usage + b"}\n\n")
