"""From the scores of `bench quality` to its report: rows, quality gates, verdicts, the terminal's table.

Owns the gates and the JSON object; nothing is measured here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from pagemill.bench.machine import describe_git, describe_machine, describe_versions, disturbance
from pagemill.bench.quality import Measurement, Scores, Settings, Subject
from pagemill.bench.quality_modes import (
    PARTS,
    REFERENCE,
    UNQUANTISED,
    Comparison,
    Mode,
    comparisons_of,
    default_mode,
)
from pagemill.bench.quality_peer import PEER, PeerScores
from pagemill.bench.quality_score import Estimate, Float64, mean, perplexity, perplexity_ratio
from pagemill.bench.report import MISS, PASS, rounded, timestamp
from pagemill.execution.loader import kv_spec_for
from pagemill.kernels.target import choose_target


@dataclass(frozen=True, slots=True)
class Gate:
    """What a mode may cost: perplexity ÷ the one it is held against, and KL divergence in nats per token."""

    ppl_ratio: float
    kld: float


DEFAULT_GATE = Gate(1.005, 0.005)
WEIGHTS_GATES = {"throughput": Gate(1.01, 0.008)}
# A KV type against bf16 KV, by the bits that a value takes with everything counted: the first that applies.
KV_GATES = ((4.8, Gate(1.02, 0.02)), (5.3, Gate(1.012, 0.01)), (float("inf"), Gate(1.0015, 0.0033)))
# KV types of so few bits are taken for their size: together with weights they have no gate.
SMALL_KV_BITS = 5.3
# How far the perplexity of our own float32 may be from llama.cpp's, either way, as a share.
PEER_GATE = 0.005


def gate_of(comparison: Comparison, bits: float) -> Gate | None:
    """The gate of a comparison: of a whole mode, its KV type with it, against float32; of a quantised KV type also
    against bf16 KV in the same weights.

    bits: of a KV value. None otherwise: float32 itself; a KV type of SMALL_KV_BITS against float32; f32 or f16 against
    bf16 KV, which tells how far any change of the cache is magnified by the roundings behind it; single parts of a KV
    type; and what the reference in numpy computes, but for its int8 against bf16.
    """
    mode, against = comparison.mode, comparison.against
    if mode == REFERENCE or mode.kv in PARTS or (mode.apart and against.kv != "bf16"):
        return None
    quantised = mode.kv not in UNQUANTISED
    if against == REFERENCE:
        small = quantised and bits <= SMALL_KV_BITS
        return None if small else WEIGHTS_GATES.get(mode.weights, DEFAULT_GATE)
    return next(gate for limit, gate in KV_GATES if bits <= limit) if quantised else None


def make_report(subject: Subject, settings: Settings, found: Measurement, peer: PeerScores) -> dict[str, Any]:
    """The bench's JSON object, without the names of its files. kld in nats per token, top1 a share from 0 to 1."""
    executor = subject.config.executor
    machine = describe_machine(choose_target() if executor == "native" else executor, subject.num_threads)
    return {
        "bench": "quality",
        "date": timestamp(),
        "machine": machine | {"cpu_shares": disturbance(found.before, found.after)},
        "versions": describe_versions(),
        "git": describe_git(),
        "settings": _settings(subject, settings),
        "interrupted": found.interrupted,
        "rows": make_rows(subject, found.scores),
        "peer": {
            "name": PEER,
            "weights": subject.checkpoint.weight_format,
            "versions": peer.versions,
            "rows": make_peer_rows(subject, found.scores, peer),
            "absent": peer.absence,
        },
    }


def make_rows(subject: Subject, measured: Sequence[Scores]) -> list[dict[str, Any]]:
    """One row for each n_ctx and comparison that has a whole window."""
    comparisons = comparisons_of(subject.modes)
    return [_row(subject, scores, each) for scores in measured if scores.num_windows for each in comparisons]


