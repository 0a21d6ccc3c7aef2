"""`pagemill bench quality` as it is typed."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pagemill.bench.quality import Scores
from pagemill.cli import quality
from pagemill.cli.main import main
from tests.fixtures.tiny import tiny_llama

ROW_KEYS = {"weights", "k", "v", "n_ctx", "windows", "ppl", "ppl_ref", "kld", "top1", "bits_per_value"}


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("PAGEMILL_") and name != "PAGEMILL_HOME":
            monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("HOME", "/nowhere")  # whatever peers this machine has


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_llama(tmp_path_factory.mktemp("q4"), format="gguf", weight_format="q4_1"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "letters.txt"
    path.write_bytes(bytes(np.random.RandomState(3).randint(65, 91, 300).astype(np.uint8)))
    return str(path)


def command(model: str, text: str, output: Path, *options: str) -> list[str]:
    required = ["--model", model, "--text", text, "--output", str(output), "--num-threads", "1"]
    return ["bench", "quality", *required, *options]


def report_of(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


def test_json_holds_one_row_for_each_comparison(
    model: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lists = ["--dtype", "auto,float32,bfloat16", "--kv-cache-dtype", "bf16,f32", "--n-ctx", "32,64", "--windows", "2"]
    assert main(command(model, text, tmp_path, *lists, "--json")) == 0
    report = report_of(capsys)
    rows = report["rows"]
    assert all(row.keys() >= ROW_KEYS for row in rows)
    names = [(r["weights"], r["k"], r["against"]["weights"], r["against"]["k"]) for r in rows if r["n_ctx"] == 64]
    assert names == [
        ("float32", "f32", "float32", "f32"),
        ("auto", "bf16", "float32", "f32"),
        ("auto", "f32", "float32", "f32"),
        ("auto", "f32", "auto", "bf16"),
        ("float32", "bf16", "float32", "f32"),
        ("bfloat16", "bf16", "float32", "f32"),
        ("bfloat16", "f32", "float32", "f32"),
        ("bfloat16", "f32", "bfloat16", "bf16"),
    ]
    assert [row["windows"] for row in rows] == [2] * 16
    assert [row["tokens"] for row in rows] == [2 * 15] * 8 + [2 * 31] * 8
    assert {"machine", "versions", "git", "settings", "files"} <= report.keys()
    assert json.loads(Path(report["files"][0]).read_text()) == report


def test_the_reference_row_differs_in_nothing_from_itself(
    model: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(model, text, tmp_path, "--dtype", "float32", "--n-ctx", "64", "--json")) == 0
    [row] = report_of(capsys)["rows"]
    assert (row["kld"], row["ppl_ratio"], row["top1"], row["bits_per_value"]) == (0, 1, 1, 32)
    assert row["ppl"] == row["ppl_ref"] == pytest.approx(np.exp(np.mean(row["samples"]["nll"])), rel=1e-4)
    assert row["verdict"] is None


def test_default_is_the_checkpoints_own_format_with_int8_kv_held_against_bf16(
    model: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(model, text, tmp_path, "--n-ctx", "64", "--json")) == 0
    report = report_of(capsys)
    names = [(row["weights"], row["k"], row["v"], row["against"]["k"]) for row in report["rows"]]
    assert names == [
        ("float32", "f32", "f32", "f32"),
        ("auto", "bf16", "bf16", "f32"),
        ("auto", "int8", "int8", "f32"),
        ("auto", "int8", "int8", "bf16"),
    ]
    assert report["rows"][1]["kld"] > 0
    gates = [row["gate"] for row in report["rows"]]
    assert gates == [None, *[{"ppl_ratio": 1.005, "kld": 0.005}] * 2, {"ppl_ratio": 1.0015, "kld": 0.0033}]
    assert [row["default"] for row in report["rows"]] == [False, False, True, False]
    assert report["rows"][2]["verdict"] in ("pass", "miss")


def test_the_table_shows_the_verdict_of_the_default(
    model: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(model, text, tmp_path, "--n-ctx", "64")) == 0
    printed = capsys.readouterr().out
    row = printed.splitlines().index(next(line for line in printed.splitlines() if line.startswith(" auto/int8")))
    assert "pass" in printed.splitlines()[row] or "miss" in printed.splitlines()[row]
    assert printed.splitlines()[row + 1].split()[-2:] == ["+0.5%,", "0.005"]
    assert "the default, auto/int8, at n_ctx 64 against float32/f32: " in printed


def test_weight_formats_and_the_parts_of_int8_have_rows_of_their_own(
    model: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lists = ["--weight-format", "q8_0", "--apart", "float32", "--n-ctx", "32,64", "--windows", "2,1"]
    assert main(command(model, text, tmp_path, *lists, "--json")) == 0
    report = report_of(capsys)
    rows = [row for row in report["rows"] if row["n_ctx"] == 64]
    assert report["settings"]["windows"] == [2, 1]
    assert [row["windows"] for row in report["rows"]] == [2] * len(rows) + [1] * len(rows)
    assert {(r["weights"], r["kv"], r["executor"]) for r in rows if r["executor"] == "native"} == {
        ("float32", "f32", "native"),
        ("q8_0", "bf16", "native"),
        ("q8_0", "int8", "native"),
    }
    keys_only = [row for row in rows if row["kv"] == "int8-k"]
    assert [(r["k"], r["v"], r["queries"], r["probabilities"], r["against"]["kv"]) for r in keys_only] == [
        ("int8", "f32", "f32", "f32", "f32"),
        ("int8", "f32", "f32", "f32", "bf16"),
    ]
    spec = {row["kv"]: row["bits_per_value"] for row in rows}
    assert spec["int8-k"] == spec["int8-v"] == (spec["int8"] + 32) / 2
    assert spec["int8-q"] == spec["int8-p"] == 32
    assert all(row["verdict"] is None for row in keys_only)
    assert main(command(model, text, tmp_path, *lists)) == 0
    printed = capsys.readouterr().out
    assert "float32/int8-q*" in printed
    assert "float32/int8-p*" in printed
    assert "* by the reference in numpy" in printed
    assert max(map(len, printed.split("* by the reference")[0].splitlines()[1:])) <= 80


def test_the_weights_of_the_environment_are_the_ones_measured(
    model: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAGEMILL_DTYPE", "bfloat16")
    assert main(command(model, text, tmp_path, "--n-ctx", "32", "--kv-cache-dtype", "bf16", "--json")) == 0
    assert [row["weights"] for row in report_of(capsys)["rows"]] == ["float32", "bfloat16"]


def test_progress_goes_to_stderr_with_the_remaining_time(
    model: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "_LINE_S", 0.0)
    assert main(command(model, text, tmp_path, "--n-ctx", "32", "--windows", "2", "--json")) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "window" in line]
    assert [line.split(":")[0] for line in lines] == ["n_ctx 32, window 1 of 2", "n_ctx 32, window 2 of 2"]
    assert all("float32/f32" in line and "auto/bf16" in line and " left " in line for line in lines)


def test_the_table_fits_80_columns_and_tells_what_the_text_lacks(
    model: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(model, text, tmp_path, "--dtype", "auto,bfloat16", "--n-ctx", "64")) == 0
    printed = capsys.readouterr()
    table = [line for line in printed.out.splitlines() if "/" in line and "written" not in line]
    assert any("bfloat16/bf16" in line and ("pass" in line or "miss" in line) for line in table)
    assert "4 of 40 windows at n_ctx 64: the text has no more" in printed.out
    assert "loading" in printed.err
    assert max(map(len, printed.out.split("4 of 40 windows")[0].splitlines()[1:])) <= 80


def test_ctrl_c_reports_the_windows_measured_by_then(
    model: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def press_ctrl_c(self: object, scores: Scores, num_windows: int) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(quality._Display, "ended", press_ctrl_c)
    assert main(command(model, text, tmp_path, "--n-ctx", "32", "--json")) == 130
    report = report_of(capsys)
    assert report["interrupted"]
    assert {row["windows"] for row in report["rows"]} == {1}


def test_ctrl_c_before_the_first_window_reports_nothing(
    model: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality._Display, "advanced", lambda self, num_tokens: signal.raise_signal(signal.SIGINT))
    assert main(command(model, text, tmp_path, "--n-ctx", "32", "--json")) == 130
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "interrupted before a window was measured" in printed.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dtype", "float23"], "--dtype: unknown 'float23'; did you mean float32?"),
        (["--kv-cache-dtype", "bf16,int3"], "--kv-cache-dtype: unknown 'int3'"),
        (["--n-ctx", "9999"], "reaches 512 tokens"),
        (["--n-ctx", "512"], "has 300 tokens and a single window needs 512"),
        (["--windows", "0"], "--windows is 0"),
        (["--windows", "4,2"], "--windows gives 2 numbers for 1 of --n-ctx"),
        (["--weight-format", "q4_0"], "--weight-format: unknown 'q4_0'; did you mean q8_0?"),
        (["--apart", "int3"], "--apart: unknown 'int3'"),
        (["--kv-cache", "none"], "--kv-cache: this bench runs windows of --n-ctx tokens"),
        (["--max-model-len", "64", "--seed", "1"], "--max-model-len, --seed: this bench"),
        (["--text", "/nowhere/text"], "cannot read /nowhere/text"),
        (["--output", "/dev/null/x"], "results cannot be written to /dev/null/x"),
        (["--model", "/nowhere/model.gguf"], "/nowhere/model.gguf"),
        (["--peer", "vllm"], "--peer: unknown 'vllm'; give llama.cpp, or none to leave it out"),
        (["--python-llama", "/nowhere/python"], "/nowhere/python cannot import llama_cpp"),
        (["--peer", "none", "--python-llama", "x"], "--python-llama is of no use with --peer none"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    model: str, text: str, tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(model, text, tmp_path, *options)) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""


def test_the_text_is_required(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "quality", "--model", model]) == 2
    assert "--text is missing: give a UTF-8 text file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "reason"), [([], "not installed in {}/none"), (["--peer", "none"], "--peer none was given")]
)
def test_llama_cpp_is_left_out_with_the_reason(
    model: str, text: str, tmp_path: Path, options: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--dtype", "float32", "--n-ctx", "32", "--environments", str(tmp_path / "none"), *options]
    assert main(command(model, text, tmp_path, *given)) == 0
    assert f"llama.cpp is left out: {reason.format(tmp_path)}" in capsys.readouterr().out
