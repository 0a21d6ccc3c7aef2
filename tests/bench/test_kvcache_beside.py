"""`pagemill bench kvcache --beside` as it is typed, against made-up peers that are real processes; and the worker that
runs inside transformers' environment, where torch is on this machine."""

from __future__ import annotations

import importlib.util
import json
import math
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pagemill.base.errors import ConfigError
from pagemill.bench import kvcache_beside
from pagemill.bench.kvcache_beside import Series, contestants, peer_config
from pagemill.bench.kvcache_beside_report import GOAL
from pagemill.bench.peers_catalog import PEERS, SCRIPTS, Form, Peer
from pagemill.bench.peers_worker import Worker
from pagemill.cli import kvcache_beside as command
from pagemill.cli.main import main
from pagemill.models.random_init import SHAPES
from pagemill.models.registry import build_plan
from tests.fixtures.small_peers import SMALL_GPT2, peer_script
from tests.fixtures.tiny import tiny_gpt2, tiny_llama

NUM_TOKENS = 9
THEIRS_S = (8 / 1000 + 0.08, 8 / 2000 + 0.08)  # fake_peer's made-up times with and without the cache


@pytest.fixture(autouse=True)
def small_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "gpt2-medium", SMALL_GPT2)


@pytest.fixture
def script(tmp_path: Path) -> str:
    return peer_script(tmp_path)


def stand_in(monkeypatch: pytest.MonkeyPatch, script: str, *behaviours: tuple[str, str], module: str = "json") -> None:
    """Put made-up peers in transformers' place: (kind of weights, behaviour of its worker)."""
    forms = tuple(Form(dtype, "none", (("dtype", dtype), ("behaviour", each))) for dtype, each in behaviours)
    monkeypatch.setattr(
        kvcache_beside, "PEERS", (Peer("transformers", module, script, ("transformers==1",), forms, 10**18),)
    )


@pytest.fixture
def both_good(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    stand_in(monkeypatch, script, ("bfloat16", "good"), ("float32", "good"))


def arguments(tmp_path: Path, *more: str, model: str = "gpt2-medium") -> list[str]:
    given = ["--model", model, "--tokens", str(NUM_TOKENS), "--runs", "3", "--num-threads", "1"]
    places = ["--output", str(tmp_path / "out"), "--environments", str(tmp_path / "environments")]
    peer = ["--beside", "transformers", "--python-transformers", sys.executable]
    return ["bench", "kvcache", *given, *places, *peer, *more]


def report_of(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


@pytest.mark.usefixtures("both_good")
def test_json_holds_every_sample_of_both_with_versions_and_ratios(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(tmp_path, "--dtype", "bfloat16,float32", "--json")) == 0
    report = report_of(capsys)
    assert report["bench"] == "kvcache-beside"
    assert [(row["engine"], row["dtype"], row["cache"]) for row in report["rows"]] == [
        (engine, dtype, "with") for dtype in ("bfloat16", "float32") for engine in ("pagemill", "transformers")
    ]
    for row in report["rows"]:
        assert {"work", "mode", "unit", "median", "p10", "p90", "samples"} <= row.keys()
        assert (row["work"], row["unit"], len(row["samples"])) == (f"generate {NUM_TOKENS} tokens", "s", 3)
        assert row["fastest_peer"]["engine"] == "transformers"
        assert row["ratio"]["median"] == pytest.approx(THEIRS_S[0] / row["median"], rel=1e-4)
        ours = row["engine"] == "pagemill"
        assert row["goal"] == (GOAL if ours else None)
        assert row["reached"] == (row["ratio"]["median"] >= GOAL if ours else None)
        if not ours:
            assert row["samples"] == pytest.approx([THEIRS_S[0]] * 3)
    assert [(each["dtype"], each["versions"], each["failure"]) for each in report["peers"]] == [
        (dtype, {"fake": "1", "threads": "1"}, None) for dtype in ("bfloat16", "float32")
    ]
    assert report["peers"][0]["config"] == peer_config(SMALL_GPT2)
    settings = report["settings"]
    assert (settings["num_tokens"], settings["num_threads"], settings["num_runs_without"]) == (NUM_TOKENS, 1, 0)
    assert settings["weights"] == "random, seed 0"
    assert [(each["dtype"], each["kv_codec"]) for each in settings["engines"]] == [
        ("bfloat16", "int8"),
        ("float32", "f32"),
    ]
    assert len(report["machine"]["barrier_ns"]["samples"]) == 3
    assert {"versions", "git", "date"} <= report.keys()
    assert [Path(each).suffix for each in report["files"]] == [".json"]
    assert json.loads(Path(report["files"][0]).read_text()) == report


@pytest.mark.usefixtures("both_good")
def test_samples_are_taken_in_turns_and_without_the_cache_as_often_as_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(tmp_path, "--runs-without", "1", "--json")) == 0
    printed = capsys.readouterr()
    taken = [line.rpartition(":")[0] for line in printed.err.splitlines() if line.startswith("run ")]
    engines = ("pagemill bfloat16", "transformers bfloat16", "transformers float32")
    first = [f"run 1: {each} {cache} the cache" for cache in ("with", "without") for each in engines]
    assert taken == first + [f"run {index}: {each} with the cache" for index in (2, 3) for each in engines]
    without = [row for row in json.loads(printed.out)["rows"] if row["cache"] == "without"]
    assert [(row["engine"], len(row["samples"]), row["goal"]) for row in without] == [
        ("pagemill", 1, None),
        ("transformers", 1, None),
        ("transformers", 1, None),
    ]
    assert without[1]["median"] == pytest.approx(THEIRS_S[1])


@pytest.mark.usefixtures("both_good")
def test_table_has_a_row_for_each_and_fits_80_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(tmp_path, "--runs-without", "1")) == 0
    printed = capsys.readouterr().out
    assert "…" not in printed
    lines = printed.splitlines()
    rows = [line.split() for line in lines if "×" in line and "–" in line]
    assert sorted(row[:3] for row in rows) == sorted(
        [engine, dtype, cache]
        for engine, dtype in (("pagemill", "bfloat16"), ("transformers", "bfloat16"), ("transformers", "float32"))
        for cache in ("with", "without")
    )
    assert max(len(line) for line in lines if "–" in line) <= 80
    assert lines[0].startswith("gpt2-medium (random weights, 1 threads): 8 + 9 tokens, beside transformers")
    assert any(line.startswith("pagemill bfloat16 with the cache is ") and "the goal of 4×" in line for line in lines)
    assert "transformers float32: fake 1, threads 1" in lines


