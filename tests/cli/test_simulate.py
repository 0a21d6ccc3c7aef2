from __future__ import annotations

import json
from pathlib import Path

import pytest

from pagemill.cli.main import main

TRACE = str(Path(__file__).parents[1] / "simulator" / "traces" / "chat.jsonl")


def test_json_has_a_row_for_each_policy_and_size(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    output = tmp_path / "rows.json"
    arguments = ["simulate", TRACE, "--policy", "lru,gittins", "--blocks", "40,1k", "--json", "--output", str(output)]
    assert main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert [(row["policy"], row["blocks"]) for row in report["rows"]] == [
        ("lru", 40),
        ("gittins", 40),
        ("lru", 1000),
        ("gittins", 1000),
    ]
    assert {"trace", "policy", "blocks", "block_hit_ratio", "ideal", "optimum"} <= report["rows"][0].keys()
    assert json.loads(output.read_text()) == report


def test_the_table_has_a_line_for_each_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", TRACE, "--policy", "lru,lru,lfu", "--blocks", "400,40"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["blocks", "lru", "lfu", "optimum"]
    assert [line.split()[0] for line in lines[2:4]] == ["40", "400"]


def test_lengths_alone_give_the_share_of_unused_positions(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    trace = tmp_path / "a.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,16,2\n")
    assert main(["simulate", str(trace), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["allocation"]["num_steps"] == 2
    assert main(["simulate", str(trace)]) == 0
    told = capsys.readouterr()
    assert "of allocated positions unused" in told.out
    assert "a.csv has lengths only and gives no hit curve: --policy and --blocks are of no use here" in told.err


def test_a_plot_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert main(["simulate", TRACE, "--policy", "lru", "--blocks", "40,400", "--plot", str(tmp_path / "p.png")]) == 0
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([TRACE, "--policy", "lur"], "did you mean 'lru'"),
        ([TRACE, "--policy", ","], "names no policy"),
        ([TRACE, "--blocks", "0"], "from 1"),
        ([TRACE, "--blocks", "x"], "is not an amount"),
        ([TRACE, "--plot", "p.pdf"], "a .png or an .svg"),
        ([TRACE, "--session-gap", "soon"], "is not a time"),
        ([TRACE, "--blocks", "40", "--output", "/nowhere/x.json"], "give another --output"),
        (["missing.jsonl"], "cannot be read"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["simulate", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_options_of_serving_without_serve_are_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    for given, message in (
        (["--requests", "1000"], "--requests means something only where the trace is served; add --serve or leave it"),
        (["--pace", "2", "--target-itl-ms", "9"], "--pace, --target-itl-ms mean something only"),
        (["--streams", "1", "--deadline", "3", "--cost-model", "x"], "--streams, --deadline, --cost-model mean"),
    ):
        assert main(["simulate", TRACE, *given]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--pace", "0"], "--pace is 0; give a number above 0"),
        (["--pace", "-1"], "--pace is -1; give a number above 0"),
        (["--pace", "nan"], "--pace is nan; give a number above 0"),
    ],
)
def test_a_pace_that_is_none_is_refused_before_steps_are_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, given: list[str], message: str
) -> None:
    monkeypatch.setattr("pagemill.cli.simulate_serve.measure_step_cost", lambda _: pytest.fail("measured"))
    assert main(["simulate", TRACE, "--serve", *given]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("num_tokens", [0, 16])
def test_a_trace_of_block_ids_that_names_none_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, num_tokens: int
) -> None:
    trace = tmp_path / "t.jsonl"
    row = {"timestamp": 0, "input_length": num_tokens, "output_length": 2, "hash_ids": []}
    trace.write_text(json.dumps(row) + "\n")
    assert main(["simulate", str(trace), "--policy", "lru", "--blocks", "40"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert ("no request has a block" if num_tokens == 0 else "line 1: hash_ids names 0 blocks") in told.err


def test_a_plot_of_lengths_alone_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    trace = tmp_path / "a.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,16,2\n")
    assert main(["simulate", str(trace), "--plot", "p.png"]) == 2
    assert "leave --plot out" in capsys.readouterr().err
