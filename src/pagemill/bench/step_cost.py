"""What a step takes on this machine, as the cost model of `pagemill simulate --serve`. Owns the steps that are timed
and the fit; what the model means is `simulator/serve.py`'s.

Least squares of the relative error over steps that decode few and many rows behind short and long texts, and that read
short and long chunks of prompts. Of each the fastest of several runs counts: what disturbs only ever adds time.
"""

from __future__ import annotations

import json
import time
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from pagemill.base.errors import ConfigError
from pagemill.base.params import SamplingParams
from pagemill.base.step import SequenceStep, StepPlan
from pagemill.build import Built
from pagemill.simulator.serve import StepCost, percentiles

_GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)
_ROWS, _BEHIND = (1, 8, 32), (64, 1024)
_CHUNKS, _STARTS = (32, 128, 512), (0, 1024)


@dataclass(frozen=True, slots=True)
class TimedStep:
    """One kind of step. rows: that decode. chunk: prompt tokens. behind: positions before them. seconds: fastest run;
    fitted_s: what the model says."""

    rows: int
    chunk: int
    behind: int
    seconds: float
    fitted_s: float = 0.0


def measure_step_cost(built: Built, repeats: int = 5) -> tuple[StepCost, list[TimedStep]]:
    """Time the steps and fit. Raises ConfigError where the KV cache is too small for any of them."""
    kinds = [(rows, 0, behind) for rows, behind in product(_ROWS, _BEHIND)]
    kinds += [(0, chunk, start) for chunk, start in product(_CHUNKS, _STARTS)]
    size, timed = built.kv_spec.block_size, []
    for rows, chunk, behind in kinds:
        per_row = -(-(behind + max(chunk, 1)) // size)
        if max(rows, 1) * per_row > built.num_blocks or behind + chunk >= built.max_model_len:
            continue
        timed.append(TimedStep(rows, chunk, behind, _fastest(built, rows, chunk, behind, repeats)))
    if len(timed) < 4:
        raise ConfigError("the KV cache is too small to measure steps in; raise kv_cache_memory_bytes or max_model_len")
    terms = np.array([_terms(each) for each in timed])
    seconds = np.array([each.seconds for each in timed])
    scaled = terms / seconds[:, None]
    keep = list(range(4))
    while True:  # figures below 0 are left out, the others fitted again
        found = np.linalg.lstsq(scaled[:, keep], np.ones(len(timed)), rcond=None)[0]
        if (found >= 0).all():
            break
        keep = [each for each, value in zip(keep, found, strict=True) if value >= 0]
    figures = np.zeros(4)
    figures[keep] = found
    fitted = terms @ figures
    source = f"{built.spec.name}, {built.num_threads} threads"
    base_s, row_s, token_s, read_s = (float(each) for each in figures)
    cost = StepCost(base_s, row_s, token_s, read_s, source)
    return cost, [
        TimedStep(each.rows, each.chunk, each.behind, each.seconds, float(value))
        for each, value in zip(timed, fitted, strict=True)
    ]


def describe_fit(timed: Sequence[TimedStep]) -> dict[str, Any] | None:
    """What a model was fitted to and how far it is from it, as JSON: the steps, and the relative error of what the
    model says of each (p50, p90, max). None without any steps."""
    if not timed:
        return None
    errors = array("d", (abs(each.fitted_s / each.seconds - 1) for each in timed))
    found = percentiles(errors)
    return {
        "relative_error": {"p50": found["p50"], "p90": found["p90"], "max": max(errors)},
        "steps": [asdict(each) for each in timed],
    }


def load_step_cost(path: Path) -> tuple[StepCost, list[TimedStep]]:
    """A model that `store_step_cost` wrote, with what it was fitted to; no steps where the file has none. Raises
    ConfigError where the file is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        cost = StepCost(**{name: found[name] for name in ("base_s", "row_s", "token_s", "read_s", "source")})
        timed = [TimedStep(**each) for each in found.get("steps", ())]
        describe_fit(timed)
        return cost, timed
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError, AttributeError) as error:
        raise ConfigError(f"{path} is no cost model ({error}); remove it, and it is measured anew") from None


def store_step_cost(path: Path, cost: StepCost, timed: list[TimedStep]) -> None:
    """Write a model and what it was fitted to as JSON. Raises ConfigError where that is not possible."""
    steps = [asdict(each) for each in timed]
    try:
        path.write_text(json.dumps(cost.describe() | {"steps": steps}) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}; give another --cost-model") from None


def _terms(step: TimedStep) -> list[float]:
    """What base_s, row_s, token_s and read_s are multiplied by."""
    if step.rows:
        return [1.0, step.rows, 0.0, step.rows * (step.behind + 0.5)]
    return [1.0, 0.0, step.chunk, step.chunk * (step.behind + step.chunk / 2)]


def _fastest(built: Built, rows: int, chunk: int, behind: int, repeats: int) -> float:
    size, count = built.kv_spec.block_size, max(chunk, 1)
    per_row = -(-(behind + count) // size)
    plan = StepPlan(
        tuple(
            SequenceStep(
                seq_id=-1 - index,
                token_ids=array("i", [(7 * index + 13 * i) % built.spec.vocab_size for i in range(count)]),
                start=behind,
                block_table=array("i", range(index * per_row, (index + 1) * per_row)),
                sample=True,
                params=_GREEDY,
                seed=0,
            )
            for index in range(max(rows, 1))
        )
    )
    best = float("inf")
    for _ in range(repeats):
        begin_s = time.perf_counter()
        built.executor.run(plan)
        best = min(best, time.perf_counter() - begin_s)
    return best