def test_peer_that_cannot_be_had_is_told_and_ours_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    stand_in(monkeypatch, script, ("bfloat16", "good"), module="no_such_module_anywhere")
    without_python = [each for each in arguments(tmp_path) if each not in ("--python-transformers", sys.executable)]
    assert main([*without_python, "--json"]) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert "free some room" in report["absent"]["transformers"]
    assert "transformers cannot be had: an environment takes about" in printed.err
    [row] = report["rows"]
    assert (row["engine"], len(row["samples"]), row["ratio"], row["reached"]) == ("pagemill", 3, None, None)


@pytest.mark.parametrize(
    ("behaviour", "failure", "num_samples"),
    [("crash later", "was ended by SIGSEGV", 2), ("refuse", "ValueError: cannot read gpt2-medium", 0)],
)
def test_peer_that_fails_is_left_out_from_there_on(
    behaviour: str,
    failure: str,
    num_samples: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    script: str,
) -> None:
    stand_in(monkeypatch, script, ("bfloat16", behaviour), ("float32", "good"))
    assert main(arguments(tmp_path, "--json")) == 0
    report = report_of(capsys)
    failures = {each["dtype"]: each["failure"] for each in report["peers"]}
    assert failure in failures["bfloat16"]
    assert failures["float32"] is None
    counts = {(row["engine"], row["dtype"]): len(row["samples"]) for row in report["rows"]}
    assert counts.get(("transformers", "bfloat16"), 0) == num_samples
    assert counts["transformers", "float32"] == counts["pagemill", "bfloat16"] == 3


