"""A process of its own that renders chat templates, so that a hostile one can harm nothing but this process.

A template's loops are bounded by fuel, but one instruction can double a string, so only a limit on the memory of a
whole process bounds what a template can allocate. Run as a script by `text/chat.py`, never imported: it reads one JSON
request per line from stdin and writes one JSON answer per line to stdout. The only file that imports minijinja.

    {"template", "context", "now", "fuel", "max_output"}  ->  {"text"} or {"error": kind, "message", "line"}
"""

from __future__ import annotations

import json
import re
import resource
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any, NoReturn

import minijinja

MEMORY_BYTES = 512 * 2**20

# transformers marks what the assistant said for training masks; for rendering, the marks stand for their content.
_GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")


class _RefusalError(Exception):
    """The template called `raise_exception`: it does not accept these messages."""


def _refuse(message: str = "the template refused the messages") -> NoReturn:
    raise _RefusalError(str(message))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: list[str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter `tojson` as transformers defines it: no escaping of HTML, keys in their order."""
    pair = None if separators is None else (separators[0], separators[1])
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=pair, sort_keys=sort_keys)


def _clock(now: datetime) -> Callable[[str], str]:
    def strftime_now(format: str) -> str:
        return now.strftime(format)

    return strftime_now


def _plain_if(match: re.Match[str]) -> str:
    return f"{{%{match[1]} {'endif' if match[2] else 'if true'} {match[3]}%}}"


def render(request: dict[str, Any]) -> dict[str, Any]:
    """One answer for one request, whatever the template does short of ending the process."""
    environment = minijinja.Environment(fuel=request["fuel"], trim_blocks=True, lstrip_blocks=True, pycompat=True)
    environment.add_global("raise_exception", _refuse)
    environment.add_global("strftime_now", _clock(datetime.fromisoformat(request["now"])))
    environment.add_filter("tojson", _to_json)
    try:
        text = environment.render_str(_GENERATION.sub(_plain_if, request["template"]), **request["context"])
    except _RefusalError as refusal:
        return {"error": "refused", "message": str(refusal), "line": None}
    except minijinja.TemplateError as error:
        kind = getattr(error, "kind", None) or "Panic"
        message = getattr(error, "detail", None) or getattr(error, "message", None) or str(error)
        return {"error": kind, "message": str(message), "line": getattr(error, "line", None)}
    except MemoryError:
        return {"error": "memory", "message": "", "line": None}
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error), "line": None}
    if len(text) > request["max_output"]:
        return {"error": "output", "message": "", "line": None}
    return {"text": text}


def main() -> None:
    """Answer requests until stdin ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    for line in sys.stdin.buffer:
        answer = json.dumps(render(json.loads(line)))
        sys.stdout.buffer.write(answer.encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
