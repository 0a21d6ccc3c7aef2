"""`pagemill chat`: a conversation in the terminal. Owns what can be typed; the conversation is a session. Works with
piped stdin."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pagemill.base.errors import PagemillError
from pagemill.base.params import CacheOptions, SamplingParams
from pagemill.cli.generate import open_llm
from pagemill.cli.terminal import BOLD, note, paint, print_error
from pagemill.llm import Session

HELP = """/exit, /quit   end (also Ctrl-D)
/clear         forget the conversation
/help          this text
Ctrl-C         stop the answer, not the program"""


def run(*, system: str | None, sampling: dict[str, Any], cache: dict[str, Any], engine: dict[str, Any]) -> int:
    """Talk until /exit or the end of stdin. Returns 2 where piped input met an error, else 0. cache: fields of
    CacheOptions."""
    params, options = SamplingParams(**sampling), CacheOptions(**cache)
    interactive = sys.stdin.isatty()
    code = 0
    with open_llm(engine, quiet=False, defaults={"max_num_seqs": 1}) as llm:
        session = llm.session(system, cache=options)
        if interactive:
            note(f"{llm.built.spec.name}, {llm.built.max_model_len:,} tokens of context. /help for help, /exit to end.")
        while (line := _read_line(interactive)) is not None:
            text = line.strip()
            if text in ("/exit", "/quit"):
                break
            if text == "/clear":
                session = llm.session(system, cache=options)
                note("forgotten")
            elif text == "/help":
                note(HELP)
            elif text.startswith("/") and " " not in text:
                print_error(f"unknown command {text}; /help lists them")
            elif text:
                try:
                    _answer(session, text, params)
                except PagemillError as error:
                    begun = len(session.messages) > 1
                    print_error(f"{error} (/clear forgets the conversation)" if begun else str(error))
                    code = 0 if interactive else error.exit_code
    return code


def _read_line(interactive: bool) -> str | None:
    """The next line, None at the end. Ctrl-C clears the line that is being typed."""
    while True:
        try:
            if not interactive:
                return sys.stdin.readline() or None
            return input(paint("> ", BOLD, sys.stdout))
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:
            if not interactive:
                raise
            print()


def _answer(session: Session, text: str, params: SamplingParams) -> None:
    """Stream one answer; what has been said when Ctrl-C comes is what stays in the conversation."""
    receipt = None
    stream = session.stream(text, params)
    with _interrupts() as interrupted:
        for delta in stream:
            receipt = delta.receipt
            sys.stdout.write(delta.text)
            sys.stdout.flush()
            if interrupted:
                note(" (stopped)")
                break
        stream.close()
    print()
    if receipt is not None and sys.stderr.isatty():
        note(str(receipt))


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Collect Ctrl-C instead of raising, so that it stops the answer between two steps and never within one."""
    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)
