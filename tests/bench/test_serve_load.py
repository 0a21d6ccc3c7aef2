"""Reading of streams and the load generator as a process, against a real socket."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pagemill.bench.serve_load import Wire, is_accepted, read_answer
from pagemill.bench.serve_servers import Contender, Server
from tests.fixtures import fake_serve

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def event(text: str, end: str | None = None) -> bytes:
    return b"data: " + json.dumps({"choices": [{"text": text, "finish_reason": end}]}).encode() + b"\n\n"


def chunked(*parts: bytes) -> bytes:
    return HEAD + b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def wire_of(*pieces: bytes) -> Wire:
    """Bytes that came at 1 s, 2 s, …"""
    wire = Wire()
    for index, piece in enumerate(pieces, 1):
        wire.add(piece, float(index))
    return wire


def test_events_have_the_time_when_their_last_byte_came() -> None:
    first, second, rest = event("a"), event("b", "length"), b"data: [DONE]\n\n"
    raw = chunked(first, second, rest)
    cut = len(HEAD) + 8 + len(first) // 2
    after = raw.index(b"\r\n", raw.index(second) + len(second))
    answer = read_answer(wire_of(raw[:cut], raw[cut : cut + len(first)], raw[cut + len(first) : after], raw[after:]))
    assert answer.error is None
    assert (answer.text, answer.finish_reason) == ("ab", "length")
    assert answer.times == [2.0, 3.0]


def test_answer_reads_the_same_however_it_was_cut() -> None:
    raw = chunked(
        event("a") + event("b"), event("").replace(b"\n", b"\r\n"), event("c", "length") + b"data: [DONE]\n\n"
    )
    whole = read_answer(wire_of(raw))
    assert whole.error is None
    for size in (1, 2, 7, 50):
        cut = read_answer(wire_of(*(raw[at : at + size] for at in range(0, len(raw), size))))
        assert (cut.text, cut.finish_reason, len(cut.times)) == ("abc", "length", 3)
        assert cut.times == sorted(cut.times)


def test_usage_of_the_last_event_is_kept_and_events_without_text_are_no_tokens() -> None:
    usage = b'data: {"choices": [], "usage": {"prompt_tokens": 5}}\n\n'
    answer = read_answer(wire_of(chunked(event(""), event("a", "length"), usage, b": a comment\n\ndata: [DONE]\n\n")))
    assert answer.usage == {"prompt_tokens": 5}
    assert len(answer.times) == 1


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "closed before an answer"),
        (b"HTTP/1.1 503 Busy\r\n\r\nlater", "HTTP/1.1 503 Busy: later"),
        (b"nonsense\r\n\r\n", "nonsense"),
        (chunked(event("a")), "ended before the answer did"),
        (chunked(event("a", "length")), "ended before the answer did"),
        (chunked(b"data: {\n\n"), "no completion"),
        (chunked(b"data: [1]\n\n"), "no completion"),
        (chunked(b'data: {"choices": [{}]}\n\n'), "no completion"),
        (chunked(b'data: {"error": {"message": "a step failed"}}\n\n'), "a step failed"),
        (HEAD + b"zz\r\n", "ended before the answer did"),
    ],
)
def test_answers_that_are_not_whole_are_errors(raw: bytes, said: str) -> None:
    assert said in str(read_answer(wire_of(raw) if raw else Wire()).error)


def test_cut_answer_is_no_error() -> None:
    raw = chunked(event("a"))
    assert read_answer(wire_of(raw[:-9]), is_whole=False).error is None
    assert read_answer(Wire(), is_whole=False).error is None
    assert not is_accepted(Wire())


@pytest.fixture(params=["good"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    with Server(Contender("fake", "", (sys.executable, fake_serve.__file__, request.param))) as server:
        server.wait(30)
        yield server


def session(*max_tokens: int, at_s: float = 0.0) -> dict[str, Any]:
    return {"at_s": at_s, "turns": [{"text": " hello", "max_tokens": each, "think_s": 0.01} for each in max_tokens]}


def run(server: Server, sessions: list[dict[str, Any]], **changed: Any) -> dict[str, Any]:
    plan = {"host": server.host, "port": server.port, "fields": {}, "duration_s": 5, "users": 2, "spread_s": 0.01}
    done = subprocess.run(
        [sys.executable, "-m", "pagemill.bench.serve_load"],
        input=json.dumps({**plan, "sessions": sessions, **changed}),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        cwd=Path(__file__).parents[2],
        env={"PYTHONPATH": "src"},
    )
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def test_users_ask_until_nothing_is_left_and_turns_follow_their_answers(server: Server) -> None:
    told = run(server, [session(4, 6), session(5), session(3)])
    requests = {(each["session"], each["turn"]): each for each in told["requests"]}
    assert {key: len(each["times"]) for key, each in requests.items()} == {(0, 0): 4, (0, 1): 6, (1, 0): 5, (2, 0): 3}
    assert all(each["error"] is None and each["finish_reason"] == "length" for each in requests.values())
    assert requests[0, 1]["due_s"] >= requests[0, 0]["end_s"] + 0.01
    assert requests[2, 0]["sent_s"] >= min(requests[0, 1]["end_s"], requests[1, 0]["end_s"])
    assert told["begin_s"] < told["idle_s"] <= told["end_s"] < told["begin_s"] + 5
    assert 0 < told["cpu_s"] < 1


def test_clock_begins_sessions_whatever_the_server_does(server: Server) -> None:
    told = run(server, [session(40, at_s=0.0), session(2, at_s=0.02), session(2, at_s=0.3)], users=0)
    due = [each["due_s"] - told["begin_s"] for each in told["requests"]]
    assert due == pytest.approx([0.0, 0.02, 0.3], abs=1e-6)
    assert told["idle_s"] is None
    waited = told["requests"][1]["times"][0] - told["requests"][1]["due_s"]
    assert waited > 0.05  # behind the first one


def test_end_of_the_duration_cuts_what_is_running(server: Server) -> None:
    told = run(server, [session(100_000), session(100_000)], duration_s=0.5)
    assert told["end_s"] - told["begin_s"] == pytest.approx(0.5, abs=0.4)
    assert [each["end_s"] for each in told["requests"]] == [None, None]
    assert told["requests"][0]["times"]
    assert [each["error"] for each in told["requests"]] == [None, None]


@pytest.mark.parametrize("server", ["refuses"], indirect=True)
def test_server_that_refuses_is_not_stormed(server: Server) -> None:
    told = run(server, [session(4)] * 1000, duration_s=0.55)
    assert 2 <= len(told["requests"]) <= 12
    assert all("429" in each["error"] and "slow down" in each["error"] for each in told["requests"])


@pytest.mark.parametrize("server", ["breaks off"], indirect=True)
def test_stream_that_breaks_off_is_an_error_and_ends_its_session(server: Server) -> None:
    told = run(server, [session(8, 8)], users=1)
    assert [(each["turn"], len(each["times"])) for each in told["requests"]] == [(0, 2)]
    assert "ended before the answer did" in told["requests"][0]["error"]


def test_nobody_there_is_an_error_of_each_request(server: Server) -> None:
    server.close()
    told = run(server, [session(4, 4), session(4)])
    assert len(told["requests"]) == 2
    assert all("cannot connect" in each["error"] for each in told["requests"])
    assert run(server, [])["requests"] == []
