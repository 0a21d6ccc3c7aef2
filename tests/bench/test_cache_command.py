"""`pagemill bench cache` as it is typed, on a tiny model and beside a made-up peer that is a real process."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pagemill.bench import cache_ttft
from pagemill.bench.cache import GROUPS
from pagemill.bench.peers_catalog import SHIPPED, Peer
from pagemill.bench.peers_setup import SetupError
from pagemill.cli.main import main
from tests.fixtures import fake_peer
from tests.fixtures.tiny import llama_weights, mistral_config, tiny_llama, write_hf

ROW_KEYS = {"group", "work", "engine", "mode", "unit", "median", "p10", "p90", "samples", "goal", "met"}


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("PAGEMILL_") and name != "PAGEMILL_HOME":
            monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_llama(tmp_path_factory.mktemp("q4"), format="gguf", weight_format="q4_1"))


def command(model: str, output: Path, *options: str) -> list[str]:
    given = ["--quick", "--runs", "2", "--num-threads", "1", "--environments", str(output / "none")]
    return ["bench", "cache", "--model", model, "--output", str(output), *given, *options]


def report_of(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


def test_every_group_has_rows_in_the_schema_of_benches(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(model, tmp_path, "--json")) == 0
    report = report_of(capsys)
    assert {"bench", "date", "machine", "versions", "git", "settings", "rows", "files"} <= report.keys()
    assert report["bench"] == "cache"
    assert {row["group"] for row in report["rows"]} == set(GROUPS)
    assert all(row.keys() >= ROW_KEYS for row in report["rows"])
    assert all(row["samples"] for row in report["rows"])
    assert json.loads(Path(report["files"][0]).read_text()) == report
    assert {Path(each).suffix for each in report["files"]} == {".json", ".png", ".svg"}
    rows = {(row["group"], row["work"], row["mode"]): row["median"] for row in report["rows"]}
    assert rows["live", "48 sequences, 32 in, 16 out, KV int8", "running at once"] == 48
    assert rows["bytes", "bytes of a token position, tiny", "f32 ÷ f16"] == 2
    [wiped] = [row for row in report["rows"] if row["mode"] == "blocks wiped"]
    assert wiped["median"] > 0


def test_tables_tell_what_each_group_is_and_how_many_goals_are_met(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(model, tmp_path, "--rows", "bytes,ttft")) == 0
    printed = capsys.readouterr()
    for text in (
        "bytes: bytes of a token position",
        "int8 ÷ f16",
        "attention",
        "next turn of a session",
        "of 0 goals met",
        "written:",
        "quick:",
    ):
        assert text in printed.out
    assert "llama.cpp is left out" in printed.err


def test_cpu_time_is_told_and_counts_nobody_else(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = time.process_time()
    assert main(command(model, tmp_path, "--rows", "wipe,live", "--cpu-time", "--json")) == 0
    spent = time.process_time() - before
    report = report_of(capsys)
    assert report["settings"]["clock"] == "CPU time of the process"
    assert report["machine"]["num_threads"] == 1
    [whole] = [row["median"] for row in report["rows"] if row["mode"] == "all of it"]
    assert 0 < whole < spent


def test_groups_without_a_model_load_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command("no-such-model", tmp_path, "--rows", "unused", "--json")) == 0
    report = report_of(capsys)
    assert report["settings"]["model"] is None
    shares = {row["mode"]: row["median"] for row in report["rows"]}
    assert 0 < shares["in use, mean"] <= shares["in use, p99"] < 0.05
    assert shares["part-filled blocks a sequence, most"] == 1


def test_lengths_and_block_ids_of_files_are_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths, trace = tmp_path / "lengths.csv", tmp_path / "trace.jsonl"
    rows = [f"2023-11-16 18:15:{at % 60:02}.0000000,{100 + at % 50},{20 + at % 9}" for at in range(150)]
    lengths.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *sorted(rows)]) + "\n")
    requests = [
        {"timestamp": at, "input_length": 1024, "output_length": 9, "hash_ids": [at % 3, 10 + at]} for at in range(30)
    ]
    trace.write_text("".join(json.dumps(each) + "\n" for each in requests))
    options = ["--lengths", str(lengths), "--trace", str(trace), "--rows", "unused,hits", "--json"]
    assert main(command("none", tmp_path, *options)) == 0
    rows_found = report_of(capsys)["rows"]
    assert rows_found[0]["work"].startswith("lengths.csv")
    hits = [row for row in rows_found if row["group"] == "hits" and row["policy"] == "lru" and row["blocks"] == 1000]
    assert hits[0]["median"] == pytest.approx(27 / 60)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rows", "ttfd"], "did you mean ttft"),
        (["--rows", ","], "names nothing"),
        (["--runs", "0"], "--runs is 0"),
        (["--trace", "no-such-file"], "--trace no-such-file"),
        (["--lengths", "no-such-file"], "--lengths no-such-file"),
        (["--kv-cache", "none"], "--kv-cache: this bench is about the paged cache"),
        (["--max-num-seqs", "4"], "--max-num-seqs"),
        (["--cpu-time", "--num-threads", "2"], "--cpu-time counts one kernel thread"),
        (["--rows", "ttft", "--max-model-len", "64"], "leave ttft out"),
        (["--rows", "latency", "--max-model-len", "200"], "leave latency out"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(command(model, tmp_path, *options)) == 2
    assert message in capsys.readouterr().err


def test_layers_with_pages_of_their_own_are_refused_unless_the_window_takes_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = mistral_config(window=40)
    model = str(write_hf(tmp_path / "windowed", config, llama_weights(config, 5)))
    assert main(command(model, tmp_path, "--rows", "overhead")) == 2
    assert "take a model without sliding windows" in " ".join(capsys.readouterr().err.split())
    assert main(command(model, tmp_path, "--rows", "wipe", "--max-model-len", "40", "--json")) == 0
    assert report_of(capsys)["rows"]


@pytest.mark.parametrize(
    ("behaviour", "clock", "warm_ms"),
    [("good", [], 130.0), ("good", ["--cpu-time"], 65.0), ("refuse", [], None), ("crash later", [], None)],
)
def test_a_peer_stands_beside_us_or_is_left_out_with_the_reason(
    model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    behaviour: str,
    clock: list[str],
    warm_ms: float | None,
) -> None:
    script = tmp_path / "worker.py"
    places = [str(Path(__file__).resolve().parents[2] / "src"), *filter(None, sys.path)]
    script.write_text(
        f"import runpy, sys\nsys.path += {places!r}\nsys.argv = ['fake', {behaviour!r}]\n"
        f"runpy.run_path({fake_peer.__file__!r}, run_name='__main__')\n"
    )
    monkeypatch.setattr(cache_ttft, "PEER_SCRIPT", script)
    monkeypatch.setattr(cache_ttft, "PEER_WEIGHTS", SHIPPED)
    monkeypatch.setattr(cache_ttft, "PEERS", (Peer("llama.cpp", "json", "", ("json",), (), 0),))
    options = ["--rows", "ttft", "--json", "--python-llama", sys.executable, *clock]
    assert main(command(model, tmp_path, *options)) == 0
    printed = capsys.readouterr()
    rows = json.loads(printed.out)["rows"]
    ratios = [row for row in rows if row["mode"] == "ratio" and row["work"].startswith("llama.cpp")]
    if warm_ms is not None:
        warm = [row["median"] for row in rows if row["engine"] == "llama.cpp" and row.get("new") == 4]
        assert warm == [pytest.approx(warm_ms)]
        assert [row["work"] for row in ratios] == ["llama.cpp ÷ pagemill, 4 new", "llama.cpp ÷ pagemill, 32 new"]
    else:
        assert not ratios
        assert "left out" in printed.err


def test_a_peer_whose_weights_cannot_be_made_is_left_out_with_the_reason(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> Path:
        raise SetupError("Q4_0 weights cannot be made here")

    monkeypatch.setattr(cache_ttft, "form_path", fail)
    monkeypatch.setattr(cache_ttft, "PEERS", (Peer("llama.cpp", "json", "", ("json",), (), 0),))
    options = ["--rows", "ttft", "--runs", "1", "--json", "--python-llama", sys.executable]
    assert main(command(model, tmp_path, *options)) == 0
    printed = capsys.readouterr()
    assert "llama.cpp is left out: Q4_0 weights cannot be made here" in printed.err
    assert not [row for row in json.loads(printed.out)["rows"] if row["engine"] == "llama.cpp"]


def test_interrupted_before_the_first_group_reports_nothing(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pagemill.cli.cache_bench.measure", _measure_interrupted)
    assert main(command(model, tmp_path, "--rows", "unused")) == 130
    assert "interrupted" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.json"))


def _measure_interrupted(*arguments: Any, interrupted: Any) -> Any:
    from pagemill.bench.cache import measure

    return measure(*arguments, interrupted=lambda: True)
