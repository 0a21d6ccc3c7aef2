from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pagemill.bench import figures
from pagemill.cli.main import main
from tests.fixtures.tiny import tiny_llama

PROGRAM = [sys.executable, "-c", "from pagemill.cli.main import run; run()"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_llama(tmp_path_factory.mktemp("model")))


def arguments(model: str, output: Path, *more: str) -> list[str]:
    base = ["bench", "kvcache", "--model", model, "--prompt", "ABC", "--num-threads", "1", "--output", str(output)]
    return [*base, *more]


def test_json_is_the_only_thing_on_stdout(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(arguments(model, tmp_path, "--tokens", "20", "--runs", "2", "--runs-without", "1", "--json"))
    printed = capsys.readouterr()
    assert code == 0
    report = json.loads(printed.out)
    assert printed.out.count("\n") == 1
    assert report["bench"] == "kvcache"
    assert {row["mode"] for row in report["rows"]} >= {"with", "without"}
    assert [run["mode"] for run in report["runs"]] == ["with", "without", "with"]
    assert "all of it about" in printed.err
    assert "without the cache: 20 tokens" in printed.err
    assert sorted(Path(each).suffix for each in report["files"]) == [".json", ".png", ".svg"]
    assert json.loads(Path(report["files"][0]).read_text()) == report


def test_table_names_both_modes_and_the_files(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(model, tmp_path, "--tokens", "8", "--runs", "1")) == 0
    printed = capsys.readouterr().out
    for text in ("without the cache", "with the cache", "ratio", "generate 8 tokens", "barrier", "written:"):
        assert text in printed
    assert len(list(tmp_path.glob("kvcache-*.png"))) == 1


def test_without_matplotlib_table_and_json_still_come(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(arguments(model, tmp_path, "--tokens", "8", "--runs", "1", "--json")) == 0
    printed = capsys.readouterr()
    assert [Path(each).suffix for each in json.loads(printed.out)["files"]] == [".json"]
    assert figures.MISSING in printed.err
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tokens", "1"], "--tokens is 1"),
        (["--runs", "0"], "--runs is 0"),
        (["--runs-without", "0"], "--runs-without is 0"),
        (["--kv-cache", "none"], "leave the option out"),
        (["--tokens", "600"], "lower --tokens to 509"),
        (["--dtype", "int3"], "choose one of auto, float32, bfloat16"),
        (["--kv-cache-memory-bytes", "1K"], "raise kv_cache_memory_bytes"),
        (["--token", "9"], "--tokens"),
    ],
)
def test_wrong_arguments_end_with_one_line_and_code_2(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert main(arguments(model, tmp_path, *more)) == 2
    printed = capsys.readouterr()
    assert not printed.out
    error = printed.err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


def test_output_that_is_no_directory_is_refused_before_anything_runs(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(arguments(model, tmp_path / "file")) == 2
    assert "give another directory (--output)" in capsys.readouterr().err


def test_ctrl_c_prints_what_was_measured(model: str, tmp_path: Path) -> None:
    command = PROGRAM + arguments(model, tmp_path, "--tokens", "400", "--runs", "500", "--json")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as child:
        assert child.stderr is not None
        for line in child.stderr:
            if "with the cache: 400 tokens" in line:
                child.send_signal(signal.SIGINT)
                break
        out, _ = child.communicate(timeout=60)
    assert child.returncode == 130
    report = json.loads(out)
    assert report["interrupted"] is True
    assert report["runs"][0]["complete"] is True
    assert len(list(tmp_path.glob("*.json"))) == 1
