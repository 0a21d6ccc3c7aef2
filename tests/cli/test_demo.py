from __future__ import annotations

import pytest

from pagemill.cli import demo
from pagemill.cli.main import main
from tests.fixtures.program import run_program


def test_the_tour_runs_and_ends_with_a_table_of_measurements(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny_model: str
) -> None:
    monkeypatch.setattr(demo, "OFF_BUDGET_S", 0.2)
    assert main(["demo", "-m", tiny_model, "--kv-cache-memory-bytes", "8MiB"]) == 0
    printed = capsys.readouterr().out
    assert "the same tokens" in printed
    for row in ("time per token, tokens 2-16", "tokens in all", "first token of the answer", "8 prompts at once"):
        assert row in printed
    assert printed.index("measured on this machine") < printed.index("all of it took")


@pytest.mark.model
def test_the_tour_on_the_default_model_ends_well_and_has_no_colours_in_a_pipe() -> None:
    done = run_program("demo")
    assert done.returncode == 0, done.stderr
    assert b"\x1b" not in done.stdout
    assert b"the same tokens" in done.stdout
