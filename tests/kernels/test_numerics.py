"""Golden bits of every target: what a kernel computes may change only together with NUMERICS_VERSION.

Cached keys and values outlive a process; the version is part of what makes two blocks the same. After a change that is
meant, raise NUMERICS_VERSION in kernels/target.py and run `python -m tests.kernels.test_numerics`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from pagemill.kernels.target import NUMERICS_VERSION, available_targets
from tests.fixtures.plans import Shape, batch, native, tokens

GOLDEN = Path(__file__).parent.parent / "golden" / "numerics.json"
CASES = [
    ("f32", "f32"),
    ("f16", "f16"),
    ("bf16", "bf16"),
    ("q4_0", "bf16"),
    ("q4_1", "bf16"),
    ("q8_0", "f16"),
    ("f32", "int8"),
    ("q4_1", "int8"),
    ("rotated", "int8"),
]


def digest(target: str, fmt: str, codec: str) -> str:
    """SHA-256 over the logits of a prefill of 300 tokens and a decode step."""
    rotated = fmt == "rotated"
    shape = Shape(
        format="q4_1" if rotated else fmt,
        rotated=rotated,
        q_heads=6,
        kv_heads=2,
        hidden=192 if rotated else 96,
        ffn=256 if rotated else 96,
        vocab=64,
        qk_norm=True,
        rope="pairs",
    )
    executor = native(shape, target, codec=codec)
    ids, table = tokens(301, 64), list(range(20))
    state = hashlib.sha256()
    state.update(executor.forward(batch((ids[:300], 0, table), every_row=True)).tobytes())
    state.update(executor.forward(batch((ids[300:], 300, table))).tobytes())
    return state.hexdigest()


@pytest.mark.parametrize("target", available_targets())
@pytest.mark.parametrize(("fmt", "codec"), CASES)
def test_results_change_only_with_the_numerics_version(target: str, fmt: str, codec: str) -> None:
    golden = json.loads(GOLDEN.read_text())
    assert golden["numerics_version"] == NUMERICS_VERSION, "re-make the golden bits for the new version"
    assert digest(target, fmt, codec) == golden["digests"][f"{target}/{fmt}/{codec}"], "raise NUMERICS_VERSION"


if __name__ == "__main__":
    digests = {f"{t}/{fmt}/{codec}": digest(t, fmt, codec) for t in available_targets() for fmt, codec in CASES}
    GOLDEN.write_text(json.dumps({"numerics_version": NUMERICS_VERSION, "digests": digests}, indent=1) + "\n")
