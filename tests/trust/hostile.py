"""S9: schemathesis against a server over a socket: cases that the published schema allows, cases that it does not, and
chains of requests that use what earlier ones answered.

A case fails where the answer is 500 or above, does not come whole in time (a hang), or is an error without a message.
The server watches itself meanwhile (S14). Its limits are set low, so that a valid case cannot ask for minutes of work.
Its admin port is asked too, by what `admin_schema.py` says of it, with its key; in the end it drains the server.
"""

from __future__ import annotations

import copy
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis.stateful import run_state_machine_as_test
from schemathesis import Case, GenerationMode

from tests.fixtures.serve_process import ROOT, ServeProcess
from tests.fixtures.tiny import tiny_llama
from tests.fixtures.watched_server import audit_reports, watched_server
from tests.trust.admin_schema import DRAIN, admin_schema, with_heads
from tests.trust.figures import Figure

HANG_S = 60.0  # a whole answer takes less than half a second
LIMITS = ("max_max_tokens=16", "max_n=4", "max_choices=8")
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
# By operation of the published schema, positive and negative: of about 100 cases, beside chains and the admin port.
SHARES = {
    "POST /v1/completions": (18, 14),
    "POST /v1/chat/completions": (13, 7),
    "POST /tokenize": (9, 6),
    "POST /detokenize": (8, 8),
    "GET /v1/models/{name}": (3, 0),
    "GET /v1/models": (1, 1),
    "GET /health": (1, 1),
    "GET /version": (1, 1),
    "GET /tokenizer_info": (1, 1),
    "GET /metrics": (1, 1),
    "GET /openapi.json": (1, 0),
}
# The same for the admin port.
ADMIN_SHARES = {
    "POST /admin/cache/purge": (3, 3),
    "POST /admin/cache/pin": (3, 3),
    "DELETE /admin/cache/pin/{pin_id}": (1, 1),
    "PUT /admin/tenants/{tenant}": (2, 2),
    "GET /admin/cache/stats": (1, 1),
    "GET /admin/cache/blocks": (1, 1),
    "GET /admin/cache/tree": (1, 1),
    "GET /admin/tenants": (1, 0),
    "GET /admin/keys": (1, 0),
    "POST /admin/keys/reload": (1, 0),
    "GET /admin/drain": (1, 0),
    "GET /health": (1, 0),
    "GET /metrics": (1, 0),
}
UNPUBLISHED = ("/metrics", "/openapi.json")  # on the public port
FILLED = {"{name}": "tiny", "{tenant}": "default", "{pin_id}": "1"}
READY_TEXT = "some words to go on from, more than a block of them"
NUM_CHAINS = 3  # of 100 cases, of up to CHAIN_STEPS each
CHAIN_STEPS = 5
# What one answer gives to the next request: operation -> operation, with what it takes from the answer.
LINKS: dict[str, dict[str, dict[str, Any]]] = {
    "/v1/models": {"/v1/models/{name}": {"parameters": {"name": "$response.body#/data/0/id"}}},
    "/tokenize": {
        "/detokenize": {"requestBody": {"tokens": "$response.body#/tokens"}},
        "/v1/completions": {"requestBody": {"prompt": "$response.body#/tokens", "max_tokens": 2}},
    },
    "/detokenize": {"/tokenize": {"requestBody": {"prompt": "$response.body#/prompt"}}},
    "/v1/completions": {
        "/v1/completions": {"requestBody": {"prompt": "$response.body#/choices/0/text", "max_tokens": 2}},
        "/tokenize": {"requestBody": {"prompt": "$response.body#/choices/0/text"}},
    },
    "/v1/chat/completions": {
        "/v1/chat/completions": {
            "requestBody": {"messages": [{"role": "user", "content": "$response.body#/choices/0/message/content"}]}
        },
    },
}

# In a case's body: it asks for 504 where its answer comes later. What asks for more time than SHORT_S never does.
DEADLINE = re.compile(r"'deadline_s': (\d[\d.e+-]*)")
SHORT_S = 5.0


