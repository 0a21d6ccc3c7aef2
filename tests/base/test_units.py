from __future__ import annotations

import pytest

from pagemill.base.errors import ConfigError
from pagemill.base.units import format_bytes, format_seconds, parse_bytes, parse_count, parse_seconds


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("512MiB", 512 * 2**20),
        ("2GiB", 2 * 2**30),
        ("1.5 GiB", 3 * 2**29),
        ("500MB", 500 * 10**6),
        ("500mb", 500 * 10**6),
        ("1k", 1000),
        ("1K", 1024),
        ("1kB", 1000),
        ("4096", 4096),
        ("4_096", 4096),
        ("98,362,432 bytes", 98_362_432),
        (4096, 4096),
        ("0", 0),
    ],
)
def test_sizes_read_as_people_write_them(text: str | int, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    "text", ["", "MiB", "-1", "1 XB", "1e9", "12 MiB 3", "0.3", "9" * 40, "9" * 5000, "5TiBB", -1, True, 2**63]
)
def test_a_wrong_size_is_refused_with_what_is_accepted(text: str | int) -> None:
    with pytest.raises(ConfigError, match="512MiB"):
        parse_bytes(text)


@pytest.mark.parametrize(("text", "expected"), [("512", 512), ("2k", 2000), ("2K", 2048), ("1M", 2**20), (7, 7)])
def test_counts_read_with_decimal_and_binary_suffixes(text: str | int, expected: int) -> None:
    assert parse_count(text) == expected


@pytest.mark.parametrize("text", ["2KiB", "2kB", "two", "1.5", "-3"])
def test_a_wrong_count_is_refused_with_what_is_accepted(text: str) -> None:
    with pytest.raises(ConfigError, match="whole number"):
        parse_count(text)


@pytest.mark.parametrize(
    ("text", "expected"), [("30", 30.0), ("2s", 2.0), ("500ms", 0.5), ("5m", 300.0), ("1h", 3600.0), (0.25, 0.25)]
)
def test_times_read_with_units(text: str | float, expected: float) -> None:
    assert parse_seconds(text) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["", "2 parsecs", "-1", float("nan"), float("inf"), -2.0, True])
def test_a_wrong_time_is_refused_with_what_is_accepted(text: str | float) -> None:
    with pytest.raises(ConfigError, match="500ms"):
        parse_seconds(text)


@pytest.mark.parametrize(
    ("num_bytes", "expected"),
    [(0, "0 B"), (1023, "1,023 B"), (98_362_432, "93.8 MiB"), (2**30, "1 GiB"), (1000 * 2**20, "1000 MiB")],
)
def test_sizes_print_with_three_digits(num_bytes: int, expected: str) -> None:
    assert format_bytes(num_bytes) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"), [(4.2e-5, "42 µs"), (0.00421, "4.21 ms"), (12.34, "12.3 s"), (125.2, "2 min 5 s")]
)
def test_durations_print_with_the_unit_that_suits(seconds: float, expected: str) -> None:
    assert format_seconds(seconds) == expected
