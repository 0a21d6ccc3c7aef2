"""The default model from its file to tokens, as a user runs it."""

from __future__ import annotations

import json

import pytest

from tests.fixtures.default_model import default_model_path
from tests.fixtures.program import run_program

pytestmark = pytest.mark.model


def test_greedy_text_is_the_same_in_every_cache_mode() -> None:
    model = str(default_model_path())
    found = []
    for mode in ("none", "contiguous", "paged"):
        done = run_program(
            "generate", "The capital of France is", "--model", model, "--max-tokens", "16", "--json",
            "--kv-cache", mode, "--max-num-seqs", "2",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    assert found[0]["usage"]["prompt_tokens"] == 5
    assert found[0]["timing"]["ttft_s"] > 0
    assert " Paris" in found[0]["text"]
    assert found[0]["token_ids"] == found[1]["token_ids"] == found[2]["token_ids"]