@pytest.mark.usefixtures("both_good")
def test_ctrl_c_reports_what_was_measured_by_then(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def press_ctrl_c(self: object, series: Series, index: int) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(command._Told, "sampled", press_ctrl_c)
    assert main(arguments(tmp_path, "--json")) == 130
    report = report_of(capsys)
    assert report["interrupted"]
    assert [(row["engine"], len(row["samples"]), row["ratio"]) for row in report["rows"]] == [("pagemill", 1, None)]


@pytest.mark.usefixtures("both_good")
def test_ctrl_c_in_the_warm_up_reports_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def press_ctrl_c(self: object, engine: str, dtype: str) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(command._Told, "warming", press_ctrl_c)
    assert main(arguments(tmp_path, "--json")) == 130
    printed = capsys.readouterr()
    assert not printed.out
    assert "interrupted before anything was measured" in printed.err


@pytest.mark.usefixtures("both_good")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--beside", "vllm"], "--beside is 'vllm'; give transformers"),
        (["--python-transformers", "/nowhere/python"], "/nowhere/python cannot import json"),
        (["--timeout", "0"], "--timeout is 0"),
        (["--runs", "0"], "--runs is 0"),
        (["--runs-without", "-1"], "--runs-without is -1; beside a peer give a number from 0"),
        (["--tokens", "1"], "--tokens is 1"),
        (["--tokens", "60"], "lower --tokens to 56"),
        (["--dtype", "bfloat16,float23"], "dtype is 'float23'; did you mean float32?"),
        (["--kv-cache", "none"], "leave the option out"),
        (["--output", "/dev/null/x"], "results cannot be written to /dev/null/x"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(tmp_path, *options)) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert not printed.out


def test_python_without_a_peer_to_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [each for each in arguments(tmp_path) if each not in ("--beside", "transformers")]
    assert main(given) == 2
    assert "--python-transformers is for --beside transformers" in capsys.readouterr().err


@pytest.mark.usefixtures("both_good")
def test_model_of_another_family_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(tmp_path, model=str(tiny_llama(tmp_path)))) == 2
    assert "is of family llama; give --model gpt2-medium" in capsys.readouterr().err


@pytest.mark.usefixtures("both_good")
def test_checkpoint_of_gpt2_has_its_shape_put_beside_it_and_no_goal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(tmp_path, "--prompt", "ABC", "--json", model=str(tiny_gpt2(tmp_path)))) == 0
    report = report_of(capsys)
    assert report["settings"]["weights"] == "checkpoint"
    assert len(report["settings"]["prompt_token_ids"]) == 3
    assert report["peers"][0]["config"]["n_positions"] == 512
    assert {row["goal"] for row in report["rows"]} == {None}


def test_shape_with_a_head_of_its_own_is_refused() -> None:
    with pytest.raises(ConfigError, match="leave --beside out"):
        peer_config(replace(SMALL_GPT2, tied_head=False))


def test_contestants_are_transformers_two_kinds_of_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    peer = next(each for each in PEERS if each.name == "transformers")
    monkeypatch.setattr(kvcache_beside, "PEERS", (replace(peer, module="json"),))
    found, absent = contestants(SMALL_GPT2, tmp_path, sys.executable, print)
    assert absent == {}
    assert [(each.mode, each.options["dtype"]) for each in found] == [("bfloat16",) * 2, ("float32",) * 2]
    assert {each.command for each in found} == {(sys.executable, str(SCRIPTS / "run_transformers.py"))}


def python_with_torch() -> str:
    if all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        return sys.executable
    path = Path("~/.cache/pagemill/peers/transformers/bin/python").expanduser()
    if not path.exists():
        pytest.skip("no torch here: `pagemill bench kvcache --model gpt2-medium --beside transformers` sets it up")
    return str(path)


def test_transformers_makes_the_same_shape_and_generates_with_and_without_its_cache() -> None:
    weights = build_plan(SMALL_GPT2, max_positions=1).weights.values()
    with Worker((python_with_torch(), str(SCRIPTS / "run_transformers.py")), timeout_s=240) as worker:
        for dtype in ("bfloat16", "float32"):
            loaded = worker.load("small", 1, {"dtype": dtype, "seed": 0, "config": peer_config(SMALL_GPT2)})
            assert loaded.versions["threads"] == "1"
            assert int(loaded.versions["parameters"]) == sum(math.prod(each.shape) for each in weights)
            assert {"torch", "transformers"} <= loaded.versions.keys()
            assert loaded.num_alternatives == len(kvcache_beside.CACHES)
            for alternative in range(loaded.num_alternatives):
                assert worker.generate([[1, 2, 3, 299]], 5, alternative) > 0
