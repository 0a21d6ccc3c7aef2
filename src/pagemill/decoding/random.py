"""Random numbers that depend on nothing but their key: no state, no order of calls, no batch.

Philox4x64-10, a counter-based generator: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3"
(SC 2011). Key = (seed, choice); counter = (position, purpose, 0, 0). `csrc/sampling.cpp` has the same for the native
sampler.
"""

from __future__ import annotations

SAMPLING = 0  # purpose: the choice of a token
RANDOM_BITS = 53

_MASK = 2**64 - 1
_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_ROUNDS = 10


def philox4x64(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Four random words of 64 bits for a counter of four words and a key of two."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        low, high = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (high >> 64) ^ c1 ^ k0, high & _MASK, (low >> 64) ^ c3 ^ k1, low & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def random_bits(seed: int, choice: int, position: int, purpose: int = SAMPLING) -> int:
    """RANDOM_BITS random bits, the same for the same four whole numbers of 0 .. 2^64 - 1."""
    return philox4x64((position, purpose, 0, 0), (seed, choice))[0] >> (64 - RANDOM_BITS)


def uniform(seed: int, choice: int, position: int, purpose: int = SAMPLING) -> float:
    """The same bits as a number in [0, 1)."""
    return float(random_bits(seed, choice, position, purpose)) * 2.0**-RANDOM_BITS
