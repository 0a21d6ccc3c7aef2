"""R17: the kernel contract suite against a core built with address and undefined-behaviour sanitizers.

`scripts/sanitize.sh` builds the core (build/sanitize, again only where sources changed) and runs tests with it. A
finding ends the process of the tests.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.trust.figures import Figure

ROOT = Path(__file__).resolve().parents[2]
# Every op in every shape and codec through whole plans, the moves of pages, and what policies keep of blocks.
CI_TESTS = (
    "tests/kernels/test_executors.py", "tests/kernels/test_attention.py", "tests/kernels/test_pages.py",
    "tests/kernels/test_policies.py",
)  # fmt: skip
_OTHERS = sorted(f"tests/kernels/{path.name}" for path in (ROOT / "tests" / "kernels").glob("test_*.py"))
ALL_TESTS = (*CI_TESTS, *(name for name in _OTHERS if name not in CI_TESTS))


def count(tests: Sequence[str] = ("tests/kernels",), timeout_s: float = 3600.0) -> Figure:
    """Tests that passed, and one failure where any did not or the sanitizers spoke."""
    command = ["bash", str(ROOT / "scripts" / "sanitize.sh"), sys.executable, *tests, "-p", "no:xdist"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout_s)
    told = done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", told)
    num_passed = int(passed.group(1)) if passed else 0
    replays = []
    if done.returncode or re.search("ERROR: AddressSanitizer|runtime error:", told):
        last = " ".join(told.strip().splitlines()[-3:])
        replays = [f"scripts/sanitize.sh {sys.executable} {' '.join(tests)}  # {last:.300}"]
    return Figure("R17", "sanitizer findings", len(replays), max(num_passed, len(replays)), "kernel tests", {}, replays)


def environment() -> dict[str, str]:
    """Without what a parent's pytest sets for its own workers."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