def make_peer_rows(subject: Subject, measured: Sequence[Scores], peer: PeerScores) -> list[dict[str, Any]]:
    """llama.cpp beside our float32, one row for each n_ctx of which it has windows, over these windows. Perplexities
    are over all tokens, standard errors over windows, of which llama.cpp tells no single tokens."""
    rows = []
    for scores in measured:
        own = [float(each.mean()) for each in scores.nll[REFERENCE]] if scores.num_windows else []
        means = peer.nll.get(scores.n_ctx, [])
        if not means:
            continue
        nll, nll_ref = np.array(means), np.array(own[: len(means)])
        ratio = perplexity_ratio(nll, nll_ref)
        rows.append(
            {
                "n_ctx": scores.n_ctx,
                "windows": len(means),
                "tokens": sum(len(each) for each in scores.nll[REFERENCE][: len(means)]),
                "against": _names(subject, REFERENCE),
                **_figure("ppl", perplexity(nll)),
                **_figure("ppl_ref", perplexity(nll_ref)),
                **_figure("ppl_ratio", ratio),
                "gate": {"ppl_difference": PEER_GATE},
                "verdict": peer_verdict(ratio),
                "samples": {"nll": [rounded(each) for each in means], "nll_ref": [rounded(each) for each in nll_ref]},
            }
        )
    return rows


def peer_verdict(ratio: Estimate) -> str:
    """PASS where llama.cpp's perplexity ÷ ours is within PEER_GATE of 1, on either side."""
    return PASS if abs(ratio.value - 1) <= PEER_GATE else MISS


def _row(subject: Subject, scores: Scores, comparison: Comparison) -> dict[str, Any]:
    mode, against = comparison.mode, comparison.against
    windows, windows_ref = scores.nll[mode], scores.nll[against]
    nll, nll_ref = np.concatenate(windows), np.concatenate(windows_ref)
    ratio = perplexity_ratio(nll, nll_ref)
    kld = mean(np.concatenate(scores.kld[comparison]))
    bits = (bits_per_value(subject, mode.k) + bits_per_value(subject, mode.v)) / 2
    gate = gate_of(comparison, bits)
    return {
        **_names(subject, mode),
        "default": mode == default_mode() and against == REFERENCE,
        "n_ctx": scores.n_ctx,
        "windows": scores.num_windows,
        "tokens": len(nll),
        "against": _names(subject, against),
        **_figure("ppl", perplexity(nll)),
        **_figure("ppl_ref", perplexity(nll_ref)),
        **_figure("ppl_ratio", ratio),
        **_figure("kld", kld),
        **_figure("top1", mean(np.concatenate(scores.top1[comparison]))),
        "bits_per_value": rounded(bits),
        "gate": None if gate is None else asdict(gate),
        "verdict": None if gate is None else verdict(gate, ratio, kld),
        "samples": {
            "nll": _means(windows),
            "nll_ref": _means(windows_ref),
            "kld": _means(scores.kld[comparison]),
            "top1": _means(scores.top1[comparison]),
        },
    }


def bits_per_value(subject: Subject, codec: str) -> float:
    """Bits of a stored number in a codec, everything of a block counted."""
    return kv_spec_for(subject.checkpoint, codec, subject.config.block_size).bits_per_value


def _names(subject: Subject, mode: Mode) -> dict[str, str]:
    """A mode in JSON. kv: as asked; k, v, queries, probabilities: what these are rounded to."""
    return {
        "weights": mode.weights,
        "kv": mode.kv,
        "k": mode.k,
        "v": mode.v,
        "queries": mode.queries,
        "probabilities": mode.probabilities,
        "executor": "reference" if mode.apart else subject.config.executor,
    }


def verdict(gate: Gate, ratio: Estimate, kld: Estimate) -> str:
    """PASS where both figures are within the gate."""
    return PASS if ratio.value <= gate.ppl_ratio and kld.value <= gate.kld else MISS


def _figure(name: str, estimate: Estimate) -> dict[str, float | None]:
    error = None if estimate.error is None else rounded(estimate.error)
    return {name: rounded(estimate.value), f"{name}_se": error}


def _means(windows: Sequence[Float64]) -> list[float]:
    return [rounded(float(each.mean())) for each in windows]


def _settings(subject: Subject, settings: Settings) -> dict[str, Any]:
    config = subject.config
    return {
        "model": config.model,
        "name": Path(config.model).name or subject.checkpoint.spec.name,
        "weight_format": subject.checkpoint.weight_format,
        "text": settings.text.name,
        "text_tokens": len(subject.tokens),
        "bos": subject.bos is not None,
        "n_ctx": list(settings.contexts),
        "windows": list(settings.windows_of.values()),
        "scored": "positions n_ctx/2 to n_ctx - 2 of each window, each on the token that follows",
        "reference": asdict(REFERENCE),
        "modes": [asdict(mode) for mode in subject.modes],
        "block_size": config.block_size,
        "executor": config.executor,
    }