@dataclass(slots=True)
class Tally:
    """Cases and what was wrong. Mutated by `took`. kinds: cases by kind; statuses: answers by hundred, of each port."""

    kinds: Counter[str] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)
    num_server_errors: int = 0
    num_hangs: int = 0
    wrong: list[str] = field(default_factory=list)

    def took(self, kind: str, answer: Any, told: str) -> None:
        """Count an answer (requests' or schemathesis's; None for one that did not come)."""
        self.kinds[kind] += 1
        if answer is None:
            self.num_hangs += 1
            self.wrong.append(f"no whole answer within {HANG_S:g} s: {told:.400}")
            return
        deadline = DEADLINE.search(told)
        if answer.status_code == 504 and deadline and float(deadline[1]) < SHORT_S:
            self.statuses["504 at its deadline"] += 1
            return
        port = "admin " if kind.startswith("admin ") else ""
        self.statuses[f"{port}{answer.status_code // 100}xx"] += 1
        if answer.status_code >= 500:
            self.num_server_errors += 1
            self.wrong.append(f"{answer.status_code}: {told:.400}")
        elif answer.status_code >= 400 and answer.request.method != "HEAD" and not _message(answer.content):
            self.wrong.append(f"{answer.status_code} without a message: {told:.400}")


def _message(content: bytes) -> str:
    try:
        return str(json.loads(content)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return ""


class Attack:
    """One port's cases. Mutated by each. session: the connection. published: what the port takes, where it does not say
    so itself. tally, named: where cases are counted, and under which name before their kind."""

    def __init__(
        self,
        url: str,
        seed_number: int,
        *,
        published: dict[str, Any] | None = None,
        key: str = "",
        tally: Tally | None = None,
        named: str = "",
    ) -> None:
        self.url = url
        self.seed = seed_number
        self.tally = Tally() if tally is None else tally
        self.named = named
        self.session = requests.Session()
        self.session.trust_env = False
        if key:
            self.session.headers["authorization"] = f"Bearer {key}"
        if published is None:
            published = self.session.get(f"{url}/openapi.json", timeout=HANG_S).json()
            for path in UNPUBLISHED:
                answers = {"200": {"description": "answered"}}
                published["paths"][path] = {"get": {"operationId": path.replace("/", "_"), "responses": answers}}
            self.linked = schemathesis.openapi.from_dict(linked(published))
            self.linked.config.update(base_url=url)
        self.schema = schemathesis.openapi.from_dict(with_heads(published))
        self.schema.config.update(base_url=url)
        self.operations = {each.ok().label: each.ok() for each in self.schema.get_all_operations()}
        self.operations.pop(DRAIN, None)

    def every_method(self) -> None:
        """Each path with each method, and without a body."""
        for path in sorted({label.split(" ")[1] for label in self.operations}):
            filled = path
            for name, value in FILLED.items():
                filled = filled.replace(name, value)
            for method in METHODS:
                if f"{method} {path}" != DRAIN:
                    answer = self._send(method, self.url + filled)
                    self.tally.took(f"{self.named}methods", answer, f"{method} {path}")

    def every_operation(self, shares: Mapping[str, tuple[int, int]], num_cases: int) -> None:
        """Of num_cases the share of each operation. Raises KeyError for an operation without one."""
        for label in sorted(self.operations):
            for mode, share in zip((GenerationMode.POSITIVE, GenerationMode.NEGATIVE), shares[label], strict=True):
                if share:
                    self.cases(label, mode, max(1, share * num_cases // 100))

    def cases(self, label: str, mode: GenerationMode, num_cases: int) -> None:
        """Cases of one operation that its schema allows, or does not."""
        kind = f"{self.named}{mode.value}"

        @seed(self.seed)
        @_settings(num_cases)
        @given(self.operations[label].as_strategy(mode))
        def run(case: Case) -> None:
            if mode is GenerationMode.POSITIVE and isinstance(case.body, dict):
                readied(case.body, whole=self.tally.kinds[kind] % 2 == 0)
            try:
                answer = case.call(session=self.session, timeout=HANG_S)
            except requests.Timeout:
                answer = None
            self.tally.took(kind, answer, _told(case))

        run()

    def chains(self, num_chains: int) -> None:
        """Requests that use what earlier ones answered."""
        tally, session = self.tally, self.session

        class Chain(self.linked.as_state_machine()):  # type: ignore[misc]
            def get_call_kwargs(self, case: Case) -> dict[str, Any]:
                return {"session": session, "timeout": HANG_S}

            def validate_response(self, response: Any, case: Case, **_: Any) -> None:
                tally.took("in chains", response, _told(case))

        machine = seed(self.seed)(Chain)
        run_state_machine_as_test(machine, settings=settings(_settings(num_chains), stateful_step_count=CHAIN_STEPS))

    def _send(self, method: str, url: str) -> requests.Response | None:
        try:
            return self.session.request(method, url, timeout=HANG_S)
        except requests.Timeout:
            return None


def readied(body: dict[str, Any], *, whole: bool) -> None:
    """Name the model that is there: any other is answered with 404 before all else. whole: with a prompt that can be
    answered too, so that the other fields are met."""
    if body.get("model"):
        body["model"] = "tiny"
    if whole and "tenant" in body:  # of the admin port: what is pinned or purged is there
        body["tenant"] = "default"
        for name in ("salt", "public", "prompt_token_ids"):
            body.pop(name, None)
    if whole and "prompt" in body and not body.get("messages"):
        body["prompt"] = READY_TEXT
    for message in (body.get("messages") or []) if whole else []:
        if not isinstance(message.get("content"), str):
            message["content"] = "hello"


def linked(published: dict[str, Any]) -> dict[str, Any]:
    """The published schema with links, which say what one answer gives to the next request."""
    schema = copy.deepcopy(published)
    names = {path: next(iter(methods.values()))["operationId"] for path, methods in schema["paths"].items()}
    for path, targets in LINKS.items():
        [operation] = schema["paths"][path].values()
        operation["responses"]["200"]["links"] = {
            f"{at}": {"operationId": names[target], **link} for at, (target, link) in enumerate(targets.items())
        }
    return schema


def _settings(num_examples: int) -> settings:
    return settings(
        max_examples=num_examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        verbosity=Verbosity.quiet,
        suppress_health_check=list(HealthCheck),
    )


def _told(case: Case) -> str:
    return f"{case.method} {case.formatted_path} {case.body!r}"


@contextmanager
def served(place: Path, further_path: str = "") -> Iterator[ServeProcess]:
    """A watched server of a tiny model with low limits. further_path: of modules of its process."""
    arguments = [text for limit in LIMITS for text in ("--limit", limit)] + ["--admin-port", "0"]
    path = ":".join(filter(None, [further_path, str(ROOT / "src")]))
    model = tiny_llama(place, context=384)
    with watched_server(place, model, *arguments, variables={"PYTHONPATH": path}) as process:
        yield process


def admin_attack(process: ServeProcess, seed_number: int, tally: Tally) -> Attack:
    """Cases of the admin port."""
    return Attack(
        process.admin_url,
        seed_number,
        published=admin_schema(),
        key=process.admin_key,
        tally=tally,
        named="admin ",
    )


def count(shard: int, num_cases: int) -> list[Figure]:
    """About so many cases from a seed, against a server of their own. Returns S9's figures and S14's."""
    with tempfile.TemporaryDirectory() as directory, served(Path(directory)) as process:
        attack = Attack(process.url, shard)
        attack.every_method()
        attack.every_operation(SHARES, num_cases)
        attack.chains(max(1, NUM_CHAINS * num_cases // 100))
        admin = admin_attack(process, shard, attack.tally)
        admin.every_method()
        admin.every_operation(ADMIN_SHARES, num_cases)
        for each in (attack, admin):
            each.session.close()
        return figures_of(attack.tally, process, f"python scripts/trust.py --shard S9:{shard}")


def figures_of(tally: Tally, process: ServeProcess, replay: str) -> list[Figure]:
    """What a tally says. A server that has ended, that answers no more, or that does not drain is a failure too."""
    wrong = list(tally.wrong)
    with process.client() as client:
        if process.process.poll() is not None or client.get("/health").json()["status"] != "ready":
            wrong.append("the server has ended")
    wrong += drained(tally, process)
    also = dict(sorted(tally.kinds.items())) | dict(sorted(tally.statuses.items()))
    total = sum(tally.kinds.values())
    also |= {"answers of 500 and above": tally.num_server_errors, "hangs": tally.num_hangs}
    replays = [f"{replay}  # {each}" for each in wrong[:5]]
    reports = audit_reports(process)
    return [
        Figure("S9", "cases answered wrongly", len(wrong), total, "cases", also, replays),
        Figure("S14", "events of the audit hook", len(reports), total, "hostile requests under watch", {}, reports[:5]),
    ]


def drained(tally: Tally, process: ServeProcess) -> list[str]:
    """What is wrong with the end that the admin port brings about: a body that nobody reads is answered, and the
    process ends."""
    with process.admin() as admin:
        answer = admin.post("/admin/drain", content=b'{"draining": [[null]]')
    tally.kinds["admin drain"] += 1
    try:
        code: int | None = process.process.wait(HANG_S)
    except subprocess.TimeoutExpired:
        code = None
    if answer.status_code == 200 and code == 0:
        return []
    return [f"a drain was answered with {answer.status_code}, and the server ended with {code}"]
