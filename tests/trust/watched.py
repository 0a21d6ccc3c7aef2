"""S14: nothing is unpickled, evaluated, compiled or run by a shell. The syntax of every file of the package is
searched, and a server that watches itself by an audit hook, armed when it has started, answers requests of every kind
on both of its ports, and is drained by the admin's at the end.

The hostile requests of S9 run under the same watch and count for this row, too. There is no tier on disk yet whose
records could be read meanwhile.
"""

from __future__ import annotations

import json
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from tests.fixtures.forbidden_calls import forbidden_in, num_calls
from tests.fixtures.serve_process import ROOT
from tests.fixtures.tiny import tiny_llama
from tests.fixtures.watched_server import audit_reports, watched_server
from tests.trust.figures import Figure

PICKLES = (
    b"cos\nsystem\n(S'true'\ntR.",
    b"\x80\x04\x95\x1c\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94",
)
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
PINNED = "words that fill more than one block of the cache, to be pinned"
# What the admin port is asked, in turns: method, path and body.
ADMIN: tuple[tuple[str, str, dict[str, Any] | None], ...] = (
    ("POST", "/admin/cache/pin", {"prompt": PINNED, "seconds": 1}), ("GET", "/admin/cache/stats?sizes=4,8", None),
    ("GET", "/admin/cache/blocks?limit=5", None), ("GET", "/admin/cache/tree?depth=3", None),
    ("POST", "/admin/cache/purge", {"prompt": "request 1", "what": "prefix"}), ("DELETE", "/admin/cache/pin/1", None),
    ("POST", "/admin/cache/purge", {"what": "tenant", "tenant": "alice"}),
    ("PUT", "/admin/tenants/alice", {"floor_tokens": 16}), ("PUT", "/admin/tenants/alice", {"cap_tokens": "x"}),
    ("GET", "/admin/tenants", None), ("GET", "/admin/keys", None), ("POST", "/admin/keys/reload", {}),
    ("GET", "/admin/drain", None), ("GET", "/health", None), ("GET", "/metrics", None),
)  # fmt: skip


def scan() -> Figure:
    """Every file of the package."""
    sources = sorted((ROOT / "src").rglob("*.py"))
    texts = {str(path.relative_to(ROOT)): path.read_text() for path in sources}
    found = [f"{name}:{what}" for name, text in texts.items() for what in forbidden_in(text)]
    also = {"files": len(texts)}
    return Figure(
        "S14", "forbidden calls and imports", len(found), sum(map(num_calls, texts.values())), "calls", also, found
    )


def asked(number: int) -> tuple[str, dict[str, Any]]:
    """A request of one of many kinds."""
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    kinds: list[tuple[str, dict[str, Any]]] = [
        (COMPLETIONS, {}), (COMPLETIONS, {"stream": True, "n": 2}), (COMPLETIONS, {"logprobs": 3, "echo": True}),
        (COMPLETIONS, {"guided_regex": f"[a-f]{{{number % 7 + 1}}}"}), (COMPLETIONS, {"guided_json": schema}),
        (COMPLETIONS, {"guided_choice": ["yes", f"no {number}"]}), (COMPLETIONS, {"stop": ["a", str(number)]}),
        (COMPLETIONS, {"temperature": 1, "top_p": 0.9, "top_k": 5, "seed": number, "logit_bias": {"5": 3}}),
        (COMPLETIONS, {"cache": {"retain": [{"from": 0, "ttl": "1s"}], "purge_on_end": True}}),
        (COMPLETIONS, {"prompt": [1, 2, number % 200]}), (COMPLETIONS, {"prompt": ["a", "b"], "prompt_logprobs": 1}),
        (COMPLETIONS, {"temperature": -5}), (COMPLETIONS, {"guided_regex": "("}), (COMPLETIONS, {"max_tokens": 10**9}),
        (CHAT, {}), (CHAT, {"stream": True, "tools": [tool]}), (CHAT, {"tools": [tool], "tool_choice": "required"}),
        (CHAT, {"response_format": {"type": "json_object"}}), (CHAT, {"logprobs": True, "top_logprobs": 2}),
        (CHAT, {"chat_template": "{{ 7*7 }}"}), (CHAT, {"messages": [{"role": "user", "content": "{{ 7*7 }}"}]}),
        ("/tokenize", {}), ("/tokenize", {"messages": [{"role": "user", "content": "a"}], "prompt": None}),
        ("/detokenize", {"tokens": [1, 2, number % 200]}),
    ]  # fmt: skip
    path, changes = kinds[number % len(kinds)]
    begin: dict[str, Any] = {"prompt": f"request {number}", "max_tokens": 6}
    if path == CHAT:
        begin = {"messages": [{"role": "user", "content": f"request {number}"}], "max_tokens": 6}
    return path, begin | changes


def serve(num_requests: int, *, further_path: str = "", changes: dict[str, Any] | None = None) -> Figure:
    """Requests of every kind, some at a time, of four one to the admin port, and pickles, which are bytes like any
    other. further_path: of modules of the server's process. changes: fields of each request to the public port."""
    path = ":".join(filter(None, [further_path, str(ROOT / "src")]))
    with (
        tempfile.TemporaryDirectory() as directory,
        watched_server(
            Path(directory), tiny_llama(Path(directory)), "--admin-port", "0", variables={"PYTHONPATH": path}
        ) as process,
        process.client() as client,
        process.admin() as admin,
    ):

        def ask(number: int) -> int:
            path, body = asked(number)
            return client.post(path, json=body | (changes or {})).status_code

        def ask_the_admin(number: int) -> int:
            method, path, body = ADMIN[number % len(ADMIN)]
            return admin.request(method, path, json=body).status_code

        client.post(COMPLETIONS, json={"prompt": PINNED, "max_tokens": 1})
        with ThreadPoolExecutor(4) as pool:
            answers = pool.map(ask, range(num_requests))
            of_the_admin = list(pool.map(ask_the_admin, range(max(len(ADMIN), num_requests // 4))))
            statuses = list(answers)
        for payload in PICKLES:
            for path in (COMPLETIONS, CHAT, "/tokenize", "/detokenize"):
                for kind in ("application/json", "application/octet-stream", "application/x-pickle"):
                    statuses.append(client.post(path, content=payload, headers={"content-type": kind}).status_code)
        statuses += _unfinished(client)
        of_the_admin.append(admin.post("/admin/drain", content=PICKLES[0]).status_code)
        statuses += of_the_admin
        code = process.process.wait(60)
        found = audit_reports(process) + ([f"it ended with {code}"] if code else [])
    found += [f"answered with {each}" for each in statuses if each >= 500]
    also = {
        "of them answered with 200": statuses.count(200),
        "to the admin port": len(of_the_admin),
        "there answered with 200": of_the_admin.count(200),
    }
    return Figure("S14", "events of the audit hook", len(found), len(statuses), "requests under watch", also, found[:5])


def _unfinished(client: httpx.Client) -> list[int]:
    """Streams that their reader leaves."""
    statuses = []
    for number in range(5):
        body = {"prompt": f"leave {number}", "max_tokens": 200, "stream": True, "ignore_eos": True}
        with client.stream(
            "POST", COMPLETIONS, content=json.dumps(body), headers={"content-type": "application/json"}
        ) as answer:
            next(answer.iter_bytes())
            statuses.append(answer.status_code)
    return statuses
