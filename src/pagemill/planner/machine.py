"""What this machine lets the process use: free memory, cores, threads. Owns the reading of /proc, /sys and cgroups."""

from __future__ import annotations

import math
import os
import re
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


@dataclass(frozen=True, slots=True)
class Processors:
    """Logical CPUs as the system counts them. num_present: plugged in; num_online: of these, switched on; num_allowed:
    of these, in the mask of this process; quota: cores that its cgroups allow at a time, None without a limit;
    siblings: groups of allowed CPUs that the system says share one core; huge_pages: the word in force of
    transparent_hugepage/enabled, "" where the kernel has none."""

    num_present: int
    num_online: int
    num_allowed: int
    quota: float | None
    siblings: tuple[tuple[int, ...], ...]
    huge_pages: str

    @property
    def num_cores(self) -> int:
        """Allowed CPUs, those that share a core counted once."""
        return self.num_allowed - sum(len(group) - 1 for group in self.siblings)


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


def thread_notice(num_threads: int, machine: Machine) -> str | None:
    """What to say about a number of kernel threads: None unless it is above the cores of this process."""
    if num_threads <= machine.num_cores:
        return None
    cores = "1 core" if machine.num_cores == 1 else f"{machine.num_cores} cores"
    return (
        f"{num_threads} kernel threads for {cores} of this process: they wait for each other and every step takes "
        f"longer; set num_threads (or PAGEMILL_THREADS) to {machine.num_cores}, or leave it out"
    )


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


def processors(
    proc: Path = Path("/proc"),
    cgroups: Path = Path("/sys/fs/cgroup"),
    system: Path = Path("/sys"),
    allowed: frozenset[int] | None = None,
) -> Processors:
    """How the machine's logical CPUs are given to this process. allowed: CPU numbers, the process's mask unless given.

    Reads /sys/devices/system/cpu/{present,online} and topology/thread_siblings_list (Linux, sysfs-devices-system-cpu),
    where there is no such file counting what is allowed.
    """
    allowed = frozenset(os.sched_getaffinity(0)) if allowed is None else allowed
    place = system / "devices" / "system" / "cpu"
    online = len(_cpu_list(place / "online")) or len(allowed)
    groups = set()
    for cpu in allowed:
        together = _cpu_list(place / f"cpu{cpu}" / "topology" / "thread_siblings_list") & allowed
        if len(together) > 1:
            groups.add(tuple(sorted(together)))
    quota = min((_cpu_quota(group) for group in _groups(proc / "self" / "cgroup", cgroups)), default=math.inf)
    return Processors(
        num_present=len(_cpu_list(place / "present")) or online,
        num_online=online,
        num_allowed=len(allowed),
        quota=None if quota == math.inf else quota,
        siblings=tuple(sorted(groups)),
        huge_pages=_chosen_word(system / "kernel" / "mm" / "transparent_hugepage" / "enabled"),
    )


def last_level_cache_bytes(system: Path = Path("/sys")) -> int | None:
    """Bytes of the largest cache of the first CPU (sysfs, index*/size), None where the system does not tell."""
    sizes = []
    for path in (system / "devices" / "system" / "cpu" / "cpu0" / "cache").glob("index*/size"):
        match = re.fullmatch(r"([0-9]{1,12})([KM]?)", _text(path))
        if match is not None:
            sizes.append(int(match[1]) * {"": 1, "K": 2**10, "M": 2**20}[match[2]])
    return max(sizes, default=None)


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _cpu_list(path: Path) -> set[int]:
    """CPU numbers of a list as the kernel writes it: 0-3,8 (empty where there is none)."""
    found: set[int] = set()
    for part in _text(path).split(","):
        first, _, last = part.partition("-")
        if first.isdecimal() and (last or first).isdecimal():
            found.update(range(int(first), int(last or first) + 1))
    return found


def _chosen_word(path: Path) -> str:
    """The word in brackets of a list of choices: always [madvise] never."""
    match = re.search(r"\[(\w+)\]", _text(path))
    return match[1] if match is not None else ""


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
