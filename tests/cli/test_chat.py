from __future__ import annotations

import io
import os
import signal
from collections.abc import Iterator
from contextlib import nullcontext

import pytest

from pagemill import LLM, SamplingParams
from pagemill.cli import chat
from pagemill.cli.main import main
from tests.fixtures.program import run_on_terminal, run_program

SMALL = ["--max-tokens", "8", "--kv-cache-memory-bytes", "4MiB"]
GREEDY = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)


@pytest.fixture
def llm(tiny_model: str) -> Iterator[LLM]:
    with LLM(tiny_model, kv_cache_memory_bytes="4MiB") as made:
        yield made


def test_piped_lines_are_answered_one_by_one_until_exit(tiny_model: str) -> None:
    done = run_program("chat", "-m", tiny_model, *SMALL, stdin=b"Hello\n\nAnd then?\n/exit\nnever read\n")
    assert done.returncode == 0
    assert done.stderr == b""
    assert done.stdout.endswith(b"\n")


def test_the_end_of_stdin_ends_the_conversation(tiny_model: str) -> None:
    assert run_program("chat", "-m", tiny_model, *SMALL, stdin=b"Hello").returncode == 0


def test_a_line_beyond_the_context_is_an_error_and_the_conversation_goes_on(tiny_model: str) -> None:
    done = run_program("chat", "-m", tiny_model, *SMALL, stdin=b"x" * 600 + b"\nHello\n")
    assert done.returncode == 2
    assert done.stderr.count(b"error: the prompt has") == 1
    assert done.stdout != b""


def test_unknown_commands_and_help(tiny_model: str) -> None:
    done = run_program("chat", "-m", tiny_model, *SMALL, stdin=b"/help\n/wat\n/clear\n/quit\n")
    assert b"/exit, /quit" in done.stderr
    assert b"unknown command /wat" in done.stderr
    assert b"forgotten" in done.stderr


def test_history_is_part_of_the_next_prompt(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    session = llm.session("Be brief.")
    chat._answer(session, "Hello", SamplingParams(temperature=0, max_tokens=4))
    *_, asked, answered = session.messages
    assert asked == {"role": "user", "content": "Hello"}
    assert capsys.readouterr().out == answered["content"] + "\n"
    prompt = llm.chat_prompt([*session.messages, {"role": "user", "content": "And?"}])["prompt"]
    assert prompt.index("Be brief.") < prompt.index("Hello") < prompt.index("And?")


def test_ctrl_c_stops_the_answer_and_not_the_program(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupting:
        """A stdout whose third piece of text comes with Ctrl-C. Mutated by `write`."""

        num_writes = 0

        def write(self, text: str) -> int:
            self.num_writes += 1
            if self.num_writes == 3:
                os.kill(os.getpid(), signal.SIGINT)
            return len(text)

        def flush(self) -> None:
            pass

        def isatty(self) -> bool:
            return False

    whole = llm.chat([{"role": "user", "content": "Hello"}], GREEDY)[0].outputs[0].text
    monkeypatch.setattr("sys.stdout", Interrupting())
    session = llm.session()
    chat._answer(session, "Hello", GREEDY)
    said = session.messages[-1]["content"]
    assert 0 < len(said) < len(whole)
    assert whole.startswith(said)
    assert (llm.stats().num_running, llm.stats().cache.num_active_blocks) == (0, 0)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_on_a_terminal_it_greets_and_ends_with_stdin(tiny_model: str) -> None:
    code, printed = run_on_terminal("chat", "-m", tiny_model, *SMALL, typed=b"/help\r/exit\r")
    assert code == 0
    assert "512 tokens of context" in printed
    assert "/clear" in printed


def test_on_a_terminal_each_turn_tells_what_the_cache_did(tiny_model: str) -> None:
    code, printed = run_on_terminal("chat", "-m", tiny_model, *SMALL, typed=b"Hello\rAnd then?\r/exit\r")
    assert code == 0
    lines = [line for line in printed.splitlines() if "prompt tokens" in line]
    assert len(lines) == 2
    assert "cache: 0 of" in lines[0]
    assert "not seen recently" in lines[0]
    assert "cache: 0 of" not in lines[1]


def test_a_conversation_has_the_cache_that_its_options_ask_for(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "open_llm", lambda *_, **__: nullcontext(llm))

    def num_hit(*options: str) -> int:
        before = llm.cache.stats()["tokens"]["hit"]
        monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n/clear\nHello\n"))
        assert main(["chat", *SMALL, "--temperature", "0", *options]) == 0
        after: int = llm.cache.stats()["tokens"]["hit"]
        return after - before

    assert num_hit("--cache-bypass") == 0, "nothing is read"
    once = num_hit()
    assert once > 0, "by the second conversation, of the first; nothing was left before"
    assert num_hit("--cache-salt", "a") == once, "which is another cache"
    assert num_hit("--cache-salt", "a") == 2 * once
