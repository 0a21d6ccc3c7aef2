"""What a start does and does not do, by counts: modules loaded, tensors read. Times are `pagemill bench peers`'s."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fixtures.program import environment
from tests.fixtures.tiny import tiny_llama

# Each costs a start from 2 to 200 ms, and none has a part in generating from a GGUF file's tokens.
NOT_FOR_IDS = (
    "tokenizers", "orjson", "llguidance", "minijinja", "huggingface_hub",  # texts, grammars, templates, fetching
    "typer", "click", "rich", "fastapi", "pydantic", "starlette", "uvicorn", "uvloop", "httptools", "httpx",
    "prometheus_client", "opentelemetry", "matplotlib", "gguf",
    "asyncio", "ssl", "socket", "http", "email", "concurrent", "multiprocessing", "subprocess", "selectors",
    "tomllib", "zipfile", "bz2", "lzma", "shutil", "tempfile", "random", "secrets", "statistics", "argparse",
    "pagemill.server", "pagemill.simulator", "pagemill.bench", "pagemill.cli", "pagemill.telemetry",
    "pagemill.llm.async_llm", "pagemill.models.safetensors", "pagemill.text.chat",
)  # fmt: skip
FOR_TEXTS = ("tokenizers",)

GENERATE = """
import json, sys
from pagemill.llm import LLM
from pagemill.base.params import SamplingParams
with LLM(sys.argv[1], num_threads=1, kv_cache_memory_bytes="1MiB") as llm:
    [answer] = llm.generate([json.loads(sys.argv[2])], SamplingParams(max_tokens=2, temperature=0, ignore_eos=True))
print(json.dumps([len(answer.outputs[0].token_ids), sorted(sys.modules)]))
"""

COMMAND = """
import json, sys
from pagemill.cli.main import main
code = main(["generate", "a text", "-m", sys.argv[1], "--max-tokens", "1", "--num-threads", "1", "--json"])
print(json.dumps([code, sorted(sys.modules)]))
"""


def fresh(program: str, *arguments: str) -> tuple[int, set[str]]:
    """A number and the modules that a fresh interpreter had loaded at the end."""
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=120)
    assert done.returncode == 0, done.stderr
    number, modules = json.loads(done.stdout.splitlines()[-1])
    return number, set(modules)


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(tiny_llama(tmp_path, format="gguf", weight_format="q8_0"))


def test_generating_from_token_ids_loads_nothing_that_it_does_not_need(model: str) -> None:
    fresh(GENERATE, model, json.dumps({"prompt_token_ids": [5, 6, 7]}))  # packs the weights
    num_tokens, modules = fresh(GENERATE, model, json.dumps({"prompt_token_ids": [5, 6, 7]}))
    assert num_tokens == 2
    assert modules.isdisjoint(NOT_FOR_IDS), sorted(modules.intersection(NOT_FOR_IDS))


def test_a_text_adds_what_encodes_it_and_nothing_of_ours(model: str) -> None:
    fresh(GENERATE, model, json.dumps("a text"))
    _, by_ids = fresh(GENERATE, model, json.dumps({"prompt_token_ids": [5, 6, 7]}))
    num_tokens, modules = fresh(GENERATE, model, json.dumps("a text"))
    assert num_tokens == 2
    added = {name.partition(".")[0] for name in modules - by_ids}
    assert set(FOR_TEXTS) <= added
    assert "pagemill" not in added


def test_the_command_line_draws_no_bars_and_loads_no_server_for_a_model_that_is_here(model: str) -> None:
    code, modules = fresh(COMMAND, model)
    assert code == 0
    unwanted = ("rich.console", "fastapi", "pydantic", "uvicorn", "asyncio", "ssl", "llguidance", "matplotlib")
    assert modules.isdisjoint(unwanted), sorted(modules.intersection(unwanted))
