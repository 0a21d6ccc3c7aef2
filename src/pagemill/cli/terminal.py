"""What the command line prints and where: results on stdout, everything else on stderr, colour on terminals only.

Owns colour, error lines and JSON output. Progress bars are in `progress.py`, tables in the commands themselves.
"""

from __future__ import annotations

import io
import json
import os
import sys
from typing import IO

RED, BOLD, DIM, GREEN, YELLOW = "31", "1", "2", "32", "33"


def prepare_streams() -> None:
    """Streams that the caller closed become empty ones; characters that stdout's encoding lacks are printed as "?"."""
    sys.stdin = sys.stdin or os.fdopen(os.open(os.devnull, os.O_RDONLY))
    sys.stdout = sys.stdout or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    sys.stderr = sys.stderr or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def allows_colour(stream: IO[str]) -> bool:
    """True on a terminal, unless NO_COLOR (no-color.org) is set or the terminal is dumb."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def paint(text: str, code: str, stream: IO[str]) -> str:
    """`text` in an ANSI style where `stream` allows colour, else as it is."""
    return f"\x1b[{code}m{text}\x1b[0m" if allows_colour(stream) else text


def print_error(message: str) -> None:
    """One line on stderr: what is wrong and how to mend it."""
    line = " ".join(message.split())
    print(f"{paint('error:', RED, sys.stderr)} {line}", file=sys.stderr)


def note(message: str) -> None:
    """A remark on stderr, dim on a terminal."""
    print(paint(message, DIM, sys.stderr), file=sys.stderr)


def print_json(value: object) -> None:
    """One JSON object on stdout and nothing else; escaped where stdout is not UTF-8."""
    is_utf8 = (sys.stdout.encoding or "utf-8").lower().replace("_", "-") in ("utf-8", "utf8")
    print(json.dumps(value, ensure_ascii=not is_utf8, allow_nan=False))


def silence_stdout() -> None:
    """After the reader of our output has left: nothing more may be written, not even at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
