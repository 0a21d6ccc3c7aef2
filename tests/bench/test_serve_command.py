"""`pagemill bench serve` as it is typed: Pagemill's server on a tiny model, and beside it one that is made up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pagemill.base.errors import ConfigError
from pagemill.bench.serve_contenders import OwnServers, Places, parse_places, usual_places
from pagemill.bench.serve_figures import LoadFigures, Objective, quantile_ms
from pagemill.bench.serve_report import BEST_WITHIN, GOALS, SAME_ITL, Context, make_report, make_tables, remarks
from pagemill.bench.serve_run import Measurement, Settings, measure
from pagemill.bench.serve_servers import Contender, Server, ServerError
from pagemill.bench.serve_workload import DISTINCT, SHARED, Session, Words, make_sessions
from pagemill.cli.main import main
from tests.fixtures import fake_serve
from tests.fixtures.tiny import tiny_llama

ROOT = Path(__file__).parents[2]
ROW_KEYS = {"work", "engine", "mode", "unit", "median", "p10", "p90", "samples", "workload", "metric", "at_once"}
WORDS = Words((" a", " b", " c"))


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("PAGEMILL_") and name != "PAGEMILL_HOME":
            monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("q4")
    return str(tiny_llama(path, format="gguf", weight_format="q4_1"))


def command(model: str, output: Path, *options: str) -> list[str]:
    own = ["--kv-cache-memory-bytes", "8MiB", "--num-threads", "1", "--environments", str(output / "none")]
    return ["bench", "serve", "--model", model, "--output", str(output), "--quick", "--duration", "1", *own, *options]


def test_rows_files_and_true_hits_of_a_run(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(model, tmp_path, "--workloads", "distinct,shared", "--at-once", "4,1", "--json")) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert {"bench", "date", "machine", "versions", "git", "settings", "rows", "files"} <= report.keys()
    assert report["bench"] == "serve"
    assert json.loads(Path(report["files"][0]).read_text()) == report
    assert {Path(each).suffix for each in report["files"]} == {".json", ".png", ".svg"}
    assert all(row.keys() >= ROW_KEYS for row in report["rows"])
    rows = {(row["workload"], row["at_once"], row["metric"]): row["median"] for row in report["rows"]}
    for work in ("distinct", "shared"):
        for at_once in (4, 1):
            assert rows[work, at_once, "tokens"] > 0
            assert rows[work, at_once, "failed"] == 0
            assert 0 < rows[work, at_once, "CPU of the generator"] < 1
    assert rows["shared", 4, "prompt tokens found"] > 0.5
    assert rows["distinct", 4, "prompt tokens found"] < 0.2
    assert report["absent"].keys() == {"llama.cpp"}
    assert report["comparisons"] == []


def test_server_held_to_a_time_between_tokens_is_told_so_and_shown_as_such(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    longer = ("--duration", "3")  # a busy machine may not have the first token within a second
    asked = command(model, tmp_path, "--workloads", "distinct", "--at-once", "2,4@500", "--json", *longer)
    assert main(asked) == 0
    report = json.loads(capsys.readouterr().out)
    settings = {(row["mode"], row["at_once"], row["target_itl_ms"]) for row in report["rows"]}
    assert settings == {("2 at once", 2, None), ("4 at once, target 500 ms", 4, 500)}
    commands = {each["mode"]: each["command"] for each in report["engines"]}
    assert "--target-itl-ms" not in commands["2 at once"]
    told = commands["4 at once, target 500 ms"]
    assert told[told.index("--target-itl-ms") + 1] == "500"
    assert [row["median"] for row in report["rows"] if row["metric"] == "failed"] == [0, 0]
    assert all(row["median"] > 0 for row in report["rows"] if row["metric"] == "tokens")


def test_conversations_find_their_own_past_and_tables_say_what_is_what(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(model, tmp_path, "--workloads", "agents", "--rate", "20", "--slo-itl", "1s")) == 0
    printed = capsys.readouterr()
    for text in ("20 sessions/s (Poisson)", "agents, ms", "good:", "gen.", "quick:", "written:"):
        assert text in printed.out
    assert "llama.cpp is left out" in printed.err
    [path] = tmp_path.glob("*.json")
    rows = {row["metric"]: row["median"] for row in json.loads(path.read_text())["rows"]}
    assert rows["prompt tokens found"] > 0.4


def test_trace_is_replayed(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp": 200 * each, "input_length": 1024, "output_length": 128, "hash_ids": [0, each + 1]}
        for each in range(20)
    ]
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(command(model, tmp_path, "--trace", str(trace), "--speed", "2", "--json")) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["settings"]["arrivals"] == "trace.jsonl × 2"
    rows = {row["metric"]: row for row in report["rows"]}
    assert len(rows["tokens"]["samples"]) == 1
    assert rows["failed"]["median"] == 0
    assert 3 <= len(report["rows"][-1]["all_first_token_ms"]) <= 10


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--max-num-seqs", "4"], "--at-once"),
        (["--at-once", "4,x"], "--at-once is '4,x'"),
        (["--at-once", "0"], "--at-once is '0'"),
        (["--at-once", "8@"], "--at-once is '8@'"),
        (["--at-once", "8@0"], "--at-once is '8@0'"),
        (["--at-once", "8@fast"], "--at-once is '8@fast'"),
        (["--at-once", "8@peer", "--peers", "none"], "--peers none leaves the peer out"),
        (["--at-once", "8@25", "--mixed-step-percent", "200"], "goes neither with mixed_step_percent"),
        (["--at-once", "8@25", "--kv-cache", "none"], "nor with kv_cache none"),
        (["--target-itl-ms", "25"], "give it with --at-once"),
        (["--users", "0"], "--users is 0"),
        (["--users", "4", "--rate", "1"], "--rate and --users"),
        (["--trace", "x", "--rate", "1"], "--rate and --trace"),
        (["--rate", "0"], "--rate is 0"),
        (["--trace", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--speed", "0"], "--speed is 0"),
        (["--workloads", "chatt"], "did you mean chat"),
        (["--peers", "vllm"], "--peers is 'vllm'"),
        (["--duration", "soon"], "not a time"),
        (["--duration", "0"], "--duration is 0 s"),
        (["--runs", "0"], "--runs is 0"),
        (["--slo-ttft", "0"], "--slo-ttft is 0 ms"),
        (["--max-model-len", "20"], "too few"),
        (["--python-llama", "/nowhere/python"], "/nowhere/python"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(
    model: str, tmp_path: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    began = time.monotonic()
    assert main(command(model, tmp_path, *options)) == 2
    assert said in capsys.readouterr().err
    assert time.monotonic() - began < 20


def test_server_that_cannot_start_is_told(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(model, tmp_path, "--kv-cache-memory-bytes", "1")) == 1
    assert "not enough memory" in capsys.readouterr().err


def children_of(pid: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_the_bench_and_all_that_it_started(
    model: str, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    arguments = [*command(model, tmp_path, "--workloads", "distinct"), "--duration", "60"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pagemill", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler) and None,
    )
    try:
        assert process.stderr is not None
        while "ready in" not in (line := process.stderr.readline()):
            assert line, "it ended before the server was ready"
        started = children_of(process.pid)
        assert started
        process.send_signal(number)
        process.communicate(timeout=30)
        assert process.returncode == code
        assert not [pid for pid in started if Path(f"/proc/{pid}").exists()]
    finally:
        process.kill()
        process.wait()


def fake(behaviour: str = "good", engine: str = "fake") -> Contender:
    return Contender(engine, behaviour, (sys.executable, fake_serve.__file__, behaviour))


class Told:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def started(self, contender: Contender, seconds: float) -> None:
        self.lines.append(f"started {contender.mode}")

    def ended(self, work: str, run: int, contender: Contender, figures: LoadFigures) -> None:
        self.lines.append(f"{work} {run} {contender.mode}")

    def failed(self, contender: Contender, reason: str) -> None:
        self.lines.append(f"failed {contender.mode}: {reason}")


def settings(**changed: Any) -> Settings:
    given = {"works": (DISTINCT,), "num_runs": 2, "duration_s": 1.0, "users": 2, "objective": Objective(1.0, 0.1)}
    return Settings(**{**given, **changed})


def sessions(work: str, run: int) -> list[Session]:
    return make_sessions(work, WORDS, 50, seed=(run,), scale=0.05)


def test_runs_are_interleaved_and_who_fails_is_left_out_alone() -> None:
    told = Told()
    contenders = [fake(each) for each in ("good", "ends at once", "refuses", "dies", "breaks off")]
    found = measure(contenders, settings(), sessions, told)
    runs = [line for line in told.lines if line.startswith("distinct")]
    assert runs == ["distinct 0 good", "distinct 0 breaks off", "distinct 1 good", "distinct 1 breaks off"]
    reasons = {contender.mode: reason for contender, reason in found.failures.items()}
    assert reasons.keys() == {"ends at once", "refuses", "dies"}
    assert "no such model here" in reasons["ends at once"]
    assert "429" in reasons["refuses"]
    assert "code 7" in reasons["dies"]
    for contender, figures in ((each, found.runs[DISTINCT, each]) for each in found.starts if each.mode == "good"):
        assert contender.mode == "good"
        assert all(run.tokens_per_s > 0 and run.num_failed == 0 and run.hit_ratio is None for run in figures)


def test_places_are_read_as_typed_and_the_usual_ones_hold_to_a_peer_that_is_there() -> None:
    assert parse_places("32, 8@25,8@peer,32") == (Places(32), Places(8, 25), Places(8, "peer"))
    for text in ("", "8,", "-8", "8@peers", "8@-1", "1.5", "65537", "8@100001", "\u0664"):
        with pytest.raises(ConfigError, match="--at-once is"):
            parse_places(text)
    assert usual_places(32, quick=False, with_peer=False) == (Places(32), Places(8), Places(4))
    held = (Places(32, "peer"), Places(8, "peer"))
    assert usual_places(None, quick=False, with_peer=True) == (Places(32), Places(8), *held)
    assert usual_places(4, quick=False, with_peer=True) == (Places(4), Places(4, "peer"))
    assert usual_places(4, quick=True, with_peer=True) == (Places(4),)


def test_servers_that_follow_from_the_peer_are_none_that_are_there_already() -> None:
    own = OwnServers("tiny", {}, None, parse_places("32,8@25,8@peer,4@peer"))
    assert [each.mode for each in own.plain()] == ["32 at once", "8 at once, target 25 ms"]
    assert [each.mode for each in own.held(25)] == ["4 at once, target 25 ms"]
    assert [each.mode for each in own.held(24)] == ["8 at once, target 24 ms", "4 at once, target 24 ms"]


def test_servers_held_to_the_peers_time_take_turns_from_when_it_is_known_to_the_end_of_the_workload() -> None:
    told, peer = Told(), fake("good", "peer")
    asked_ms: list[int] = []
    made: list[Contender] = []

    def held(target_itl_ms: int) -> list[Contender]:
        asked_ms.append(target_itl_ms)
        made.append(fake("good", "pagemill"))
        return made[-1:]

    found = measure([peer], settings(works=(DISTINCT, SHARED)), sessions, told, held=held)
    for work, asked, mine in zip((DISTINCT, SHARED), asked_ms, made, strict=True):
        p95_ms = quantile_ms(found.runs[work, peer][0].itl_s, 0.95)
        assert p95_ms is not None
        assert asked == max(int(0.9 * p95_ms), 1)
        assert len(found.runs[work, mine]) == 2
    turns = [line for line in told.lines if not line.startswith("started")]
    assert turns == [f"{work} {run} good" for work in (DISTINCT, SHARED) for run in (0, 0, 1, 1)]
    assert not found.failures


def test_without_a_peers_time_none_is_held_to_it_and_the_report_says_so() -> None:
    found = measure([fake("is mute", "peer")], settings(), sessions, Told(), held=lambda _: [fake("dies")])
    assert found.unheld == [DISTINCT]
    assert not found.failures
    report = make_report(Context("tiny", {}, {"arrivals": "users"}, {}, False, 2), settings(), found)
    assert any("no peer told a time between tokens" in line for line in remarks(report))


def test_mute_server_gives_no_tokens_and_everybody_waits() -> None:
    found = measure([fake("is mute")], settings(num_runs=1), sessions, Told())
    [[run]] = found.runs.values()
    assert (run.tokens_per_s, run.num_waiting, run.ttft_s) == (0.0, 2, ())


def test_interrupted_run_is_not_counted() -> None:
    asked = iter([False] * 12)
    began = time.monotonic()
    found = measure([fake()], settings(duration_s=60.0), sessions, Told(), interrupted=lambda: next(asked, True))
    assert found.interrupted
    assert not found.runs
    assert time.monotonic() - began < 30


def test_server_that_never_listens_and_one_that_is_not_there() -> None:
    silent = Contender("fake", "", (sys.executable, "-c", "import time; print('hello', flush=True); time.sleep(60)"))
    with Server(silent) as server, pytest.raises(ServerError, match=r"not ready within 1 s: hello"):
        server.wait(1.0)
    server.close()
    with pytest.raises(ServerError, match="cannot start /nowhere"):
        Server(Contender("fake", "", ("/nowhere/server",)))


def run_of(tokens_per_s: float, itl_s: float) -> LoadFigures:
    itl = tuple([itl_s] * 20) if itl_s else ()
    return LoadFigures(
        window_s=10.0,
        tokens_per_s=tokens_per_s,
        requests_per_s=1.0,
        ttft_s=itl[:2],
        itl_s=itl,
        num_good=1,
        num_judged=2,
        num_waiting=0,
        num_failed=0,
        hit_ratio=None,
        errors=(),
        generator_s=0.1,
        server_s=5.0,
        run_s=10.0,
        latest_s=0.0,
    )


def compared(ours: dict[int, tuple[float, float]], theirs: tuple[float, float], **changed: Any) -> dict[str, Any]:
    """A report with Pagemill at several numbers at once, and one peer: (tokens per second, p95 between tokens)."""
    found = Measurement(cpu_shares={"own": 0.9, "others": changed.pop("others", 0.05), "steal": 0.0})
    for at_once, figures in ours.items():
        found.runs[SHARED, Contender("pagemill", f"{at_once} at once", ("x",), at_once=at_once)] = [
            run_of(*figures)
        ] * 2
    found.runs[SHARED, Contender("llama.cpp", "Q4_0", ("x",))] = [run_of(*theirs)] * 2
    context = Context("tiny", {}, {"arrivals": "users"}, {}, changed.pop("quick", False), 2)
    return make_report(context, settings(works=(SHARED,), users=changed.pop("users", 32)), found)


def test_comparison_takes_the_best_setting_that_waits_no_longer_between_tokens() -> None:
    report = compared({32: (900.0, 0.05), 8: (600.0, 0.01), 4: (400.0, 0.005)}, (100.0, 0.012))
    same, plain = report["comparisons"]
    assert (same["compared"], same["pagemill"]["mode"], same["ratio"]["median"]) == (SAME_ITL, "8 at once", 6.0)
    assert (same["goal"], same["met"]) == (GOALS[SHARED], True)
    assert (plain["pagemill"]["mode"], plain["ratio"]["median"], plain["goal"]) == ("32 at once", 9.0, None)
    assert any("6.00× the tokens of llama.cpp Q4_0" in line and "goal 5× met" in line for line in remarks(report))


def test_best_setting_within_the_peers_time_has_a_row_of_its_own_beside_all_settings() -> None:
    report = compared({32: (900.0, 0.05), 8: (600.0, 0.01), 4: (400.0, 0.005)}, (100.0, 0.012))
    [row] = [row for row in report["rows"] if row["metric"] == BEST_WITHIN]
    assert (row["mode"], row["median"], row["at_once"], row["peer"]) == ("8 at once", 600.0, 8, "llama.cpp Q4_0")
    among = report["comparisons"][0]["among"]
    assert [(each["mode"], each["tokens_per_s"], each["is_within"]) for each in among] == [
        ("32 at once", 900.0, False),
        ("8 at once", 600.0, True),
        ("4 at once", 400.0, True),
    ]
    [table] = make_tables(report)
    servers, ratios = (list(column.cells) for column in (table.columns[0], table.columns[-1]))
    assert servers == [
        "pagemill 32 at once",
        "pagemill 8 at once",
        "pagemill 4 at once",
        "llama.cpp Q4_0",
        "p95 within llama.cpp's 12.0 ms: 8 at once",
    ]
    assert ratios == ["9.0", "6.0", "4.0", "", "6.0"]
    assert any(line.startswith(f"{SAME_ITL}: all settings of Pagemill") for line in remarks(report))


def test_where_no_setting_keeps_to_the_peers_time_the_row_says_none() -> None:
    report = compared({32: (900.0, 0.05)}, (100.0, 0.012))
    assert not [row for row in report["rows"] if row["metric"] == BEST_WITHIN]
    [table] = make_tables(report)
    assert list(table.columns[0].cells)[-1] == "p95 within llama.cpp's 12.0 ms: none"


def test_goal_is_missed_where_no_setting_qualifies_and_not_judged_at_other_sizes() -> None:
    report = compared({32: (900.0, 0.05)}, (100.0, 0.012))
    assert (report["comparisons"][0]["met"], report["comparisons"][0]["pagemill"]) == (False, None)
    assert any(
        "stays within the 12.0 ms between tokens of llama.cpp Q4_0, goal 5× missed" in line for line in remarks(report)
    )
    for changed in ({"quick": True}, {"users": 8}):
        assert compared({8: (900.0, 0.01)}, (100.0, 0.012), **changed)["comparisons"][0]["goal"] is None


def test_goal_is_not_judged_where_others_had_the_machine() -> None:
    report = compared({8: (900.0, 0.01)}, (100.0, 0.012), others=0.4)
    assert [line["met"] for line in report["comparisons"]] == [None, None]
    assert any(line.startswith("disturbed:") for line in remarks(report))


def test_peer_that_delivered_nothing_is_not_beaten() -> None:
    report = compared({32: (900.0, 0.05)}, (0.0, 0.0))
    assert all(line["ratio"] is None for line in report["comparisons"])
    assert not any(line["met"] for line in report["comparisons"])
    assert any("too little to compare with" in line for line in remarks(report))
    [table] = make_tables(report)
    assert list(table.columns[0].cells) == ["pagemill 32 at once", "llama.cpp Q4_0"]
    assert list(table.columns[-1].cells) == ["", ""]
