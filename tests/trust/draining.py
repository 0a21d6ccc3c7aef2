"""R13: SIGTERM to a real `pagemill serve` with requests under way: none of them is lost, and nothing new is taken.

A trial starts a server, sends requests of every form until some run, some wait and their number is known to the server,
ends it, and asks on: on new connections, on one that was open before, on one whose request had come in part. A request
that was under way must be answered whole: all choices that were asked, each to its end, with as many tokens as were
asked. A new one must be refused, by 503 with Retry-After or by no connection; the process must end with 0 and say
nothing on stderr.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from prometheus_client.parser import text_string_to_metric_families

from tests.fixtures.serve_process import ServeProcess
from tests.trust.figures import Figure
from tests.trust.serving import ANSWER_S, FORMS, Reply, ask, own_words, port_of, read_reply, request_bytes, tiny_model

OPTIONS: Final = (
    "--served-model-name", "tiny", "--packed-weights-cache", "off", "--kv-cache-memory-bytes", "4MiB",
    "--max-num-seqs", "8", "--shutdown-timeout", "2m",
    "--limit", "header_timeout_s=120", "--limit", "body_timeout_s=120",
)  # fmt: skip
NUM_UNDER_WAY: Final = 32
PER_SHARD: Final = 5
NUM_NEW: Final = 10  # on connections of their own
NUM_KEPT: Final = 3  # on connections that were there before
FRESH_S: Final = 0.6  # after which metrics are read anew
_GAUGES: Final = ("vllm:num_requests_running", "vllm:num_requests_waiting", "pagemill:http_open_requests")
_FINISHED: Final = ("length", "stop", "tool_calls")
_MAY_END: Final = ("tools", "called")  # before their tokens are used up; what the others ask for is longer than that


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request asked for. num_choices: of all its prompts. max_tokens: of each. has_logprobs: of each token."""

    form: str
    stream: bool
    num_choices: int
    max_tokens: int
    has_logprobs: bool = False

    @classmethod
    def of(cls, form: str, body: Mapping[str, Any]) -> Asked:
        """Of a request's form and body."""
        prompt = body.get("prompt")
        num_prompts = len(prompt) if isinstance(prompt, list) else 1
        num_choices = num_prompts * int(body.get("n", 1))
        return cls(form, body["stream"], num_choices, body["max_tokens"], bool(body.get("logprobs")))


@dataclass(slots=True)
class Drain:
    """What became of a drain's requests. Mutated by their answers."""

    num_under_way: int = 0
    lost: list[str] = field(default_factory=list)
    taken: list[str] = field(default_factory=list)
    met: Counter[str] = field(default_factory=Counter)

    def saw(self, asked: Asked, reply: Reply) -> None:
        """The answer of one that was under way."""
        self.num_under_way += 1
        if (wrong := _wrong_with(reply, asked)) != "":
            self.lost.append(f"{asked.form}, streamed: {asked.stream}: {wrong}")

    def refused(self, where: str, reply: Reply) -> None:
        """The answer to a new request."""
        if reply.status == 0:
            self.met["new ones without a connection"] += 1
        elif reply.status == 503 and reply.is_refusal:
            self.met["new ones refused with 503"] += 1
        else:
            self.taken.append(f"{where}: status {reply.status}, {reply.body[:200]!r}")


def _wrong_with(reply: Reply, asked: Asked) -> str:
    """Why an answer is not whole, "" where it is."""
    if reply.status != 200 or not reply.is_whole:
        return f"status {reply.status}, whole: {reply.is_whole}, {reply.body[-200:]!r}"
    if not asked.stream:
        return _short_of(asked, [reply.json])
    *events, done = reply.events
    if done != "[DONE]" or any("error" in each for each in events):
        return f"its stream ended with {events[-1:]} {done}"
    return _short_of(asked, events)


def _short_of(asked: Asked, events: Sequence[Mapping[str, Any]]) -> str:
    """What an answer's events lack of what was asked: a choice, its end, tokens that were made or their figures."""
    parts = [each for event in events for each in event["choices"]]
    indices, ended = {each["index"] for each in parts}, Counter[int]()
    for each in parts:
        ended[each["index"]] += each["finish_reason"] in _FINISHED
    if indices != set(range(asked.num_choices)):
        return f"choices {sorted(indices)} of {asked.num_choices} came"
    if wrong := [index for index, times in ended.items() if times != 1]:
        return f"choices {wrong} did not end, or twice"
    reasons = [each["finish_reason"] for each in parts if each["finish_reason"] is not None]
    if asked.form not in _MAY_END and set(reasons) != {"length"}:
        return f"it ended with {reasons} before the tokens that it asked for"
    usages = [event["usage"] for event in events if event.get("usage")]
    if not usages:
        return "no usage was told"
    made, least = usages[-1]["completion_tokens"], reasons.count("length") * asked.max_tokens
    if not least <= made <= asked.num_choices * asked.max_tokens:
        return f"{made} tokens came, and {asked.max_tokens} for each of {asked.num_choices} choices were asked"
    told = sum(map(_num_told, parts))
    if asked.form == "echoed":
        made += usages[-1]["prompt_tokens"]
    return f"{told} tokens were told, and {made} made" if asked.has_logprobs and told != made else ""