def make_tables(report: dict[str, Any]) -> list[Table]:
    """The report as tables for people, one for each n_ctx, of two lines a row. top-1: share of tokens where both modes
    have the same most likely one. KV bits: per value."""
    tables = []
    for n_ctx in report["settings"]["n_ctx"]:
        rows = [row for row in report["rows"] if row["n_ctx"] == n_ctx]
        if not rows:
            continue
        title = f"n_ctx {n_ctx:,}, {rows[0]['windows']:,} windows"
        table = Table(box=SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
        table.add_column("weights/KV\nheld against", no_wrap=True)
        for heading in ("PPL\n± se", "change\n± se", "KLD, nats\n± se", "top-1\n± se", "KV\nbits", "verdict\ngate"):
            table.add_column(heading, justify="right")
        for row in rows:
            table.add_row(*_cells(row))
        for row in report["peer"]["rows"]:
            if row["n_ctx"] == n_ctx:
                table.add_row(*_peer_cells(row))
        tables.append(table)
    return tables


def _cells(row: dict[str, Any]) -> list[str]:
    mode, against = _mode(row), _mode(row["against"])
    few, many = (".2f", ".3f") if row["ppl"] < 1000 else (".0f", ".0f")
    ppl, bits = f"{row['ppl']:{many}}{_under(row['ppl_se'], few)}", f"{row['bits_per_value']:.4g}"
    if mode == against:
        return [f"{mode}\n(reference)", ppl, "", "", "", bits, ""]
    gate = row["gate"]
    return [
        f"{mode}\n{against}",
        ppl,
        f"{row['ppl_ratio'] - 1:+.2%}{_under(row['ppl_ratio_se'], '.2%')}",
        f"{row['kld']:.5f}{_under(row['kld_se'], '.5f')}",
        f"{row['top1']:.1%}{_under(row['top1_se'], '.1%')}",
        bits,
        "" if gate is None else f"{row['verdict']}\n{100 * (gate['ppl_ratio'] - 1):+.3g}%, {gate['kld']:g}",
    ]


def _peer_cells(row: dict[str, Any]) -> list[str]:
    few, many = (".2f", ".3f") if row["ppl"] < 1000 else (".0f", ".0f")
    return [
        f"{PEER}\n{_mode(row['against'])}",
        f"{row['ppl']:{many}}{_under(row['ppl_se'], few)}",
        f"{row['ppl_ratio'] - 1:+.2%}{_under(row['ppl_ratio_se'], '.2%')}",
        *("", "", ""),
        f"{row['verdict']}\n±{100 * row['gate']['ppl_difference']:g}%",
    ]


def _mode(names: dict[str, Any]) -> str:
    return f"{names['weights']}/{names['kv']}{'*' * (names['executor'] == 'reference')}"


def _under(error: float | None, form: str) -> str:
    return "" if error is None else f"\n± {error:{form}}"


def _default_line(row: dict[str, Any]) -> str:
    return f"the default, {_mode(row)}, at n_ctx {row['n_ctx']:,} against {_mode(row['against'])}: {row['verdict']}"


def title_of(report: dict[str, Any]) -> str:
    """Model and text in one line."""
    settings = report["settings"]
    return f"{settings['name']} ({settings['weight_format']}), {settings['text_tokens']:,} tokens of {settings['text']}"


def remarks(report: dict[str, Any]) -> list[str]:
    """What was cut short, the default's verdict, what llama.cpp is for or why it is absent, and the machine, one line
    each."""
    settings, machine = report["settings"], report["machine"]
    lines = []
    for n_ctx, windows in zip(settings["n_ctx"], settings["windows"], strict=True):
        done = next((row["windows"] for row in report["rows"] if row["n_ctx"] == n_ctx), 0)
        if done < windows:
            why = "interrupted" if report["interrupted"] else "the text has no more"
            lines.append(f"{done:,} of {windows:,} windows at n_ctx {n_ctx:,}: {why}")
    if any(row["executor"] == "reference" for row in report["rows"]):
        lines.append(
            "* by the reference in numpy; int8-k, -v, -q, -p: only keys, values, queries or probabilities as in int8"
        )
    lines += [_default_line(row) for row in report["rows"] if row["default"]]
    if report["peer"]["rows"]:
        lines.append(f"{PEER}: the same file and windows; our float32 is to be within {PEER_GATE:.1%} of it")
    if report["peer"]["absent"] is not None:
        lines.append(report["peer"]["absent"])
    return [*lines, f"{machine['cpu']}, {machine['num_threads']} of {machine['num_cores']} cores, {machine['target']}"]
