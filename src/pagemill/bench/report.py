"""What every bench hands back: rows of samples with their statistics, and the report as one JSON object in a directory.

Owns the schema that all benches share and where results are written; what is measured is each bench's own.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from pagemill.base.errors import ConfigError
from pagemill.bench.machine import describe_git, describe_versions

DEFAULT_DIRECTORY = "bench-results"
PASS, MISS = "pass", "miss"  # verdicts on a goal or a gate

_DIGITS = 6
_MAX_STEM = 80


@dataclass(frozen=True, slots=True)
class Row:
    """Samples of one quantity. work: what was done. mode: the variant that the samples belong to. unit: of each
    sample. At least one sample."""

    work: str
    mode: str
    unit: str
    samples: tuple[float, ...]
    engine: str = "pagemill"

    def __post_init__(self) -> None:
        assert self.samples, f"{self.work}: a row needs samples"

    @property
    def median(self) -> float:
        return float(np.median(self.samples))

    @property
    def mean(self) -> float:
        return float(np.mean(self.samples))

    @property
    def std(self) -> float | None:
        """Standard deviation of the sample (n - 1); None for one sample."""
        return float(np.std(self.samples, ddof=1)) if len(self.samples) > 1 else None

    def quantile(self, share: float) -> float:
        """The value below which `share` (0 to 1) of the samples lie, interpolated linearly."""
        return float(np.quantile(self.samples, share))

    def as_json(self) -> dict[str, Any]:
        """The row in the schema of every bench."""
        return {
            "work": self.work,
            "engine": self.engine,
            "mode": self.mode,
            "unit": self.unit,
            "median": rounded(self.median),
            "p10": rounded(self.quantile(0.1)),
            "p90": rounded(self.quantile(0.9)),
            "mean": rounded(self.mean),
            "std": None if self.std is None else rounded(self.std),
            "samples": [rounded(each) for each in self.samples],
        }


def report_heading(bench: str, machine: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that every report begins with."""
    return {
        "bench": bench,
        "date": timestamp(),
        "machine": dict(machine),
        "versions": describe_versions(),
        "git": describe_git(),
    }


def machine_remarks(machine: Mapping[str, Any]) -> list[str]:
    """Who had the cores meanwhile, where that is known (`cpu_shares`), and the machine, one line each."""
    lines, shares = [], machine["cpu_shares"]
    if shares is not None:
        lines.append(f"CPU time: own {shares['own']:.0%}, others {shares['others']:.0%}, steal {shares['steal']:.0%}")
    return [*lines, f"{machine['cpu']}, {machine['num_threads']} of {machine['num_cores']} cores, {machine['target']}"]


def absence_remarks(report: Mapping[str, Any]) -> list[str]:
    """What could not be had, one line each."""
    return [f"not run: {name}: {why}" for name, why in report["absent"].items()]


def rounded(value: float) -> float:
    """A measured number to six significant digits."""
    return float(f"{value:.{_DIGITS}g}")


def timestamp(now: datetime | None = None) -> str:
    """A moment in UTC (ISO 8601), now unless given."""
    return (now or datetime.now(UTC)).strftime("%Y-%m-%dT%H:%M:%SZ")


def prepare_directory(path: str | os.PathLike[str]) -> Path:
    """The directory for results, made if need be and found writable before anything is measured. Raises ConfigError."""
    directory = Path(path).expanduser()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".writable-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"results cannot be written to {directory}: {said}; give another directory (--output)"
        ) from None
    return directory


def file_stem(*parts: str) -> str:
    """A file name without its ending: parts joined by '-', anything but letters, digits, dots and dashes replaced."""
    return "-".join(re.sub(r"[^A-Za-z0-9._]+", "-", part).strip("-.")[:_MAX_STEM] for part in parts)


def write_json(path: Path, report: Mapping[str, Any]) -> None:
    """Write a report. Raises ConfigError where the file cannot be written."""
    try:
        path.write_text(json.dumps(report, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"the report cannot be written to {path}: {error.strerror}; give another directory (--output)"
        ) from None
