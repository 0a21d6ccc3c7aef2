"""lm-eval's `local-completions`: local tasks are scored, and every number is the one that the server gives when asked
for it in another way."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.serve_process import ServeProcess

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("lm-eval is not installed; `make clients` installs it", allow_module_level=True)
pytestmark = pytest.mark.clients

TASKS = Path(__file__).with_name("lm_eval")
NAMES = ("pagemill_choices", "pagemill_answers", "pagemill_perplexity")
MODEL = "smollm2-135m"


@pytest.fixture(scope="module")
def output(server: ServeProcess, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory with lm-eval's results and samples. The server's address is all that it is told: it finds the
    tokeniser there."""
    place = tmp_path_factory.mktemp("lm-eval")
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(place / "home")}
    arguments = f"base_url={server.url}/v1/completions,model={MODEL},num_concurrent=4,max_retries=1"
    command = [
        *(sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", arguments),
        *("--tasks", ",".join(NAMES), "--include_path", str(TASKS), "--batch_size", "2"),
        *("--output_path", str(place / "out"), "--log_samples"),
    ]
    done = subprocess.run(command, cwd=TASKS, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return place / "out"


def results(output: Path) -> dict[str, Any]:
    [path] = output.rglob("results_*.json")
    found: dict[str, Any] = json.loads(path.read_text())["results"]
    return found


def samples(output: Path, task: str) -> list[dict[str, Any]]:
    [path] = output.rglob(f"samples_{task}_*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def scored(server: ServeProcess, text: str, begin: int) -> list[tuple[float, int]]:
    """Log-probability and rank of each token of a text, from the token of its character `begin` on, by another field
    and as text."""
    with server.client() as http:
        body = {"prompt": text, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        answer = http.post("/v1/completions", json=body).json()
        ids = http.post("/tokenize", json={"prompt": text}).json()["tokens"]
        head = len(http.post("/tokenize", json={"prompt": text[:begin]}).json()["tokens"]) if begin else 1
    entries = answer["choices"][0]["prompt_logprobs"]
    found = [entries[index][str(token)] for index, token in enumerate(ids) if index >= head]
    return [(each["logprob"], each["rank"]) for each in found]


def test_choices_are_scored_by_the_server_s_log_probabilities(output: Path, server: ServeProcess) -> None:
    assert results(output)["pagemill_choices"]["acc,none"] == 1.0
    found = samples(output, "pagemill_choices")
    assert len(found) == 6
    for sample in found[:3]:
        question = sample["doc"]["question"]
        for choice, [response] in zip(sample["doc"]["choices"], sample["resps"], strict=True):
            expected = scored(server, f"{question} {choice}", len(question))
            assert float(response[0]) == pytest.approx(sum(value for value, _ in expected), abs=1e-3)
            assert (str(response[1]) == "True") is all(rank == 1 for _, rank in expected)


def test_answers_end_before_their_stop(output: Path, server: ServeProcess) -> None:
    found = samples(output, "pagemill_answers")
    assert len(found) == 6
    assert "Paris" in found[0]["resps"][0][0]
    with server.client() as http:
        for sample in found:
            [[text]] = sample["resps"]
            assert "." not in text
            assert "\n" not in text
            body = {"prompt": sample["doc"]["question"], "max_tokens": 12, "temperature": 0, "stop": [".", "\n"]}
            assert http.post("/v1/completions", json=body).json()["choices"][0]["text"] == text


def test_perplexity_is_that_of_the_texts(output: Path, server: ServeProcess) -> None:
    total, num_bytes = 0.0, 0
    for line in (TASKS / "texts.jsonl").read_text().splitlines():
        text = json.loads(line)["text"]
        num_bytes += len(text.encode())
        # lm-eval sets the model's first control token before a text
        total += sum(value for value, _ in scored(server, "<|im_start|>" + text, 0))
    reported = results(output)["pagemill_perplexity"]["byte_perplexity,none"]
    assert reported == pytest.approx(math.exp(-total / num_bytes), rel=1e-4)
