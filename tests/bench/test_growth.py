from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pagemill.base.config import EngineConfig
from pagemill.base.errors import ConfigError
from pagemill.bench import growth
from pagemill.bench.growth import (
    COARSE,
    FULL,
    QUICK,
    SECOND_MODEL,
    Cell,
    Grid,
    ModelGrowth,
    Settings,
    growths,
    measure,
    subjects,
)
from pagemill.bench.growth_plot import draw_growth
from pagemill.bench.growth_report import make_report, make_tables, remarks
from pagemill.bench.native_step import Work, open_packed_model
from pagemill.kernels.target import choose_target
from pagemill.planner.machine import Machine
from tests.fixtures.tiny import tiny_llama

SETTINGS = Settings(num_rounds=2, quick=True)


class Silent:
    def loading(self, name: str) -> None:
        pass

    def began(self, name: str, codec: str, index: int, count: int) -> None:
        pass


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    return EngineConfig(model=str(tiny_llama(tmp_path_factory.mktemp("tiny"))), num_threads=1)


@pytest.fixture(scope="module")
def report(config: EngineConfig) -> dict[str, Any]:
    grid = Grid((1, 3), (16, 64, 1000), ("bf16", "int8"))
    return make_report(SETTINGS, measure([(config, grid)], SETTINGS, Silent()))


def test_growth_is_extra_time_over_the_time_to_read_the_extra_bytes(config: EngineConfig) -> None:
    found = ModelGrowth(open_packed_model(config, choose_target(), 64))
    found.bandwidth["int8", 2] = 1000.0
    found.memory_bytes_s = 500.0
    found.page_bytes_s = {"int8": 800.0}
    found.cells = [
        Cell("int8", Work(2, 16), 100, [0.5, 0.25]),
        Cell("int8", Work(2, 32), 300, [9.0]),
        Cell("int8", Work(2, 64), 600, [0.75, 1.0]),
        Cell("bf16", Work(2, 500), 10_000, [5.0]),
    ]
    (row,) = growths(found)
    assert (row.from_context, row.to_context, row.extra_bytes, row.extra_s) == (16, 64, 500, 0.5)
    assert row.ratio == pytest.approx(1.0)
    assert row.memory_ratio == pytest.approx(0.5)
    assert row.page_ratio == pytest.approx(0.8)


def test_one_context_alone_grows_nowhere(config: EngineConfig) -> None:
    found = ModelGrowth(open_packed_model(config, choose_target(), 64))
    found.bandwidth["int8", 1] = 1000.0
    found.cells = [Cell("int8", Work(1, 16), 100, [0.5]), Cell("int8", Work(1, 64), 600)]
    assert growths(found) == []


def test_every_step_that_fits_is_measured_and_the_others_are_told(report: dict[str, Any]) -> None:
    rows = {(row["codec"], row["num_seqs"], row["context"]) for row in report["rows"]}
    assert rows == {(codec, batch, context) for codec in ("bf16", "int8") for batch in (1, 3) for context in (16, 64)}
    (model,) = report["models"]
    assert {(each["num_seqs"], each["context"]) for each in model["skipped"]} == {(1, 1000), (3, 1000)}
    assert "reaches 512 positions" in model["skipped"][0]["reason"]
    assert {(each["codec"], each["num_seqs"]) for each in model["growth"]} == {
        (codec, batch) for codec in ("bf16", "int8") for batch in (1, 3)
    }
    for each in model["growth"]:
        assert each["near_bytes_s"] > 0
        assert each["page_bytes_s"] > 0
        wanted = 48 * each["num_seqs"] * model["kv_bytes_per_token"][each["codec"]]
        assert each["extra_bytes"] == wanted


def test_tables_and_remarks_show_the_grid(report: dict[str, Any]) -> None:
    tables = make_tables(report)
    assert [table.row_count for table in tables] == [2, 2]
    assert any("4 steps left out" in line for line in remarks(report))


def test_plots_come_for_each_model(report: dict[str, Any], tmp_path: Path) -> None:
    paths = draw_growth(report, tmp_path / "growth")
    assert [path.suffix for path in paths] == [".png", ".svg"]
    assert "tokens per second" in paths[1].read_text()


def test_a_kv_cache_beyond_half_of_the_free_memory_is_left_out(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growth, "this_machine", lambda: Machine(2 * 64 * 1024, 1 << 30, 1))
    found = measure([(config, Grid((1, 64), (16, 64), ("bf16",)))], Settings(1, quick=True), Silent())
    assert {each.work for each in found.models[0].skipped} == {Work(64, 16), Work(64, 64)}
    assert "half of what is free" in found.models[0].skipped[0].reason


def test_where_nothing_fits_the_message_says_why(config: EngineConfig) -> None:
    with pytest.raises(ConfigError, match=r"no step fits: the model reaches 512 positions"):
        measure([(config, Grid((1,), (600,), ("bf16",)))], Settings(1, quick=True), Silent())


def test_an_interruption_keeps_what_was_measured(config: EngineConfig) -> None:
    asked: list[int] = []

    def interrupted() -> bool:
        asked.append(1)
        return len(asked) > 3

    found = measure([(config, QUICK)], Settings(500, quick=True), Silent(), interrupted=interrupted)
    assert found.interrupted
    report = make_report(SETTINGS, found)
    assert 0 < len(report["rows"]) < 4
    assert make_tables(report)


def test_without_a_model_the_default_and_a_larger_shape_are_measured() -> None:
    default = EngineConfig()
    names = [(each.model, grid) for each, grid in subjects(default, Settings(), model_given=False)]
    assert names == [(default.model, FULL), (SECOND_MODEL, COARSE)]
    assert [grid for _, grid in subjects(default, SETTINGS, model_given=False)] == [QUICK]
    large = EngineConfig(model=SECOND_MODEL)
    assert subjects(large, Settings(), model_given=True) == [(large, COARSE)]


def test_one_kv_type_may_be_asked_for() -> None:
    config = EngineConfig(kv_cache_dtype="f32")
    ((_, grid),) = subjects(config, Settings(), model_given=True)
    assert grid.codecs == ("f32",)
    assert grid.contexts == FULL.contexts


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="--rounds is 0"):
        Settings(0)
    with pytest.raises(ConfigError, match="leave the option out"):
        subjects(EngineConfig(executor="reference"), Settings(), model_given=True)
