"""The runner of the release size (`scripts/trust.py`), over shards that print, hang and fail."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from scripts import trust

from tests.fixtures.live_server import wait_until
from tests.trust.figures import Figure

GOOD = Figure("R15", "other requests changed", 0, 3, "planted exceptions").encode()
WRONG = Figure("R15", "other requests changed", 1, 3, "planted exceptions", {}, ["it was changed"]).encode()


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A state and a scorecard of its own."""
    monkeypatch.setattr(trust, "STATE", tmp_path / "figures.jsonl")
    monkeypatch.setattr(trust, "SCORECARD", tmp_path / "scorecard.md")


def run(program: str, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """R15's shard is this program. Returns what the runner counts, and the scorecard."""
    monkeypatch.setattr(trust, "command_of", lambda shard: [sys.executable, "-c", program])
    return trust.run_all({"R15"}, minutes=1, processes=2), trust.SCORECARD.read_text()


def test_a_shard_that_goes_right_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    num_failures, scorecard = run(f"print({GOOD!r})", monkeypatch)
    assert num_failures == 0
    assert "0 other requests changed | 3 planted exceptions" in scorecard


def test_a_shard_may_say_more_than_a_pipe_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust, "MOST_SECONDS", 20)
    program = f"import sys; sys.stderr.write('x' * 10**6); print('y' * 10**6); print({WRONG!r})"
    num_failures, scorecard = run(program, monkeypatch)
    assert num_failures == 1
    assert "it was changed" in scorecard


def test_a_shard_that_hangs_is_killed_with_what_it_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(trust, "MOST_SECONDS", 1)
    child = tmp_path / "child"
    program = (
        "import subprocess, time\n"
        f"open({str(child)!r}, 'w').write(str(subprocess.Popen(['sleep', '600']).pid))\n"
        "time.sleep(600)"
    )
    num_failures, scorecard = run(program, monkeypatch)
    assert num_failures == 1
    assert "killed after 1 s" in scorecard
    assert wait_until(lambda: not is_running(int(child.read_text())), 10)


def is_running(process_id: int) -> bool:
    """Whether there is such a process, and it is no zombie."""
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(("program", "said"), [
    (f"print({GOOD!r}); raise SystemExit(3)", "it ended with 3"),
    (f"print({GOOD!r}, flush=True); import os; os.abort()", "it ended with -6"),
    ("raise ValueError('too bad')", "too bad"),
    ("", "no output"),
])  # fmt: skip
def test_a_shard_that_ends_wrongly_is_a_failure(program: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    num_failures, scorecard = run(program, monkeypatch)
    assert num_failures == 1
    assert said in scorecard


def test_a_run_goes_on_where_it_was_and_counts_what_failed_before(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(f"print({WRONG!r})", monkeypatch)[0] == 1
    assert run("raise ValueError('it ran again')", monkeypatch)[0] == 1
    assert trust.run_all({"S2"}, minutes=0, processes=1) == 0, "failures of tests that were not chosen"


@pytest.mark.parametrize(("printed", "code"), [(GOOD, 0), (WRONG, 1)], ids=["good", "wrong"])
def test_the_command_ends_with_what_was_found(printed: str, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust, "command_of", lambda shard: [sys.executable, "-c", f"print({printed!r})"])
    monkeypatch.setattr(sys, "argv", ["trust.py", "--only", "R15"])
    monkeypatch.setattr(trust.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as found:
        trust.main()
    assert found.value.code == code


def test_parts_that_met_too_little_together_are_a_failure() -> None:
    met = {"requests refused": 9, "tails dropped": 0, "choices": 9, "clients that left": 9}
    days = Figure("R14", "days of a server gone wrong", 0, 20, "days", met)
    assert trust.judged(days) is days
    [whole] = trust.totals({f"R14:{part}": [days] for part in range(3)})
    assert whole.num_failures == 1
    assert "0 tails dropped, 1 at least" in whole.replays[0]


def test_a_shard_that_met_too_little_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    blind = Figure(
        "S5", "differences seen by another tenant", 0, 30, "pairs", {"controls that differ (same tenant)": 27}
    )
    [test] = [each for each in trust.TESTS if each.name == "S5"]
    monkeypatch.setitem(trust.BY_NAME, "S5", replace(test, run=lambda _: [blind]))
    monkeypatch.setattr(sys, "argv", ["trust.py", "--shard", "S5:0"])
    trust.main()
    figure = Figure.decode(capsys.readouterr().out)
    assert figure.num_failures == 1
    assert "27 controls that differ (same tenant), 28 at least" in figure.replays[0]
