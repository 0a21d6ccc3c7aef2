"""The profile of a decode step: the stop watch, the stages of a real engine, the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pagemill.base.errors import ConfigError
from pagemill.bench.step_profile import PYTHON, STAGES, STEP, StageWatch, parse_streams
from pagemill.cli.main import main
from tests.fixtures.tiny import tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_llama(tmp_path_factory.mktemp("model")))


def arguments(model: str, output: Path, *more: str) -> list[str]:
    return ["bench", "step", "--model", model, "--steps", "3", "--num-threads", "1", "--output", str(output), *more]


def test_stages_are_the_time_since_the_one_before_and_the_rest_is_told() -> None:
    times = iter([10.0, 11.0, 13.0, 17.0, 18.0, 20.0])
    watch = StageWatch(lambda: next(times))
    watch.begin()
    for stage in ("schedule", "native", "batch", "native"):
        watch.reach(stage)
    spent = watch.end()
    assert [spent[stage] for stage in STAGES] == [1.0, 4.0, 3.0, 0.0, 0.0, 0.0, 2.0]
    assert (spent[STEP], spent[PYTHON]) == (10.0, 7.0)


@pytest.mark.parametrize("sampled", [[], ["--sampled"]])
def test_every_stage_of_every_number_of_streams_is_reported(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], sampled: list[str]
) -> None:
    assert main(arguments(model, tmp_path, "--streams", "1,5", "--json", *sampled)) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["bench"] == "step"
    rows = {(row["work"], row["mode"]): row for row in report["rows"]}
    assert rows.keys() == {(f"{n} streams", stage) for n in (1, 5) for stage in (*STAGES, PYTHON, STEP)}
    for n in (1, 5):
        samples = {stage: rows[f"{n} streams", stage]["samples"] for stage in (*STAGES, PYTHON, STEP)}
        assert {len(each) for each in samples.values()} == {3}
        for i in range(3):
            assert sum(samples[stage][i] for stage in STAGES) == pytest.approx(samples[STEP][i], rel=1e-3)
            assert all(samples[stage][i] > 0 for stage in STAGES)
    assert json.loads(Path(report["files"][0]).read_text()) == report


def test_the_table_names_stages_and_shares(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(model, tmp_path, "--streams", "2")) == 0
    printed = capsys.readouterr().out
    for text in (*STAGES, PYTHON, "2 streams", "p99", "100.0%", "written:"):
        assert text in printed


@pytest.mark.parametrize("text", ["", "0", "1,,2", "many", "-3", "70000"])
def test_wrong_numbers_of_streams_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="give numbers of sequences"):
        parse_streams(text)


def test_streams_that_do_not_fit_are_refused(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(model, tmp_path, "--streams", "4", "--max-num-seqs", "2")) == 2
    assert "raise max_num_seqs" in capsys.readouterr().err
    assert main(["bench", "step", "--model", model, "--steps", "0", "--output", str(tmp_path)]) == 2
    assert "at least 1" in capsys.readouterr().err