def _num_told(part: Mapping[str, Any]) -> int:
    """Tokens whose log-probabilities a part of a choice tells."""
    told = part.get("logprobs") or {}
    return len(told.get("tokens") or told.get("content") or ())


def draw_requests(seed: int) -> list[tuple[Asked, bytes]]:
    """What each asks for, and the request."""
    draw, found = random.Random(seed), []
    for number in range(NUM_UNDER_WAY):
        form, stream = draw.choice(tuple(FORMS)), draw.random() < 0.5
        path, body = own_words(form, number)
        more: dict[str, Any] = {"temperature": 1, "max_tokens": draw.randint(400, 800), "stream": stream}
        more |= {"stream_options": {"include_usage": True}} if stream else {}
        body = {"model": "tiny", **body, **more}
        found.append((Asked.of(form, body), request_bytes(path, body)))
    return found


async def drain(process: ServeProcess, seed: int, result: Drain) -> None:
    """Requests under way, the signal, and new requests."""
    port, requests = port_of(process.url), draw_requests(seed)
    kept = [await asyncio.open_connection("127.0.0.1", port) for _ in range(NUM_KEPT)]
    kept[0][1].write(request_bytes("/health", None, method="GET"))
    assert (await read_reply(kept[0][0])).status == 200
    late = request_bytes("/v1/completions", {"prompt": "late", "max_tokens": 2})
    kept[1][1].write(late[:-9])  # its head and a part of its body
    open_ones = [await asyncio.open_connection("127.0.0.1", port) for _ in requests]
    for (_, writer), (_, data) in zip(open_ones, requests, strict=True):
        writer.write(data)
    reading = [asyncio.create_task(read_reply(reader)) for reader, _ in open_ones]
    running, waiting = await _all_taken(process, reading)
    result.met["ran"] += running
    result.met["waited"] += waiting
    process.process.terminate()
    kept[1][1].write(late[-9:])
    kept[2][1].write(late)
    for _ in range(NUM_NEW):
        result.refused("a new connection", await ask(port, "/v1/completions", {"prompt": "new", "max_tokens": 2}))
    kept[0][1].write(late)
    for name, (reader, _) in zip(("kept open", "sent in part", "open and unused"), kept, strict=True):
        result.refused(f"a connection {name}", await read_reply(reader))
    for (asked, _), reply in zip(requests, reading, strict=True):
        result.saw(asked, await reply)
    for _, writer in (*kept, *open_ones):
        writer.close()


async def _all_taken(process: ServeProcess, reading: Sequence[asyncio.Task[Reply]]) -> tuple[int, int]:
    """Wait until each request that is not answered is past the door and the engine has as many sequences. Returns how
    many run there and wait. Past the door are also this question for metrics and the request that was sent in part.
    Metrics are read first: what is answered meanwhile only makes fewer that are left."""
    async with asyncio.timeout(ANSWER_S):
        while True:
            running, waiting, open_requests = await asyncio.to_thread(_gauges, process)
            left = sum(not task.done() for task in reading)
            assert left, "all were answered before the signal; ask for more tokens"
            if open_requests >= left + 2 and running + waiting >= left:
                return running, waiting
            await asyncio.sleep(FRESH_S)


def _gauges(process: ServeProcess) -> tuple[int, int, int]:
    with process.client() as client:
        families = text_string_to_metric_families(client.get("/metrics").text)
    values = {each.name: int(each.value) for family in families for each in family.samples if each.name in _GAUGES}
    running, waiting, open_requests = (values[name] for name in _GAUGES)
    return running, waiting, open_requests


def count(model: str, seeds: range) -> list[Figure]:
    """Drains of a server each."""
    result, wrong = Drain(), []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as directory, ServeProcess(Path(directory), model, *OPTIONS) as process:
            asyncio.run(drain(process, seed, result))
            code = process.process.wait(ANSWER_S)
            errors = process.err.read_text()
            wrong += [f"seed {seed}: exit code {code}"] if code else []
            wrong += [f"seed {seed}: {errors[-300:]!r} on stderr"] if errors else []
    met = dict(result.met)
    return [
        Figure(
            "R13", "lost by a drain", len(result.lost), result.num_under_way, "requests under way", met, result.lost
        ),
        Figure(
            "R13", "taken by a server that drains, or ended wrongly", len(result.taken) + len(wrong),
            len(seeds) * (NUM_NEW + NUM_KEPT) + len(seeds), "new requests and exits", {}, [*result.taken, *wrong],
        ),
    ]  # fmt: skip


def shard(number: int) -> list[Figure]:
    """A part of the release size."""
    with tiny_model() as model:
        return count(model, range(PER_SHARD * number, PER_SHARD * (number + 1)))
