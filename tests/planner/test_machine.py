from __future__ import annotations

from pathlib import Path

import pytest

from pagemill.base.config import EngineConfig
from pagemill.base.errors import ConfigError
from pagemill.planner.machine import (
    Machine,
    Processors,
    kernel_threads,
    last_level_cache_bytes,
    processors,
    this_machine,
    thread_notice,
)

GIB_KB = 2**20


def machine_files(tmp_path: Path, membership: str, limits: dict[str, str]) -> Machine:
    """A machine of 16 GiB, 8 of them free, under the cgroup files of `limits` (path -> content)."""
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(f"MemTotal: {16 * GIB_KB} kB\nMemFree: 1 kB\nMemAvailable: {8 * GIB_KB} kB\n")
    (proc / "self" / "cgroup").write_text(membership)
    cgroups.mkdir()
    for name, content in limits.items():
        (cgroups / name).parent.mkdir(parents=True, exist_ok=True)
        (cgroups / name).write_text(content)
    return this_machine(proc, cgroups)


def test_free_memory_is_what_the_kernel_calls_available(tmp_path: Path) -> None:
    machine = machine_files(tmp_path, "0::/\n", {})
    assert (machine.free_bytes, machine.total_bytes) == (8 * 2**30, 16 * 2**30)


def test_a_cgroup_limit_counts_with_the_page_cache_given_back(tmp_path: Path) -> None:
    files = {
        "a/b/memory.max": f"{2 * 2**30}\n",
        "a/b/memory.current": f"{2**30}\n",
        "a/b/memory.stat": f"anon 5\ninactive_file {2**29}\n",
    }
    machine = machine_files(tmp_path, "0::/a/b\n", files)
    assert (machine.free_bytes, machine.total_bytes) == (2**30 + 2**29, 2 * 2**30)


def test_the_limit_of_a_group_above_counts(tmp_path: Path) -> None:
    files = {"a/memory.max": f"{2**30}\n", "a/memory.current": "0\n", "a/b/memory.max": "max\n"}
    assert machine_files(tmp_path, "0::/a/b\n", files).free_bytes == 2**30


def test_limits_of_the_first_version_of_cgroups_count(tmp_path: Path) -> None:
    files = {"memory/x/memory.limit_in_bytes": f"{2**30}\n", "memory/x/memory.usage_in_bytes": f"{2**28}\n"}
    assert machine_files(tmp_path, "5:memory:/x\n", files).free_bytes == 2**30 - 2**28


def test_a_group_that_has_used_more_than_its_limit_leaves_nothing(tmp_path: Path) -> None:
    files = {"memory.max": f"{2**20}\n", "memory.current": f"{2**30}\n"}
    assert machine_files(tmp_path, "0::/\n", files).free_bytes == 0


def test_a_quota_of_half_a_core_gives_one_thread(tmp_path: Path) -> None:
    assert machine_files(tmp_path, "0::/\n", {"cpu.max": "50000 100000\n"}).num_cores == 1


def test_without_limits_all_cores_of_the_process_count(tmp_path: Path) -> None:
    assert machine_files(tmp_path, "0::/\n", {"cpu.max": "max 100000\n"}).num_cores >= 1


def test_threads_come_from_the_option_then_the_variable_then_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(free_bytes=0, total_bytes=0, num_cores=7)
    monkeypatch.delenv("PAGEMILL_THREADS", raising=False)
    assert kernel_threads(EngineConfig(), machine) == 7
    monkeypatch.setenv("PAGEMILL_THREADS", "3")
    assert kernel_threads(EngineConfig(), machine) == 3
    assert kernel_threads(EngineConfig(num_threads=2), machine) == 2


@pytest.mark.parametrize("text", ["0", "-1", "many", "257", "9" * 50])
def test_a_wrong_number_of_threads_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("PAGEMILL_THREADS", text)
    with pytest.raises(ConfigError, match=r"PAGEMILL_THREADS is .* from 1 to 256"):
        kernel_threads(EngineConfig(), Machine(0, 0, 1))


