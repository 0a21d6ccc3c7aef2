from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pagemill.base.errors import ModelError
from pagemill.base.model_spec import RopeSpec
from pagemill.models.rope import inverse_frequencies, rope_table, yarn_attention_factor
from tests.fixtures.rope_cases import CASES, POSITIONS, load_golden


@pytest.mark.parametrize("name", CASES)
def test_inverse_frequencies_are_those_of_transformers(name: str) -> None:
    ours = inverse_frequencies(CASES[name].spec)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, load_golden(name)[0], rtol=1.3e-7, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_table_is_that_of_transformers(name: str) -> None:
    """At position 8191 one rounding of a frequency moves the angle by 5e-4 at the most."""
    table = rope_table(CASES[name].spec, max(POSITIONS) + 1)
    exact = np.abs(inverse_frequencies(CASES[name].spec) - load_golden(name)[0]) == 0
    columns = np.concatenate([exact, exact])
    difference = np.abs(table[list(POSITIONS)] - load_golden(name)[1])
    assert columns.mean() > 0.9
    assert difference[:, columns].max() <= 2.5e-7
    assert difference.max() <= 5e-4


def test_table_holds_cosines_then_sines_times_the_attention_factor() -> None:
    rope = RopeSpec(100.0, 8, attention_factor=1.5)
    table = rope_table(rope, 33)
    angles = np.arange(33)[:, None] * 100.0 ** (-np.arange(0, 8, 2) / 8)
    np.testing.assert_allclose(table[:, :4], 1.5 * np.cos(angles), atol=4e-6)
    np.testing.assert_allclose(table[:, 4:], 1.5 * np.sin(angles), atol=4e-6)


def test_shorter_table_is_the_beginning_of_a_longer_one() -> None:
    rope = CASES["llama3-32-64"].spec
    np.testing.assert_array_equal(rope_table(rope, 100), rope_table(rope, 5000)[:100])


def test_factors_divide_each_frequency() -> None:
    rope = RopeSpec(10000.0, 4, scaling="factors", freq_factors=(1.0, 8.0))
    plain = inverse_frequencies(replace(rope, scaling="none"))
    np.testing.assert_array_equal(inverse_frequencies(rope), plain / np.float32([1.0, 8.0]))


def test_factors_of_the_wrong_number_are_refused() -> None:
    with pytest.raises(ModelError, match="3 rope frequency factors for 2 frequencies"):
        inverse_frequencies(RopeSpec(10000.0, 4, scaling="factors", freq_factors=(1.0, 1.0, 1.0)))


def test_yarn_with_a_ramp_of_no_width_keeps_numbers_finite() -> None:
    rope = RopeSpec(10000.0, 8, scaling="yarn", factor=4.0, original_context=8, beta_fast=1e3, beta_slow=1e3)
    assert np.isfinite(inverse_frequencies(rope)).all()


def test_yarn_without_stretching_leaves_cosines_alone() -> None:
    assert yarn_attention_factor(1.0) == 1.0
    assert yarn_attention_factor(4.0) == pytest.approx(1.1386294)
    assert yarn_attention_factor(40.0, 1.0, 1.0) == 1.0


def test_table_of_absurd_size_is_refused_before_memory_is_taken() -> None:
    with pytest.raises(ModelError, match="set max_model_len"):
        rope_table(RopeSpec(10000.0, 128), 1 << 24)
