"""Reading safetensors files and sharded checkpoints, true ones (by the `safetensors` package) and lying ones."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from pagemill.base.errors import ModelError
from pagemill.models.safetensors import MAX_HEADER_BYTES, read_safetensors

RNG = np.random.default_rng(3)
WEIGHT = RNG.standard_normal((3, 4)).astype(np.float32)


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, object]:
    """One tensor of a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write(path: Path, header: object, num_data_bytes: int, *, header_bytes: int | None = None) -> Path:
    """A file with any header: text, or a value that becomes JSON; `header_bytes` overrides the length written."""
    raw = header.encode() if isinstance(header, str) else json.dumps(header).encode()
    length = len(raw) if header_bytes is None else header_bytes
    path.write_bytes(length.to_bytes(8, "little") + raw + bytes(num_data_bytes))
    return path


def test_files_of_the_safetensors_package_are_read(tmp_path: Path) -> None:
    arrays = {
        "a": WEIGHT,
        "b.half": RNG.standard_normal((2, 3, 5)).astype(np.float16),
        "ä": RNG.standard_normal(7).astype(np.float32),
        "scalar": np.array(2.5, np.float32),
    }
    path = tmp_path / "m.safetensors"
    safetensors.numpy.save_file(arrays, path, metadata={"format": "pt", "note": 'a "quoted" \\ {line}'})
    tensors = read_safetensors(path)
    assert set(tensors) == set(arrays)
    for name, values in arrays.items():
        assert tensors[name].shape == (values.shape or (1,))
        assert np.array_equal(tensors[name].dequantize().reshape(values.shape), values.astype(np.float32))
    with pytest.raises(ValueError, match="read-only"):
        tensors["a"].data[0, 0] = 1


