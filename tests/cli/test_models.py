from __future__ import annotations

import json
from pathlib import Path

import pytest

from pagemill.cli.main import main


def test_show_describes_sizes_formats_and_bytes(capsys: pytest.CaptureFixture[str], tiny_model: str) -> None:
    assert main(["models", "show", tiny_model, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["spec"]["family"], found["spec"]["num_layers"], found["source_format"]) == ("llama", 2, "safetensors")
    assert found["bytes"] == 4 * found["parameters"]
    assert found["tensor_formats"]["f32"]["bytes"] == found["bytes"]
    assert found["kv_bytes_per_token"]["f32"] == 2 * found["kv_bytes_per_token"]["bf16"]
    assert found["kv_bytes_per_token"]["f16"] == found["kv_bytes_per_token"]["bf16"]
    assert main(["models", "show", tiny_model]) == 0
    printed = capsys.readouterr().out
    assert "4 query, 2 KV, of 16" in printed
    assert all(f"KV cache {codec}" in printed for codec in ("f32", "f16", "bf16", "int8"))


def test_show_prints_every_op_and_every_phase(capsys: pytest.CaptureFixture[str], tiny_model: str) -> None:
    assert main(["models", "show", tiny_model, "--plan", "--lowered", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    ops = [op["record"] for op in found["plan"]]
    assert (ops[0], ops[-1], ops.count("Attention")) == ("Embed", "Head", 2)
    assert [op["layer"] for op in found["plan"] if op["record"] == "WriteKV"] == [0, 1]
    kinds = [phase["kind"] for phase in found["lowered"]]
    assert kinds == ["embed", *["attention_in", "attention", "attention_out", "mlp_in", "mlp_out"] * 2, "head"]
    assert main(["models", "show", tiny_model, "--plan", "--lowered"]) == 0
    printed = capsys.readouterr().out
    assert "layers.1.down" in printed
    assert printed.count("attention_in") == 2


def test_an_empty_cache_tells_how_to_fill_it(capsys: pytest.CaptureFixture[str], own_home: Path) -> None:
    assert main(["models", "ls"]) == 0
    assert "pagemill models pull smollm2-135m" in capsys.readouterr().out
    assert main(["models", "ls", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"models": []}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rm", "smollm2-135m"], "not in the cache"),
        (["pull", "smolm2-135m"], "smollm2-135m"),
        (["show", "./nothing.gguf"], "nothing.gguf"),
    ],
)
def test_a_model_that_is_not_there_is_named(
    capsys: pytest.CaptureFixture[str], own_home: Path, arguments: list[str], message: str
) -> None:
    assert main(["models", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_show_refuses_a_file_that_is_no_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"GGUF but not really")
    assert main(["models", "show", str(path)]) == 2
    assert "bad.gguf" in capsys.readouterr().err
