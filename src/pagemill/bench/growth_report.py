"""From the measurements of `bench growth` to its report. Owns the JSON object and the terminal's tables."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from pagemill.base.units import format_bytes
from pagemill.bench.growth import Cell, Growth, Measurement, ModelGrowth, Settings, growths
from pagemill.bench.machine import describe_git, describe_machine, describe_versions, disturbance
from pagemill.bench.report import Row, rounded, timestamp

GOAL = 1.3


def make_report(settings: Settings, found: Measurement) -> dict[str, Any]:
    """The bench's JSON object, without the names of its files. Times in seconds, sizes in bytes, rates per second."""
    barriers = Row("barrier", "all", "ns", tuple(found.barriers_ns or (0.0,))).as_json()
    machine = describe_machine(found.target, found.num_threads) | {
        "barrier_ns": {name: barriers[name] for name in ("median", "p10", "p90", "samples")},
        "cpu_shares": disturbance(found.before, found.after),
    }
    return {
        "bench": "growth",
        "date": timestamp(),
        "machine": machine,
        "versions": describe_versions(),
        "git": describe_git(),
        "settings": {"num_rounds": settings.num_rounds, "quick": settings.quick, "goal": GOAL},
        "interrupted": found.interrupted,
        "models": [_model_json(each) for each in found.models],
        "rows": [_row_json(model, cell) for model in found.models for cell in model.cells if cell.samples],
    }


def _model_json(found: ModelGrowth) -> dict[str, Any]:
    model = found.model
    return {
        "name": model.name,
        "weights": "random" if model.random else "checkpoint",
        "weight_format": model.main_format(),
        "weight_bytes": model.weight_bytes,
        "kv_bytes_per_token": {codec: spec.bytes_per_token for codec, spec in found.codecs.items()},
        "memory_bytes_s": rounded(found.memory_bytes_s),
        "growth": [_growth_json(each) for each in growths(found)],
        "skipped": [
            {"codec": each.codec, "num_seqs": each.work.num_seqs, "context": each.work.context, "reason": each.reason}
            for each in found.skipped
        ],
    }


def _growth_json(each: Growth) -> dict[str, Any]:
    return {
        "codec": each.codec,
        "num_seqs": each.num_seqs,
        "from_context": each.from_context,
        "to_context": each.to_context,
        "extra_s": rounded(each.extra_s),
        "extra_bytes": each.extra_bytes,
        "near_bytes_s": rounded(each.near_bytes_s),
        "memory_bytes_s": rounded(each.memory_bytes_s),
        "page_bytes_s": rounded(each.page_bytes_s),
        "ratio": rounded(each.ratio),
        "memory_ratio": rounded(each.memory_ratio),
        "page_ratio": rounded(each.page_ratio),
    }


def _row_json(found: ModelGrowth, cell: Cell) -> dict[str, Any]:
    name = f"{found.model.name}, decode × {cell.work.num_seqs} at {cell.work.context:,}"
    return Row(name, cell.codec, "ms", tuple(1e3 * each for each in cell.samples)).as_json() | {
        "model": found.model.name,
        "codec": cell.codec,
        "num_seqs": cell.work.num_seqs,
        "context": cell.work.context,
        "kv_bytes": cell.kv_bytes,
        "best_s": rounded(cell.best_s),
        "best_tok_s": rounded(cell.work.num_seqs / cell.best_s),
    }


def title_of(model: dict[str, Any]) -> str:
    """A model and its weights in one line."""
    weights = "random weights, " if model["weights"] == "random" else ""
    return f"{model['name']} ({weights}{model['weight_format']}): decoding by batch and context"


def make_tables(report: dict[str, Any]) -> list[Table]:
    """One table for each model and KV codec: milliseconds of a step, and its growth."""
    return [_table(report, model, codec) for model in report["models"] for codec in model["kv_bytes_per_token"]]


def _table(report: dict[str, Any], model: dict[str, Any], codec: str) -> Table:
    rows = [each for each in report["rows"] if each["model"] == model["name"] and each["codec"] == codec]
    contexts = sorted({each["context"] for each in rows})
    per_token = format_bytes(model["kv_bytes_per_token"][codec])
    title = f"KV {codec}, {per_token} a token: ms of a step"
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    table.add_column("streams", justify="right")
    for context in contexts:
        table.add_column(f"{context:,}", justify="right")
    for name in ("GB/s", "growth", "in pages", "growth"):
        table.add_column(name, justify="right")
    cells = {(each["num_seqs"], each["context"]): each for each in rows}
    for batch in sorted({each["num_seqs"] for each in rows}):
        grown = next((g for g in model["growth"] if (g["codec"], g["num_seqs"]) == (codec, batch)), None)
        line = [cells.get((batch, context)) for context in contexts]
        table.add_row(
            f"{batch}",
            *("–" if each is None else _milliseconds(each["best_s"]) for each in line),
            "–" if grown is None else f"{grown['near_bytes_s'] / 1e9:.1f}",
            "–" if grown is None else f"{grown['ratio']:.2f}",
            "–" if grown is None else f"{grown['page_bytes_s'] / 1e9:.1f}",
            "–" if grown is None else f"{grown['page_ratio']:.2f}",
        )
    return table


def _milliseconds(seconds: float) -> str:
    value = 1e3 * seconds
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def remarks(report: dict[str, Any]) -> list[str]:
    """What the figures were measured on and how to read them, one line each."""
    machine = report["machine"]
    lines = [
        f"{machine['cpu']}, {machine['num_threads']} of {machine['num_cores']} cores, {machine['target']}; barrier "
        f"{machine['barrier_ns']['median']:,.0f} ns",
        f"Fastest of all samples ({report['settings']['num_rounds']} a step or more). Growth: extra time from the "
        "shortest to the longest context ÷ time to read the extra keys and values at the bandwidth over as much memory "
        f"as the longest step reads, measured in the same run (goal ≤ {GOAL}). In pages: the same against the "
        "bandwidth at which single pages of many blocks can be read, as keys and values lie.",
    ]
    for model in report["models"]:
        missing = model["skipped"]
        if missing:
            first = missing[0]
            steps = "1 step" if len(missing) == 1 else f"{len(missing)} steps"
            lines.append(
                f"{model['name']}: {steps} left out, such as {first['num_seqs']} × {first['context']:,} "
                f"in {first['codec']}: {first['reason']}"
            )
    shares = machine["cpu_shares"]
    if shares is not None:
        lines.append(
            f"of all CPU time: this process {shares['own']:.0%}, other processes {shares['others']:.0%}, taken by the "
            f"hypervisor {shares['steal']:.1%}"
        )
    if report["interrupted"]:
        lines.append("interrupted: what had been measured by then")
    return lines
