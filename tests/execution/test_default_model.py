"""The default model, native against reference, in float32: the same greedy tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from pagemill.base.params import SamplingParams
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
