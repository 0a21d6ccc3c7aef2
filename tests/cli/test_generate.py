from __future__ import annotations

import json
import subprocess
import sys
from contextlib import nullcontext
from typing import Any

import pytest

from pagemill import LLM
from pagemill.cli import generate
from pagemill.cli.main import main
from tests.fixtures.program import environment, run_on_terminal, run_program

SMALL = ["--max-tokens", "8", "--ignore-eos", "--kv-cache-memory-bytes", "4MiB"]


def generated(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["generate", *arguments, "--json"]) == 0
    printed = capsys.readouterr()
    assert printed.out.count("\n") == 1
    found = json.loads(printed.out)
    assert isinstance(found, dict)
    return found


def test_json_is_one_object_with_the_promised_fields(capsys: pytest.CaptureFixture[str], tiny_model: str) -> None:
    found = generated(capsys, "Hello", "-m", tiny_model, *SMALL)
    assert list(found) == ["text", "token_ids", "finish_reason", "usage", "timing", "receipt"]
    assert len(found["token_ids"]) == 8
    assert found["finish_reason"] == "length"
    assert found["usage"] == {"prompt_tokens": 5, "completion_tokens": 8, "cached_tokens": 0}
    assert found["timing"]["ttft_s"] > 0
    assert found["timing"]["tpot_s"] > 0
    assert list(found["receipt"]) == ["cached_tokens", "computed_tokens", "tiers", "saved_s", "miss"]
    assert found["receipt"]["miss"] == {"kind": "not seen", "reason": "not seen recently", "token": 0}


def test_the_second_of_two_answers_finds_the_prompt_and_is_the_same(
    capsys: pytest.CaptureFixture[str], tiny_model: str
) -> None:
    found = generated(capsys, "Hello, who is there?", "-m", tiny_model, "--repeat", "2", *SMALL)
    cold, warm = found["answers"]
    num_prompt = cold["usage"]["prompt_tokens"]
    assert cold["usage"]["cached_tokens"] == 0
    assert cold["receipt"]["miss"] == {"kind": "not seen", "reason": "not seen recently", "token": 0}
    assert warm["usage"]["cached_tokens"] == num_prompt - 1 == warm["receipt"]["cached_tokens"]
    assert warm["receipt"]["computed_tokens"] == 1
    assert warm["receipt"]["miss"] is None
    assert warm["receipt"]["saved_s"] > 0
    assert warm["token_ids"] == cold["token_ids"]


def test_repeated_answers_are_streamed_one_after_the_other(capsys: pytest.CaptureFixture[str], tiny_model: str) -> None:
    once = generated(capsys, "Hello", "-m", tiny_model, *SMALL)["text"]
    assert main(["generate", "Hello", "-m", tiny_model, "--repeat", "3", *SMALL]) == 0
    assert capsys.readouterr().out == 3 * (once + "\n")


@pytest.mark.parametrize("count", ["0", "1001"])
def test_a_number_of_repeats_that_cannot_be_is_refused(
    capsys: pytest.CaptureFixture[str], tiny_model: str, count: str
) -> None:
    assert main(["generate", "Hello", "-m", tiny_model, "--repeat", count]) == 2
    assert f"--repeat is {count}" in capsys.readouterr().err


def test_streamed_text_equals_that_of_json(capsys: pytest.CaptureFixture[str], tiny_model: str) -> None:
    text = generated(capsys, "Hello", "-m", tiny_model, *SMALL)["text"]
    assert main(["generate", "Hello", "-m", tiny_model, *SMALL]) == 0
    printed = capsys.readouterr()
    assert printed.out == text + "\n"
    assert printed.err == ""


def test_the_same_text_in_every_cache_mode(capsys: pytest.CaptureFixture[str], tiny_model: str) -> None:
    found = [
        generated(capsys, "Hello", "-m", tiny_model, *SMALL, "--kv-cache", mode)["token_ids"]
        for mode in ("none", "contiguous", "paged")
    ]
    assert found[0] == found[1] == found[2]


