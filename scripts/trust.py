"""The trust suite at release size, by hand: `make trust`, or

    python scripts/trust.py --minutes 10            # go on for so long, then write docs/scorecard.md
    python scripts/trust.py --only R5,S2            # some tests
    python scripts/trust.py --replay R14:1234    # one seed of R5, R11, R14, S2 or S5, with its traceback

Work is cut into shards, each run by a process of its own, which is killed after an hour. What a shard counted is
appended to the file build/trust/figures.jsonl, so that a run that is stopped goes on where it was; figures of other
code (another commit, or other changes to it) are left out. Shards of all tests take turns, so that a short run has
something of each. It ends with 1 where a figure of the tests chosen counts a failure. A shard that does not come to its
end is one, and one that met too little to tell anything (`FLOORS` in tests/trust/figures.py).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, NoReturn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from tests.fixtures.tiny import tiny_llama  # noqa: E402
from tests.trust import (  # noqa: E402
    accounting,
    beyond,
    canary,
    conversations,
    crossing,
    days,
    disconnects,
    doors,
    draining,
    hooks,
    hostile,
    leaks,
    listening,
    matrix,
    overload,
    planted,
    pressure,
    residue,
    sanitized,
    server_hooks,
    server_leaks,
    simulation,
    slow_sockets,
    timing,
    watched,
)
from tests.trust.figures import Figure, added, judged  # noqa: E402

STATE = ROOT / "build" / "trust" / "figures.jsonl"
SCORECARD = ROOT / "docs" / "scorecard.md"
CODECS = ("f32", "f16", "bf16", "int8")
MOST_SECONDS = 3600  # of one shard


@dataclass(frozen=True, slots=True)
class Test:
    """A row of the scorecard. num_shards: of the release size, which `size` says in words. run: counts one shard."""

    name: str
    title: str
    num_shards: int
    size: str
    run: Callable[[int], list[Figure]]


def seeds(count: Callable[[range], Figure], per_shard: int) -> Callable[[int], list[Figure]]:
    """Shards of consecutive seeds."""
    return lambda shard: [count(range(shard * per_shard, (shard + 1) * per_shard))]


def on_tiny(count: Callable[[str, int], Figure]) -> Callable[[int], list[Figure]]:
    """Shards on a tiny model that is made for each."""

    def run(shard: int) -> list[Figure]:
        with tempfile.TemporaryDirectory() as directory:
            return [count(str(tiny_llama(Path(directory))), shard)]

    return run


def conversations_of(model: str, shard: int) -> Figure:
    """Four scripts on the tiny model, then one on the default model."""
    return (
        conversations.count_default("smollm2-135m", shard) if shard % 5 == 4 else conversations.count_tiny(model, shard)
    )


def engines(_shard: int) -> list[Figure]:
    """The whole isolation matrix."""
    with tempfile.TemporaryDirectory() as directory:
        parts = [matrix.cache_cells(), matrix.token_cells(), matrix.key_cells(), matrix.engine_cells(Path(directory))]
        return [matrix.count(parts)]


TESTS = (
    Test("R5", "block accounting against a slow model", 520, "10 M operations", seeds(accounting.count, 100)),
    Test("R6", "clients that leave in every state", 10, "1,000 disconnects", disconnects.shard),
    Test("R7", "the cache is invisible", 24, "2,000 turns in 5 arms each", on_tiny(conversations_of)),
    Test("R9", "too little memory, and too many requests", 5, "10,000 requests", pressure.shard),
    Test("R11", "ten times the load, and one tenant that floods", 300, "300 worlds of 3,000 requests", overload.shard),
    Test("R13", "a drain on SIGTERM", 20, "100 drains", draining.shard),
    Test(
        "R14", "scheduler, cache, clock and faults from a seed", 500, "100,000 seeds, and 10,000 days of a server",
        lambda shard: [
            simulation.count(range(shard * 200, (shard + 1) * 200)), days.count(range(shard * 20, (shard + 1) * 20)),
        ],
    ),
    Test(
        "R15", "an exception at every per-request hook of engine and server", 1, "every hook",
        lambda shard: [*map(hooks.count_hook, hooks.HOOKS), *planted.shard(shard), server_hooks.count()],
    ),
    Test(
        "R17", "native code under address and undefined-behaviour sanitizers", len(sanitized.ALL_TESTS),
        "the kernel tests", lambda shard: [sanitized.count([sanitized.ALL_TESTS[shard]])],
    ),
    Test("S1", "isolation matrix, a control for each negative", 1, "every cell", engines),
    Test("S2", "hits across tenants in random traffic", 25, "1,000,000 look-ups", seeds(crossing.count, 2)),
    Test(
        "S3", "another tenant's prompts told by time", 1, "1,600 times the least of two probes, in each arm",
        lambda _: [timing.count(1600, 0.55)],
    ),
    Test(
        "S5", "what other tenants see, of an engine and over HTTP", 34, "1,000 pairs of worlds, and 34 of servers",
        lambda shard: [leaks.count(range(shard * 30, (shard + 1) * 30)), server_leaks.count(range(shard, shard + 1))],
    ),
    Test(
        "S8", "keys and values left in the process's memory", len(CODECS), "every way to go, every codec",
        on_tiny(lambda model, shard: residue.count(model, [(case, CODECS[shard]) for case in residue.CASES])),
    ),
    Test(
        "S9", "schemathesis, positive, negative and in chains, on all routes", 200, "200,000 cases",
        lambda shard: hostile.count(shard, 1000),
    ),
    Test("S11", "a request beyond each limit", 1, "every limit", beyond.shard),
    Test("S12", "500 slow sockets beside normal load", 4, "16 rounds of 500 questions", slow_sockets.shard),
    Test("S13", "every route of both ports without a key", 1, "every route", lambda _: doors.count()),
    Test(
        "S14", "no pickle, eval, exec or shell: the source, and servers under an audit hook", 20,
        "40,000 requests, and those of S9",
        lambda shard: [*([watched.scan()] if shard == 0 else []), watched.serve(2000)],
    ),
    Test("S15", "where a server listens", 1, "every setting", lambda _: listening.count()),
    Test("S18", "a canary prompt in logs, traces, metrics and crash text", 6, "every level and format", canary.shard),
)  # fmt: skip
BY_NAME = {test.name: test for test in TESTS}
REPLAYS: dict[str, Callable[[int], object]] = {
    "R5": accounting.replay,
    "R11": overload.replay,
    "R14": simulation.replay,
    "S2": lambda seed: crossing.count(range(seed, seed + 1)),
    "S5": leaks.leak,
}


def code_id() -> str:
    """The commit, and a digest of what differs from it in source and tests."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout

    commit, changes = git("rev-parse", "--short", "HEAD").strip(), git("diff", "HEAD", "--", "src", "csrc", "tests")
    return f"{commit}+{hashlib.sha256(changes.encode()).hexdigest()[:8]}" if changes else commit


