"""`pagemill models`: fetch, list, remove and describe models."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from pagemill.base.kv_spec import KV_VALUE_BYTES
from pagemill.base.units import format_bytes
from pagemill.cli.progress import byte_progress
from pagemill.cli.terminal import print_json
from pagemill.execution.loader import kv_spec_for
from pagemill.kernels.ops import Op
from pagemill.kernels.plan import Phase, lower
from pagemill.models import hub
from pagemill.models.checkpoint import Checkpoint, open_checkpoint
from pagemill.models.registry import build_plan

_KV_CODECS = tuple(KV_VALUE_BYTES)


def pull_model(*, name: str, as_json: bool) -> None:
    """Fetch a model into the local cache."""
    with byte_progress(quiet=as_json) as report:
        found = hub.pull(name, progress=report)
    if as_json:
        print_json(_plain(asdict(found)))
    else:
        print(f"{found.name}: {format_bytes(found.bytes)} in {found.path}")


def list_local(*, as_json: bool) -> None:
    """Print the models of the local cache."""
    found = hub.list_models()
    if as_json:
        print_json({"models": [_plain(asdict(each)) for each in found]})
        return
    if not found:
        print("no models yet; fetch the default one with `pagemill models pull smollm2-135m`")
        return
    table = _table("name", "size", "format", "source", "path")
    for each in found:
        table.add_row(each.name, format_bytes(each.bytes), each.format, each.source, str(each.path))
    Console(highlight=False, soft_wrap=True).print(table)


def remove_model(*, name: str, as_json: bool) -> None:
    """Remove a model from the local cache."""
    hub.remove(name)
    if as_json:
        print_json({"removed": name})
    else:
        print(f"removed {name}")


def show_model(*, name: str, plan: bool, lowered: bool, as_json: bool) -> None:
    """Describe a model; with `plan` its ops, with `lowered` the phase records."""
    with byte_progress(quiet=as_json) as report:
        path = hub.resolve(name, progress=report)
    checkpoint = open_checkpoint(path)
    found = _describe(checkpoint)
    made = build_plan(checkpoint.spec, max_positions=1) if plan or lowered else None
    if made is not None and plan:
        found["plan"] = [_record(op) for op in made.ops]
    if made is not None and lowered:
        found["lowered"] = [_record(phase) for phase in lower(made)]
    if as_json:
        print_json(found)
        return
    _print_description(found)
    for heading in ("plan", "lowered"):
        if heading in found:
            print(f"\n{heading}")
            for index, record in enumerate(found[heading]):
                print(f"{index:4d}  {_one_line(record)}")


def _describe(checkpoint: Checkpoint) -> dict[str, Any]:
    formats: dict[str, dict[str, int]] = {}
    for tensor in checkpoint.tensors.values():
        entry = formats.setdefault(tensor.format, {"tensors": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["bytes"] += tensor.data.nbytes
    return {
        "path": str(checkpoint.path),
        "source_format": checkpoint.source_format,
        "spec": _plain(asdict(checkpoint.spec)),
        "parameters": checkpoint.num_parameters,
        "bytes": sum(entry["bytes"] for entry in formats.values()),
        "tensor_formats": formats,
        "kv_bytes_per_token": {codec: kv_spec_for(checkpoint, codec, 16).bytes_per_token for codec in _KV_CODECS},
        "vocabulary": {
            "tokens": len(checkpoint.vocab.tokens),
            "pre_tokeniser": checkpoint.vocab.pre,
            "stop_ids": list(checkpoint.vocab.stop_ids),
            "chat_template": checkpoint.vocab.chat_template is not None,
        },
    }


def _print_description(found: dict[str, Any]) -> None:
    spec = found["spec"]
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    rope = spec["rope"]
    rows = {
        "name": f"{spec['name']} ({spec['family']}, {found['source_format']})",
        "path": found["path"],
        "parameters": f"{found['parameters']:,}",
        "layers": f"{spec['num_layers']} of hidden {spec['hidden_dim']}, inner {spec['ffn_dim']}",
        "heads": f"{spec['num_q_heads']} query, {spec['num_kv_heads']} KV, of {spec['head_dim']}",
        "rope": f"base {rope['base']:g}, scaling {rope['scaling']}" if rope else "none (learned positions)",
        "context": f"{spec['context_length']:,} tokens",
        "vocabulary": f"{spec['vocab_size']:,} tokens, pre-tokeniser {found['vocabulary']['pre_tokeniser']}",
        "chat template": "yes" if found["vocabulary"]["chat_template"] else "no",
        "weights": format_bytes(found["bytes"]),
    }
    for name, entry in sorted(found["tensor_formats"].items()):
        rows[f"  {name}"] = f"{entry['tensors']} tensors, {format_bytes(entry['bytes'])}"
    for codec, size in found["kv_bytes_per_token"].items():
        rows[f"KV cache {codec}"] = f"{format_bytes(size)} per token"
    for heading, text in rows.items():
        table.add_row(heading, text)
    Console(highlight=False, markup=False).print(table)


def _record(each: Op | Phase) -> dict[str, Any]:
    """An op or a phase as a flat record: its class, then the fields that are set."""
    fields = {name: value for name, value in asdict(each).items() if value is not None and value is not False}
    return {"record": type(each).__name__, **_plain(fields)}


def _one_line(record: dict[str, Any]) -> str:
    kind = record.get("kind") if record["record"] == "Phase" else record["record"]
    rest = {name: value for name, value in record.items() if name != "record" and value != kind and value != []}
    return f"{kind:14s} {'  '.join(f'{name}={_short(value)}' for name, value in rest.items())}"


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return "(" + " ".join(f"{name}={_short(each)}" for name, each in value.items() if each is not None) + ")"
    if isinstance(value, list):
        return "[" + ", ".join(_short(each) for each in value) + "]"
    return str(value)


def _plain(value: Any) -> Any:
    """Tuples as lists and paths as text, for JSON."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table