def test_several_choices_and_their_logprobs(capsys: pytest.CaptureFixture[str], tiny_model: str) -> None:
    arguments = ["Hello", "-m", tiny_model, *SMALL, "-n", "2", "--temperature", "1", "--logprobs", "2"]
    found = generated(capsys, *arguments)
    assert len(found["choices"]) == 2
    assert found["usage"]["completion_tokens"] == 16
    assert [position[0]["rank"] for position in found["logprobs"]] == [1] * 8
    assert main(["generate", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "[0]" in printed
    assert "[1]" in printed


def test_a_stop_string_ends_the_text(capsys: pytest.CaptureFixture[str], tiny_model: str) -> None:
    whole = generated(capsys, "Hello", "-m", tiny_model, *SMALL)["text"]
    stop = whole[3:5]
    found = generated(capsys, "Hello", "-m", tiny_model, *SMALL, "--stop", stop)
    assert found["finish_reason"] == "stop"
    assert found["text"] == whole[: whole.index(stop)]


def test_the_seed_decides_what_is_sampled(capsys: pytest.CaptureFixture[str], tiny_model: str) -> None:
    def sampled(seed: str) -> list[int]:
        found = generated(capsys, "Hello", "-m", tiny_model, *SMALL, "--temperature", "1.5", "--seed", seed)
        token_ids: list[int] = found["token_ids"]
        return token_ids

    assert sampled("1") == sampled("1")
    assert sampled("1") != sampled("2")


def test_a_dash_reads_the_prompt_from_stdin(capsys: pytest.CaptureFixture[str], tiny_model: str) -> None:
    expected = generated(capsys, "Hello", "-m", tiny_model, *SMALL)
    done = run_program("generate", "-", "-m", tiny_model, *SMALL, "--json", stdin=b"Hello\n")
    assert json.loads(done.stdout)["token_ids"] == expected["token_ids"]


def test_stdin_that_is_no_text_is_refused(tiny_model: str) -> None:
    done = run_program("generate", "-", "-m", tiny_model, *SMALL, stdin=b"caf\xe9")
    assert done.returncode == 2
    assert b"stdin is not UTF-8 text (byte 3)" in done.stderr


def test_an_empty_prompt_is_refused(capsys: pytest.CaptureFixture[str], tiny_model: str) -> None:
    assert main(["generate", "", "-m", tiny_model, *SMALL]) == 2
    assert "the prompt is empty" in capsys.readouterr().err


def test_a_prompt_beyond_the_context_is_refused(capsys: pytest.CaptureFixture[str], tiny_model: str) -> None:
    assert main(["generate", "x" * 600, "-m", tiny_model, *SMALL]) == 2
    assert "600 tokens and max_model_len is 512" in capsys.readouterr().err


def test_too_little_memory_is_refused(capsys: pytest.CaptureFixture[str], tiny_model: str) -> None:
    assert main(["generate", "x", "-m", tiny_model, "--kv-cache-memory-bytes", "1K"]) == 2
    assert "not enough memory" in capsys.readouterr().err


def test_generate_imports_no_web_framework(tiny_model: str) -> None:
    program = (
        f"import sys\nfrom pagemill.cli.main import main\nassert main(['generate', 'x', '-m', {tiny_model!r}]) == 0\n"
        "print([m for m in ('fastapi', 'pydantic', 'uvicorn', 'matplotlib', 'torch') if m in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment(), timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_terminal_is_told_the_speed_and_a_pipe_is_not(tiny_model: str) -> None:
    code, printed = run_on_terminal("generate", "Hello", "-m", tiny_model, *SMALL)
    assert code == 0
    assert "8 tokens, first after" in printed
    assert run_program("generate", "Hello", "-m", tiny_model, *SMALL).stderr == b""


def test_a_bypassed_cache_is_neither_read_nor_left_anything(
    capsys: pytest.CaptureFixture[str], tiny_model: str
) -> None:
    arguments = ["Hello, who is there?", "-m", tiny_model, *SMALL]
    plain = generated(capsys, *arguments)
    found = generated(capsys, *arguments, "--repeat", "2", "--cache-bypass")
    for each in found["answers"]:
        assert each["usage"]["cached_tokens"] == each["receipt"]["cached_tokens"] == 0
        assert each["receipt"]["miss"]["kind"] == "bypassed"
        assert each["token_ids"] == plain["token_ids"]


def test_a_salt_parts_the_cache(
    capsys: pytest.CaptureFixture[str], tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LLM(tiny_model, kv_cache_memory_bytes="4MiB") as llm:
        monkeypatch.setattr(generate, "open_llm", lambda *_, **__: nullcontext(llm))
        prompt = "Hello, who is there?"
        for salt, is_hit in ((None, False), ("a", False), ("a", True), ("b", False), ("", False), (None, True)):
            found = generated(capsys, prompt, *SMALL, *([] if salt is None else ["--cache-salt", salt]))
            assert (found["receipt"]["cached_tokens"] > 0) == is_hit, salt
            assert main(["generate", prompt, *SMALL, *([] if salt is None else ["--cache-salt", salt])]) == 0
            assert capsys.readouterr().out == found["text"] + "\n", "streamed, with the same cache"


def test_a_salt_that_is_too_long_is_refused(capsys: pytest.CaptureFixture[str], tiny_model: str) -> None:
    assert main(["generate", "x", "-m", tiny_model, "--cache-salt", "x" * 1025]) == 2
    assert "give a text of at most 1,024 letters" in capsys.readouterr().err
