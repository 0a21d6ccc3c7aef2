"""The profile of a decode step: the stop watch, the stages of a real engine, the command."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from pagemill.base.config import EngineConfig
from pagemill.base.errors import ConfigError
from pagemill.bench.step_profile import (
    PYTHON,
    STAGES,
    STEP,
    Profile,
    Settings,
    StageWatch,
    make_report,
    make_table,
    parse_streams,
)
from pagemill.build import build
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
    names = ("1 stream", "5 streams")
    assert rows.keys() == {(name, stage) for name in names for stage in (*STAGES, PYTHON, STEP)}
    for name in names:
        samples = {stage: rows[name, stage]["samples"] for stage in (*STAGES, PYTHON, STEP)}
        assert {len(each) for each in samples.values()} == {3}
        for i in range(3):
            assert sum(samples[stage][i] for stage in STAGES) == pytest.approx(samples[STEP][i], rel=1e-3)
            assert all(samples[stage][i] > 0 for stage in STAGES)
    judged = {key for key, row in rows.items() if row["verdict"] is not None}
    assert judged == (set() if sampled else {("1 stream", PYTHON)})
    assert json.loads(Path(report["files"][0]).read_text()) == report
    assert Path(report["files"][0]).name.startswith(f"step-{Path(model).name}-")


def test_the_table_names_stages_and_shares(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(model, tmp_path, "--streams", "2")) == 0
    printed = capsys.readouterr().out
    for text in (*STAGES, PYTHON, "2 streams", "p99", "100.0%", "written:"):
        assert text in printed
    assert "goal" not in printed


def profile(num_streams: int, step_us: float, python_us: float) -> Profile:
    spent = dict.fromkeys(STAGES, 0.0) | {STEP: step_us / 1e6, PYTHON: python_us / 1e6}
    return Profile(num_streams, {stage: (seconds,) * 3 for stage, seconds in spent.items()})


@pytest.mark.parametrize(
    ("found", "goal", "verdict"),
    [
        (profile(1, 1000, 149), "≤ 150", "pass"),
        (profile(1, 1000, 151), "≤ 150", "miss"),
        (profile(32, 10_000, 499), "≤ 5%", "pass"),
        (profile(32, 10_000, 501), "≤ 5%", "miss"),
        (profile(256, 10_000, 299), "≤ 3%", "pass"),
        (profile(256, 10_000, 301), "≤ 3%", "miss"),
    ],
)
def test_time_outside_the_native_call_is_held_to_its_goal(model: str, found: Profile, goal: str, verdict: str) -> None:
    config = EngineConfig(model=model, num_threads=1, kv_cache_memory_bytes=4 << 20)
    report = make_report(build(config), config, Settings((found.num_streams, 5), 3, False), [found, profile(5, 10, 9)])
    verdicts = {row["verdict"] for row in report["rows"] if row["goal"] is not None}
    assert verdicts == {verdict}
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(make_table(report))
    [line] = [line for line in console.export_text().splitlines() if "goal" in line]
    assert goal in line
    assert verdict in line


@pytest.mark.parametrize("text", ["", "0", "1,,2", "many", "-3", "70000"])
def test_wrong_numbers_of_streams_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="give numbers of sequences"):
        parse_streams(text)


def test_streams_that_do_not_fit_are_refused(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(model, tmp_path, "--streams", "4", "--max-num-seqs", "2")) == 2
    assert "raise max_num_seqs" in capsys.readouterr().err
    assert main(["bench", "step", "--model", model, "--steps", "0", "--output", str(tmp_path)]) == 2
    assert "at least 1" in capsys.readouterr().err
