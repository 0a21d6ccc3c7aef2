"""Values of the metrics: counters, gauges, histograms. Owns numbers and locks; writes no text and knows no client.

Standard library only, so that the control plane may count; `telemetry/export.py` reads `Metrics.collect`. Names that
the catalogue does not declare are our own mistake.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from threading import Lock

from pagemill.telemetry.catalog import CATALOG, Kind, MetricSpec

OTHER = "other"  # what stands for label values beyond a metric's number of label sets


@dataclass(frozen=True, slots=True)
class Sample:
    """One label set's value. labels: values in the order of the declaration. counts: of a histogram, one for each
    bucket and one beyond the last, not added up; value is then the sum of what was observed."""

    labels: tuple[str, ...]
    value: float
    counts: tuple[int, ...] = ()


class Series:
    """One metric's values by label set. Mutated by `add`, `set`, `observe` and `clear`; safe to use from any thread."""

    __slots__ = ("_counts", "_lock", "_values", "spec")

    def __init__(self, spec: MetricSpec, lock: Lock) -> None:
        self.spec = spec
        self._lock = lock
        self._values: dict[tuple[str, ...], float] = {}
        self._counts: dict[tuple[str, ...], list[int]] = {}
        if not spec.labels:
            self._values[()] = 0.0
            if spec.kind == "histogram":
                self._counts[()] = [0] * (len(spec.buckets) + 1)

    def add(self, amount: float = 1.0, *labels: str) -> None:
        """Count up, never down."""
        self._check("counter", labels)
        assert amount >= 0, (self.spec.name, amount)
        with self._lock:
            labels = self._known(labels)
            self._values[labels] = self._values.get(labels, 0.0) + amount

    def set(self, value: float, *labels: str) -> None:
        """The value now."""
        self._check("gauge", labels)
        with self._lock:
            self._values[self._known(labels)] = value

    def shift(self, amount: float, *labels: str) -> None:
        """A gauge goes up or down by `amount`."""
        self._check("gauge", labels)
        with self._lock:
            labels = self._known(labels)
            self._values[labels] = self._values.get(labels, 0.0) + amount

    def raise_to(self, total: float, *labels: str) -> None:
        """A counter that is counted elsewhere stands at `total` now; a smaller total changes nothing."""
        self._check("counter", labels)
        with self._lock:
            labels = self._known(labels)
            self._values[labels] = max(self._values.get(labels, 0.0), total)

    def observe(self, values: Iterable[float], *labels: str) -> None:
        """Count each value in its bucket: the first whose bound it does not exceed."""
        self._check("histogram", labels)
        buckets = self.spec.buckets
        with self._lock:
            labels = self._known(labels)
            counts = self._counts.get(labels)
            if counts is None:
                counts = self._counts[labels] = [0] * (len(buckets) + 1)
                self._values[labels] = 0.0
            total = 0.0
            for value in values:
                counts[bisect_left(buckets, value)] += 1
                total += value
            self._values[labels] += total

    def clear(self) -> None:
        """Forget every label set, as before a gauge with changing labels is set anew."""
        with self._lock:
            self._values.clear()
            self._counts.clear()

    def samples(self) -> list[Sample]:
        """All values now, in the order in which label sets appeared."""
        with self._lock:
            return [Sample(key, value, tuple(self._counts.get(key, ()))) for key, value in self._values.items()]

    def _check(self, kind: Kind, labels: tuple[str, ...]) -> None:
        assert self.spec.kind == kind, f"{self.spec.name} is a {self.spec.kind}"
        assert len(labels) == len(self.spec.labels), (self.spec.name, labels)

    def _known(self, labels: tuple[str, ...]) -> tuple[str, ...]:
        """The label set, or the one that stands for all beyond the largest number of them."""
        if labels in self._values or len(self._values) < self.spec.max_sets:
            return labels
        return (OTHER,) * len(labels)


class Metrics:
    """All metrics of one engine. Mutated through its series.

    model_name, engine: the labels that every sample carries.
    """

    __slots__ = ("_series", "engine", "model_name")

    def __init__(self, model_name: str, engine: str = "0") -> None:
        self.model_name = model_name
        self.engine = engine
        self._series = {name: Series(spec, Lock()) for name, spec in CATALOG.items()}

    def __getitem__(self, name: str) -> Series:
        """The series of a name of the catalogue."""
        return self._series[name]

    def collect(self) -> list[Series]:
        """All series, in the catalogue's order."""
        return list(self._series.values())
