"""Weights in another format than the checkpoint's: exactness of each conversion, quantisation, refusals."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from pagemill.base.errors import ConfigError, ModelError
from pagemill.execution import convert as module
from pagemill.execution.convert import convert, loaded_format, quantize_q8_0
from pagemill.execution.loader import ConvertedWeights, load_executor
from pagemill.kernels.reference import to_bf16
from pagemill.kernels.tensors import ROTATED, Tensor
from pagemill.models.checkpoint import open_checkpoint
from pagemill.models.registry import build_plan
from tests.fixtures.greedy import run
from tests.fixtures.plans import quantized
from tests.fixtures.tiny import tiny_llama

FORMATS = ("f32", "f16", "bf16", "q4_0", "q4_1", "q8_0")
PROMPTS = [np.arange(10, 60, dtype=np.int32)]


def values(n: int = 70, k: int = 96, seed: int = 5) -> np.ndarray:
    """Normal numbers f32 [n, k] of very different size by row."""
    random = np.random.RandomState(seed)
    return (random.randn(n, k) * 10.0 ** random.randint(-3, 3, (n, 1))).astype(np.float32)


def plain_q8_0(rows: np.ndarray) -> np.ndarray:
    """Blocks one at a time, as the format is specified."""
    out = []
    for row in rows:
        for group in row.reshape(-1, 32):
            scale = np.float16(np.abs(group).max() / np.float32(127))
            inverse = np.float32(1) / np.float32(scale) if scale else np.float32(0)
            q = np.clip(np.rint(group * inverse), -127, 127).astype(np.int8)
            out.append(np.concatenate([np.array([scale]).view(np.uint8), q.view(np.uint8)]))
    return np.concatenate(out).reshape(len(rows), -1)


def test_q8_0_is_the_nearest_even_byte_of_the_stored_scale() -> None:
    rows = values()
    rows[3, :32] = 0
    rows[4, :32] = np.arange(32) - 15.5  # halves
    rows[5, :32] = 1e-9  # the scale is below f16
    rows[6, :32] *= 1e-6  # the scale is subnormal
    assert np.array_equal(quantize_q8_0(rows), plain_q8_0(rows))
    decoded = Tensor("q8_0", rows.shape, quantize_q8_0(rows)).dequantize()
    assert not decoded[3, :32].any()
    assert not decoded[5, :32].any()


@pytest.mark.parametrize("chunk", [1, 96 * 7, 1 << 17])
def test_conversion_is_the_same_in_pieces_of_any_size(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(module, "_CHUNK_VALUES", chunk)
    converted = convert(Tensor.from_array(values()), "q8_0")
    assert (converted.format, converted.shape) == ("q8_0", (70, 96))
    assert np.array_equal(converted.data, plain_q8_0(values()))


def test_q8_0_is_as_close_as_that_of_llama_cpp() -> None:
    rows = values(200, 256)
    theirs = quants.dequantize(quants.quantize(rows, GGMLQuantizationType.Q8_0), GGMLQuantizationType.Q8_0)
    ours = convert(Tensor.from_array(rows), "q8_0").dequantize()
    peak = np.repeat(np.abs(rows.reshape(200, -1, 32)).max(axis=2), 32, axis=1)
    assert (np.abs(ours - rows) <= peak * (0.5 / 127 * 1.002)).all()
    relative = [np.sqrt((((each - rows) / peak) ** 2).mean()) for each in (ours, theirs)]
    assert relative[0] <= relative[1] * 1.001


@pytest.mark.parametrize("fmt", FORMATS)
def test_every_format_converts_to_every_other_by_its_values(fmt: str) -> None:
    tensor = quantized(values(), fmt)
    exact = tensor.dequantize()
    assert convert(tensor, "auto") is tensor
    assert np.array_equal(convert(tensor, "f32").dequantize(), exact)
    assert np.array_equal(convert(tensor, "bf16").dequantize(), to_bf16(exact))
    expected = tensor.data if fmt == "q8_0" else plain_q8_0(exact)
    assert np.array_equal(convert(tensor, "q8_0").data, expected)


def test_q8_0_converted_again_is_the_same() -> None:
    once = convert(Tensor.from_array(values()), "q8_0")
    assert np.array_equal(quantize_q8_0(once.dequantize()), once.data)


def test_rows_that_are_no_whole_groups_become_bf16() -> None:
    rows = values(8, 40)
    tensor = Tensor.from_array(rows)
    assert loaded_format(tensor, "q8_0") == "bf16"
    assert np.array_equal(convert(tensor, "q8_0").dequantize(), to_bf16(rows))


def test_numbers_beyond_the_scales_are_refused() -> None:
    rows = values()
    rows[2, 2] = 127 * 65_504
    assert np.isfinite(convert(Tensor.from_array(rows), "q8_0").dequantize()).all()
    rows[2, 2] = 127 * 65_530
    with pytest.raises(ModelError, match=r"beyond ±8.3 million do not fit in q8_0.* leave weight_format at auto"):
        convert(Tensor.from_array(rows), "q8_0")


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown weight format 'q5_k'; choose one of auto, exact, int8, q8_0"):
        convert(Tensor.from_array(values()), "q5_k")


# --- whole models


def test_q8_0_of_a_model_is_near_its_float32(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_llama(tmp_path))
    logits = {
        fmt: run(load_executor(checkpoint, weight_format=fmt, kv_codec="f32", num_blocks=8).model, PROMPTS, [[49]], 1)
        for fmt in ("f32", "q8_0", "bf16")
    }
    exact = logits["f32"][0][0]
    errors = {
        fmt: float(np.sqrt(((found[0][0] - exact) ** 2).mean() / (exact**2).mean())) for fmt, found in logits.items()
    }
    assert 0 < errors["q8_0"] < 0.03
    assert 0 < errors["bf16"] < 0.03


def test_native_and_reference_agree_on_converted_weights(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_llama(tmp_path))
    native, reference = (
        run(
            load_executor(checkpoint, weight_format="q8_0", kv_codec="f32", num_blocks=8, executor=each).model,
            PROMPTS,
            [[49]],
            1,
        )[0][0]
        for each in ("native", "reference")
    )
    assert np.abs(native - reference).max() < 2e-2 * np.abs(reference).max()


def test_matrices_that_cannot_be_q8_0_are_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = open_checkpoint(tiny_llama(tmp_path, weight_format="bf16", ffn=120))
    with caplog.at_level(logging.WARNING):
        load_executor(checkpoint, weight_format="q8_0", num_blocks=1)
    [notice] = [record.getMessage() for record in caplog.records]
    assert notice.startswith("2 matrices stay in bf16, their rows are no multiple of 32")
    weights = ConvertedWeights(build_plan(checkpoint.spec), checkpoint.tensors, "q8_0", "scalar")
    assert all(weights[handle].format == "bf16" for handle in weights.matrices_not_in("q8_0"))
    assert weights["embed"].format == "q8_0"
    assert weights["final_norm.weight"].format == checkpoint.tensors["final_norm.weight"].format


@pytest.mark.parametrize(("sizes", "beginning", "listed"), [
    ({"hidden": 96, "q_heads": 6, "ffn": 96}, "14 of the layers' 14 matrices stay in f32,", ", …;"),
    ({"hidden": 64, "ffn": 96}, "2 of the layers' 14 matrices stay in f32,", "needs: {}, {};"),
])  # fmt: skip
def test_matrices_that_cannot_be_rotated_are_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, sizes: dict[str, int], beginning: str, listed: str
) -> None:
    checkpoint = open_checkpoint(tiny_llama(tmp_path, **sizes))
    with caplog.at_level(logging.WARNING):
        load_executor(checkpoint, weight_format="int8", num_blocks=1)
    [notice] = [record.getMessage() for record in caplog.records]
    weights = ConvertedWeights(build_plan(checkpoint.spec), checkpoint.tensors, "int8", "scalar")
    others = [each for each in weights.matrices_not_in(ROTATED) if each not in ("embed", "head")]
    assert notice.startswith(f"{beginning} their rows are no multiple of 64 numbers as int8 needs: {others[0]}")
    assert listed.format(*others) in notice
    assert "give weight_format q8_0 (multiples of 32) or bf16 to convert them too, or exact to keep" in notice
    assert all(weights[handle].format == "f32" for handle in others)


@pytest.mark.parametrize(("weight_format", "ffn"), [("int8", 128), ("auto", 96), ("exact", 96), ("bf16", 96)])
def test_nothing_is_told_where_every_matrix_is_as_asked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, weight_format: str, ffn: int
) -> None:
    with caplog.at_level(logging.WARNING):
        load_executor(open_checkpoint(tiny_llama(tmp_path, ffn=ffn)), weight_format=weight_format, num_blocks=1)
    assert not caplog.records


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float16"}, "dtype is 'float16'; did you mean bfloat16"),
        ({"weight_format": "q4_0"}, "weights are not quantised to 4 bits at load.*; give q8_0, or take a checkpoint"),
        ({"dtype": "float32", "weight_format": "q8_0"}, "dtype is float32, which means weight_format f32"),
    ],
)
def test_formats_that_cannot_be_are_refused(tmp_path: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_executor(open_checkpoint(tiny_llama(tmp_path)), num_blocks=1, **options)  # type: ignore[arg-type]