def test_bfloat16_is_widened_exactly(tmp_path: Path) -> None:
    bits = RNG.integers(0, 0x7F80, 12, dtype=np.uint16)
    header = json.dumps({"w": entry(0, 24, [3, 4], "BF16")}).encode()
    (tmp_path / "m.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bits.tobytes())
    tensor = read_safetensors(tmp_path / "m.safetensors")["w"]
    assert (tensor.format, tensor.shape) == ("bf16", (3, 4))
    assert np.array_equal(tensor.dequantize().view(np.uint32).ravel(), bits.astype(np.uint32) << 16)


def test_fields_come_in_any_order_and_spacing(tmp_path: Path) -> None:
    header = ' { "a" :\n{"data_offsets":[ 0 , 8 ],\t"shape":[2],"dtype":"F32"} , "__metadata__":{"x":[1,{"y":null}]} } '
    assert read_safetensors(write(tmp_path / "m.safetensors", header, 8))["a"].shape == (2,)


def test_a_file_without_tensors_is_empty(tmp_path: Path) -> None:
    assert read_safetensors(write(tmp_path / "m.safetensors", "{}", 0)) == {}


A = entry(0, 8, [2])
DEEP = "[" * 100_000
LIES: list[tuple[str, object, int, str]] = [
    ("no_json", "hello", 0, "expected '{'"),
    ("a_list", "[]", 0, "expected '{'"),
    ("cut", '{"a":{"dtype":"F32"', 8, "expected '}'|expected ','"),
    ("cut_string", '{"a', 8, "expected a string"),
    ("text_after", '{"a":' + json.dumps(A) + "} x", 8, "text after the end"),
    ("duplicate", '{"a":' + json.dumps(A) + ',"a":' + json.dumps(entry(8, 16, [2])) + "}", 16, "'a' appears twice"),
    ("duplicate_escaped", '{"a":' + json.dumps(A) + ',"\\u0061":' + json.dumps(A) + "}", 8, "appears twice"),
    ("duplicate_field", '{"a":{"dtype":"F32","dtype":"F32"}}', 8, "'dtype' appears twice"),
    ("unknown_field", {"a": {**A, "extra": 1}}, 8, "unknown field 'extra'"),
    ("no_dtype", {"a": {"shape": [2], "data_offsets": [0, 8]}}, 8, "lacks dtype"),
    ("one_offset", {"a": {**A, "data_offsets": [8]}}, 8, "lacks dtype, shape or two data_offsets"),
    ("three_offsets", {"a": {**A, "data_offsets": [0, 8, 8]}}, 8, "more than 2 numbers"),
    ("nine_dims", {"a": {**A, "shape": [1] * 9}}, 8, "more than 8 numbers"),
    ("negative", {"a": {**A, "shape": [-2]}}, 8, "expected a whole number"),
    ("fraction", {"a": {**A, "shape": [2.0]}}, 8, "expected"),
    ("exponent", '{"a":{"dtype":"F32","shape":[2e9],"data_offsets":[0,8]}}', 8, "expected a whole number"),
    ("leading_zero", '{"a":{"dtype":"F32","shape":[02],"data_offsets":[0,8]}}', 8, "expected ','"),
    ("digits", '{"a":{"dtype":"F32","shape":[' + "9" * 100_000 + '],"data_offsets":[0,8]}}', 8, "whole number"),
    ("shape_text", {"a": {**A, "shape": "2"}}, 8, r"expected '\['"),
    ("deep_metadata", '{"__metadata__":' + DEEP, 0, "nested more than 16 deep"),
    ("deep_objects", '{"__metadata__":' + '{"a":' * 100_000, 0, "nested more than 16 deep"),
    ("bad_metadata", '{"__metadata__":{"a":tru}}', 0, "expected a value"),
    ("bad_escape", '{"\\q":1}', 0, "a string is not valid"),
    ("surrogate", '{"\\ud800":1}', 0, "a string is not valid"),
    ("long_name", {"n" * 5000: A}, 8, "a name of 5,002 bytes"),
    ("integer_dtype", {"a": A, "mask": entry(8, 16, [1], "I64")}, 16, "I64 .1 tensors., the first 'mask'"),
    ("unknown_dtype", {"a": entry(0, 8, [2], "F99")}, 8, "F99"),
    ("empty_tensor", {"a": entry(0, 0, [0])}, 0, "is empty"),
    ("size_disagrees", {"a": entry(0, 8, [3])}, 8, r"takes 12 bytes, but data_offsets span 8"),
    ("offsets_backwards", {"a": entry(8, 0, [2])}, 8, "span -8"),
    ("product_2_to_64", {"a": entry(0, 8, [1 << 62, 8])}, 8, "takes"),
    ("outside", {"a": entry(8, 16, [2])}, 8, "ends at byte 16 of 8"),
    ("overlap", {"a": A, "b": entry(4, 12, [2])}, 12, "overlap"),
    ("same_place", {"a": A, "b": A}, 8, "overlap"),
    ("hole", {"a": A, "b": entry(12, 20, [2])}, 20, "have a hole"),
    ("hole_in_front", {"a": entry(4, 12, [2])}, 12, "do not cover"),
    ("bytes_left_over", {"a": A}, 12, "do not cover"),
    ("data_without_tensors", {}, 8, "do not cover"),
]


@pytest.mark.parametrize(("header", "num_data_bytes", "problem"), [x[1:] for x in LIES], ids=[x[0] for x in LIES])
def test_a_lying_file_is_refused(tmp_path: Path, header: object, num_data_bytes: int, problem: str) -> None:
    path = write(tmp_path / "m.safetensors", header, num_data_bytes)
    with pytest.raises(ModelError, match=problem) as error:
        read_safetensors(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("dtype", ["BOOL", "U8", "I64", "F64", "F8_E4M3"])
def test_ignored_tensors_are_left_out_whatever_their_dtype(tmp_path: Path, dtype: str) -> None:
    header = {"a": A, "h.0.mask": entry(8, 24, [2 if dtype in ("I64", "F64") else 16], dtype)}
    path = write(tmp_path / "m.safetensors", header, 24)
    assert list(read_safetensors(path, ignored=r"h\.\d+\.mask")) == ["a"]
    with pytest.raises(ModelError, match=rf"{dtype} .1 tensors., the first 'h.0.mask'"):
        read_safetensors(path)


@pytest.mark.parametrize("mask", [entry(4, 12, [8], "U8"), entry(8, 24, [8], "U8"), entry(8, 0, [8], "F99")])
def test_ignored_tensors_must_have_a_place_of_their_own(tmp_path: Path, mask: object) -> None:
    path = write(tmp_path / "m.safetensors", {"a": A, "mask": mask}, 16)
    with pytest.raises(ModelError, match=r"overlap|takes 8 bytes|is empty"):
        read_safetensors(path, ignored="mask")


@pytest.mark.parametrize("claimed", [MAX_HEADER_BYTES + 1, 1 << 63, (1 << 64) - 1])
def test_a_huge_header_length_is_refused_without_taking_memory(tmp_path: Path, claimed: int) -> None:
    path = write(tmp_path / "m.safetensors", {"a": A}, 8, header_bytes=claimed)
    tracemalloc.start()
    try:
        with pytest.raises(ModelError, match="claims a header"):
            read_safetensors(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_header_longer_than_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="longer than the file"):
        read_safetensors(write(tmp_path / "m.safetensors", {"a": A}, 8, header_bytes=5000))


def test_a_hostile_header_takes_less_memory_than_twice_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", '{"__metadata__":[' + "[],{}," * 20_000 + "1]}", 0)
    tracemalloc.start()
    try:
        assert read_safetensors(path) == {}
        assert tracemalloc.get_traced_memory()[1] < 2 * path.stat().st_size
    finally:
        tracemalloc.stop()


