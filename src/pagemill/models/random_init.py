"""Checkpoints of seeded random weights, made in memory: for benchmarks whose timing does not depend on the values, and
for tests. Owns the shapes by name and the drawing of numbers in every weight format; no file is read or written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pagemill.base.errors import ConfigError
from pagemill.base.model_spec import ModelSpec, RopeSpec, VocabSpec
from pagemill.kernels.ops import WeightDecl
from pagemill.kernels.tensors import BLOCK_BYTES, Tensor
from pagemill.models.checkpoint import Checkpoint
from pagemill.models.registry import build_plan

INIT_STD = 0.02

_SQRT_12 = 12.0**0.5

SHAPES: dict[str, ModelSpec] = {
    "gpt2-medium": ModelSpec(
        family="gpt2",
        name="gpt2-medium",
        num_layers=24,
        hidden_dim=1024,
        num_q_heads=16,
        num_kv_heads=16,
        head_dim=64,
        ffn_dim=4096,
        vocab_size=50257,
        context_length=1024,
        norm_eps=1e-5,
        rope=None,
        tied_head=True,
        attention_bias=True,
        mlp_bias=True,
    ),
    "llama-1b": ModelSpec(
        family="llama",
        name="llama-1b",
        num_layers=16,
        hidden_dim=2048,
        num_q_heads=32,
        num_kv_heads=8,
        head_dim=64,
        ffn_dim=8192,
        vocab_size=128256,
        context_length=131072,
        norm_eps=1e-5,
        rope=RopeSpec(
            base=500000.0,
            rotary_dim=64,
            scaling="llama3",
            factor=32.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_context=8192,
        ),
        tied_head=True,
    ),
    "smollm2-135m": ModelSpec(
        family="llama",
        name="smollm2-135m",
        num_layers=30,
        hidden_dim=576,
        num_q_heads=9,
        num_kv_heads=3,
        head_dim=64,
        ffn_dim=1536,
        vocab_size=49152,
        context_length=8192,
        norm_eps=1e-5,
        rope=RopeSpec(base=100000.0, rotary_dim=64, style="pairs"),
        tied_head=True,
    ),
}


def shape(name: str) -> ModelSpec:
    """The spec of a named shape. Raises ConfigError listing the names."""
    if name not in SHAPES:
        raise ConfigError(f"no model shape is called {name[:60]!r}; choose one of {', '.join(sorted(SHAPES))}")
    return SHAPES[name]


def random_checkpoint(
    spec: ModelSpec, *, seed: int = 0, weight_format: str = "f32", vocab: VocabSpec | None = None
) -> Checkpoint:
    """A checkpoint of uniform random weights of standard deviation 0.02; norms are 1 and biases 0.

    weight_format: of the matrices, any of the checkpoint formats; vectors are f32. vocab: without one, prompts are
    token ids. The same seed gives the same bytes. Raises ConfigError for an unknown format or rows that it cannot
    hold, ModelError for sizes that cannot be.
    """
    if weight_format not in BLOCK_BYTES:
        raise ConfigError(f"weight format {weight_format!r} is unknown; choose one of {', '.join(BLOCK_BYTES)}")
    stream = np.random.Generator(np.random.SFC64(seed))
    tensors = {
        handle: _tensor(handle, decl, weight_format, stream)
        for handle, decl in build_plan(spec, max_positions=1).weights.items()
    }
    return Checkpoint(spec, vocab or VocabSpec(), tensors, "random", Path(spec.name))


def _tensor(handle: str, decl: WeightDecl, weight_format: str, stream: np.random.Generator) -> Tensor:
    if len(decl.shape) == 1:
        value = 1.0 if handle.endswith("norm.weight") else 0.0
        return Tensor.from_array(np.full(decl.shape, value, dtype=np.float32))
    format = weight_format if decl.kind == "matrix" else "f32"
    rows, width = decl.shape
    group, block_bytes = BLOCK_BYTES[format]
    if width % group:
        raise ConfigError(f"rows of {width} values cannot be {format}, whose groups hold {group}; choose f32 or bf16")
    data = _draw_blocks(format, rows, width // group * block_bytes, stream)
    return Tensor(format, decl.shape, data)


def _draw_blocks(format: str, rows: int, row_bytes: int, stream: np.random.Generator) -> NDArray[np.uint8]:
    """Rows of a format, [rows, row_bytes] u8, drawn as raw bits where that gives uniform values."""
    if format in ("f32", "f16", "bf16"):
        return _uniform(format, rows, row_bytes, stream)
    _, block_bytes = BLOCK_BYTES[format]
    num_words = -(-rows * row_bytes // 8)
    raw = stream.integers(0, 1 << 64, num_words, dtype=np.uint64).view(np.uint8)[: rows * row_bytes]
    blocks = raw.reshape(-1, block_bytes)
    levels = 256 if format == "q8_0" else 16
    step = np.float16(INIT_STD * _SQRT_12 / levels)
    blocks[:, 0:2] = np.frombuffer(step.tobytes(), dtype=np.uint8)
    if format == "q4_1":
        lowest = np.float16(-(levels - 1) / 2 * float(step))
        blocks[:, 2:4] = np.frombuffer(lowest.tobytes(), dtype=np.uint8)
    return blocks.reshape(rows, row_bytes)


def _uniform(format: str, rows: int, row_bytes: int, stream: np.random.Generator) -> NDArray[np.uint8]:
    width = row_bytes // BLOCK_BYTES[format][1]
    out: NDArray[np.uint8] = np.empty((rows, row_bytes), dtype=np.uint8)
    step = max(1, (1 << 18) // width)
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        values = stream.random((end - begin, width), dtype=np.float32)
        values -= np.float32(0.5)
        values *= np.float32(INIT_STD * _SQRT_12)
        stored: NDArray[Any] = values
        if format == "f16":
            stored = values.astype(np.float16)
        elif format == "bf16":
            stored = (values.view(np.uint32) >> 16).astype(np.uint16)
        out[begin:end] = stored.view(np.uint8)
    return out
