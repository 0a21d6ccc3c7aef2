"""Amounts as people write them: sizes in bytes, counts, seconds. Owns their spelling in both directions.

Suffixes are vLLM's: a small letter is decimal (`1k` = 1,000), a capital is binary (`1K` = 1,024). With an `i` they are
binary (`KiB`, `MiB`), with a plain `B` decimal (`kB`, `MB`, `GB`), as in IEC 80000-13.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from pagemill.base.errors import ConfigError

_EXPONENT = {"k": 1, "m": 2, "g": 3, "t": 4}
_AMOUNT = re.compile(r"\s*([0-9][0-9_,]{0,30}(?:\.[0-9]{1,15})?)\s*([A-Za-z]*)\s*", re.ASCII)
_SECONDS = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_LARGEST = 2**62

BYTES_ACCEPTED = "a number of bytes such as 512MiB, 2GiB, 500MB, 1K (1,024) or 1k (1,000)"
COUNT_ACCEPTED = "a whole number such as 512, 2k (2,000) or 2K (2,048)"
SECONDS_ACCEPTED = "a time such as 30, 2s, 500ms, 5m or 1h"


def parse_bytes(value: str | int) -> int:
    """Bytes from `512MiB`, `2GiB`, `1.5GB`, `1k`, `1K` or a plain number. Raises ConfigError on anything else."""
    return _whole(value, _bytes_factor, BYTES_ACCEPTED)


def parse_count(value: str | int) -> int:
    """A count from `512`, `2k` or `2K`. Raises ConfigError on anything else, negative numbers included."""
    return _whole(value, _count_factor, COUNT_ACCEPTED)


def parse_seconds(value: str | float) -> float:
    """Seconds from `30`, `2s`, `500ms`, `5m`, `1h` or a plain number. Raises ConfigError on anything else."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        if math.isfinite(value) and value >= 0:
            return float(value)
        raise ConfigError(f"{value!r} is not a time; give {SECONDS_ACCEPTED}")
    match = _AMOUNT.fullmatch(value) if isinstance(value, str) else None
    if match is None or match[2] not in _SECONDS:
        raise ConfigError(f"{value!r} is not a time; give {SECONDS_ACCEPTED}")
    return float(_digits(match[1])) * _SECONDS[match[2]]


def format_bytes(num_bytes: int) -> str:
    """`num_bytes` to three digits with a binary unit: 93.8 MiB."""
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{num_bytes:,} B" if unit == "B" else f"{size:.3g} {unit}" if size < 999.5 else f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"


def format_seconds(seconds: float) -> str:
    """A duration to three digits with the unit that suits it: 4.21 ms, 12.3 s, 2 min 5 s."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.3g} µs"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


def _digits(text: str) -> str:
    return text.replace("_", "").replace(",", "")


def _count_factor(suffix: str) -> int | None:
    if not suffix:
        return 1
    exponent = _EXPONENT.get(suffix.lower()) if len(suffix) == 1 else None
    if exponent is None:
        return None
    return int((1000 if suffix.islower() else 1024) ** exponent)


def _bytes_factor(suffix: str) -> int | None:
    stem = suffix.lower()
    if stem in ("b", "byte", "bytes"):
        return 1
    if stem.endswith("ib") and len(stem) == 3 and stem[0] in _EXPONENT:
        return int(1024 ** _EXPONENT[stem[0]])
    if stem.endswith("b") and len(stem) == 2 and stem[0] in _EXPONENT:
        return int(1000 ** _EXPONENT[stem[0]])
    return _count_factor(suffix)


def _whole(value: object, factor_of: Callable[[str], int | None], accepted: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST:
        return value
    match = _AMOUNT.fullmatch(value) if isinstance(value, str) else None
    factor = factor_of(match[2]) if match is not None else None
    if match is None or factor is None:
        raise ConfigError(f"{value!r} is not an amount; give {accepted}")
    digits = _digits(match[1])
    amount = float(digits) * factor if "." in digits else int(digits) * factor
    if amount != int(amount) or amount > _LARGEST:
        raise ConfigError(f"{value!r} is not a whole amount up to 2^62; give {accepted}")
    return int(amount)
