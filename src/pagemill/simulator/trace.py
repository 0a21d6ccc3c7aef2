"""Traces of requests, read from files. Owns the three formats and what is wrong with a line.

* Mooncake JSONL (FAST25 release): `{"timestamp": ms, "input_length", "output_length", "hash_ids": [block, …]}`, ids
  global, one per block of 512 tokens of the prompt, the last one part-filled.
* Agent sessions, JSONL or JSONL.gz: one session a line, `{"id", "block_size", "tool_tokens", "system_tokens",
  "requests": [[t, in, out, [[first_id, count], …], think_s, api_s, agent], …]}`, ids local to the session. Sessions
  start as a Poisson process; in a session each request waits for the one before it (api_s) and for think_s, both at
  most 60 s.
* Azure LLM inference CSV: `TIMESTAMP,ContextTokens,GeneratedTokens`, lengths only.

Times are seconds since the trace's first request. Files are read line by line and checked; nothing in them is run.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import IO, Any

from pagemill.base.errors import ConfigError

MOONCAKE_BLOCK_TOKENS = 512
_LONGEST_WAIT_S = 60.0
_MOST_BLOCKS = 1 << 20  # of a request
_MOST_ACCESSES = 1 << 26  # of a trace
_LARGEST = 1 << 53
_LONGEST_LINE = 1 << 27
_LONGEST_SHOWN = 40
_MOONCAKE_FIELDS = ("timestamp", "input_length", "output_length", "hash_ids")
_SESSION_FIELDS = ("id", "block_size", "tool_tokens", "system_tokens", "requests")
_AZURE_HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"
_MEND = "mend or remove the line"
_KNOWN = "give a trace of a known format"
_NUM_AGENT_FIELDS = 7  # of a request of a session


@dataclass(frozen=True, slots=True)
class Request:
    """One request. blocks: ids of its prompt's blocks, () where the trace has lengths only."""

    time_s: float
    num_input_tokens: int
    num_output_tokens: int
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in the order of their times (of the file, where times are equal). block_tokens: 0 for lengths only."""

    name: str
    block_tokens: int
    requests: tuple[Request, ...]

    @property
    def num_accesses(self) -> int:
        """Blocks of all requests together."""
        return sum(len(each.blocks) for each in self.requests)

    @property
    def num_distinct(self) -> int:
        """Different blocks."""
        return len(set(chain.from_iterable(each.blocks for each in self.requests)))


def read_trace(path: str | os.PathLike[str], *, session_gap_s: float = 60.0, seed: int = 0) -> Trace:
    """Read a trace; the format is told by its content.

    session_gap_s: mean time between starts of agent sessions; seed: of their Poisson process. Raises ConfigError, with
    the number of the line, where the file cannot be read or is none of the formats.
    """
    file = Path(path).expanduser()
    try:
        with _open(file) as opened:
            lines = _lines(file.name, opened)
            first = next(lines, "")
            if first.startswith("TIMESTAMP"):
                return Trace(file.name, 0, tuple(_azure(file.name, chain([first], lines))))
            if first.strip() and not first.lstrip().startswith(("{", "[")):
                raise _wrong(file.name, 1, f"is neither a JSON object nor the header {_AZURE_HEADER}; {_KNOWN}")
            rows = _json_lines(file.name, chain([first], lines))
            number, row = next(rows, (1, None))
            if row is None:
                raise ConfigError(f"{file.name}: the file is empty; give a trace")
            rows = chain([(number, row)], rows)
            if "hash_ids" in row:
                return Trace(file.name, MOONCAKE_BLOCK_TOKENS, tuple(_mooncake(file.name, rows)))
            if "requests" in row:
                return _sessions(file.name, rows, session_gap_s, seed)
    except OSError as error:
        said = error.strerror or error
        raise ConfigError(f"the trace {file} cannot be read: {said}; give the path of a readable file") from None
    raise _wrong(
        file.name,
        number,
        f'has neither "hash_ids" (Mooncake) nor "requests" (agent sessions); {_KNOWN}',
    )


def _open(file: Path) -> IO[str]:
    """The file's text; bytes that are not UTF-8 become lone surrogates, which `_lines` refuses."""
    if file.name.endswith(".gz"):
        return gzip.open(file, "rt", encoding="utf-8-sig", errors="surrogateescape")
    return file.open(encoding="utf-8-sig", errors="surrogateescape")


