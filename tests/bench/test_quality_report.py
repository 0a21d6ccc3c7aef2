from __future__ import annotations

import pytest

from pagemill.bench.quality_modes import REFERENCE, Comparison, Mode
from pagemill.bench.quality_report import DEFAULT_GATE, Gate, gate_of, peer_verdict, verdict
from pagemill.bench.quality_score import Estimate


@pytest.mark.parametrize(
    ("mode", "against", "bits", "gate"),
    [
        (REFERENCE, REFERENCE, 32, None),
        (Mode("auto", "bf16"), REFERENCE, 16, Gate(1.005, 0.005)),
        (Mode("bfloat16", "f32"), REFERENCE, 32, Gate(1.005, 0.005)),
        (Mode("throughput", "bf16"), REFERENCE, 16, Gate(1.01, 0.008)),
        (Mode("auto", "int8"), REFERENCE, 8.25, Gate(1.005, 0.005)),
        (Mode("throughput", "int8"), REFERENCE, 8.25, Gate(1.01, 0.008)),
        (Mode("auto", "int5"), REFERENCE, 5.3, None),
        (Mode("auto", "int8", True), REFERENCE, 8.25, None),
        (Mode("auto", "int8"), Mode("auto", "bf16"), 8.25, Gate(1.0015, 0.0033)),
        (Mode("throughput", "int8"), Mode("throughput", "bf16"), 8.25, Gate(1.0015, 0.0033)),
        (Mode("auto", "int5"), Mode("auto", "bf16"), 5.3, Gate(1.012, 0.01)),
        (Mode("auto", "int4"), Mode("auto", "bf16"), 4.75, Gate(1.02, 0.02)),
        (Mode("auto", "f32"), Mode("auto", "bf16"), 32, None),
        (Mode("auto", "f16"), REFERENCE, 16, Gate(1.005, 0.005)),
        (Mode("q8_0", "bf16"), REFERENCE, 16, Gate(1.005, 0.005)),
        (Mode("auto", "f32", True), REFERENCE, 32, None),
        (Mode("auto", "int8-k", True), Mode("auto", "bf16", True), 20.125, None),
        (Mode("auto", "int8", True), Mode("auto", "f32", True), 8.25, None),
        (Mode("auto", "int8", True), Mode("auto", "bf16", True), 8.25, Gate(1.0015, 0.0033)),
    ],
)
def test_gate_follows_from_what_is_compared(mode: Mode, against: Mode, bits: float, gate: Gate | None) -> None:
    assert gate_of(Comparison(mode, against), bits) == gate


@pytest.mark.parametrize(
    ("ratio", "kld", "expected"),
    [(1.005, 0.005, "pass"), (0.99, 0.001, "pass"), (1.0051, 0.001, "miss"), (1.001, 0.0051, "miss")],
)
def test_verdict_needs_both_figures_within_the_gate(ratio: float, kld: float, expected: str) -> None:
    assert verdict(DEFAULT_GATE, Estimate(ratio, None), Estimate(kld, None)) == expected


@pytest.mark.parametrize(
    ("ratio", "expected"), [(1.0, "pass"), (1.0049, "pass"), (0.9951, "pass"), (1.0051, "miss"), (0.9949, "miss")]
)
def test_our_float32_is_near_llama_cpp_on_either_side(ratio: float, expected: str) -> None:
    assert peer_verdict(Estimate(ratio, None)) == expected
