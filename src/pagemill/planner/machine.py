"""What this machine lets the process use: free memory, cores, threads. Owns the reading of /proc and cgroup limits."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

from pagemill.base.config import EngineConfig
from pagemill.base.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Machine:
    """What this process may use. free_bytes: memory that is free now; num_cores: cores, quotas counted."""

    free_bytes: int
    total_bytes: int
    num_cores: int


def kernel_threads(config: EngineConfig, machine: Machine) -> int:
    """Kernel threads: num_threads, else PAGEMILL_THREADS, else the cores of this process."""
    if config.num_threads is not None:
        return config.num_threads
    text = os.environ.get("PAGEMILL_THREADS", "").strip()
    if not text:
        return machine.num_cores
    if not text.isdecimal() or not 1 <= int(text[:9]) <= 256:
        raise ConfigError(f"PAGEMILL_THREADS is {text!r}; give a whole number from 1 to 256")
    return int(text)


def this_machine(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> Machine:
    """Memory and cores of this process: /proc/meminfo and the CPU mask, within the limits of its cgroups (v1, v2)."""
    meminfo = _meminfo(proc / "meminfo")
    free, total = meminfo["MemAvailable"], meminfo["MemTotal"]
    cores = float(len(os.sched_getaffinity(0)))
    for group in _groups(proc / "self" / "cgroup", cgroups):
        limit = _number(group / "memory.max") or _number(group / "memory.limit_in_bytes")
        if limit is not None and limit < total:
            used = _number(group / "memory.current") or _number(group / "memory.usage_in_bytes") or 0
            free = min(free, max(0, limit - used + _page_cache(group / "memory.stat")))
            total = limit
        cores = min(cores, _cpu_quota(group))
    return Machine(free_bytes=free, total_bytes=total, num_cores=max(1, math.ceil(cores)))


def _meminfo(path: Path) -> dict[str, int]:
    found = {"MemAvailable": 0, "MemTotal": 0}
    for line in path.read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in found:
            found[name] = int(rest.split()[0]) * 1024
    return found


def _groups(membership: Path, root: Path) -> list[Path]:
    """Directories of the process's cgroups and of those above them, as far as they are visible here."""
    groups: list[Path] = []
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, inner = line.split(":", 2)
        for top in (root, *(root / each for each in controllers.split(",") if each)):
            place = top / inner.lstrip("/")
            while top in (place, *place.parents):
                if place.is_dir() and place not in groups:
                    groups.append(place)
                if place == top:
                    break
                place = place.parent
    return groups


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _page_cache(path: Path) -> int:
    """File pages that the kernel gives back under pressure."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    values = dict(line.split()[:2] for line in lines if len(line.split()) >= 2)
    return int(values.get("inactive_file", values.get("total_inactive_file", "0")))


def _cpu_quota(group: Path) -> float:
    """Cores that a group may use at a time; infinite where nothing limits it."""
    try:
        quota, period = (group / "cpu.max").read_text().split()
    except (OSError, ValueError):
        quota_us, period_us = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
        return quota_us / period_us if quota_us and period_us else math.inf
    return math.inf if quota == "max" else int(quota) / int(period)
