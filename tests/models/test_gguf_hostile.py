"""Reading GGUF files that lie. Each is refused with ModelError that names the file and the field."""

from __future__ import annotations

import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from pagemill.base.errors import ModelError
from pagemill.models.gguf import MAX_METADATA, MAX_TENSORS, open_gguf
from tests.fixtures.gguf_files import ARRAY, BOOL, F32, I32, STRING, U8, U32, U64, GGUFBytes, TensorBytes, array, scalar

HUGE = (1 << 63, (1 << 64) - 1, 1 << 40)
EXTRA = 1 << 20


def lie(**fields: object) -> GGUFBytes:
    """The default small file with some fields of the whole replaced."""
    return GGUFBytes(**fields)  # type: ignore[arg-type]


def metadata(key: str | bytes, value: bytes) -> GGUFBytes:
    """The default small file with one more metadata entry."""
    source = GGUFBytes()
    source.metadata.append((key, value))
    return source


def tensor(**fields: object) -> GGUFBytes:
    """The default small file with the first tensor's fields replaced."""
    source = GGUFBytes()
    for name, value in fields.items():
        setattr(source.tensors[0], name, value)
    return source


CASES: list[tuple[str, Callable[[], GGUFBytes], str]] = [
    ("magic", lambda: lie(magic=b"GGML"), "magic: is not 'GGUF'"),
    ("version_0", lambda: lie(version=0), "version: is 0; supported: 2, 3"),
    ("version_1", lambda: lie(version=1), "version: is 1"),
    ("version_4", lambda: lie(version=4), "version: is 4"),
    ("big_endian", lambda: lie(version=0x03000000), "big endian"),
    ("more_metadata_than_bytes", lambda: lie(num_metadata=MAX_METADATA), "more than"),
    ("more_tensors_than_bytes", lambda: lie(num_tensors=MAX_TENSORS), "more than"),
    ("one_metadata_too_many", lambda: lie(num_metadata=7), "is 1,125,899,906,842,624 bytes long"),
    ("one_tensor_too_many", lambda: lie(num_tensors=4), "tensor"),
    ("empty_key", lambda: metadata("", scalar(U8, 1)), "is an empty key"),
    ("long_key", lambda: metadata("k" * 70_000, scalar(U8, 1)), "70,000 bytes long; at most 65,535"),
    ("key_not_utf8", lambda: metadata(b"\xff\xfe", scalar(U8, 1)), "is not UTF-8"),
    ("duplicate_key", lambda: metadata("llama.block_count", scalar(U32, 1)), "'llama.block_count': appears twice"),
    ("unknown_value_type", lambda: metadata("k", struct.pack("<I", 13)), "unknown value type 13"),
    ("bool_of_2", lambda: metadata("k", struct.pack("<IB", BOOL, 2)), "truth value is 0 or 1"),
    ("bool_array_of_2", lambda: metadata("k", array(BOOL, [True])[:-1] + b"\2"), "other than 0 and 1"),
    ("string_not_utf8", lambda: metadata("k", scalar(STRING, b"a\xff")), "is not UTF-8 (byte 1)"),
    ("token_not_utf8", lambda: metadata("k", array(STRING, ["a", b"\xff"])), "'k'[1]: is not UTF-8"),
    ("nested_array", lambda: metadata("k", struct.pack("<IIQIIQ", ARRAY, ARRAY, 1, ARRAY, ARRAY, 1)), "arrays"),
    ("array_of_unknown", lambda: metadata("k", struct.pack("<IIQ", ARRAY, 99, 1)), "unknown value type 99"),
    ("alignment_0", lambda: metadata("general.alignment", scalar(U32, 0)), "not a power of two"),
    ("alignment_48", lambda: metadata("general.alignment", scalar(U32, 48)), "not a power of two"),
    ("alignment_1", lambda: metadata("general.alignment", scalar(U32, 1)), "not a power of two"),
    ("alignment_2_to_63", lambda: metadata("general.alignment", scalar(U64, 1 << 63)), "not a power of two"),
    ("alignment_text", lambda: metadata("general.alignment", scalar(STRING, "32")), "is not a whole number"),
    ("split_file", lambda: metadata("split.count", scalar(U32, 3)), "is one of 3 parts"),
    ("empty_tensor_name", lambda: tensor(name=""), "has an empty name"),
    ("long_tensor_name", lambda: tensor(name="n" * 65), "65 bytes long; at most 64"),
    ("duplicate_tensor", lambda: tensor(name="output_norm.weight"), "'output_norm.weight': appears twice"),
    ("no_dims", lambda: tensor(num_dims=0), "has 0 dimensions"),
    ("five_dims", lambda: tensor(dims=[32, 4, 1, 1, 1]), "has 5 dimensions"),
    ("dims_2_to_32", lambda: tensor(num_dims=(1 << 32) - 1), "4,294,967,295 dimensions"),
    ("dim_0", lambda: tensor(dims=[32, 0]), "impossible dimensions"),
    ("dims_product_wraps", lambda: tensor(dims=[1 << 32, 1 << 32], data=b""), "impossible dimensions"),
    ("dims_product_wraps_to_small", lambda: tensor(dims=[1 << 62, 4, 1, 1], data=b""), "impossible dimensions"),
    ("data_outside", lambda: tensor(dims=[32, 4000], data=b""), "of a file of"),
    ("offset_outside", lambda: tensor(offset=1 << 40), "of a file of"),
    ("offset_wraps", lambda: tensor(offset=(1 << 64) - 32), "of a file of"),
    ("offset_unaligned", lambda: tensor(offset=4), "not a multiple of 32"),
    ("overlap", lambda: tensor(offset=256), "overlaps tensor"),
    ("rows_split_blocks", lambda: tensor(type_name="Q8_0", dims=[48, 4]), "rows of 48 values, which Q8_0 cannot hold"),
]


