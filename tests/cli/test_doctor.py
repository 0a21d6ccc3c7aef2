from __future__ import annotations

import json
from pathlib import Path

import pytest

from pagemill.cli import doctor
from pagemill.cli.main import main
from pagemill.planner.machine import Machine, processors


def checks(capsys: pytest.CaptureFixture[str], code: int) -> dict[str, dict[str, str]]:
    assert main(["doctor", "--json"]) == code
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is (code == 0)
    return {each["name"]: each for each in found["checks"]}


def test_a_sound_machine_passes_every_check(capsys: pytest.CaptureFixture[str], own_home: Path) -> None:
    found = checks(capsys, 0)
    assert set(found) == set(doctor.CHECKS)
    assert found["self-check"]["status"] == "ok"
    assert "tokens of a random model" in found["self-check"]["found"]
    assert found["default model"]["fix"] == "run `pagemill models pull smollm2-135m`"


def test_a_cache_that_cannot_be_written_is_wrong_and_says_what_to_do(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PAGEMILL_HOME", str(tmp_path / "file" / "home"))
    assert "PAGEMILL_HOME" in checks(capsys, 2)["model directory"]["fix"]


def test_a_target_that_cannot_run_is_wrong(
    capsys: pytest.CaptureFixture[str], own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAGEMILL_FORCE_TARGET", "quantum")
    found = checks(capsys, 2)
    assert "PAGEMILL_FORCE_TARGET is 'quantum'" in found["native core"]["fix"]
    assert found["self-check"]["status"] == "wrong"


def test_a_slower_target_is_a_warning_and_still_right(
    capsys: pytest.CaptureFixture[str], own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAGEMILL_FORCE_TARGET", "scalar")
    found = checks(capsys, 0)
    assert found["native core"]["status"] == "warning"
    assert "forced: scalar" in found["native core"]["found"]
    assert found["self-check"]["status"] == "ok"


def test_a_missing_native_core_says_how_to_build_it(
    capsys: pytest.CaptureFixture[str], own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_NATIVE_ERROR", "No module named 'pagemill.kernels._native'")
    found = checks(capsys, 2)
    assert "pip install ." in found["native core"]["fix"]


def test_the_table_shows_what_to_do(capsys: pytest.CaptureFixture[str], own_home: Path) -> None:
    assert main(["doctor"]) == 0
    assert "→ run `pagemill models pull smollm2-135m`" in capsys.readouterr().out


def pretend(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    *,
    present: str = "0-3",
    online: str = "0-3",
    allowed: tuple[int, ...] = (0, 1, 2, 3),
    siblings: dict[int, str] | None = None,
    quota: str = "max 100000",
    huge_pages: str = "always [madvise] never",
    threads: int = 2,
    gain: float = 2.0,
) -> None:
    """Let doctor see a machine by its files: /sys, /proc/self/cgroup and the cgroup's cpu.max."""
    cpu, pages = tmp_path / "sys/devices/system/cpu", tmp_path / "sys/kernel/mm/transparent_hugepage"
    for directory in (cpu, pages, tmp_path / "cgroup/box", tmp_path / "proc/self"):
        directory.mkdir(parents=True)
    (cpu / "present").write_text(present + "\n")
    (cpu / "online").write_text(online + "\n")
    for number, listed in (siblings or {}).items():
        (cpu / f"cpu{number}" / "topology").mkdir(parents=True)
        (cpu / f"cpu{number}" / "topology" / "thread_siblings_list").write_text(listed + "\n")
    (pages / "enabled").write_text(huge_pages + "\n")
    (tmp_path / "cgroup/box/cpu.max").write_text(quota + "\n")
    (tmp_path / "proc/self/cgroup").write_text("0::/box\n")
    seen = processors(tmp_path / "proc", tmp_path / "cgroup", tmp_path / "sys", frozenset(allowed))
    monkeypatch.setattr(doctor, "processors", lambda: seen)
    monkeypatch.setattr(doctor, "this_machine", lambda: Machine(2**33, 2**34, len(allowed)))
    monkeypatch.setattr(doctor, "_thread_gain", lambda: gain)
    monkeypatch.setenv("PAGEMILL_THREADS", str(threads))


def finding(name: str) -> doctor.Finding:
    return doctor.CHECKS[name]()


def test_a_plain_machine_has_no_oddities(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend(monkeypatch, tmp_path)
    assert {finding(name).status for name in ("cores", "core sharing", "huge pages")} == {"ok"}


def test_cores_outside_the_mask_are_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend(monkeypatch, tmp_path, allowed=(0, 2, 3))
    found = finding("cores")
    assert (found.status, found.found) == ("warning", "3 of 4 logical CPUs")
    assert found.fix == "1 hidden from this process: start it without taskset, numactl or --cpuset-cpus"


def test_a_core_that_is_switched_off_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend(monkeypatch, tmp_path, online="0-2", allowed=(0, 1, 2))
    found = finding("cores")
    assert found.status == "warning"
    assert found.fix.startswith("1 switched off")


def test_a_quota_below_the_threads_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend(monkeypatch, tmp_path, quota="150000 100000", threads=2)
    found = finding("cores")
    assert found.status == "warning"
    assert "a CPU quota of 1.5" in found.found
    assert found.fix.endswith("or set PAGEMILL_THREADS to 1")


def test_a_quota_that_holds_the_threads_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend(monkeypatch, tmp_path, quota="200000 100000", threads=2)
    assert finding("cores").status == "ok"


def test_more_threads_than_cores_behind_shared_cpus_are_a_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pretend(monkeypatch, tmp_path, siblings={0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"}, threads=3)
    found = finding("core sharing")
    assert found.status == "warning"
    assert "CPUs 0+2, 1+3 share a core; 2 cores, 3 kernel threads" in found.found
    assert "PAGEMILL_THREADS to 2" in found.fix


def test_one_thread_for_each_shared_core_is_right(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend(monkeypatch, tmp_path, siblings={0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"}, threads=2)
    assert finding("core sharing").status == "ok"


def test_a_hidden_shared_core_shows_in_the_rate_of_two_threads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend(monkeypatch, tmp_path, gain=1.1)
    found = finding("core sharing")
    assert (found.status, found.found) == ("warning", "two threads multiply 1.1 times as fast as one")
    assert "PAGEMILL_THREADS to 2" in found.fix


def test_the_rate_of_two_threads_is_measured() -> None:
    assert 0.2 < doctor._thread_gain() < 8


@pytest.mark.parametrize(
    ("text", "found"), [("always madvise [never]", "never"), ("", "not in this kernel")], ids=["off", "absent"]
)
def test_no_huge_pages_are_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, found: str) -> None:
    pretend(monkeypatch, tmp_path, huge_pages=text)
    pages = finding("huge pages")
    assert (pages.status, pages.found) == ("warning", f"transparent huge pages: {found}")
    assert "transparent_hugepage/enabled" in pages.fix


def test_a_processor_without_avx512_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.target, "available_targets", lambda: ["avx2", "scalar"])
    monkeypatch.setattr(doctor.target, "built_targets", lambda: ["amx", "avx512_bf16", "avx512", "avx2", "scalar"])
    found = finding("native core")
    assert found.status == "warning"
    assert "no AVX-512 with VNNI" in found.fix


def test_a_forced_target_is_a_warning_even_where_it_is_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    best = doctor.target.available_targets()[0]
    monkeypatch.setenv("PAGEMILL_FORCE_TARGET", best)
    found = finding("native core")
    assert (found.status, f"forced: {best}" in found.found) == ("warning", True)
    assert found.fix.startswith("unset PAGEMILL_FORCE_TARGET")


def test_more_threads_than_cores_are_a_warning_and_said_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pretend(monkeypatch, tmp_path, allowed=(0,), threads=2)
    found = finding("processor")
    assert (found.status, found.fix) == ("warning", "set PAGEMILL_THREADS to 1 or less")
    assert "1 core for this process, 2 kernel threads" in found.found
    assert finding("self-check").status == "ok"
    assert not caplog.records
