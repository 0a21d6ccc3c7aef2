"""The default model: native against reference in float32, and steps that look for the largest logit alone against those
that compute all logits; the same greedy tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from pagemill.base.params import SamplingParams
from pagemill.kernels.batch import Batch
from pagemill.kernels.target import available_targets
from pagemill.llm import LLM
from tests.fixtures.default_model import default_model_path

PROMPTS = [
    "The capital of France is",
    "Water boils at",
    "def fibonacci(n):",
    "Once upon a time",
    "The three primary colours are",
    "A haiku about rain:",
    "In 1969, the first",
    "Q: What is 12 times 12?\nA:",
    "The mitochondrion is",
    "Dear Sir or Madam,",
    "import numpy as np\n",
    "The opposite of hot is",
    "Roses are red,",
    "To be or not to be,",
    "SELECT name FROM users WHERE",
    "The speed of light is about",
    "1, 1, 2, 3, 5, 8,",
    "My favourite book is",
    "Paris, London, Berlin,",
    "List of planets:\n1. Mercury\n2.",
]


def greedy(model: Path, executor: str) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    with LLM(
        str(model), dtype="float32", executor=executor, packed_weights_cache="off", max_model_len=128, max_num_seqs=20
    ) as llm:
        return [list(out.outputs[0].token_ids) for out in llm.generate(PROMPTS, params)]


@pytest.mark.model
def test_native_and_reference_choose_the_same_tokens() -> None:
    model = default_model_path()
    native, reference = greedy(model, "native"), greedy(model, "reference")
    assert all(len(tokens) == 64 for tokens in native)
    assert native == reference


@pytest.mark.model
@pytest.mark.parametrize("target", [each for each in available_targets() if each not in ("amx", "scalar")])
def test_the_largest_logit_alone_is_that_of_all(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probabilities have all logits computed. On amx the head is widened, which ranks nothing."""
    monkeypatch.setenv("PAGEMILL_FORCE_TARGET", target)
    answers, ranked = [], []
    options = {"packed_weights_cache": "off", "max_model_len": 128, "max_num_seqs": 20, "enable_prefix_caching": "off"}
    with LLM(str(default_model_path()), **options) as llm:
        executor = llm.built.executor.model  # type: ignore[attr-defined]
        forward = executor.forward_best

        def counting(batch: Batch, best_only: bool = False) -> object:
            found = forward(batch, best_only)
            ranked.append((best_only, executor.ranked_panels / max(1, len(found[1]))))
            return found

        executor.forward_best = counting
        for logprobs in (None, 0):
            params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=logprobs)
            answers.append([list(out.outputs[0].token_ids) for out in llm.generate(PROMPTS, params)])
            steps = [panels for best_only, panels in ranked if best_only == (logprobs is None)]
            assert len(steps) == len(ranked) > 20
            if logprobs is None:
                assert sum(0 <= panels < 100 for panels in steps) > 20, "of 1,536 panels few are left"
            else:
                assert max(steps) < 0
            ranked.clear()
    assert answers[0] == answers[1]
