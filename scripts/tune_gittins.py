"""Choose the constants of the policy gittins on the first half of a trace; score the choice on the second half and on
the whole.

    python scripts/tune_gittins.py conversation_trace.jsonl --blocks 5859,10000 --rounds 2

It begins with plain guesses: a block used k times is expected to come back k times as often, one used once the less the
longer its text. Then constants are searched one after the other, each over a short list; a value is kept where the mean
hit ratio over the sizes, in the first half alone, is higher. Nothing of the second half is looked at before the choice
is made.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from pagemill.cache.policies.gittins import Gittins, GittinsSetting
from pagemill.cache.policies.reuse import LearnerSetting
from pagemill.simulator.replay import Prepared, prepare, replay
from pagemill.simulator.trace import Trace, read_trace

Change = Callable[[GittinsSetting], GittinsSetting]


def learner(**values: float | int) -> Change:
    """A change of constants of the learner."""
    return lambda setting: replace(setting, learner=replace(setting.learner, **values))


def classes(**values: object) -> Change:
    """A change of constants of the classes."""
    return lambda setting: replace(setting, **values)


GUESS = GittinsSetting(
    gaps=(0.25, 1.0, 4.0),
    lengths=(4096, 8192, 16384, 49152),
    once=(1.0, 0.8, 0.6, 0.5, 0.4),
    part_filled=0.1,
    continued=0.5,
    again=(2.0, 3.0, 4.0, 6.0, 11.0, 20.0),
    learner=LearnerSetting(0.5, 9, 16.0, 20_000.0, 500.0, 500.0, 0.1, 0.5),
)


def steeper(power: float) -> Change:
    """Levels of blocks used again that grow with a power of the guess."""
    return classes(again=tuple(float(f"{each**power:.3g}") for each in GUESS.again))


def flatter(power: float) -> Change:
    """Levels of blocks used once that fall with a power of the guess."""
    return classes(once=tuple(float(f"{each**power:.3g}") for each in GUESS.once))


SEARCH: list[tuple[str, list[Change]]] = [
    ("uses", [steeper(each) for each in (0.5, 0.75, 1.0, 1.25, 1.5)]),
    ("lengths", [flatter(each) for each in (0.0, 0.5, 1.0, 1.5, 2.0)]),
    ("continued", [classes(continued=each) for each in (0.15, 0.3, 0.6)]),
    ("part filled", [classes(part_filled=each) for each in (0.01, 0.03)]),
    ("half life", [learner(half_life=each) for each in (6.0, 12.0, 24.0, 48.0)]),
    ("shape weight", [learner(shape_weight=each) for each in (5e3, 2e4, 8e4, 3e5)]),
    ("level weight", [learner(level_weight=each) for each in (100.0, 400.0, 1600.0, 6400.0)]),
    ("group weight", [learner(group_weight=each) for each in (40.0, 160.0, 640.0, 2560.0, 10_000.0)]),
    ("prior hazard", [learner(prior_hazard=each) for each in (0.06, 0.12, 0.24)]),
    ("prior age", [learner(prior_age=each) for each in (0.1, 0.3, 1.0, 3.0)]),
    ("first edge", [learner(first_edge=e, num_edges=n) for e, n in ((0.25, 11), (0.25, 9), (0.5, 9), (0.5, 7))]),
    ("gaps", [classes(gaps=each) for each in ((), (1.0,), (0.5, 2.0), (0.25, 2.0, 6.0), (0.5, 1.0, 2.0, 4.0))]),
]


def halves(trace: Trace) -> tuple[Trace, Prepared]:
    """The first half of the requests."""
    first = Trace(trace.name, trace.block_tokens, trace.requests[: len(trace.requests) // 2])
    return first, prepare(first)


def score(trace: Trace, prepared: Prepared, setting: GittinsSetting, sizes: Sequence[int]) -> float:
    """Mean block hit ratio over the sizes."""
    ratios = [replay(trace, Gittins(size, setting), size, prepared).block_hit_ratio for size in sizes]
    return sum(ratios) / len(ratios)


def search(trace: Trace, setting: GittinsSetting, sizes: Sequence[int], rounds: int) -> GittinsSetting:
    """The best setting found on the first half."""
    first, prepared = halves(trace)
    best = score(first, prepared, setting, sizes)
    print(f"first half, to begin with: {best:.4f}", flush=True)
    for _ in range(rounds):
        before = best
        for name, changes in SEARCH:
            tried = [change(setting) for change in changes]
            scores = [score(first, prepared, each, sizes) for each in tried]
            at = max(range(len(scores)), key=scores.__getitem__)
            print(f"{name}: {' '.join(f'{each:.4f}' for each in scores)}", flush=True)
            if scores[at] > best:
                best, setting = scores[at], tried[at]
        if best == before:
            break
    return setting


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--blocks", default="5859,10000")
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    sizes = [int(each) for each in options.blocks.split(",")]
    trace = read_trace(options.trace)
    chosen = search(trace, GUESS, sizes, options.rounds)
    print(chosen)
    prepared = prepare(trace)
    for size in sizes:
        done = replay(trace, Gittins(size, chosen), size, prepared)
        print(f"{size:,} blocks: whole {done.block_hit_ratio:.4f}, second half {done.later_hit_ratio:.4f}", flush=True)


if __name__ == "__main__":
    main()
