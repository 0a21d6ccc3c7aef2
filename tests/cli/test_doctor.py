from __future__ import annotations

import json
from pathlib import Path

import pytest

from pagemill.cli import doctor
from pagemill.cli.main import main


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
    assert found["native core"]["status"] == ("ok" if found["native core"]["found"].count(",") < 2 else "warning")
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
