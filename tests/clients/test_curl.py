"""The commands of docs/serve.md that ask the server, each run by curl as it stands there, but for the port."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from typing import Any

import pytest

from tests.fixtures.markdown import blocks_of
from tests.fixtures.serve_process import ROOT, ServeProcess

pytestmark = [
    pytest.mark.clients,
    pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed; apt-get install curl"),
]
PAGE = ROOT / "docs" / "serve.md"
ADDRESS = re.compile(r"http://127\.0\.0\.1:\d+")


def documented() -> dict[str, str]:
    """The commands that call curl, by the comment above them. Loops and continued lines stay whole."""
    found: dict[str, str] = {}
    for block in blocks_of(PAGE):
        if block.language == "bash":
            for paragraph in block.text.split("\n\n"):
                lines = paragraph.splitlines()
                title = lines[0].removeprefix("# ") if lines[0].startswith("#") else lines[0]
                if "curl" in paragraph and "until curl" not in paragraph:
                    found[title] = paragraph
    return found


COMMANDS = documented()


def ran(server: ServeProcess, title: str) -> str:
    script = ADDRESS.sub(server.url, COMMANDS[next(each for each in COMMANDS if title in each)])
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout


def test_every_documented_command_is_run_here() -> None:
    tested = {"/v1/models", "the same prompt twice", "a conversation, streamed", "must be JSON", "log-probabilities"}
    assert len(COMMANDS) == len(tested)
    assert all(any(part in title for title in COMMANDS) for part in tested)


def test_models_are_listed(server: ServeProcess) -> None:
    assert json.loads(ran(server, "/v1/models"))["data"][0]["id"] == "smollm2-135m"


def test_the_second_ask_is_a_hit(server: ServeProcess) -> None:
    told = ran(server, "the same prompt twice")
    headers = re.findall(r"x-cache: (\w+); cached=(\d+); computed=(\d+)", told)
    assert len(headers) == 2
    assert headers[1][0] == "hit"
    assert int(headers[1][1]) > 0
    bodies = [json.loads(line) for line in told.splitlines() if line.startswith("{")]
    cached = [each["usage"]["prompt_tokens_details"]["cached_tokens"] for each in bodies]
    assert cached == [int(each[1]) for each in headers]
    assert bodies[0]["choices"][0]["text"] == bodies[1]["choices"][0]["text"]


def test_a_conversation_is_streamed_with_its_counts(server: ServeProcess) -> None:
    lines = [line for line in ran(server, "a conversation, streamed").splitlines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    chunks: list[Any] = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] > 0
    assert "".join(each["choices"][0]["delta"].get("content") or "" for each in chunks[:-1])


def test_a_form_is_kept(server: ServeProcess) -> None:
    answer = json.loads(ran(server, "must be JSON"))["choices"][0]
    if answer["finish_reason"] == "stop":
        person = json.loads(answer["message"]["content"])
        assert set(person) == {"name", "age"}
        assert isinstance(person["age"], int)
    else:  # a long name used up the tokens
        assert re.match(r'\s*\{\s*"name"\s*:\s*"', answer["message"]["content"])


def test_a_prompt_is_scored(server: ServeProcess) -> None:
    answer = json.loads(ran(server, "log-probabilities"))["choices"][0]
    assert len(answer["logprobs"]["token_logprobs"]) == 6
    assert answer["logprobs"]["token_logprobs"][0] is None
    assert "".join(answer["logprobs"]["tokens"]) == answer["text"]
