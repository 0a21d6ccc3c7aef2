from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from pagemill.bench import figures
from pagemill.cli.main import main
from tests.fixtures.tiny import tiny_llama

COMMANDS = ("roofline", "growth")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_llama(tmp_path_factory.mktemp("model")))


def arguments(command: str, model: str, output: Path, *more: str) -> list[str]:
    base = ["bench", command, "--model", model, "--quick", "--rounds", "1", "--num-threads", "1"]
    return [*base, "--output", str(output), *more]


@pytest.mark.parametrize("command", COMMANDS)
def test_json_is_the_only_thing_on_stdout(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert main(arguments(command, model, tmp_path, "--json")) == 0
    printed = capsys.readouterr()
    assert printed.out.count("\n") == 1
    report = json.loads(printed.out)
    assert report["bench"] == command
    assert report["rows"]
    assert {"median", "samples", "unit"} <= set(report["rows"][0])
    assert "round 1 of 1" in printed.err
    assert sorted(Path(each).suffix for each in report["files"]) == [".json", ".png", ".svg"]
    assert json.loads(Path(report["files"][0]).read_text()) == report


@pytest.mark.parametrize(("command", "words"), [("roofline", ("share", "bound by")), ("growth", ("growth", "KV int8"))])
def test_tables_name_what_was_measured_and_the_files(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, words: tuple[str, ...]
) -> None:
    assert main(arguments(command, model, tmp_path)) == 0
    printed = capsys.readouterr().out
    for word in (*words, "barrier", "written:"):
        assert word in printed


@pytest.mark.parametrize("command", COMMANDS)
def test_without_matplotlib_the_report_still_comes(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(arguments(command, model, tmp_path, "--json")) == 0
    printed = capsys.readouterr()
    assert [Path(each).suffix for each in json.loads(printed.out)["files"]] == [".json"]
    assert figures.MISSING in printed.err


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--rounds", "0"], "--rounds is 0"),
        (["--executor", "reference"], "leave the option out"),
        (["--dtype", "int3"], "choose one of auto, float32, bfloat16"),
        (["--model", "no-such-model"], "no-such-model"),
    ],
)
def test_wrong_arguments_end_with_one_line_and_code_2(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, more: list[str], message: str
) -> None:
    assert main(arguments(command, model, tmp_path, *more)) == 2
    printed = capsys.readouterr()
    assert not printed.out
    error = printed.err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
