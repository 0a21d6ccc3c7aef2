"""The trust suite at release size, by hand: `make trust`, or

    python scripts/trust.py --minutes 10            # go on for so long, then write docs/scorecard.md
    python scripts/trust.py --only R5,S2            # some tests
    python scripts/trust.py --replay R14:1234    # one seed of R5, R11, R14, S2 or S5, with its traceback

Work is cut into shards, each run by a process of its own. What a shard counted is appended to the file
build/trust/figures.jsonl, so that a run that is stopped goes on where it was; figures of other code (another commit, or
other changes to it) are left out. Shards of all tests take turns, so that a short run has something of each.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

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
from tests.trust.figures import Figure, added  # noqa: E402

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
    Test("R5", "block accounting against a slow model", 500, "10 M operations", seeds(accounting.count, 100)),
    Test("R6", "clients that leave in every state", 10, "1,000 disconnects", disconnects.shard),
    Test("R7", "the cache is invisible", 24, "2,000 turns in 5 arms each", on_tiny(conversations_of)),
    Test("R9", "too little memory, and too many requests", 5, "10,000 requests", pressure.shard),
    Test("R11", "ten times the load, and one tenant that floods", 50, "300 worlds", overload.shard),
    Test("R13", "a drain on SIGTERM", 20, "100 drains", draining.shard),
    Test(
        "R14", "scheduler, cache, clock and faults from a seed", 500, "100,000 seeds, and 10,000 days of a server",
        lambda shard: [
            simulation.count(range(shard * 200, (shard + 1) * 200)), days.count(range(shard * 20, (shard + 1) * 20)),
        ],
    ),
    Test(
        "R15", "an exception at every per-request hook of engine and server", 1, "every hook",
        lambda _: [*map(hooks.count_hook, hooks.HOOKS), server_hooks.count()],
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
    Test("S11", "a request beyond each limit", 1, "every limit", lambda _: [beyond.count()]),
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


def start(shard: str) -> subprocess.Popen[str]:
    """A process that runs one shard, with one kernel thread and a low priority."""
    variables = os.environ | {"PAGEMILL_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = ["nice", sys.executable, str(Path(__file__).resolve()), "--shard", shard]
    return subprocess.Popen(command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def keep(code: str, shard: str, output: str, error: str) -> list[Figure]:
    """Append what a shard told; a shard that told nothing is a failure."""
    lines = [line for line in output.splitlines() if line.startswith("{")]
    figures = [Figure.decode(line) for line in lines]
    if not figures:
        last = (error.strip().splitlines() or ["no output"])[-1]
        replay = f"python scripts/trust.py --shard {shard}  # {last:.200}"
        figures = [Figure(shard.split(":")[0], "shards that ended early", 1, 1, "shards", {}, [replay])]
    STATE.parent.mkdir(parents=True, exist_ok=True)
    entry = {"code": code, "shard": shard, "figures": [json.loads(each.encode()) for each in figures]}
    with STATE.open("a") as file:
        file.write(json.dumps(entry) + "\n")
    return figures


def run_all(only: set[str], minutes: float, processes: int) -> None:
    """Run shards until none is left or the time is up, then write the scorecard."""
    code, began = code_id(), time.monotonic()
    done = read_state(code)
    waiting = shards_left(only, done)
    running: dict[str, subprocess.Popen[str]] = {}
    more = True
    try:
        while running or more:
            more = more and time.monotonic() - began < 60 * minutes
            while more and len(running) < processes:
                shard = next(waiting, None)
                more = shard is not None
                if shard is not None:
                    running[shard] = start(shard)
            for shard in [name for name, process in running.items() if process.poll() is not None]:
                done[shard] = keep(code, shard, *running.pop(shard).communicate())
                print(*done[shard], sep="\n", flush=True)
            time.sleep(0.05)
    finally:
        for process in running.values():
            process.terminate()
        write_scorecard(done, code)


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
    replays = []
    for test in TESTS:
        ran = [name for name in done if name.split(":")[0] == test.name]
        share = f"{len(ran)} of {test.num_shards} parts of {test.size}"
        every = added(each for figures in done.values() for each in figures)
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
    "* R5 and R14 have no offloading and no restoring yet: there is one tier, memory. S1 and S14 have that tier only,",
    "  too.",
    "* R7 compares a digest of all logits of each token chosen with those of an engine that shares nothing and",
    "  computes one request at a time: shared and forked, evicted, preempted, purged and pinned, resized.",
    "* R11 and R14 run the real scheduler, admission and cache on a virtual clock. R6, R9, R13, S12 and the second row",
    "  of R15 run a server over sockets, with a tiny model.",
    "* S3: its figure is the chance that probes of fresh prompts take longer than those of prompts that another tenant",
    "  has primed (AUC), with a one-sided 95 % upper bound; a probe is the least time of two prompts. The control is",
    "  the victim's own, 0.95 or more. One below that is a failure of the row as well, though no prompt was told: its",
    "  figure is under failures.",
    "* S5 compares usage, receipts, reasons, errors and ids in pairs of runs that differ only in what another",
    "  tenant writes; over HTTP, answers and headers too, but for ids and times. The dashboard is not in it.",
    "* S8 searches all writable memory of a process: pages, scratch memory, freed memory. Prompt texts and token ids",
    "  are out of scope: they belong to the caller. In scratch memory, 32-bit floats are looked for.",
    "* S9 counts answers of 500 and above, answers that do not come within a minute, and errors without a message. Its",
    "  server's limits on answers are low, so that a valid case cannot ask for minutes of work.",
    "* S11 counts a refusal as right when the engine has run no step and let nothing in, and neither tokeniser nor",
    "  template was asked, unless only they can tell.",
    "* S12: each part asks in turns without and with slow sockets, whose timers are 10 s, and compares the 99th",
    "  percentiles: beside slow sockets 1.2 times that without, at the most.",
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
        print(*(each.encode() for each in added(BY_NAME[name].run(int(number)))), sep="\n")
    else:
        run_all(only, chosen.minutes, chosen.processes)


if __name__ == "__main__":
    main()
