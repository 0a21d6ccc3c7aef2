from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest

from pagemill.base.errors import ConfigError
from pagemill.simulator.trace import Request, read_trace
from pagemill.simulator.workload import GENERATORS, generate

MOONCAKE: dict[str, Any] = {"timestamp": 1000, "input_length": 1000, "output_length": 5, "hash_ids": [7, 8]}
SESSION: dict[str, Any] = {
    "id": "s",
    "block_size": 64,
    "tool_tokens": 10,
    "system_tokens": 10,
    "requests": [[0, 192, 9, [[0, 2], [5, 1]], 0, 90, "a"], [9, 256, 9, [[0, 4]], 1000, 5, "a"]],
}


def write(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(each if isinstance(each, str) else json.dumps(each) for each in rows) + "\n")
    return path


def test_mooncake_lines_become_requests(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path / "t.jsonl", MOONCAKE, "", {**MOONCAKE, "timestamp": 2500}))
    assert trace.block_tokens == 512
    assert trace.requests == (Request(1.0, 1000, 5, (7, 8)), Request(2.5, 1000, 5, (7, 8)))
    assert (trace.num_accesses, trace.num_distinct) == (4, 2)


def test_sessions_share_no_blocks_and_wait_a_minute_at_most(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path / "s.jsonl", SESSION, SESSION), session_gap_s=0)
    assert trace.block_tokens == 64
    assert [each.time_s for each in trace.requests] == [0, 0, 120, 120]
    first, second, third, fourth = (each.blocks for each in trace.requests)
    assert not {*first, *third} & {*second, *fourth}
    assert first[:2] == third[:2]
    assert (len(first), len(third)) == (3, 4)


def test_sessions_start_as_the_seed_says(tmp_path: Path) -> None:
    path = write(tmp_path / "s.jsonl", *[SESSION] * 50)
    one, same, other = (read_trace(path, seed=seed) for seed in (1, 1, 2))
    assert one == same != other
    assert one.requests[-1].time_s / 50 == pytest.approx(60, rel=0.5)


