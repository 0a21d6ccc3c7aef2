from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from pagemill.base.errors import ConfigError
from pagemill.bench.report import Row, file_stem, prepare_directory, rounded, timestamp, write_json


def test_row_gives_median_spread_and_every_sample() -> None:
    row = Row("generate", "with", "s", (1.0, 2.0, 3.0, 4.0, 10.0)).as_json()
    assert row["median"] == 3.0
    assert row["mean"] == 4.0
    assert row["p10"] == pytest.approx(1.4)
    assert row["p90"] == pytest.approx(7.6)
    assert row["std"] == pytest.approx(3.53553, rel=1e-5)
    assert row["samples"] == [1.0, 2.0, 3.0, 4.0, 10.0]
    assert {"work", "engine", "mode", "unit"} <= row.keys()


def test_one_sample_has_no_standard_deviation() -> None:
    row = Row("generate", "with", "s", (2.5,)).as_json()
    assert row["std"] is None
    assert row["median"] == row["p10"] == row["p90"] == 2.5


def test_numbers_keep_six_digits() -> None:
    assert rounded(123456.789) == 123457.0
    assert rounded(0.000123456789) == 0.000123457


def test_file_names_are_plain_whatever_the_model_is_called() -> None:
    assert file_stem("kvcache", "../a b/ü$x.gguf", "2026-01-02T03:04:05Z") == "kvcache-a-b-x.gguf-2026-01-02T03-04-05Z"
    assert len(file_stem("x" * 500)) == 80


def test_time_is_utc() -> None:
    assert timestamp(datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)) == "2026-01-02T03:04:05Z"


def test_directory_is_made_and_left_empty(tmp_path: Path) -> None:
    made = prepare_directory(tmp_path / "a" / "b")
    assert made.is_dir()
    assert not list(made.iterdir())


def test_directory_that_cannot_be_is_refused_with_the_option_to_change(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below", "a\0b"):
        with pytest.raises(ConfigError, match="give another directory \\(--output\\)"):
            prepare_directory(path)


def test_report_is_written_as_one_json_object(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_json(path, {"bench": "x", "rows": [1.5, "×"]})
    assert json.loads(path.read_text()) == {"bench": "x", "rows": [1.5, "×"]}


def test_report_that_cannot_be_written_says_where(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be written to .*gone"):
        write_json(tmp_path / "gone" / "report.json", {})
