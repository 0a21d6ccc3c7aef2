"""`pagemill simulate --serve`: the table, the JSON, the cost model's file, wrong arguments."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pagemill.cli.main import main
from tests.fixtures.tiny import tiny_llama

TRACE = str(Path(__file__).parents[1] / "simulator" / "traces" / "chat.jsonl")
FIGURES = {"base_s": 0.004, "row_s": 0.0004, "token_s": 0.0003, "read_s": 1e-8, "source": "by hand"}


@pytest.fixture
def cost_model(tmp_path: Path) -> str:
    path = tmp_path / "cost.json"
    path.write_text(json.dumps(FIGURES))
    return str(path)


def arguments(cost_model: str, *more: str) -> list[str]:
    return ["simulate", TRACE, "--serve", "--policy", "lru", "--blocks", "400", "--cost-model", cost_model, *more]


def test_json_has_a_row_for_each_policy_and_size(
    capsys: pytest.CaptureFixture[str], cost_model: str, tmp_path: Path
) -> None:
    output = tmp_path / "served.json"
    more = ["--policy", "lru,s3fifo", "--requests", "20", "--json", "--output", str(output)]
    assert main(arguments(cost_model, *more)) == 0
    report = json.loads(capsys.readouterr().out)
    assert [(row["policy"], row["blocks"], row["num_finished"]) for row in report["rows"]] == [
        ("lru", 400, 20),
        ("s3fifo", 400, 20),
    ]
    assert report["cost_model"] == FIGURES | {"fit": None}
    assert json.loads(output.read_text()) == report


def test_the_table_names_what_was_served(capsys: pytest.CaptureFixture[str], cost_model: str) -> None:
    assert main(arguments(cost_model, "--requests", "5", "--streams", "2", "--pace", "0.5")) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].endswith("5 requests, 2 streams, steps as of by hand")
    assert printed[1] == "cost model: its file does not say what it was fitted to"
    assert printed[2].split()[:4] == ["blocks", "policy", "done", "lost"]
    assert printed[3].split()[:4] == ["400", "lru", "5", "0"]


def test_how_far_the_cost_model_is_from_what_it_was_fitted_to_is_told(
    capsys: pytest.CaptureFixture[str], cost_model: str
) -> None:
    fitted = [0.9, 1.0, 1.0, 1.02, 0.8, 1.04, 1.01, 0.99, 1.03, 0.95, 1.5]  # seconds that the model says of one
    steps = [{"rows": 1 + at, "chunk": 0, "behind": 64, "seconds": 1.0, "fitted_s": at_s} for at, at_s in
             enumerate(fitted)]  # fmt: skip
    Path(cost_model).write_text(json.dumps(FIGURES | {"steps": steps}))
    assert main(arguments(cost_model, "--requests", "2", "--json")) == 0
    fit = json.loads(capsys.readouterr().out)["cost_model"]["fit"]
    assert fit["steps"] == steps
    assert fit["relative_error"] == pytest.approx({"p50": 0.03, "p90": 0.2, "max": 0.5})
    assert main(arguments(cost_model, "--requests", "2")) == 0
    assert capsys.readouterr().out.splitlines()[1] == (
        "cost model: off by 3% (median), 20% (p90) and 50% (most) of the 11 kinds of steps that it was fitted to"
    )


def test_requests_that_are_not_finished_by_their_deadline_are_counted(
    capsys: pytest.CaptureFixture[str], cost_model: str
) -> None:
    options = ["--requests", "40", "--streams", "2", "--pace", "0.01", "--deadline", "8", "--json"]
    assert main(arguments(cost_model, *options)) == 0
    report = json.loads(capsys.readouterr().out)
    [row] = report["rows"]
    assert report["deadline_s"] == 8
    assert row["num_expired"] == row["num_failed"] == 40 - row["num_finished"]
    assert row["num_finished"] > 0
    assert row["num_expired"] > 0
    assert row["finished_per_s"] == pytest.approx(row["num_finished"] / row["seconds"])


def test_steps_are_held_to_a_time_between_tokens_that_is_named(
    capsys: pytest.CaptureFixture[str], cost_model: str
) -> None:
    p99_ms = []
    crowd = ["--requests", "40", "--streams", "8", "--pace", "0.05", "--json"]
    for options in ([], ["--target-itl-ms", "12.5"]):
        assert main(arguments(cost_model, *crowd, *options)) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["rows"][0]["num_finished"] == 40
        p99_ms.append((report["target_itl_ms"], 1e3 * report["rows"][0]["itl_s"]["p99"]))
    (unset, usual_ms), (target_ms, held_ms) = p99_ms
    assert (unset, target_ms) == (None, 12.5)
    assert held_ms <= 12.5 * 1.02 < usual_ms


def test_a_model_that_is_not_there_is_measured_and_kept(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAGEMILL_MODEL", str(tiny_llama(tmp_path, context=2048)))
    monkeypatch.setenv("PAGEMILL_KV_CACHE_MEMORY_BYTES", "64MiB")
    path = tmp_path / "measured.json"
    assert main(arguments(str(path), "--requests", "2", "--json")) == 0
    first = json.loads(capsys.readouterr().out)["cost_model"]
    kept = json.loads(path.read_text())
    assert {name: kept[name] for name in FIGURES} == {name: first[name] for name in FIGURES}
    assert len(kept["steps"]) == 12
    assert first["fit"]["steps"] == kept["steps"]
    errors = sorted(abs(step["fitted_s"] / step["seconds"] - 1) for step in kept["steps"])
    assert first["fit"]["relative_error"] == pytest.approx({"p50": errors[6], "p90": errors[10], "max": errors[11]})
    assert all(step["seconds"] > 0 for step in kept["steps"])
    assert main(arguments(str(path), "--requests", "2", "--json")) == 0
    assert json.loads(capsys.readouterr().out)["cost_model"] == first


def test_a_cache_too_small_to_measure_in_is_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAGEMILL_MODEL", str(tiny_llama(tmp_path, context=32)))
    assert main(["simulate", TRACE, "--serve", "--json"]) == 2
    assert "too small to measure steps in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--plot", "p.png"], "--plot belongs to hit curves"),
        (["--manager"], "--manager belongs to hit curves"),
        (["--requests", "0"], "--requests is 0"),
        (["--deadline", "0"], "--deadline is 0"),
        (["--target-itl-ms", "0"], "--target-itl-ms is 0"),
        (["--target-itl-ms", "nan"], "--target-itl-ms is nan"),
        (["--deadline", "nan"], "--deadline is nan"),
        (["--pace", "0"], "pace is 0"),
        (["--streams", "0"], "max_num_seqs is 0"),
        (["--policy", "none such"], "none such"),
        (["--blocks", "0"], "--blocks"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_2(
    capsys: pytest.CaptureFixture[str], cost_model: str, more: list[str], message: str
) -> None:
    assert main(arguments(cost_model, *more)) == 2
    assert message in capsys.readouterr().err


STEP = {"rows": 1, "chunk": 0, "behind": 64, "seconds": 0.1, "fitted_s": 0.1}
WRONG_TYPE = json.dumps(FIGURES | {"base_s": "x"})


WRONG_STEPS = [json.dumps(FIGURES | {"steps": steps}) for steps in (5, [5], [{"x": 1}], [{**STEP, "seconds": 0}])]


@pytest.mark.parametrize("text", ["", "{}", "[]", WRONG_TYPE, *WRONG_STEPS])
def test_a_file_that_is_no_cost_model_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str) -> None:
    path = tmp_path / "cost.json"
    path.write_text(text)
    assert main(arguments(str(path))) == 2
    assert "is no cost model" in capsys.readouterr().err


def test_a_directory_that_is_not_there_is_told_before_anything_is_measured(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(arguments(str(tmp_path / "none" / "cost.json"))) == 2
    assert "its directory is not there" in capsys.readouterr().err
