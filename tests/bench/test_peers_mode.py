from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pagemill.base.config import EngineConfig
from pagemill.bench.peers_mode import accuracy_line, find_accuracy, mode_line, resolve_mode
from pagemill.cli.main import main
from pagemill.kernels.target import available_targets, rotates
from pagemill.models.checkpoint import open_checkpoint
from tests.fixtures.tiny import tiny_llama

RESOLVED: dict[str, Any] = {
    "model": "smollm2-135m",
    "asked": "auto",
    "layers": {"i8_rotated": 210},
    "others": {"q8_0": 1},
    "kv": "int8",
    "executor": "native",
    "target": "avx512",
    "file_format": "q4_1",
}


def row(kv: str = "int8", ppl_ratio: float = 1.002, **changed: Any) -> dict[str, Any]:
    made = {"weights": "auto", "kv": kv, "executor": "native", "against": {"weights": "float32", "kv": "f32"}}
    figures = {"n_ctx": 512, "windows": 40, "ppl": 23.5, "ppl_ref": 23.4, "ppl_ratio": ppl_ratio, "kld": 0.0039}
    return made | figures | {"gate": {"ppl_ratio": 1.005, "kld": 0.005}, "verdict": "pass"} | changed


def store(directory: Path, date: str, *rows: dict[str, Any], target: str = "avx512", **changed: Any) -> str:
    """A result of `bench quality`; its name."""
    report = {
        "bench": "quality",
        "date": date,
        "machine": {"target": target},
        "git": {"commit": "0123456789abcdef", "modified": True},
        "settings": {"name": "smollm2-135m", "weight_format": "q4_1"} | changed,
        "rows": list(rows),
    }
    path = directory / f"quality-{changed.get('name', 'smollm2-135m')}-{date}-{len(list(directory.iterdir()))}.json"
    path.write_text(json.dumps(report))
    return path.name


@pytest.mark.parametrize("target", available_targets())
def test_auto_is_told_by_what_the_loader_makes_of_it(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAGEMILL_FORCE_TARGET", target)
    checkpoint = open_checkpoint(tiny_llama(tmp_path, format="gguf", weight_format="q4_1"))
    resolved = resolve_mode(EngineConfig(model=str(checkpoint.path)), checkpoint)
    assert set(resolved["layers"]) == {"i8_rotated" if rotates(target) else "q4_1"}
    assert sum(resolved["layers"].values()) == 7 * checkpoint.spec.num_layers
    assert (resolved["kv"], resolved["target"], resolved["file_format"]) == ("int8", target, "q4_1")
    assert resolve_mode(EngineConfig(model="x", dtype="float32"), checkpoint)["kv"] == "f32"


def test_mode_is_one_line() -> None:
    assert mode_line("pagemill auto", RESOLVED) == (
        "pagemill auto: layers in i8_rotated, embedding and head in q8_0, KV int8, target avx512, from a file in q4_1"
    )
    mixed = RESOLVED | {"layers": {"q4_1": 200, "q8_0": 10}}
    assert "layers in q4_1 (200) and q8_0 (10)," in mode_line("pagemill auto", mixed)


def test_accuracy_is_the_modes_own_row_of_the_newest_result(tmp_path: Path) -> None:
    store(tmp_path, "2026-11-20T00:00:00Z", row(ppl_ratio=1.009))
    beside_bf16 = row(ppl_ratio=1.0001, against={"weights": "auto", "kv": "bf16"})
    others = [row("bf16"), row(weights="exact"), beside_bf16, row(executor="reference"), row(n_ctx=4096)]
    name = store(tmp_path, "2026-11-22T00:00:00Z", *others, row(ppl_ratio=1.003))
    found = find_accuracy(tmp_path, "smollm2-135m", RESOLVED)
    assert found is not None
    assert (found["file"], found["ppl_ratio"], found["n_ctx"], found["verdict"]) == (name, 1.003, 512, "pass")
    line = accuracy_line("pagemill auto", RESOLVED, found)
    assert "perplexity +0.30%, KL divergence 0.00390 nats, pass (gate +0.5%, 0.005); 40 windows of 512 tokens" in line
    assert f"2026-11-22, commit 0123456789ab with changes, {name}" in line


def test_results_of_something_else_are_passed_over(tmp_path: Path) -> None:
    date = "2026-11-22T00:00:00Z"
    store(tmp_path, date, row(), target="avx2")
    store(tmp_path, date, row(), name="another")
    store(tmp_path, date, row(), weight_format="q8_0")
    store(tmp_path, date, row("bf16"))
    store(tmp_path, date, row(kld="much"))
    store(tmp_path, date, {"weights": "llama.cpp", "ppl": 23.4})
    for index, text in enumerate(("", "[]", "{}", '{"settings": [], "rows": 3}')):
        (tmp_path / f"quality-broken-{index}.json").write_text(text)
    assert find_accuracy(tmp_path, "smollm2-135m", RESOLVED) is None
    line = accuracy_line("pagemill auto", RESOLVED | {"model": "a model.gguf"}, None)
    assert "bench quality --model 'a model.gguf' --weight-format auto --kv-cache-dtype int8 --text" in line


def test_row_without_a_gate_and_without_git_is_told(tmp_path: Path) -> None:
    store(tmp_path, "2026-11-22T00:00:00Z", row(gate=None, verdict=None))
    found = find_accuracy(tmp_path, "smollm2-135m", RESOLVED)
    assert found is not None
    assert "no gate in that result; 40 windows" in accuracy_line("x", RESOLVED, found | {"git": None})


def test_what_the_line_says_to_run_is_found_afterwards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_llama(tmp_path, format="gguf", weight_format="q4_1")
    resolved = resolve_mode(EngineConfig(model=str(model)), open_checkpoint(model))
    text, out = tmp_path / "text", tmp_path / "out"
    text.write_text("the cat sat on the mat and looked at the dog. " * 40)
    asked = ["--weight-format", resolved["asked"], "--kv-cache-dtype", resolved["kv"], "--text", str(text)]
    small = ["--n-ctx", "32", "--windows", "1", "--num-threads", "1"]
    assert main(["bench", "quality", "--model", str(model), *asked, "--output", str(out), *small, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    found = find_accuracy(out, model.name, resolved)
    assert found is not None
    assert (found["date"], found["weights"], found["kv"]) == (report["date"], "auto", "int8")
