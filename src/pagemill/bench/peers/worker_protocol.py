"""The worker's side of `pagemill bench peers`: one JSON object a line, requests on stdin, answers on stdout.

Owns the loop, the clock and the streams. Runs inside a peer's environment, so it needs the standard library alone; what
an engine does with a request is the `run_*.py` script's own. What libraries print goes to stderr.

    {"do": "load", "model": path, "threads": 2, "options": {…}}   -> {"seconds": s, "versions": {…}, "alternatives": n}
    {"do": "generate", "prompts": [[id, …], …], "tokens": n, "alternative": 0}
        -> {"seconds": s, "cpu_seconds": s of all its threads, "tokens": [n, …]}

Any failure is answered by {"error": text}. The end of stdin ends the worker.
"""

import json
import os
import sys
import time
import traceback
from typing import Any, Protocol

MAX_ERROR = 2000


class Subject(Protocol):
    """An engine with its model loaded. num_alternatives: settings of which the faster is to be kept, at least 1."""

    versions: dict[str, str]
    num_alternatives: int

    def generate(self, prompts: list[list[int]], num_tokens: int, alternative: int) -> list[int]:
        """Greedy continuations of exactly `num_tokens` each, end of text ignored, all prompts at once. Returns the
        number of tokens that each got."""

    def prepare(self, prompts: list[list[int]], num_tokens: int, alternative: int) -> None:
        """What a user would set up once for requests of this size, off the clock."""


class Load(Protocol):
    """Load a model with a number of threads and an engine's own options."""

    def __call__(self, model: str, num_threads: int, options: dict[str, Any], /) -> Subject: ...


def serve(load: Load) -> None:
    """Answer requests until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    subject: Subject | None = None
    for line in sys.stdin:
        try:
            request = json.loads(line)
            if request["do"] == "load":
                began = time.perf_counter()
                subject = load(request["model"], request["threads"], request["options"])
                answer = {
                    "seconds": time.perf_counter() - began,
                    "versions": subject.versions,
                    "alternatives": subject.num_alternatives,
                }
            elif subject is None:
                answer = {"error": "nothing is loaded"}
            else:
                answer = _generate(subject, request)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"[:MAX_ERROR]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _generate(subject: Subject, request: dict[str, Any]) -> dict[str, Any]:
    prompts, num_tokens, alternative = request["prompts"], request["tokens"], request["alternative"]
    subject.prepare(prompts, num_tokens, alternative)
    began, cpu_began = time.perf_counter(), time.process_time()
    counts = subject.generate(prompts, num_tokens, alternative)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "tokens": counts}
