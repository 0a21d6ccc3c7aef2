from __future__ import annotations

import logging
from pathlib import Path

import pytest

from pagemill.llm import LLM
from pagemill.planner.machine import this_machine
from tests.fixtures.tiny import tiny_llama


@pytest.mark.parametrize("extra", [0, 1])
def test_more_threads_than_cores_are_warned_of_and_still_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, extra: int
) -> None:
    num_threads = this_machine().num_cores + extra
    with caplog.at_level(logging.WARNING, "pagemill"), LLM(str(tiny_llama(tmp_path)), num_threads=num_threads) as llm:
        assert llm.generate("ABC")[0].outputs[0].token_ids
    notices = [each.getMessage() for each in caplog.records if "kernel threads" in each.getMessage()]
    assert len(notices) == extra
    assert all(f"{num_threads} kernel threads" in each for each in notices)
