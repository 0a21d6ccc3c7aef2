from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from pagemill.bench.machine import (
    CpuCounters,
    barrier_ns,
    cpu_model,
    describe_git,
    describe_machine,
    describe_versions,
    disturbance,
    read_counters,
)


def checkout(folder: Path, pyproject: str) -> Path:
    """A git checkout with one commit of a pyproject.toml."""
    folder.mkdir()
    (folder / "pyproject.toml").write_text(pyproject)
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "one"]):
        subprocess.run(["git", "-C", str(folder), *arguments], check=True, capture_output=True)
    return folder


def test_counters_are_read_in_seconds_from_the_line_of_all_cores(tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 20 30 400 50 6 7 80 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n")
    tick_s = 1.0 / os.sysconf("SC_CLK_TCK")
    found = read_counters(stat)
    assert found is not None
    assert found.busy_s == pytest.approx(163 * tick_s)
    assert (found.nice_s, found.idle_s, found.steal_s) == pytest.approx((20 * tick_s, 450 * tick_s, 80 * tick_s))
    assert found.own_s > 0


@pytest.mark.parametrize("text", [None, "", "cpu 1 2 3\n", "cpu a b c d e f g h\n"])
def test_counters_that_cannot_be_read_are_none(tmp_path: Path, text: str | None) -> None:
    stat = tmp_path / "stat"
    if text is not None:
        stat.write_text(text)
    assert read_counters(stat) is None
    assert disturbance(None, read_counters(stat)) is None


def test_shares_of_cpu_time_add_up_to_one() -> None:
    before = CpuCounters(busy_s=10, nice_s=1, idle_s=5, steal_s=0, own_s=2)
    after = CpuCounters(busy_s=16, nice_s=2, idle_s=8, steal_s=1, own_s=6)
    assert disturbance(before, after) == {"own": 0.4, "others": 0.2, "nice": 0.1, "steal": 0.1, "idle": 0.3}


def test_machine_names_what_the_figures_depend_on() -> None:
    found = describe_machine("avx2", 2)
    assert found["target"] == "avx2"
    assert found["num_threads"] == 2
    assert found["num_cores"] >= 1
    assert found["memory_bytes"] >= found["free_bytes"] > 0
    assert found["cpu"]
    assert barrier_ns(1) >= 0
    assert set(describe_versions()) == {"pagemill", "python", "numpy"}


def test_processor_is_named_or_unknown(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\n")
    assert cpu_model(cpuinfo) == "Some CPU @ 2 GHz"
    assert cpu_model(tmp_path / "none")


def test_commit_and_changes_of_a_checkout_of_pagemill_are_told(tmp_path: Path) -> None:
    folder = checkout(tmp_path / "ours", '[project]\nname = "pagemill"\n')
    found = describe_git(folder)
    assert found is not None
    assert len(found["commit"]) == 40
    assert found["modified"] is False
    (folder / "pyproject.toml").write_text('[project]\nname = "pagemill"\nversion = "2"\n')
    changed = describe_git(folder)
    assert changed is not None
    assert changed["modified"] is True


def test_the_commit_of_another_project_is_not_ours(tmp_path: Path) -> None:
    assert describe_git(checkout(tmp_path / "other", '[project]\nname = "other"\n')) is None
    assert describe_git(checkout(tmp_path / "broken", "project = [")) is None


def test_no_git_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert describe_git(tmp_path) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert describe_git() is None
