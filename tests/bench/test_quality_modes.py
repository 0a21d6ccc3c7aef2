"""Modes of `bench quality`: lists as they are typed, and what each mode is held against."""

from __future__ import annotations

import pytest

from pagemill.base.errors import ConfigError
from pagemill.bench.quality_modes import (
    REFERENCE,
    Comparison,
    Mode,
    comparisons_of,
    default_mode,
    modes_to_run,
    parse_apart,
    parse_counts,
    parse_modes,
)

PLAIN, INT8 = Mode("auto", "bf16"), Mode("auto", "int8")


def test_modes_are_every_combination_with_the_codec_of_each_weights() -> None:
    assert parse_modes("auto,float32", "auto") == (INT8, REFERENCE)
    assert parse_modes("auto, bfloat16", "bf16,f32") == (
        PLAIN,
        Mode("auto", "f32"),
        Mode("bfloat16", "bf16"),
        Mode("bfloat16", "f32"),
    )
    assert parse_modes("auto,auto", "auto,int8") == (INT8,)


def test_weight_formats_stand_beside_dtypes_under_one_name_each() -> None:
    assert parse_modes("float32,auto", "bf16", "f32,q8_0,bf16,auto") == tuple(
        Mode(each, "bf16") for each in ("float32", "auto", "q8_0", "bfloat16")
    )
    assert parse_modes("", "auto", "q8_0,f32") == (Mode("q8_0", "int8"), REFERENCE)


def test_float32_always_runs_and_bf16_beside_a_quantised_kv() -> None:
    assert modes_to_run([PLAIN]) == (REFERENCE, PLAIN)
    assert modes_to_run([REFERENCE]) == (REFERENCE,)
    assert modes_to_run([INT8, PLAIN]) == (REFERENCE, PLAIN, INT8)


def test_kv_types_are_held_against_bf16_in_the_same_weights() -> None:
    assert comparisons_of(modes_to_run([INT8])) == (
        Comparison(REFERENCE, REFERENCE),
        Comparison(PLAIN, REFERENCE),
        Comparison(INT8, REFERENCE),
        Comparison(INT8, PLAIN),
    )


def test_parts_of_int8_are_held_against_f32_and_bf16_kv_of_their_own_weights_and_arithmetic() -> None:
    modes = modes_to_run([REFERENCE, *parse_apart("bfloat16")])
    exact, plain = Mode("bfloat16", "f32", True), Mode("bfloat16", "bf16", True)
    parts = [Mode("bfloat16", kv, True) for kv in ("int8-k", "int8-v", "int8-q", "int8-p", "int8")]
    assert modes == (REFERENCE, exact, plain, *parts)
    assert comparisons_of(modes) == (
        Comparison(REFERENCE, REFERENCE),
        Comparison(exact, REFERENCE),
        Comparison(plain, exact),
        *(Comparison(part, against) for part in parts for against in (exact, plain)),
    )


def test_a_part_says_what_is_rounded_and_the_codec_rounds_all() -> None:
    rounded = {mode.kv: (mode.k, mode.v, mode.queries, mode.probabilities) for mode in parse_apart("float32")}
    assert rounded == {
        "f32": ("f32", "f32", "f32", "f32"),
        "bf16": ("bf16", "bf16", "f32", "f32"),
        "int8-k": ("int8", "f32", "f32", "f32"),
        "int8-v": ("f32", "int8", "f32", "f32"),
        "int8-q": ("f32", "f32", "int8", "f32"),
        "int8-p": ("f32", "f32", "f32", "int8"),
        "int8": ("int8", "int8", "int8", "int8"),
    }


def test_the_default_is_what_runs_where_nothing_is_asked_for() -> None:
    assert default_mode() == INT8


def test_no_weights_means_no_parts() -> None:
    assert parse_apart(" ") == ()


@pytest.mark.parametrize(
    ("dtypes", "codecs", "formats", "message"),
    [
        ("auto,float16", "auto", "", r"--dtype: unknown 'float16'; did you mean bfloat16\?.* auto, float32, bfloat16"),
        ("int3,x", "auto", "", r"--dtype: unknown 'int3', 'x'"),
        ("auto", "bf61", "", r"--kv-cache-dtype: unknown 'bf61'; did you mean bf16\?.* auto, f32, f16, bf16, int8"),
        ("auto", "int8-k", "", r"--kv-cache-dtype: unknown 'int8-k'; did you mean int8\?"),
        (" ,", "auto", "", "--dtype: the list is empty"),
        ("", "auto", "", "--dtype: the list is empty"),
        ("auto", "", "", "--kv-cache-dtype: the list is empty"),
        ("", "auto", "q4_0", r"--weight-format: unknown 'q4_0'; did you mean q8_0\?.* auto, exact, int8, q8_0, bf16"),
    ],
)
def test_unknown_modes_are_listed(dtypes: str, codecs: str, formats: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_modes(dtypes, codecs, formats)


def test_parts_of_unknown_weights_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"--apart: unknown 'f32';.* auto, exact, int8, q8_0, bfloat16, float32"):
        parse_apart("f32")


def test_counts_are_read_in_order() -> None:
    assert parse_counts("--n-ctx", "512,4K") == (512, 4096)


@pytest.mark.parametrize("bad", ["x", "-5", "1.5", "512;4096"])
def test_a_count_that_is_none_is_refused(bad: str) -> None:
    with pytest.raises(ConfigError, match=r"--n-ctx: .*give a whole number"):
        parse_counts("--n-ctx", bad)