def test_a_compressed_file_is_the_same_trace(tmp_path: Path) -> None:
    plain = write(tmp_path / "s.jsonl", SESSION)
    (tmp_path / "s.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    assert read_trace(plain).requests == read_trace(tmp_path / "s.jsonl.gz").requests


def test_azure_lines_have_lengths_alone(tmp_path: Path) -> None:
    rows = ("2023-11-16 18:15:46.6805900,374,44", "2023-11-16 18:15:50.9951690,396,109")
    trace = read_trace(write(tmp_path / "a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens", *rows))
    assert trace.requests[0] == Request(0.0, 374, 44, ())
    assert trace.requests[1].time_s == pytest.approx(4.314579)


BAD_LINES: list[tuple[object, str]] = [
    ("{", "is not JSON"),
    ("[" * 100_000, "is not JSON"),
    ("[1]", "not a JSON object"),
    ({"timestamp": 2000}, "has no 'input_length'"),
    ({**MOONCAKE, "timestamp": 1}, "before that of the line above"),
    ({**MOONCAKE, "timestamp": -1}, "timestamp is -1; it must be a time from 0 to 2\\^53"),
    ({**MOONCAKE, "timestamp": None}, "timestamp is null"),
    ({**MOONCAKE, "hash_ids": [(1 << 53) + 1]}, "a block id is 9007199254740993; it must be a whole .* 0 to 2\\^53"),
    ({**MOONCAKE, "output_length": "9" * 99}, 'output_length is "9{39}…; it must'),
    ({**MOONCAKE, "input_length": 1.5}, "input_length"),
    ({**MOONCAKE, "input_length": True}, "input_length"),
    ({**MOONCAKE, "output_length": -1}, "output_length"),
    ({**MOONCAKE, "hash_ids": 5}, "not a list"),
    ({**MOONCAKE, "hash_ids": ["x", 1]}, "a block id"),
    ({**MOONCAKE, "hash_ids": [7, 7]}, "twice"),
    ({**MOONCAKE, "hash_ids": [7, 8, 9]}, "more than 1,000 input tokens fill; mend or remove the line"),
    ({**MOONCAKE, "hash_ids": [7]}, "names 1 blocks, and 1,000 input tokens fill more of 512 tokens; name each"),
    ({**MOONCAKE, "hash_ids": []}, "names 0 blocks"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES, ids=[each[1] for each in BAD_LINES])
def test_a_wrong_line_is_named_with_its_number(tmp_path: Path, line: object, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"t\.jsonl, line 3: .*{message}"):
        read_trace(write(tmp_path / "t.jsonl", MOONCAKE, MOONCAKE, line))


BAD_REQUESTS: list[tuple[object, str]] = [
    (5, "not \\[t, in, out"),
    ([0, 192], "not \\[t, in, out"),
    ([0, 192, 9, [], 0, 0], "not \\[t, in, out.* agent\\]"),
    (["x", 192, 9, [], 0, 0, "a"], "t is"),
    ([0, -1, 9, [], 0, 0, "a"], "in is"),
    ([0, 192, "9", [], 0, 0, "a"], "out is"),
    ([0, 192, 9, 5, 0, 0, "a"], "not a list"),
    ([0, 192, 9, [[1]], 0, 0, "a"], "run of blocks"),
    ([0, 192, 9, [[-1, 2]], 0, 0, "a"], "first_id"),
    ([0, 192, 9, [[0, 2], [1, 1]], 0, 0, "a"], "twice"),
    ([0, 192, 9, [[0, 4]], 0, 0, "a"], "more than"),
    ([0, 192, 9, [[0, 1 << 40]], 0, 0, "a"], "more than"),
    ([0, 192, 9, [[0, 3]], -1, 0, "a"], "think_s"),
    ([0, 192, 9, [[0, 3]], 0, "x", "a"], "api_s"),
    ([0, 192, 9, [[0, 3]], "", 0, "a"], "think_s"),
    ([0, 192, 9, [[0, 3]], 0, False, "a"], "api_s"),
    ([0, 1 << 50, 9, [[0, 1 << 20], [1 << 20, 1]], 0, 0, "a"], "more than 1,048,576"),
]


@pytest.mark.parametrize(("request_", "message"), BAD_REQUESTS, ids=[str(each[0])[:40] for each in BAD_REQUESTS])
def test_a_wrong_request_of_a_session_is_named_with_its_line(tmp_path: Path, request_: object, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"line 2: .*{message}"):
        read_trace(write(tmp_path / "s.jsonl", SESSION, {**SESSION, "requests": [request_]}))


@pytest.mark.parametrize("change", [{"block_size": 0}, {"block_size": 32}, {"requests": 1}, {"tool_tokens": "x"}])
def test_a_wrong_session_is_named_with_its_line(tmp_path: Path, change: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"s\.jsonl, line 2: "):
        read_trace(write(tmp_path / "s.jsonl", SESSION, {**SESSION, **change}))


@pytest.mark.parametrize("field", ["id", "block_size", "tool_tokens", "system_tokens", "requests"])
def test_a_session_without_a_field_is_named_with_it(tmp_path: Path, field: str) -> None:
    row = {name: value for name, value in SESSION.items() if name != field}
    with pytest.raises(ConfigError, match=rf"line 2: has no '{field}'; every line of agent sessions must"):
        read_trace(write(tmp_path / "s.jsonl", SESSION, row))


@pytest.mark.parametrize(
    "row",
    [
        "x,1,2",
        "2023-11-16 18:15:46.68,one,2",
        "2023-11-16 18:15:46.68,1",
        "2023-11-16,-1,2",
        "2023-11-16 18:15:46.68,1_0,2",
        "2023-11-16 18:15:46.68,\u0663,2",
        "2023-11-16 18:15:46.68," + "9" * 5000 + ",2",
        "2023-11-16 18:15:46.6805900+00:00,1,2",
        "2023-11-16 18:15:46.680+00:00,1,2",
        "2023-11-16 18:15:46.68,1\x00,2",
        '2023-11-16 18:15:46.68,"1,2',
        "x" * 200_000 + ",1,2",
    ],
    ids=lambda row: row[:40],
)
def test_a_wrong_line_of_lengths_is_named_with_its_number(tmp_path: Path, row: str) -> None:
    with pytest.raises(
        ConfigError, match=r"a\.csv, line 2: .*; (mend or remove the line|give times of one zone|it must be)"
    ):
        read_trace(write(tmp_path / "a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens", row))


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz", "a.csv"])
def test_bytes_that_are_not_text_are_named_with_their_line(tmp_path: Path, name: str) -> None:
    good = b"TIMESTAMP,ContextTokens,GeneratedTokens" if name == "a.csv" else json.dumps(MOONCAKE).encode()
    content = good + b"\n\n" + b"\xff\xfe\n"
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    with pytest.raises(ConfigError, match=r"line 3: is not text in UTF-8"):
        read_trace(tmp_path / name)


def test_where_a_compressed_file_breaks_off_is_named(tmp_path: Path) -> None:
    rng = random.Random(0)
    rows = [{**MOONCAKE, "input_length": 500, "hash_ids": [rng.randrange(1 << 40)]} for _ in range(2000)]
    content = gzip.compress("\n".join(map(json.dumps, rows)).encode())
    (tmp_path / "t.jsonl.gz").write_bytes(content[: len(content) // 2])
    with pytest.raises(ConfigError, match=r"line [1-9][\d,]+: cannot be read") as refused:
        read_trace(tmp_path / "t.jsonl.gz")
    assert "give a whole file" in str(refused.value)


@pytest.mark.parametrize("content", [b"x" * 100, b'{"hash_ids": [1, ' + b"1, " * 50])
def test_a_line_without_an_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr("pagemill.simulator.trace._LONGEST_LINE", 60)
    (tmp_path / "t.jsonl").write_bytes(b"\n" + content)
    with pytest.raises(ConfigError, match="line 2: is longer than 60 characters"):
        read_trace(tmp_path / "t.jsonl")


def test_sessions_of_more_blocks_than_can_be_held_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagemill.simulator.trace._MOST_ACCESSES", 10)
    with pytest.raises(ConfigError, match="line 2: brings the trace to more than 10 blocks"):
        read_trace(write(tmp_path / "s.jsonl", SESSION, SESSION))


@pytest.mark.parametrize("first", [MOONCAKE, SESSION, "TIMESTAMP,ContextTokens,GeneratedTokens"])
def test_a_byte_order_mark_is_no_part_of_a_trace(tmp_path: Path, first: object) -> None:
    plain = write(tmp_path / "plain", first)
    (tmp_path / "marked").write_bytes(b"\xef\xbb\xbf" + plain.read_bytes())
    assert read_trace(tmp_path / "marked").requests == read_trace(plain).requests


def test_a_line_of_another_format_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="line 2: has no 'timestamp'"):
        read_trace(write(tmp_path / "t.jsonl", MOONCAKE, SESSION))
    with pytest.raises(ConfigError, match="line 2: has no 'id'"):
        read_trace(write(tmp_path / "s.jsonl", SESSION, MOONCAKE))


@pytest.mark.parametrize(
    "content", [b"", b"\n\n", b'{"a": 1}\n', b"\xff\xfe\x00", b"TIMESTAMP,a,b\n", b"TIMESTAMP" + b"x" * 200_000]
)
def test_a_file_of_no_format_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ConfigError, match=r"give|columns|is not CSV"):
        read_trace(tmp_path / "x")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (
            "arrived_at,num_prefill_tokens,num_decode_tokens",
            "is neither a JSON object nor the header TIMESTAMP,Context",
        ),
        ("0.5,374,44", "is neither a JSON object nor the header TIMESTAMP,Context"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens,Model", "the columns are not TIMESTAMP,Context"),
    ],
)
def test_a_csv_of_other_columns_is_told_which_are_read(tmp_path: Path, header: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"line 1: {message}.*; give a trace of a known format"):
        read_trace(write(tmp_path / "a.csv", header, "2023-11-16 18:15:46.68,1,2,x"))


@pytest.mark.parametrize("name", ["missing.jsonl", ".", "broken.jsonl.gz", "cut.jsonl.gz"])
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "broken.jsonl.gz").write_bytes(b"not gzip")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(json.dumps(MOONCAKE).encode())[:-6])
    with pytest.raises(ConfigError, match="cannot be read"):
        read_trace(tmp_path / name)


@pytest.mark.parametrize("name", GENERATORS)
def test_a_generated_load_follows_from_its_seed(name: str) -> None:
    one = generate(name, 60, seed=1)
    assert one == generate(name, 60, seed=1)
    assert len(one.requests) == 60
    assert all(len(set(each.blocks)) == len(each.blocks) > 0 for each in one.requests)
    assert [each.time_s for each in one.requests] == sorted(each.time_s for each in one.requests)


def test_an_unknown_load_is_refused() -> None:
    with pytest.raises(ConfigError, match="there are chat"):
        generate("chats", 10, seed=1)
