"""Rotary position embedding: inverse frequencies of every scaling kind, and the table of cosines and sines that plans
carry as a constant. Owns the arithmetic only; families read the settings, executors rotate.

Sources: RoFormer (Su et al., arXiv 2104.09864); linear position interpolation (Chen et al., arXiv 2306.15595);
YaRN (Peng et al., arXiv 2309.00071); the frequency bands of Llama 3.1 (Grattafiori et al., arXiv 2407.21783), with the
constants of its released configuration; GGUF's `rope_freqs.weight` (one divisor per frequency).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from pagemill.base.errors import ModelError
from pagemill.base.model_spec import RopeSpec

Array = NDArray[np.float32]

MAX_TABLE_BYTES = 1 << 30
_ONE = np.float32(1.0)
_CHUNK_POSITIONS = 1024  # temporary arrays stay in the second cache


def inverse_frequencies(rope: RopeSpec) -> Array:
    """Angle per position of each rotated pair: [rotary_dim / 2] f32, rounded as float32 arithmetic rounds it.

    Raises ModelError where `freq_factors` do not fit the dimension.
    """
    plain = _plain(rope)
    if rope.scaling == "none":
        return plain
    if rope.scaling == "linear":
        return plain / np.float32(rope.factor)
    if rope.scaling == "llama3":
        return _llama3(plain, rope)
    if rope.scaling == "yarn":
        return _yarn(rope)
    if len(rope.freq_factors) != plain.size:
        raise ModelError(
            f"the checkpoint has {len(rope.freq_factors)} rope frequency factors for {plain.size} frequencies; "
            "convert the model again with a current converter"
        )
    divisors: Array = np.asarray(rope.freq_factors, dtype=np.float32)
    return plain / divisors


def rope_table(rope: RopeSpec, num_positions: int) -> Array:
    """Rows of rotary_dim/2 cosines, then as many sines, both times attention_factor: [num_positions, rotary_dim] f32.

    The angle is the float32 product of position and inverse frequency. Raises ModelError above 1 GiB.
    """
    num_bytes = num_positions * rope.rotary_dim * 4
    if num_bytes > MAX_TABLE_BYTES:
        raise ModelError(
            f"a rope table for {num_positions:,} positions would take {num_bytes / 2**30:.1f} GiB; "
            "set max_model_len to the length that you need"
        )
    inverse = inverse_frequencies(rope)
    half = rope.rotary_dim // 2
    table = np.empty((num_positions, rope.rotary_dim), dtype=np.float32)
    scale = np.float32(rope.attention_factor)
    for begin in range(0, num_positions, _CHUNK_POSITIONS):
        end = min(begin + _CHUNK_POSITIONS, num_positions)
        angles = np.multiply.outer(np.arange(begin, end, dtype=np.float32), inverse).astype(np.float64)
        table[begin:end, :half] = np.cos(angles).astype(np.float32) * scale
        table[begin:end, half:] = np.sin(angles).astype(np.float32) * scale
    return table


def yarn_attention_factor(factor: float, mscale: float | None = None, mscale_all_dim: float | None = None) -> float:
    """YaRN's factor on cos and sin where the configuration gives none: 0.1 ln(factor) + 1 (arXiv 2309.00071, eq. 22).

    mscale, mscale_all_dim: where both are given, the ratio of the two factors that they weight.
    """

    def weighted(weight: float) -> float:
        return 1.0 if factor <= 1.0 else 0.1 * weight * math.log(factor) + 1.0

    if mscale and mscale_all_dim:
        return weighted(mscale) / weighted(mscale_all_dim)
    return weighted(1.0)


def _powers(rope: RopeSpec) -> Array:
    """base^(2i / rotary_dim), i = 0 .. rotary_dim/2 - 1, correctly rounded to float32."""
    exponents = np.arange(0, rope.rotary_dim, 2, dtype=np.float32) / np.float32(rope.rotary_dim)
    powers: Array = np.power(np.float64(rope.base), exponents.astype(np.float64)).astype(np.float32)
    return powers


def _plain(rope: RopeSpec) -> Array:
    return _ONE / _powers(rope)


def _llama3(plain: Array, rope: RopeSpec) -> Array:
    """Short wavelengths stay, long ones are stretched by `factor`, those between are blended."""
    factor = np.float32(rope.factor)
    wavelength = np.float32(2.0 * math.pi) / plain
    long_wave = rope.original_context / rope.low_freq_factor
    short_wave = rope.original_context / rope.high_freq_factor
    stretched = np.where(wavelength > np.float32(long_wave), plain / factor, plain)
    turns = np.float32(rope.original_context) / wavelength
    blend = (turns - np.float32(rope.low_freq_factor)) / np.float32(rope.high_freq_factor - rope.low_freq_factor)
    blended = (_ONE - blend) * stretched / factor + blend * stretched
    between = (wavelength >= np.float32(short_wave)) & (wavelength <= np.float32(long_wave))
    inverse: Array = np.where(between, blended, stretched).astype(np.float32)
    return inverse


def _yarn(rope: RopeSpec) -> Array:
    """Dimensions that turn often keep their frequency, those that turn little are interpolated, a ramp between them."""
    dim, powers = rope.rotary_dim, _powers(rope)
    low = max(math.floor(_yarn_dimension(rope.beta_fast, rope)), 0)
    high: float = min(math.ceil(_yarn_dimension(rope.beta_slow, rope)), dim - 1)
    if low == high:
        high += 0.001
    ramp = (np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    keep = _ONE - np.clip(ramp, 0.0, 1.0).astype(np.float32)
    interpolated = _ONE / (np.float32(rope.factor) * powers)
    inverse: Array = (interpolated * (_ONE - keep) + (_ONE / powers) * keep).astype(np.float32)
    return inverse


def _yarn_dimension(num_rotations: float, rope: RopeSpec) -> float:
    """The dimension that turns `num_rotations` times over the original context."""
    turns = rope.original_context / (num_rotations * 2.0 * math.pi)
    return rope.rotary_dim * math.log(turns) / (2.0 * math.log(rope.base))
