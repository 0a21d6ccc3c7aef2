"""Which instruction-set target runs the kernels. `PAGEMILL_FORCE_TARGET` overrides the choice, for tests."""

from __future__ import annotations

import os

from pagemill.base.errors import ConfigError
from pagemill.kernels import _native

# Part of what makes two cached blocks the same. Every change of a kernel's result must raise it; a golden test fails
# until it is.
NUMERICS_VERSION = 5


def available_targets() -> list[str]:
    """Targets that this machine can run, the best first."""
    return list(_native.available_targets())


def built_targets() -> list[str]:
    """Targets that this build contains, the best first."""
    return list(_native.built_targets())


def choose_target() -> str:
    """The forced target, or the best that the machine can run. Raises ConfigError for one that it cannot."""
    forced = os.environ.get("PAGEMILL_FORCE_TARGET", "").strip()
    available = available_targets()
    if not forced:
        return available[0]
    if forced not in available:
        raise ConfigError(
            f"PAGEMILL_FORCE_TARGET is {forced!r}, which this machine or build cannot run; "
            f"choose one of {', '.join(available)}, or unset it"
        )
    return forced


def arithmetic_of(target: str) -> str:
    """How a target multiplies 4-bit and 8-bit weights. A property of the target, never of the step.

    "int8": with activations in groups of 32 signed bytes, the head's of 16 bits. "bf16": weights and activations are
    rounded to bfloat16.
    """
    return "bf16" if target == "amx" else "int8"


def rotates(target: str) -> bool:
    """Whether weight_format "auto" means "int8" for 4-bit and 8-bit checkpoints; elsewhere it means "exact".

    So it is on targets with an instruction for integer dot products over 512 bits, or on tiles.
    """
    return target in ("amx", "avx512_bf16", "avx512")


def numerics_id(target: str) -> str:
    """Names the results of a target's kernels, bit for bit."""
    return f"{target}-{NUMERICS_VERSION}"
