from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pagemill.base.config import EngineConfig
from pagemill.base.errors import ConfigError
from pagemill.bench.native_step import Demand
from pagemill.bench.roofline import Settings, limit_of, measure, open_subject
from pagemill.bench.roofline_peaks import MEMORY, NEAR, PeakMeter, Peaks, memory_buffer_bytes
from pagemill.bench.roofline_plot import draw_roofline
from pagemill.bench.roofline_report import make_report, make_tables, remarks, title_of
from pagemill.kernels.target import choose_target
from pagemill.planner.machine import this_machine
from tests.fixtures.tiny import tiny_llama


class Silent:
    def began(self, index: int, count: int) -> None:
        pass


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tiny_llama(tmp_path_factory.mktemp("tiny"))
    settings = Settings(num_rounds=2, quick=True)
    subject = open_subject(EngineConfig(model=str(path), num_threads=2, max_num_batched_tokens=40), settings)
    return make_report(subject, settings, measure(subject, settings, Silent()))


def test_the_limit_is_the_longer_of_reading_and_multiplying() -> None:
    peaks = Peaks(multiply_adds={("int8", 2): 100.0, ("f32", 2): 10.0}, read_bytes={(NEAR, 2): 50.0, (MEMORY, 2): 1.0})
    reading = limit_of(Demand({"int8": 100, "f32": 10}, 150, 50), peaks, 2)
    assert (reading.bound, reading.memory_s, reading.arithmetic_s, reading.seconds) == ("bandwidth", 4.0, 2.0, 4.0)
    multiplying = limit_of(Demand({"int8": 500}, 150, 50), peaks, 2)
    assert (multiplying.bound, multiplying.seconds) == ("arithmetic", 5.0)


def test_peaks_keep_the_best_that_was_seen() -> None:
    meter = PeakMeter(choose_target(), {NEAR: 1 << 20}, (1, 1))
    meter.peaks.read_bytes[NEAR, 1] = 1e30
    meter.peaks.multiply_adds["f32", 1] = 1e30
    meter.measure_reading(1)
    meter.measure_arithmetic(1)
    assert meter.peaks.read_bytes == {(NEAR, 1): 1e30}
    assert meter.peaks.multiply_adds["f32", 1] == 1e30
    assert 0 < meter.peaks.multiply_adds["int8", 1] < 1e20
    assert meter.peaks.barrier_ns == {}


def test_the_large_buffer_leaves_room_for_others() -> None:
    assert 16 << 20 <= memory_buffer_bytes() <= max(16 << 20, this_machine().free_bytes // 3)


def test_rows_hold_what_was_asked_and_their_limits(report: dict[str, Any]) -> None:
    assert [row["work"] for row in report["rows"]] == ["prefill 64", "decode × 1", "decode × 4"]
    for row in report["rows"]:
        assert row["best"] == pytest.approx(max(row["samples"]))
        assert len(row["samples"]) >= 2
        assert row["bound"] in ("bandwidth", "arithmetic")
        assert row["share"] == pytest.approx(row["best"] / row["limit"], rel=1e-4)
        longest = max(row["memory_s"], row["arithmetic_s"])
        assert row["share"] == pytest.approx(longest / row["best_s"], rel=1e-4)


def test_a_prompt_is_read_in_chunks_that_each_read_the_weights(report: dict[str, Any]) -> None:
    prefill, decode = report["rows"][:2]
    assert prefill["weight_bytes"] == 2 * decode["weight_bytes"]


def test_peaks_are_told_for_one_and_all_threads(report: dict[str, Any]) -> None:
    told = {(each["what"], each["threads"]) for each in report["peaks"]}
    assert told >= {(what, threads) for what in (MEMORY, NEAR, "f32", "bf16", "int8") for threads in (1, 2)}
    assert all(each["rate"] > 0 for each in report["peaks"])
    assert set(report["machine"]["barrier_ns"]) == {"2"}


def test_tables_and_remarks_show_every_row(report: dict[str, Any]) -> None:
    peaks, rows = make_tables(report)
    assert rows.row_count == len(report["rows"])
    assert peaks.row_count >= 5
    assert "tiny" in title_of(report)
    assert any("10⁹ multiply-adds" in line for line in remarks(report))


def test_the_plot_comes_as_png_and_svg(report: dict[str, Any], tmp_path: Path) -> None:
    paths = draw_roofline(report, tmp_path / "roofline")
    assert [path.suffix for path in paths] == [".png", ".svg"]
    text = paths[1].read_text()
    assert all(row["work"] in text for row in report["rows"])
    with pytest.raises(ConfigError, match="give another directory"):
        draw_roofline(report, tmp_path / "absent" / "roofline")


def test_an_interruption_keeps_the_first_round(tmp_path: Path) -> None:
    settings = Settings(num_rounds=500, quick=True)
    subject = open_subject(EngineConfig(model=str(tiny_llama(tmp_path)), num_threads=1), settings)
    found = measure(subject, settings, Silent(), interrupted=lambda: True)
    assert found.interrupted
    assert all(row.samples for row in found.rows)
    assert make_report(subject, settings, found)["interrupted"] is True


@pytest.mark.parametrize("num_rounds", [0, -1, 1001])
def test_a_number_of_rounds_that_cannot_be_is_refused(num_rounds: int) -> None:
    with pytest.raises(ConfigError, match="--rounds is"):
        Settings(num_rounds)


def test_another_executor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="leave the option out"):
        open_subject(EngineConfig(model=str(tiny_llama(tmp_path)), executor="reference"), Settings(quick=True))