def processor_files(tmp_path: Path, files: dict[str, str], allowed: set[int], limits: dict[str, str]) -> Processors:
    """CPUs as the /sys files of `files` (below devices/system/cpu) and the cgroup files of `limits` tell of them."""
    proc, cgroups, system = tmp_path / "proc", tmp_path / "cgroup", tmp_path / "sys"
    (proc / "self").mkdir(parents=True)
    (proc / "self" / "cgroup").write_text("0::/box\n")
    (cgroups / "box").mkdir(parents=True)
    for name, content in limits.items():
        (cgroups / "box" / name).write_text(content)
    for name, content in files.items():
        path = system / "devices" / "system" / "cpu" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return processors(proc, cgroups, system, frozenset(allowed))


def test_cores_are_counted_as_present_online_and_allowed(tmp_path: Path) -> None:
    seen = processor_files(tmp_path, {"present": "0-7\n", "online": "0-3,6\n"}, {0, 1}, {"cpu.max": "max 100000\n"})
    assert (seen.num_present, seen.num_online, seen.num_allowed) == (8, 5, 2)
    assert seen.quota is None
    assert seen.siblings == ()
    assert seen.num_cores == 2


def test_a_quota_is_told_in_cores(tmp_path: Path) -> None:
    assert processor_files(tmp_path, {}, {0, 1}, {"cpu.max": "150000 100000\n"}).quota == 1.5


def test_logical_cpus_that_share_a_core_are_found_where_both_are_allowed(tmp_path: Path) -> None:
    lists = {f"cpu{cpu}/topology/thread_siblings_list": f"{cpu % 2},{cpu % 2 + 2}\n" for cpu in range(4)}
    seen = processor_files(tmp_path, lists, {0, 1, 2}, {})
    assert seen.siblings == ((0, 2),)
    assert seen.num_cores == 2


def test_where_the_system_tells_nothing_the_mask_counts(tmp_path: Path) -> None:
    seen = processor_files(tmp_path, {"present": "rubbish\n"}, {3, 5, 9}, {})
    assert (seen.num_present, seen.num_online, seen.num_allowed, seen.huge_pages) == (3, 3, 3, "")


@pytest.mark.parametrize(
    ("text", "word"), [("always [madvise] never\n", "madvise"), ("always madvise [never]\n", "never")]
)
def test_the_word_in_brackets_is_the_one_in_force(tmp_path: Path, text: str, word: str) -> None:
    files = {"../../../kernel/mm/transparent_hugepage/enabled": text}
    (tmp_path / "sys" / "devices" / "system" / "cpu").mkdir(parents=True)
    assert processor_files(tmp_path, files, {0}, {}).huge_pages == word


@pytest.mark.parametrize(
    ("sizes", "wanted"),
    [(["48K", "2048K", "300M"], 300 * 2**20), (["32K"], 32 * 2**10), (["?"], None), ([], None)],
)
def test_the_largest_cache_is_the_last_level(tmp_path: Path, sizes: list[str], wanted: int | None) -> None:
    for index, size in enumerate(sizes):
        place = tmp_path / "devices" / "system" / "cpu" / "cpu0" / "cache" / f"index{index}"
        place.mkdir(parents=True)
        (place / "size").write_text(size + "\n")
    assert last_level_cache_bytes(tmp_path) == wanted


def test_only_more_threads_than_cores_are_worth_a_notice() -> None:
    machine = Machine(free_bytes=0, total_bytes=0, num_cores=2)
    assert thread_notice(1, machine) is None
    assert thread_notice(2, machine) is None
    notice = thread_notice(3, machine)
    assert notice is not None
    assert "3 kernel threads for 2 cores" in notice
    assert "set num_threads (or PAGEMILL_THREADS) to 2" in notice