def test_metadata_that_costs_too_much_time_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagemill.models.json_scanner.MAX_SKIPPED", 100)
    with pytest.raises(ModelError, match="more than 100 values that no reader asked for"):
        read_safetensors(write(tmp_path / "m.safetensors", '{"__metadata__":[' + "1," * 200 + "1]}", 0))


def test_names_beyond_the_budget_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagemill.models.json_scanner.MAX_TEXT_BYTES", 100)
    header = {f"{'n' * 40}{i}": entry(8 * i, 8 * i + 8, [2]) for i in range(3)}
    with pytest.raises(ModelError, match="names of more than 100 bytes"):
        read_safetensors(write(tmp_path / "m.safetensors", header, 24))


def test_a_file_cut_at_any_byte_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    safetensors.numpy.save_file({"a": WEIGHT, "b": WEIGHT[0]}, path)
    raw = path.read_bytes()
    for num_bytes in range(len(raw)):
        path.write_bytes(raw[:num_bytes])
        with pytest.raises(ModelError):
            read_safetensors(path)


def test_missing_and_wrong_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(ModelError, match="no such file"):
        read_safetensors(tmp_path / "no.safetensors")
    with pytest.raises(ModelError, match="is not a file"):
        read_safetensors(tmp_path / "pipe.safetensors")
    with pytest.raises(ModelError, match="cannot be read"):
        read_safetensors("n" * 5000)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A checkpoint of two shards."""
    safetensors.numpy.save_file({"a": WEIGHT, "b": WEIGHT[0]}, tmp_path / "model-00001-of-00002.safetensors")
    safetensors.numpy.save_file({"c": WEIGHT[1]}, tmp_path / "model-00002-of-00002.safetensors")
    write_index(tmp_path, {"a": 1, "b": 1, "c": 2})
    return tmp_path


def write_index(directory: Path, shard_of: dict[str, int | str]) -> None:
    """The index; a number stands for the shard of that number."""
    names = {k: v if isinstance(v, str) else f"model-{v:05d}-of-00002.safetensors" for k, v in shard_of.items()}
    index = {"metadata": {"total_size": 1.5}, "weight_map": names}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def test_shards_are_joined(sharded: Path) -> None:
    tensors = read_safetensors(sharded)
    assert set(tensors) == {"a", "b", "c"}
    assert np.array_equal(tensors["c"].dequantize(), WEIGHT[1])


@pytest.mark.parametrize(
    "shard",
    ["../m.safetensors", "/etc/m.safetensors", "sub/m.safetensors", "..", ".safetensors", "a\\b.safetensors",
     "m.bin", "a\0.safetensors", "-x.safetensors", "m.safetensors\n"],
)  # fmt: skip
def test_shard_names_cannot_leave_the_directory(sharded: Path, shard: str) -> None:
    write_index(sharded, {"a": 1, "b": 1, "c": shard})
    with pytest.raises(ModelError, match="is no plain name"):
        read_safetensors(sharded)


def test_shards_that_disagree_with_the_index_are_refused(sharded: Path) -> None:
    write_index(sharded, {"a": 1, "b": 2, "c": 2})
    with pytest.raises(ModelError, match="'b' is not in this shard"):
        read_safetensors(sharded)
    write_index(sharded, {"a": 1, "b": 1, "c": 2, "d": 2})
    with pytest.raises(ModelError, match="1 tensors are in no shard, the first 'd'"):
        read_safetensors(sharded)
    write_index(sharded, {"a": 1, "c": 2})
    with pytest.raises(ModelError, match="'b' is not in this shard"):
        read_safetensors(sharded)
    write_index(sharded, {"a": 1, "b": 1, "c": 2})
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model-00002-of-00002\.safetensors: there is no such file"):
        read_safetensors(sharded)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"weight_map":{}}', '{"weight_map":[]}', '{"weight_map":{"a":1}}'])
def test_a_damaged_index_is_refused(sharded: Path, text: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json"):
        read_safetensors(sharded)


def test_a_directory_is_searched_for_its_one_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no \.safetensors file\. Give"):
        read_safetensors(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match="only PyTorch pickles"):
        read_safetensors(tmp_path)
    safetensors.numpy.save_file({"x": WEIGHT}, tmp_path / "other.safetensors")
    assert set(read_safetensors(tmp_path)) == {"x"}
    safetensors.numpy.save_file({"y": WEIGHT}, tmp_path / "third.safetensors")
    with pytest.raises(ModelError, match=r"holds 2 \.safetensors files and no model\.safetensors\.index\.json"):
        read_safetensors(tmp_path)
    safetensors.numpy.save_file({"z": WEIGHT}, tmp_path / "model.safetensors")
    assert set(read_safetensors(tmp_path)) == {"z"}
