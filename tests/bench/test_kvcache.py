from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from pagemill.base.config import EngineConfig
from pagemill.base.errors import CapacityError, ConfigError, IntegrityError, ModelError
from pagemill.bench import kvcache
from pagemill.bench.generation import Estimate, Generation
from pagemill.bench.kvcache import (
    GPT2_PROMPT_IDS,
    WITH,
    WITHOUT,
    Measurement,
    Reading,
    Settings,
    Subject,
    check_same_tokens,
    measure,
    open_subject,
)
from pagemill.bench.kvcache_report import RATIO, curves, make_report, make_rows, make_table, remarks, title_of
from pagemill.bench.plots import draw_kvcache
from pagemill.models.random_init import SHAPES
from pagemill.planner.machine import Machine
from tests.fixtures.small_peers import SMALL_GPT2
from tests.fixtures.tiny import tiny_gpt2, tiny_llama

NUM_TOKENS = 12
SMALL = replace(SMALL_GPT2, name="small")


class Recorder:
    """A watcher that keeps what it is told, in order."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.total_s = 0.0
        self.advanced_s = 0.0

    def estimated(self, total_s: float, estimates: dict[str, Estimate]) -> None:
        self.told.append("estimated")
        self.total_s = total_s

    def began(self, mode: str, index: int, count: int) -> None:
        self.told.append(f"{mode} {index}/{count}")

    def advanced(self, expected_s: float) -> None:
        self.advanced_s += expected_s

    def ended(self, run: Generation) -> None:
        self.told.append(f"{run.mode} ended")


def config_of(path: object, **options: object) -> EngineConfig:
    return EngineConfig(model=str(path), num_threads=1, max_num_seqs=1, **options)  # type: ignore[arg-type]


def stop_after(count: int) -> Callable[[], bool]:
    """An interrupt that comes with the count-th token of the whole comparison."""
    asked = [0]

    def interrupted() -> bool:
        asked[0] += 1
        return asked[0] >= count

    return interrupted


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    path = tiny_llama(tmp_path_factory.mktemp("model"))
    return open_subject(config_of(path), Settings(NUM_TOKENS, prompt="ABC DEF"))


def test_runs_are_interleaved_and_both_modes_give_the_same_tokens(subject: Subject) -> None:
    watcher = Recorder()
    found = measure(subject, Settings(NUM_TOKENS, 3, 2), watcher)
    begun = [each for each in watcher.told if "/" in each]
    assert begun == ["with 1/3", "without 1/2", "with 2/3", "without 2/2", "with 3/3"]
    assert watcher.told[0] == "estimated"
    assert watcher.advanced_s == pytest.approx(watcher.total_s)
    assert {run.token_ids for run in found.runs} == {found.runs[0].token_ids}
    assert all(run.complete and len(run.seconds) == NUM_TOKENS for run in found.runs)


def test_histories_are_read_in_both_modes_in_turns(subject: Subject) -> None:
    found = measure(subject, Settings(NUM_TOKENS, 1, 2), Recorder())
    lengths = list(range(10, 7 + NUM_TOKENS))
    assert [[each.num_tokens for each in run] for run in found.readings] == [lengths, lengths]
    runs = found.of(WITHOUT)
    for run, readings in zip(runs, found.readings, strict=True):
        assert [each.without_s for each in readings] == list(run.seconds[-9:])
    assert {run.token_ids for run in found.runs} == {found.runs[0].token_ids}


def test_prompt_longer_than_what_is_compared_is_read_once(subject: Subject) -> None:
    settings = Settings(NUM_TOKENS, 1, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kvcache, "_PREFILL_TOKENS", 5)
        found = measure(subject, settings, Recorder())
    assert [[each.num_tokens for each in run] for run in found.readings] == [[7]]


def test_without_the_cache_every_step_computes_the_whole_history(subject: Subject) -> None:
    for mode, expected in ((WITH, 7 + NUM_TOKENS - 1), (WITHOUT, sum(range(7, 7 + NUM_TOKENS)))):
        llm = subject.engines[mode]
        before = llm.stats().num_computed_tokens
        assert len(kvcache.generate_timed(llm, subject.prompt, NUM_TOKENS, mode=mode).seconds) == NUM_TOKENS
        assert llm.stats().num_computed_tokens - before == expected
        assert llm.stats().cache.num_active_blocks == 0


def test_both_engines_share_one_executor(subject: Subject) -> None:
    builts = [llm.built for llm in subject.engines.values()]
    assert builts[0].executor is builts[1].executor
    assert [each.config.kv_cache for each in builts] == ["paged", "none"]


def test_report_has_the_schema_and_survives_json(subject: Subject) -> None:
    settings = Settings(NUM_TOKENS, 2, 2)
    report = json.loads(json.dumps(make_report(subject, settings, measure(subject, settings, Recorder()))))
    assert {"bench", "date", "machine", "versions", "git", "settings", "rows", "positions", "runs"} <= report.keys()
    for row in report["rows"]:
        assert {"work", "engine", "mode", "unit", "median", "p10", "p90", "samples", "mean", "std"} == row.keys()
        assert row["p10"] <= row["median"] <= row["p90"]
        assert len(row["samples"]) == 2
    modes = {(row["work"], row["mode"]) for row in report["rows"]}
    for work in (f"generate {NUM_TOKENS} tokens", "first token", "time per token", "time per token, last 11"):
        assert {(work, WITH), (work, WITHOUT)} <= modes
    assert (f"generate {NUM_TOKENS} tokens", RATIO) in modes
    assert {(f"read {7 + NUM_TOKENS - 1} tokens", mode) for mode in (WITH, WITHOUT)} <= modes
    assert [len(run["token_s"]) for run in report["runs"]] == [NUM_TOKENS] * 4
    for mode in (WITH, WITHOUT):
        assert report["positions"][mode]["position"] == list(range(7, 7 + NUM_TOKENS))
    assert report["machine"]["barrier_ns"]["median"] >= 0
    assert len(report["machine"]["barrier_ns"]["samples"]) == 4
    assert report["settings"]["engine"]["kv_cache"] == "paged"
    assert "published" not in report


def test_figures_are_sums_and_means_of_the_token_times() -> None:
    runs = [
        Generation(WITH, (1, 2, 3), (0.5, 0.1, 0.3), True, 1.0),
        Generation(WITHOUT, (1, 2, 3), (0.5, 1.0, 1.5), True, 1.0),
    ]
    readings = [[Reading(3, 1.0, 0.5), Reading(4, 2.0, 0.5), Reading(4, 4.0, 2.0)], []]
    rows = {(row.work, row.mode): row.samples for row in make_rows(Measurement({}, 4, runs, readings), 3)}
    assert rows["generate 3 tokens", WITH] == pytest.approx((0.9,))
    assert rows["generate 3 tokens", RATIO] == pytest.approx((3.0 / 0.9,))
    assert rows["first token", WITHOUT] == (500.0,)
    assert rows["time per token", WITH] == pytest.approx((200.0,))
    assert rows["time per token", RATIO] == pytest.approx((6.25,))
    assert rows["read 4 tokens", WITH] == (6.0,)
    assert rows["read 4 tokens", WITHOUT] == (2.0,)
    assert rows["read 4 tokens", RATIO] == (0.5,)


def test_ratio_is_to_the_runs_with_the_cache_on_either_side() -> None:
    times = [(WITH, 1.0), (WITHOUT, 30.0), (WITH, 2.0), (WITHOUT, 35.0), (WITH, 3.0), (WITH, 4.0)]
    runs = [Generation(mode, (1, 2), (1.0, seconds - 1.0), True, 1.0) for mode, seconds in times]
    rows = {(row.work, row.mode): row.samples for row in make_rows(Measurement({}, 4, runs), 2)}
    assert rows["generate 2 tokens", RATIO] == pytest.approx((30 / 1.5, 35 / 2.5))
    only = {(row.work, row.mode): row.samples for row in make_rows(Measurement({}, 4, runs[:4]), 2)}
    assert only["generate 2 tokens", RATIO] == pytest.approx((30 / 1.5, 35 / 2.0))


def test_curves_are_medians_over_the_runs_that_got_so_far() -> None:
    runs = [
        Generation(WITH, (1, 2), (0.1, 0.2), False, 1.0),
        Generation(WITH, (1, 2, 3), (0.3, 0.4, 0.5), True, 1.0),
    ]
    found = curves(Measurement({}, 4, runs), 10)
    assert found[WITH]["position"] == [10, 11, 12]
    assert found[WITH]["median_ms"] == pytest.approx([200, 300, 500])
    assert found[WITHOUT]["median_ms"] == []


def test_interrupt_leaves_a_report_over_the_tokens_that_both_modes_have(subject: Subject, tmp_path: Path) -> None:
    settings = Settings(NUM_TOKENS, 3, 3)
    found = measure(subject, settings, Recorder(), interrupted=stop_after(NUM_TOKENS + 5))
    assert found.interrupted
    assert [(run.mode, len(run.seconds), run.complete) for run in found.runs] == [(WITH, 12, True), (WITHOUT, 5, False)]
    report = make_report(subject, settings, found)
    assert report["interrupted"] is True
    assert {row["mode"] for row in report["rows"] if row["work"] == "generate 5 tokens"} == {WITH, WITHOUT, RATIO}
    assert any("without the cache ended at token 5 of 12" in line for line in remarks(report))
    assert len(draw_kvcache(report, tmp_path / "plot")) == 2
    assert subject.engines[WITHOUT].stats().num_running == 0


def test_interrupt_in_the_first_run_reports_that_run(subject: Subject, tmp_path: Path) -> None:
    for count in (1, 12):
        found = measure(subject, Settings(NUM_TOKENS), Recorder(), interrupted=stop_after(count))
        report = make_report(subject, Settings(NUM_TOKENS), found)
        assert {row["mode"] for row in report["rows"]} == {WITH}
        assert report["rows"][0]["work"] == f"generate {count} tokens"
        assert len(draw_kvcache(report, tmp_path / f"plot{count}")) == 2


def test_engines_that_disagree_fail_the_bench(subject: Subject, tmp_path: Path) -> None:
    other = open_subject(config_of(tiny_llama(tmp_path, seed=5)), Settings(NUM_TOKENS, prompt="ABC DEF"))
    mixed = replace(subject, engines={WITH: subject.engines[WITH], WITHOUT: other.engines[WITHOUT]})
    with pytest.raises(IntegrityError, match=r"run 1 \(with the cache\) and run 2 \(without the cache\) differ"):
        measure(mixed, Settings(NUM_TOKENS), Recorder())


def test_tokens_are_compared_as_far_as_both_runs_go() -> None:
    whole = Generation(WITH, (1, 2, 3), (1.0, 1.0, 1.0), True, 0.0)
    check_same_tokens([whole, replace(whole, mode=WITHOUT, token_ids=(1, 2))])
    with pytest.raises(IntegrityError, match="from token 2 on \\(2 and 9\\)"):
        check_same_tokens([whole, replace(whole, mode=WITHOUT, token_ids=(1, 9))])


def test_gpt2_checkpoint_with_one_token_of_prompt_and_two_of_answer(tmp_path: Path) -> None:
    settings = Settings(2, 1, 1, prompt="a")
    found = open_subject(config_of(tiny_gpt2(tmp_path), dtype="float32"), settings)
    report = make_report(found, settings, measure(found, settings, Recorder()))
    assert report["settings"]["prompt_token_ids"] == [97]
    assert report["settings"]["dtype"] == "float32"
    assert [run["complete"] for run in report["runs"]] == [True, True]


@pytest.mark.parametrize(
    ("options", "shown", "codec"),
    [
        ({}, "bfloat16", "int8"),
        ({"dtype": "float32"}, "float32", "f32"),
        ({"weight_format": "q8_0", "kv_cache_dtype": "bf16"}, "q8_0", "bf16"),
    ],
)
def test_shape_gets_random_weights_and_stored_ids(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, str], shown: str, codec: str
) -> None:
    monkeypatch.setitem(SHAPES, "small", SMALL)
    settings = Settings(8, 1, 1)
    found = open_subject(config_of("small", **options), settings)
    report = make_report(found, settings, measure(found, settings, Recorder()))
    assert report["settings"]["weights"] == "random, seed 0"
    assert report["settings"]["dtype"] == shown
    assert report["settings"]["kv_codec"] == codec
    assert found.prompt == tuple(token % 300 for token in GPT2_PROMPT_IDS)
    assert title_of(report) == f"small (random weights, {shown}, KV {codec}): 8 + 8 tokens, 1 + 1 runs"


def test_published_figure_stands_beside_its_own_shape_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "gpt2-medium", replace(SMALL, name="gpt2-medium"))
    settings = Settings(4, 1, 1)
    found = open_subject(config_of("gpt2-medium"), settings)
    report = make_report(found, settings, measure(found, settings, Recorder()))
    assert report["published"]["with"] == {"mean": 21.7, "std": 0.5}
    assert report["published"]["without"]["more_than"] is True
    console = Console(file=StringIO(), width=100)
    console.print(make_table(report))
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "> 107 ± 2 s" in printed
    assert "21.7 ± 0.5 s" in printed


def test_gpt2_medium_takes_a_thousand_tokens() -> None:
    assert len(GPT2_PROMPT_IDS) + 1000 <= SHAPES["gpt2-medium"].context_length


def test_plots_are_written_and_not_empty(subject: Subject, tmp_path: Path) -> None:
    settings = Settings(NUM_TOKENS, 2, 2)
    report = make_report(subject, settings, measure(subject, settings, Recorder()))
    png, svg = draw_kvcache(report, tmp_path / "a.b")
    assert (png.name, svg.name) == ("a.b.png", "a.b.svg")
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert png.stat().st_size > 20_000
    drawn = svg.read_text()
    assert "position in the context" in drawn
    assert drawn.count("the cache") >= 2


def test_plot_that_cannot_be_written_says_where(subject: Subject, tmp_path: Path) -> None:
    settings = Settings(NUM_TOKENS, 1, 1)
    report = make_report(subject, settings, measure(subject, settings, Recorder()))
    with pytest.raises(ConfigError, match=r"cannot be written to .*gone"):
        draw_kvcache(report, tmp_path / "gone" / "plot")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_tokens": 1}, "--tokens is 1; give at least 2"),
        ({"num_tokens": -5}, "--tokens is -5"),
        ({"num_runs": 0}, "--runs is 0; give a number of runs from 1"),
        ({"num_runs_without": 0}, "--runs-without is 0"),
        ({"num_runs": 1001}, "from 1 to 1,000"),
        ({"prompt": " "}, "--prompt is empty"),
    ],
)
def test_counts_that_cannot_be_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Settings(**arguments)  # type: ignore[arg-type]


def test_lengths_beyond_the_context_name_the_number_that_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_llama(tmp_path, context=64)
    with pytest.raises(ConfigError, match="lower --tokens to 61"):
        open_subject(config_of(path), Settings(62, prompt="ABC"))
    with pytest.raises(ConfigError, match="shorten the prompt"):
        open_subject(config_of(path), Settings(2, prompt="A" * 63))
    with pytest.raises(ConfigError, match="lower --tokens to 17"):
        open_subject(config_of(path, max_model_len=20), Settings(18, prompt="ABC"))
    monkeypatch.setitem(SHAPES, "small", SMALL)
    with pytest.raises(ConfigError, match=r"8 prompt tokens .* of small; lower --tokens to 56"):
        open_subject(config_of("small"), Settings(57))


def test_own_prompt_needs_a_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "small", SMALL)
    with pytest.raises(ConfigError, match="small brings no vocabulary, so --prompt cannot be read"):
        open_subject(config_of("small"), Settings(4, prompt="hello"))


def test_misspelt_shape_is_told_the_right_one() -> None:
    with pytest.raises(ModelError, match="'gpt2-medium' is a shape that this bench knows"):
        open_subject(config_of("gpt2-mediun"), Settings(4))
    with pytest.raises(ModelError, match="no known model and no path"):
        open_subject(config_of("zzzz"), Settings(4))


def test_memory_is_counted_before_weights_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvcache, "this_machine", lambda: Machine(1_000_000_000, 2_000_000_000, 2))
    with pytest.raises(CapacityError, match=r"354,823,168 weights × 4 bytes, drawn and then packed = 2\.64 GiB"):
        open_subject(config_of("gpt2-medium", dtype="float32"), Settings(4))