def read_state(code: str) -> dict[str, list[Figure]]:
    """Figures of this code by shard."""
    lines = STATE.read_text().splitlines() if STATE.exists() else []
    entries = [entry for entry in map(json.loads, lines) if entry["code"] == code]
    return {entry["shard"]: [Figure(**each) for each in entry["figures"]] for entry in entries}


def shards_left(only: set[str], done: dict[str, list[Figure]]) -> Iterator[str]:
    """Names of shards to run, the tests taking turns."""
    for index in range(max(test.num_shards for test in TESTS)):
        for test in TESTS:
            if test.name in only and index < test.num_shards and f"{test.name}:{index}" not in done:
                yield f"{test.name}:{index}"


class Running:
    """A process that runs one shard, with one kernel thread and a low priority, and what it starts. Mutated by its
    life. It writes to files, so that it never waits for a reader."""

    def __init__(self, shard: str) -> None:
        variables = os.environ | {"PAGEMILL_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._out: IO[str] = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - closed by `end`
        self._error: IO[str] = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._began_s = time.monotonic()
        self._process = subprocess.Popen(
            command_of(shard), cwd=ROOT, env=variables, stdin=subprocess.DEVNULL, stdout=self._out,
            stderr=self._error, start_new_session=True,
        )  # fmt: skip

    @property
    def is_late(self) -> bool:
        """Whether it has had its time."""
        return time.monotonic() - self._began_s > MOST_SECONDS

    @property
    def is_over(self) -> bool:
        """Whether it has ended, or has had its time."""
        return self._process.poll() is not None or self.is_late

    def end(self) -> tuple[str, str, str]:
        """Kill it and all that it started, if they still run. Returns what it wrote to either, and what was wrong with
        its end ("")."""
        code = self._process.poll()
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        told = []
        for file in (self._out, self._error):
            file.seek(0)
            told.append(file.read())
            file.close()
        wrong = f"killed after {MOST_SECONDS} s" if code is None else f"it ended with {code}" if code else ""
        return told[0], told[1], wrong


def command_of(shard: str) -> list[str]:
    """What runs one shard."""
    return ["nice", sys.executable, str(Path(__file__).resolve()), "--shard", shard]


def keep(code: str, shard: str, output: str, error: str, wrong: str) -> list[Figure]:
    """Append what a shard told; one that told nothing, or that ended wrongly, is a failure."""
    figures = [Figure.decode(line) for line in output.splitlines() if line.startswith("{")]
    if wrong or not figures:
        last = (error.strip().splitlines() or ["no output"])[-1]
        replay = f"python scripts/trust.py --shard {shard}  # {wrong}; {last:.200}"
        figures.append(Figure(shard.split(":")[0], "shards that ended early", 1, 1, "shards", {}, [replay]))
    STATE.parent.mkdir(parents=True, exist_ok=True)
    entry = {"code": code, "shard": shard, "figures": [json.loads(each.encode()) for each in figures]}
    with STATE.open("a") as file:
        file.write(json.dumps(entry) + "\n")
    return figures


def run_all(only: set[str], minutes: float, processes: int) -> int:
    """Run shards until none is left or the time is up, then write the scorecard. Returns failures of the tests chosen,
    those of earlier runs of the same code with them."""
    code, began = code_id(), time.monotonic()
    done = read_state(code)
    waiting = shards_left(only, done)
    running: dict[str, Running] = {}
    more = True
    try:
        while running or more:
            more = more and time.monotonic() - began < 60 * minutes
            while more and len(running) < processes:
                shard = next(waiting, None)
                more = shard is not None
                if shard is not None:
                    running[shard] = Running(shard)
            for shard in [name for name, each in running.items() if each.is_over]:
                done[shard] = keep(code, shard, *running.pop(shard).end())
                print(*done[shard], sep="\n", flush=True)
            time.sleep(0.05)
    finally:
        for each in running.values():
            each.end()
        write_scorecard(done, code)
    return sum(each.num_failures for each in totals(done) if each.test in only)


def totals(done: dict[str, list[Figure]]) -> list[Figure]:
    """The figures of all parts together, which have more floors to reach than one part."""
    return [judged(each) for each in added(each for figures in done.values() for each in figures)]


def write_scorecard(done: dict[str, list[Figure]], code: str) -> None:
    """docs/scorecard.md from all figures of this code."""
    lines = [
        "# Scorecard of the trust tests",
        "",
        "Written by `make trust` (`scripts/trust.py`). The same tests run at a smaller size, as `make trust-ci`, with",
        "every change. N is what ran, never extrapolated. No failure in N trials bounds the rate of failures at 3/N",
        "with a confidence of 95 %. Trials of one seed depend on each other, so that for operations, turns and",
        "look-ups the true bound lies above the one shown.",
        "",
        f"Last run: {datetime.now(UTC):%Y-%m-%d}, code {code}, {os.cpu_count()} cores.",
        "",
        "| id | test | failures | in N | 3/N | ran of the release size | met on the way |",
        "|---|---|---|---|---|---|---|",
    ]
    replays, every = [], totals(done)
    for test in TESTS:
        ran = [name for name in done if name.split(":")[0] == test.name]
        share = f"{len(ran)} of {test.num_shards} parts of {test.size}"
        figures = [each for each in every if each.test == test.name]
        if not figures:
            lines.append(f"| {test.name} | {test.title} | not run | 0 | nothing ran | {share} | |")
        for each in figures:
            met = ", ".join(f"{count:,} {name}" for name, count in each.also.items())
            counted = f"{each.num_failures:,} {each.what} | {each.num_trials:,} {each.unit} | {each.bound}"
            lines.append(f"| {test.name} | {test.title} | {counted} | {share} | {met} |")
            replays += each.replays
    if replays:
        lines += ["", "## Failures", "", "```text", *(each[:300] for each in replays), "```"]
    lines += ["", *SCOPE]
    SCORECARD.write_text("\n".join(lines) + "\n")


SCOPE = (
    "## What the rows say and what not",
    "",
    "* There is one tier, memory. What colder tiers promise is therefore not shown: in R5 offloading and",
    "  restoring, in R7 the arm of a disk, in R13 the hits on durable blocks after a kill (its drain is shown),",
    "  in R14 tiers and their faults, in S1, S8 and S14 every tier but memory. R1, R2, R3, R8, R10, S7 and S7b",
    "  are of such tiers altogether.",
    "* A part that met too little to tell anything is a failure of its row: no eviction, no preemption, a control",
    "  that sees nothing. So is one that did not come to its end, or not within an hour.",
    "* R7 compares a digest of all logits of each token chosen with those of an engine that shares nothing and",
    "  computes one request at a time: shared and forked, evicted, preempted, purged and pinned, resized; in families",
    "  llama, mistral and qwen2 (both with sliding windows) and gpt2. Every fourth cache of R5 has windows too.",
    "* R11 and R14 run the real scheduler, admission and cache on a virtual clock. R6, R9, R13, S12 and the second row",
    "  of R15 run a server over sockets, with a tiny model.",
    "* R11: a flood is one tenant that asks for ten times of what the machine can do; in the other row everybody",
    "  asks for ten times. The peak is the best of several loads, from one that just fills the machine to three",
    "  times of that. Each world is judged by itself, with 400 to 900 requests of its victims, so that its 99th",
    "  percentile is one of their 4 to 9 longest times. Of the first 61 worlds none exceeds the bound of 1.5 (seed 22",
    "  has 1.45; before steps followed rows by eights world 2 had 1.51): highest where there are 8 places and one",
    "  victim, since all places are taken beside a flood and a burst of a victim's requests takes them one by one.",
    "* R14 compares answers, reasons, blocks, pins and what is left after a purge. What changes none of them it",
    "  cannot see: of the 22 broken caches of `tests/contracts/cache/broken.py` it finds 13. The others break the",
    "  order of eviction, hits that are too short or too long, tables that are old where the contents are the",
    "  same, drafts, salts, admission that promises too much, and lost events: R5 finds each.",
    "* R15 plants once at the beginning of each Python function that is called for one request, as found by a",
    "  profiler; coroutines, generators, native code and work for a whole step are left out. Routes are a hand list.",
    "* S1: no engine option moves the key's codec version, adapter or media; they have cells of the key only.",
    "* S3: its figure is the chance that probes of fresh prompts take longer than those of prompts that another",
    "  tenant has primed (AUC), with a one-sided 95 % upper bound. N is not of single probes: each of the 1,600",
    "  times of an arm is the least of two. The control is the victim's own, 0.95 or more, timed among the",
    "  others. One below that is a failure of the row as well, though no prompt was told: its figure is under",
    "  failures.",
    "* S5 compares usage, receipts, reasons, errors and ids in pairs of runs that differ only in what another",
    "  tenant writes, or asks three times as often, or not at all; over HTTP, answers and headers too. There is room",
    "  for all and no quota: where blocks are scarce or a tenant waits at its own quota, order, eviction and times may",
    "  depend on others' load (S3 has times). Of the metrics names and labels are compared, of times only that they",
    "  are times. The dashboard is not in it.",
    "* S8 searches all writable memory of a process: pages, scratch memory, stacks, freed memory. Prompt texts and",
    "  token ids are out of scope: they belong to the caller. So are logits, the last step's answer. In scratch memory",
    "  and on stacks rows of 32-bit floats are looked for, whatever the codec.",
    "* S9 counts answers of 500 and above, answers that do not come within a minute, and errors without a message. Its",
    "  server's limits on answers are low, so that a valid case cannot ask for minutes of work. The admin port is",
    "  asked too, by a description that is held against its routes; its drain comes last.",
    "* S11 counts a refusal as right when the engine has run no step and let nothing in, and neither tokeniser nor",
    "  template was asked, unless only they can tell. Times are judged at release size: the median of five requests,",
    "  from the request's end or, for a timer, from when it runs out. Not judged are a template's instructions, output",
    "  and memory (work up to the limit is part of them) and a client that does not read, which is cut without an",
    "  answer. One connection too many is answered with 503.",
    "* S12: each part asks in turns without and with slow sockets, whose timers are 10 s, and compares the 99th",
    "  percentiles: beside slow sockets 1.2 times that without, at the most; CI compares no times. Slow are",
    "  silence, heads, bodies and chunks sent bit by bit, answers that are not read, streams of which a byte is",
    "  read now and then, and TLS handshakes. A cut that comes more than 20 s behind its timer is a failure;",
    "  those that come more than a second behind it, as the slow client sees it, are counted.",
    "* S13 sends right bodies to every route that takes one.",
    "* S18: at level info a request's line tells its path and a well-formed x-request-id of the client, and names of",
    "  unknown fields are told at the default level; neither counts.",
)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=24 * 60.0, help="begin no shard after so long")
    parser.add_argument("--processes", type=int, default=2, help="shards at a time")
    parser.add_argument("--only", default=",".join(BY_NAME), help="tests, separated by commas")
    parser.add_argument("--replay", metavar="TEST:SEED", help="one seed, with its traceback")
    parser.add_argument("--shard", metavar="TEST:SHARD", help="one shard, its figures as JSON")
    chosen = parser.parse_args()
    only = set(chosen.only.split(","))
    if unknown := only - BY_NAME.keys():
        parser.error(f"there is no test {', '.join(sorted(unknown))}; choose from {', '.join(BY_NAME)}")
    name, _, number = (chosen.replay or chosen.shard or "R5:0").partition(":")
    if name not in (REPLAYS if chosen.replay else BY_NAME) or not number.isdecimal():
        parser.error(f"{name}:{number} is no test and number; give {', '.join(REPLAYS if chosen.replay else BY_NAME)}")
    if chosen.replay:
        print(REPLAYS[name](int(number)))
    elif chosen.shard:
        print(*(each.encode() for each in added(map(judged, BY_NAME[name].run(int(number))))), sep="\n")
    else:
        signal.signal(signal.SIGTERM, _stopped)
        num_failures = run_all(only, chosen.minutes, chosen.processes)
        print(f"{num_failures:,} failures; {SCORECARD} has the figures")
        sys.exit(1 if num_failures else 0)


def _stopped(number: int, _frame: object) -> NoReturn:
    """What runs is ended, and the scorecard written, whatever else is said meanwhile."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