@pytest.mark.parametrize(("build", "problem"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_lying_file_is_refused_with_path_and_field(
    tmp_path: Path, build: Callable[[], GGUFBytes], problem: str
) -> None:
    path = build().write(tmp_path / "m.gguf")
    with pytest.raises(ModelError) as error:
        open_gguf(path)
    assert str(path) in str(error.value)
    assert problem in str(error.value)


@pytest.mark.parametrize("count", HUGE)
@pytest.mark.parametrize(
    "build",
    [
        lambda count: lie(num_tensors=count),
        lambda count: lie(num_metadata=count),
        lambda count: metadata("k", array(STRING, ["a"], count=count)),
        lambda count: metadata("k", array(I32, [1], count=count)),
        lambda count: metadata("k", array(BOOL, [True], count=count)),
        lambda count: metadata("k", struct.pack("<IQ", STRING, count)),
        lambda count: metadata("k", array(STRING, [])[:-8] + struct.pack("<QQ", 1, count)),
        lambda count: tensor(dims=[count], data=b""),
        lambda count: tensor(dims=[32, count], data=b""),
        lambda count: tensor(offset=count),
    ],
    ids=["tensors", "metadata", "strings", "ints", "bools", "length", "token_length", "dim", "rows", "offset"],
)
def test_a_huge_count_is_refused_without_taking_memory(
    tmp_path: Path, build: Callable[[int], GGUFBytes], count: int
) -> None:
    path = build(count).write(tmp_path / "m.gguf")
    tracemalloc.start()
    try:
        with pytest.raises(ModelError):
            open_gguf(path)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 2 * path.stat().st_size + EXTRA


def test_a_file_cut_at_any_byte_is_refused(tmp_path: Path) -> None:
    whole = GGUFBytes()
    whole.tensors.append(TensorBytes("last", [8]))
    raw = whole.encode()
    path = tmp_path / "m.gguf"
    path.write_bytes(raw)
    assert "last" in open_gguf(path).tensors
    for num_bytes in range(len(raw)):
        path.write_bytes(raw[:num_bytes])
        with pytest.raises(ModelError):
            open_gguf(path)


def test_unsupported_types_are_refused_by_name_with_a_remedy(tmp_path: Path) -> None:
    source = GGUFBytes()
    source.tensors[0].type_id = 12
    source.tensors[1].type_id = 14
    source.tensors[2].type_id = 777
    with pytest.raises(ModelError) as error:
        open_gguf(source.write(tmp_path / "m.gguf"))
    for part in (
        "Q4_K (1 tensors)",
        "Q6_K",
        "unknown type 777",
        "token_embd.weight",
        "F32, F16, BF16",
        "llama-quantize",
    ):
        assert part in str(error.value)


def test_a_missing_file_a_directory_a_pipe_and_an_empty_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "pipe")
    for name, problem in (("no", "no such file"), ("", "is not a file"), ("pipe", "is not a file"), ("empty", "empty")):
        with pytest.raises(ModelError, match=problem):
            open_gguf(tmp_path / name)
    with pytest.raises(ModelError, match="cannot be read"):
        open_gguf("a\0b")
    with pytest.raises(ModelError, match="cannot be read"):
        open_gguf("n" * 5000)


def test_an_unreadable_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = GGUFBytes().write(tmp_path / "m.gguf")

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ModelError, match="Permission denied"):
        open_gguf(path)


def test_many_small_strings_take_bounded_memory(tmp_path: Path) -> None:
    num_strings = 60_000
    path = metadata("k", array(STRING, [f"{i:04x}" for i in range(num_strings)])).write(tmp_path / "m.gguf")
    tracemalloc.start()
    try:
        file = open_gguf(path)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(file.get_strings("k")) == num_strings
    assert peak_bytes < 80 * num_strings + EXTRA


def test_text_beyond_the_budget_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagemill.models.gguf_values.MAX_TEXT_BYTES", 1000)
    for value in (scalar(STRING, "x" * 990), array(STRING, ["x" * 90] * 12)):
        with pytest.raises(ModelError, match="1,000"):
            open_gguf(metadata("k", value).write(tmp_path / "m.gguf"))
    fitting = metadata("k", array(STRING, ["x" * 60] * 10)).write(tmp_path / "m.gguf")
    assert len(open_gguf(fitting).get_strings("k")) == 10


def test_strings_beyond_the_budget_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagemill.models.gguf_values.MAX_STRINGS", 10)
    with pytest.raises(ModelError, match="strings of the file to 11; 10 are accepted"):
        open_gguf(metadata("k", array(STRING, [""] * 7)).write(tmp_path / "m.gguf"))


def test_a_nan_alignment_of_another_type_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not a whole number"):
        open_gguf(metadata("general.alignment", scalar(F32, float("nan"))).write(tmp_path / "m.gguf"))
