"""Messages to a prompt, by the model's own chat template. Owns the check of messages, the limits on templates and the
process that renders them; what a template may call is in `text/template_process.py`. Standard library only.

Templates come with model files and are hostile input: each is rendered without files, network or clock in a process of
limited memory, with limits on instructions, time and output.
"""

from __future__ import annotations

import atexit
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from threading import Lock
from typing import Any

from pagemill.base.errors import ConfigError, ModelError, PagemillError, RequestError

FUEL = 5_000_000  # template instructions
RENDER_TIMEOUT_S = 5.0
MAX_TEMPLATE_CHARS = 2**20
MAX_MESSAGES_BYTES = 2**24
MAX_OUTPUT_CHARS = 2**20  # beside four times what the messages hold

_PROGRAM = Path(__file__).with_name("template_process.py")
# What an interpreter may need to start; a hostile template gets near nothing else.
_ENVIRONMENT = (
    "PATH", "PYTHONHOME", "PYTHONPATH", "LD_LIBRARY_PATH", "LD_PRELOAD", "LANG", "LC_ALL", "LC_CTYPE", "TZ",
)  # fmt: skip
_START_TIMEOUT_S = 60.0
_MEND = "mend the template, or give another one"


def render_chat(
    template: str | None,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    bos_token: str = "",
    eos_token: str = "",
    now: datetime | None = None,
    **variables: Any,
) -> str:
    """The prompt of a conversation.

    template: Jinja, as transformers defines chat templates (blocks trimmed; `raise_exception`, `strftime_now`,
    `tojson`; methods of strings, lists and dicts). messages: dicts with `role` and `content`, both strings; other keys
    are handed on. now: the time that `strftime_now` tells (default: the machine's). variables: further names for the
    template, such as `tools`; values that JSON can express.

    Raises RequestError where messages are malformed or the template refuses them, and ModelError where there is no
    template or it is broken, does not end, or asks for too much memory or output.
    """
    if template is None:
        raise ModelError(
            "this model brings no chat template, so a conversation has no defined form; use generate with a prompt of "
            "your own, or give a template"
        )
    if len(template) > MAX_TEMPLATE_CHARS:
        raise ModelError(f"the chat template has {len(template):,} characters; up to {MAX_TEMPLATE_CHARS:,} are read")
    checked = [_checked_message(index, message) for index, message in enumerate(messages)]
    if not checked:
        raise RequestError("there are no messages; give at least one with a role and a content")
    context = {
        "messages": checked,
        "add_generation_prompt": add_generation_prompt,
        "bos_token": bos_token,
        "eos_token": eos_token,
        **variables,
    }
    return _render(template, context, now or datetime.now())