def _lines(name: str, file: IO[str]) -> Iterator[str]:
    number = 1
    while True:
        try:
            line = file.readline(_LONGEST_LINE)
        except (OSError, EOFError, zlib.error) as error:
            said = getattr(error, "strerror", None) or error
            raise _wrong(name, number, f"cannot be read ({said}); give a whole file") from None
        if not line:
            return
        if len(line) == _LONGEST_LINE:
            raise _wrong(name, number, f"is longer than {_LONGEST_LINE:,} characters; give a trace, one request a line")
        try:
            line.encode()
        except UnicodeEncodeError:
            raise _wrong(name, number, "is not text in UTF-8; give a JSONL or CSV") from None
        yield line
        number += 1


def _csv_rows(name: str, rows: Any) -> Iterator[list[str]]:
    try:
        yield from rows
    except csv.Error as error:
        raise _wrong(name, rows.line_num, f"is not CSV ({error}); {_MEND}") from None


def _wrong(name: str, line: int, what: str) -> ConfigError:
    return ConfigError(f"{name}, line {line:,}: {what}")


def _json_lines(name: str, lines: Iterator[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            said = getattr(
                error, "msg", "nested too deep" if isinstance(error, RecursionError) else "a number too long"
            )
            raise _wrong(name, number, f"is not JSON ({said}); {_MEND}") from None
        if not isinstance(row, dict):
            raise _wrong(name, number, f"is not a JSON object; {_MEND}")
        yield number, row


def _count(name: str, line: int, field: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _LARGEST:
        raise _wrong(name, line, f"{field} is {_shown(value)}; it must be a whole number from 0 to 2^53")
    return value


def _seconds(name: str, line: int, field: str, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= _LARGEST:
        raise _wrong(name, line, f"{field} is {_shown(value)}; it must be a time from 0 to 2^53")
    return float(value)


def _shown(value: object) -> str:
    """A value as the file has it, or its beginning."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"


def _check_fields(name: str, line: int, row: dict[str, Any], fields: tuple[str, ...], what: str) -> None:
    missing = [field for field in fields if field not in row]
    if missing:
        raise _wrong(name, line, f"has no {missing[0]!r}; every line of {what} must")


def _check_blocks(name: str, line: int, num_blocks: int, num_tokens: int, block_tokens: int) -> None:
    if num_blocks > -(-num_tokens // block_tokens):
        raise _wrong(
            name,
            line,
            f"{num_blocks:,} blocks of {block_tokens} tokens are more than {num_tokens:,} input tokens fill; {_MEND}",
        )


def _mooncake(name: str, rows: Iterator[tuple[int, dict[str, Any]]]) -> Iterator[Request]:
    latest = 0.0
    for line, row in rows:
        _check_fields(name, line, row, _MOONCAKE_FIELDS, "a Mooncake trace")
        time_s = _seconds(name, line, "timestamp", row["timestamp"]) / 1000
        if time_s < latest:
            raise _wrong(name, line, "its timestamp is before that of the line above; sort the trace by time")
        latest = time_s
        ids = row["hash_ids"]
        if not isinstance(ids, list):
            raise _wrong(name, line, f"hash_ids is not a list of block ids; {_MEND}")
        for each in ids:
            _count(name, line, "a block id", each)
        if len(set(ids)) != len(ids):
            raise _wrong(name, line, "hash_ids names a block twice; blocks of one prompt differ in their position")
        num_tokens = _count(name, line, "input_length", row["input_length"])
        _check_blocks(name, line, len(ids), num_tokens, MOONCAKE_BLOCK_TOKENS)
        if len(ids) * MOONCAKE_BLOCK_TOKENS < num_tokens:
            raise _wrong(
                name,
                line,
                f"hash_ids names {len(ids):,} blocks, and {num_tokens:,} input tokens fill more of "
                f"{MOONCAKE_BLOCK_TOKENS} tokens; name each, the last one part-filled, or remove the line",
            )
        yield Request(time_s, num_tokens, _count(name, line, "output_length", row["output_length"]), tuple(ids))


def _sessions(name: str, rows: Iterator[tuple[int, dict[str, Any]]], gap_s: float, seed: int) -> Trace:
    """All sessions, interleaved by time. Blocks are numbered anew, so that sessions share none."""
    starts = random.Random(seed)
    start_s = 0.0
    block_tokens = 0
    numbers: dict[tuple[int, int], int] = {}
    found: list[Request] = []
    num_accesses = 0
    for index, (line, row) in enumerate(rows):
        _check_fields(name, line, row, _SESSION_FIELDS, "agent sessions")
        size = _count(name, line, "block_size", row["block_size"])
        if size == 0 or size != (block_tokens or size):
            raise _wrong(name, line, f"block_size is {size} and must be one size above 0 in the whole file")
        block_tokens = size
        requests = row["requests"]
        if not isinstance(requests, list):
            raise _wrong(name, line, "requests is not a list")
        for field in ("tool_tokens", "system_tokens"):
            _count(name, line, field, row[field])
        now_s = start_s
        for request in requests:
            waited_s, took_s, lengths, ids = _agent_request(name, line, size, request)
            now_s += waited_s
            num_accesses += len(ids)
            if num_accesses > _MOST_ACCESSES:
                raise _wrong(name, line, f"brings the trace to more than {_MOST_ACCESSES:,} blocks; give a part of it")
            blocks = tuple(numbers.setdefault((index, each), len(numbers)) for each in ids)
            found.append(Request(now_s, *lengths, blocks))
            now_s += took_s
        start_s += starts.expovariate(1 / gap_s) if gap_s > 0 else 0.0
    return Trace(name, block_tokens, tuple(sorted(found, key=lambda each: each.time_s)))


def _agent_request(
    name: str, line: int, block_tokens: int, request: object
) -> tuple[float, float, tuple[int, int], list[int]]:
    """(seconds of thinking before it, of serving it, (tokens in, out), block ids) of one request of a session."""
    if not isinstance(request, list) or len(request) < _NUM_AGENT_FIELDS:
        raise _wrong(name, line, "a request is not [t, in, out, [[first_id, count], …], think_s, api_s, agent]")
    _seconds(name, line, "t", request[0])
    num_in = _count(name, line, "in", request[1])
    num_out = _count(name, line, "out", request[2])
    ids: list[int] = []
    if not isinstance(request[3], list):
        raise _wrong(name, line, "the block runs of a request are not a list")
    for run in request[3]:
        if not isinstance(run, list) or len(run) != 2:
            raise _wrong(name, line, "a run of blocks is not [first_id, count]")
        first, count = _count(name, line, "first_id", run[0]), _count(name, line, "count", run[1])
        if len(ids) + count > _MOST_BLOCKS:
            raise _wrong(name, line, f"a request has more than {_MOST_BLOCKS:,} blocks")
        ids.extend(range(first, first + count))
    if len(set(ids)) != len(ids):
        raise _wrong(name, line, "a request names a block twice; blocks of one prompt differ in their position")
    _check_blocks(name, line, len(ids), num_in, block_tokens)
    waits = [
        0.0 if request[at] is None else _seconds(name, line, field, request[at])
        for at, field in ((4, "think_s"), (5, "api_s"))
    ]
    return min(waits[0], _LONGEST_WAIT_S), min(waits[1], _LONGEST_WAIT_S), (num_in, num_out), ids


def _azure(name: str, lines: Iterator[str]) -> Iterator[Request]:
    first: datetime | None = None
    reader = csv.reader(lines)
    rows = _csv_rows(name, reader)
    header = next(rows)
    if header != _AZURE_HEADER.split(","):
        raise _wrong(name, 1, f"the columns are not {_AZURE_HEADER}; {_KNOWN}")
    latest: datetime | None = None
    for row in rows:
        line = reader.line_num
        if not row:
            continue
        if len(row) != 3:
            raise _wrong(name, line, f"has {len(row)} columns instead of 3; {_MEND}")
        try:
            lengths = tuple(_digits(each) for each in row[1:])
            when = datetime.fromisoformat(row[0][:26])  # without the digits behind microseconds
        except ValueError:
            said = f"{','.join(row)[:60]!r} is not a time and two counts of tokens"
            raise _wrong(name, line, f"{said}, as in 2023-11-16 18:15:46.680,374,44; {_MEND}") from None
        if when.tzinfo is not None or not (row[0][26:] or "0").isdigit():
            raise _wrong(name, line, "the time has a zone; give times of one zone, without it")
        if latest is not None and when < latest:
            raise _wrong(name, line, "the time is before that of the line above; sort the trace by time")
        latest = when
        for field, value in zip(header[1:], lengths, strict=True):
            _count(name, line, field, value)
        first = first or when
        yield Request((when - first).total_seconds(), lengths[0], lengths[1], ())


def _digits(text: str) -> int:
    if not (text.isascii() and text.strip().lstrip("-").isdigit()):
        raise ValueError(text)
    return int(text)
