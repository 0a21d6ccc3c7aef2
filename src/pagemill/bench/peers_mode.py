"""What a mode of Pagemill is in `bench peers`: the formats that it resolved to, and its accuracy from the newest result
of `bench quality` in the same directory.

Owns the two descriptions and their lines; accuracy is measured by `bench quality`, whose files are only read here.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pagemill.base.config import DTYPE_FORMATS, EngineConfig
from pagemill.execution.loader import ConvertedWeights, kv_codec_for
from pagemill.kernels.target import choose_target
from pagemill.models.checkpoint import Checkpoint
from pagemill.models.registry import build_plan

_REFERENCE = ("float32", "f32")
_USUAL_CONTEXT = 512
_DTYPES = {format: dtype for dtype, format in DTYPE_FORMATS.items()}
_LAYER = "layers."  # what the handles of layers begin with


def resolve_mode(config: EngineConfig, checkpoint: Checkpoint) -> dict[str, Any]:
    """What the engine makes of a configuration on this machine, by the loader's own rules.

    model: as `--model` takes it. asked: the weight format, auto among them. layers, others: format in memory -> number
    of matrices. kv: the resident codec. file_format: of the checkpoint. Raises ConfigError for a forced target that
    this machine cannot run.
    """
    plan = build_plan(checkpoint.spec, max_positions=1)
    weights = ConvertedWeights(plan, checkpoint.tensors, config.weights, choose_target())
    counts: dict[str, dict[str, int]] = {"layers": {}, "others": {}}
    for handle, declared in plan.weights.items():
        if declared.kind == "matrix":
            part = counts["layers" if handle.startswith(_LAYER) else "others"]
            format = weights.format_of(handle)
            part[format] = part.get(format, 0) + 1
    return {
        "model": config.model,
        "asked": config.weights,
        **counts,
        "kv": kv_codec_for(config.weights, config.kv_cache_dtype),
        "executor": config.executor,
        "target": choose_target() if config.executor == "native" else config.executor,
        "file_format": checkpoint.weight_format,
    }


def mode_line(name: str, resolved: Mapping[str, Any]) -> str:
    """A resolved mode in one line. name: of the engine in its mode."""
    return (
        f"{name}: layers in {_formats(resolved['layers'])}, embedding and head in {_formats(resolved['others'])}, "
        f"KV {resolved['kv']}, target {resolved['target']}, from a file in {resolved['file_format']}"
    )


def _formats(counts: Mapping[str, int]) -> str:
    """Formats in memory, with the numbers of matrices where there are several."""
    if len(counts) == 1:
        return next(iter(counts))
    return " and ".join(f"{format} ({count})" for format, count in counts.items())


def find_accuracy(directory: Path, model: str, resolved: Mapping[str, Any]) -> dict[str, Any] | None:
    """The mode's row of the newest result of `bench quality` in `directory` for the same model, file format and target.

    Of a result with several window lengths, that of 512 tokens, else the first. None where there is none. Files that
    are no such result are passed over.
    """
    found: dict[str, Any] | None = None
    for path in directory.glob("quality-*.json"):
        try:
            each = _accuracy_in(path, model, resolved)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        if each is not None and (found is None or each["date"] > found["date"]):
            found = each
    return found


def _accuracy_in(path: Path, model: str, resolved: Mapping[str, Any]) -> dict[str, Any] | None:
    """The row in one file. Raises what reading an unknown JSON object raises."""
    report = json.loads(path.read_text(encoding="utf-8"))
    settings = report["settings"]
    of_file = (settings["name"], settings["weight_format"], report["machine"]["target"])
    if report["bench"] != "quality" or of_file != (model, resolved["file_format"], resolved["target"]):
        return None
    rows = [row for row in report["rows"] if _is_of(row, resolved)]
    if not rows:
        return None
    row = next((row for row in rows if row["n_ctx"] == _USUAL_CONTEXT), rows[0])
    taken: dict[str, Any] = {name: row[name] for name in ("n_ctx", "windows", "weights", "kv")}
    taken |= {name: float(row[name]) for name in ("ppl", "ppl_ref", "ppl_ratio", "kld")}
    gate = row.get("gate")
    return {
        "file": path.name,
        "date": str(report["date"]),
        "git": report.get("git"),
        **taken,
        "gate": None if gate is None else {name: float(gate[name]) for name in ("ppl_ratio", "kld")},
        "verdict": row.get("verdict"),
    }


def _is_of(row: Mapping[str, Any], resolved: Mapping[str, Any]) -> bool:
    """Whether a row is of the mode, held against float32."""
    asked, against = resolved["asked"], row.get("against")
    if not isinstance(against, Mapping) or (against.get("weights"), against.get("kv")) != _REFERENCE:
        return False
    wanted = (resolved["executor"], _DTYPES.get(asked, asked), resolved["kv"])
    return (row.get("executor"), row.get("weights"), row.get("kv")) == wanted


def accuracy_line(name: str, resolved: Mapping[str, Any], found: Mapping[str, Any] | None) -> str:
    """The accuracy of a mode in one line, or how to get it. found: by `find_accuracy`."""
    if found is None:
        model = shlex.quote(resolved["model"])
        return (
            f"{name}: accuracy unknown, the output directory has no result of `bench quality` for this model and "
            f"target; get one by `pagemill bench quality --model {model} --weight-format {resolved['asked']} "
            f"--kv-cache-dtype {resolved['kv']} --text wiki.test.raw`, with the same --output"
        )
    gate, git = found["gate"], found["git"]
    judged = "no gate in that result"
    if gate is not None:
        judged = f"{found['verdict']} (gate {100 * (gate['ppl_ratio'] - 1):+.3g}%, {gate['kld']:g})"
    commit = ""
    if isinstance(git, Mapping):
        commit = f", commit {str(git.get('commit'))[:12]}{' with changes' if git.get('modified') else ''}"
    return (
        f"{name}: accuracy against own float32: perplexity {found['ppl_ratio'] - 1:+.2%}, KL divergence "
        f"{found['kld']:.5f} nats, {judged}; {found['windows']:,} windows of {found['n_ctx']:,} tokens, "
        f"{found['date'][:10]}{commit}, {found['file']}"
    )
