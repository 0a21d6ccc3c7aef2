"""What a figure was measured on: machine, versions, commit, and how much others disturbed it. Reads /proc and asks git;
measures nothing of the engine. Every bench puts these into its report.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pagemill import __version__
from pagemill.kernels import _native
from pagemill.planner.machine import this_machine

_GIT_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class CpuCounters:
    """Seconds of CPU time since the machine's start, all cores, from /proc/stat; `own_s`: of this process."""

    busy_s: float
    nice_s: float
    idle_s: float
    steal_s: float
    own_s: float


def read_counters(stat: Path = Path("/proc/stat"), *, beside_s: float = 0.0) -> CpuCounters | None:
    """The counters now; None where the machine does not tell (proc(5), line `cpu`). beside_s: CPU seconds of processes
    that count as ours too."""
    try:
        fields = stat.read_text().split("\n", 1)[0].split()
        user, nice, system, idle, wait, irq, softirq, steal = (int(text) for text in fields[1:9])
    except (OSError, ValueError):
        return None
    tick_s = 1.0 / os.sysconf("SC_CLK_TCK")
    own = os.times()
    return CpuCounters(
        busy_s=(user + nice + system + irq + softirq) * tick_s,
        nice_s=nice * tick_s,
        idle_s=(idle + wait) * tick_s,
        steal_s=steal * tick_s,
        own_s=own.user + own.system + beside_s,
    )


def disturbance(before: CpuCounters | None, after: CpuCounters | None) -> dict[str, float] | None:
    """Who had the cores between two readings, as shares of all CPU time: own, others (other processes), nice (of
    which at low priority), steal (taken by the hypervisor), idle. None where the machine does not tell."""
    if before is None or after is None:
        return None
    busy, idle, steal = (
        after.busy_s - before.busy_s,
        after.idle_s - before.idle_s,
        after.steal_s - before.steal_s,
    )
    total = max(busy + idle + steal, 1e-9)
    own = min(after.own_s - before.own_s, busy)
    shares = {
        "own": own,
        "others": busy - own,
        "nice": after.nice_s - before.nice_s,
        "steal": steal,
        "idle": idle,
    }
    return {name: round(seconds / total, 4) for name, seconds in shares.items()}


def describe_machine(target: str, num_threads: int) -> dict[str, Any]:
    """The machine as a report shows it. target: of the kernels; num_threads: kernel threads; memory in bytes."""
    machine = this_machine()
    return {
        "cpu": cpu_model(),
        "num_cores": machine.num_cores,
        "memory_bytes": machine.total_bytes,
        "free_bytes": machine.free_bytes,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "target": target,
        "num_threads": num_threads,
    }


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name, as the system tells it."""
    try:
        for line in cpuinfo.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "Model", "cpu model") and value.strip():
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown"


def describe_versions() -> dict[str, str]:
    """Versions of what computes."""
    return {"pagemill": __version__, "python": platform.python_version(), "numpy": np.__version__}


def describe_git(start: Path = Path(__file__).parent) -> dict[str, Any] | None:
    """Commit of the checkout that holds `start`, and whether files differ from it. None outside a checkout of Pagemill,
    or without git."""
    top = _git(start, "rev-parse", "--show-toplevel")
    if top is None or not _is_ours(Path(top)):
        return None
    commit = _git(start, "rev-parse", "HEAD")
    changes = _git(start, "status", "--porcelain", "--untracked-files=no")
    return None if commit is None else {"commit": commit, "modified": bool(changes)}


def barrier_ns(num_threads: int) -> float:
    """Nanoseconds that one barrier of the kernels' thread pool takes now: it tells how near the cores are placed."""
    return float(_native.barrier_ns(num_threads))


def _is_ours(top: Path) -> bool:
    try:
        project = tomllib.loads((top / "pyproject.toml").read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
        return False
    return bool(project.get("project", {}).get("name") == "pagemill")


def _git(directory: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(directory), *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            encoding=sys.getfilesystemencoding(),
            errors="replace",
            timeout=_GIT_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
