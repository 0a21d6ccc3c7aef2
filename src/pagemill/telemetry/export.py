"""Metrics as text for a scraper. The only file that imports the metrics client; owns no values."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Final

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from pagemill.telemetry.catalog import BASE_LABELS
from pagemill.telemetry.metrics import Metrics, Series

# The client library fails on versions that are no numbers: it is not asked to read what a scraper sent.
OPEN_METRICS: Final = "application/openmetrics-text; version=1.0.0"


class _Families(Collector):
    """Series as the client's families, made when a scrape asks."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        own = (self._metrics.model_name, self._metrics.engine)
        for series in self._metrics.collect():
            yield _family(series, own)


class Exporter:
    """Renders one engine's metrics, and the process's own (CPU seconds, memory, open files)."""

    def __init__(self, metrics: Metrics) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_Families(metrics))
        ProcessCollector(registry=self._registry)

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """The scrape's body and its content type: Prometheus text, or OpenMetrics where `accept` asks for that."""
        encode, content_type = choose_encoder(OPEN_METRICS if "application/openmetrics-text" in accept else "")
        return encode(self._registry), content_type


def _family(series: Series, own: tuple[str, ...]) -> Metric:
    spec = series.spec
    labels = (*BASE_LABELS, *spec.labels)
    if spec.kind == "histogram":
        histogram = HistogramMetricFamily(spec.name, spec.help, labels=labels)
        bounds = [*(str(float(bound)) for bound in spec.buckets), "+Inf"]
        for each in series.samples():
            counts = accumulate(each.counts)
            buckets = [(bound, float(count)) for bound, count in zip(bounds, counts, strict=True)]
            histogram.add_metric((*own, *each.labels), buckets, each.value)
        return histogram
    family: CounterMetricFamily | GaugeMetricFamily
    family = (CounterMetricFamily if spec.kind == "counter" else GaugeMetricFamily)(spec.name, spec.help, labels=labels)
    for each in series.samples():
        family.add_metric((*own, *each.labels), each.value)
    return family