def _checked_message(index: int, message: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RequestError(f"message {index} is {type(message).__name__}; give an object with role and content")
    for key in ("role", "content"):
        if key not in message:
            raise RequestError(f"message {index} has no {key!r}; give an object with role and content")
        if not isinstance(message[key], str):
            raise RequestError(f"{key!r} of message {index} is {type(message[key]).__name__}; give a string")
    if not message["role"]:
        raise RequestError(f"'role' of message {index} is empty; give system, user or assistant")
    return dict(message)


def _render(template: str, context: dict[str, Any], now: datetime) -> str:
    try:
        encoded = json.dumps(context, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise RequestError(
            "the messages hold half of a surrogate pair, which is not Unicode text; send UTF-8"
        ) from None
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"a message or template variable cannot be handed to the template: {error}") from None
    if len(encoded) > MAX_MESSAGES_BYTES:
        raise RequestError(f"the messages have {len(encoded):,} bytes of JSON; give up to {MAX_MESSAGES_BYTES:,}")
    max_output = MAX_OUTPUT_CHARS + 4 * len(encoded)
    limits = {"template": template, "now": now.isoformat(), "fuel": FUEL, "max_output": max_output}
    answer = _renderer.ask(json.dumps(limits).encode()[:-1] + b', "context": ' + encoded + b"}\n")
    if "text" not in answer:
        raise _error(answer, max_output)
    return str(answer["text"])


def _error(answer: dict[str, Any], max_output: int) -> PagemillError:
    """The error for an answer of the rendering process."""
    kind, message = answer["error"], answer.get("message", "")
    where = f" in line {answer['line']}" if answer.get("line") else ""
    if kind == "refused":
        return RequestError(f"the model's chat template refuses these messages: {message}")
    if kind == "SyntaxError":
        return ModelError(f"the chat template has a syntax error{where}: {message}; {_MEND}")
    if kind == "OutOfFuel":
        return ModelError(f"the chat template did not end within {FUEL:,} instructions; {_MEND}")
    if kind == "time":
        return ModelError(f"the chat template did not end within {RENDER_TIMEOUT_S:g} s; {_MEND}")
    if kind == "memory":
        return ModelError(f"the chat template used up the memory that it may have, or its process was ended; {_MEND}")
    if kind == "output":
        return ModelError(f"the chat template wrote more than {max_output:,} characters; {_MEND}")
    if kind == "UnicodeEncodeError":
        return ModelError(f"the chat template holds half of a surrogate pair, which is not Unicode text; {_MEND}")
    if kind == "TemplateNotFound":
        return ModelError(f"the chat template{where} asks for another file, which templates cannot have; {_MEND}")
    return RequestError(
        f"the model's chat template failed{where} on these messages: {message} ({kind}); check roles and fields, "
        "or give another template"
    )


class _Renderer:
    """The rendering process: started when first wanted, again after it died. Mutated by `ask` and `close`.

    One request at a time; a render takes well under a millisecond and the process 12 MB.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def ask(self, request: bytes) -> dict[str, Any]:
        """The process's answer, or `{"error": "time" | "memory"}` where it was ended or ended itself."""
        with self._lock:
            process = self._started()
            line = b""
            timed_out = False
            try:
                line = _exchange(process, request, RENDER_TIMEOUT_S)
            except TimeoutError:
                timed_out = True
            except OSError:
                pass
            except BaseException:  # an interrupt: the answer that is still to come is not the next one's
                self._end()
                raise
            if line.endswith(b"\n"):
                answer: dict[str, Any] = json.loads(line)
                return answer
            self._end()
            return {"error": "time" if timed_out else "memory"}

    def close(self) -> None:
        """End the process; a later `ask` starts another."""
        with self._lock:
            self._end()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._owner == os.getpid() and self._process.poll() is None:
            return self._process
        self._end()
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", str(_PROGRAM)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},  # no keys
                start_new_session=True,  # Ctrl-C is for the engine
            )
        except OSError as error:
            raise ConfigError(f"cannot start the process that renders chat templates ({error}); free some") from None
        self._process, self._owner = process, os.getpid()
        warm_up = {"template": "", "context": {}, "now": "2000-01-01", "fuel": 1000, "max_output": 0}
        try:
            ready = _exchange(process, json.dumps(warm_up).encode() + b"\n", _START_TIMEOUT_S)
        except (OSError, TimeoutError):
            ready = b""
        except BaseException:
            self._end()
            raise
        if not ready.endswith(b"\n"):
            self._end()
            raise ConfigError(
                f"the process that renders chat templates does not start; try `{sys.executable} -c 'import minijinja'` "
                "and install minijinja if that fails"
            )
        return process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        process.stdout.close()
        if self._owner == os.getpid():
            process.kill()
            process.wait()


def _exchange(process: subprocess.Popen[bytes], request: bytes, timeout_s: float) -> bytes:
    """Write a request and read to the end of a line, or of the stream. Raises TimeoutError, or OSError if it died."""
    assert process.stdin is not None
    assert process.stdout is not None
    deadline = time.monotonic() + timeout_s
    with selectors.DefaultSelector() as selector:
        os.set_blocking(process.stdin.fileno(), False)
        selector.register(process.stdin, selectors.EVENT_WRITE)
        selector.register(process.stdout, selectors.EVENT_READ)
        unsent, pieces = memoryview(request), list[bytes]()
        while True:
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError
            for key, _ in ready:
                if key.fileobj is process.stdin:
                    unsent = unsent[os.write(process.stdin.fileno(), unsent) :]
                    if not unsent:
                        selector.unregister(process.stdin)
                    continue
                piece = os.read(process.stdout.fileno(), 2**20)
                pieces.append(piece)
                if not piece or piece.endswith(b"\n"):
                    return b"".join(pieces)


_renderer = _Renderer()
atexit.register(_renderer.close)
