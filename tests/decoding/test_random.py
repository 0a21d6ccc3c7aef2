"""The counter-based generator against numpy's Philox and the published answers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagemill.decoding.random import philox4x64, uniform

WORD = st.integers(0, 2**64 - 1)
ONES = 2**64 - 1


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # Random123's known-answer vectors
        (
            (0, 0, 0, 0),
            (0, 0),
            (0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B),
        ),
        (
            (ONES, ONES, ONES, ONES),
            (ONES, ONES),
            (0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0),
        ),
    ],
)
def test_published_answers(
    counter: tuple[int, int, int, int], key: tuple[int, int], expected: tuple[int, int, int, int]
) -> None:
    assert philox4x64(counter, key) == expected


@given(st.integers(1, 2**64 - 1), WORD, WORD, WORD)
def test_numbers_are_numpys(position: int, purpose: int, seed: int, choice: int) -> None:
    # numpy counts up before it draws
    counter = np.array([position - 1, purpose, 0, 0], np.uint64)
    theirs = np.random.Philox(counter=counter, key=np.array([seed, choice], np.uint64))
    assert philox4x64((position, purpose, 0, 0), (seed, choice)) == tuple(theirs.random_raw(4).tolist())


@given(WORD, WORD, WORD)
def test_a_uniform_number_is_in_the_unit_interval_and_the_same_each_time(seed: int, choice: int, position: int) -> None:
    number = uniform(seed, choice, position)
    assert 0.0 <= number < 1.0
    assert number == uniform(seed, choice, position)


def test_every_part_of_the_key_matters() -> None:
    numbers = {uniform(*key) for key in [(1, 2, 3, 0), (2, 2, 3, 0), (1, 3, 3, 0), (1, 2, 4, 0), (1, 2, 3, 1)]}
    assert len(numbers) == 5


@pytest.mark.parametrize("moving", [0, 1, 2])
def test_neighbouring_keys_give_evenly_spread_numbers(moving: int) -> None:
    numbers = []
    for i in range(4000):
        key = [7, 0, 100]
        key[moving] += i
        numbers.append(uniform(*key))
    counts = np.histogram(numbers, bins=20, range=(0.0, 1.0))[0]
    chi_square = float(((counts - 200.0) ** 2 / 200.0).sum())
    assert chi_square < 43.8  # 19 degrees of freedom, 1 in 1,000
    assert abs(float(np.corrcoef(numbers[:-1], numbers[1:])[0, 1])) < 0.05
