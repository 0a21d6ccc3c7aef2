"""Reading GGUF files that are what they claim to be, with the `gguf` package as writer and oracle."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from pagemill.base.errors import ModelError
from pagemill.kernels.tensors import Tensor
from pagemill.models.gguf import GGML_TYPES, SUPPORTED_TYPES, GGUFFile, open_gguf
from pagemill.models.hub import resolve
from tests.fixtures.gguf_files import BOOL, F32, F64, I8, I64, STRING, U32, U64, GGUFBytes, array, scalar

RNG = np.random.default_rng(7)


def write_with_oracle(path: Path, tensors: dict[str, tuple[np.ndarray, str]], **metadata: object) -> Path:
    """A file by the `gguf` package: name -> (f32 values, type name), metadata as add_<method>=(key, value)."""
    writer = gguf.GGUFWriter(path, "llama")
    for method, (key, value) in metadata.items():
        getattr(writer, method)(key, value)
    for name, (values, type_name) in tensors.items():
        kind = gguf.GGMLQuantizationType[type_name]
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("type_name", SUPPORTED_TYPES)
def test_dequantised_values_equal_the_gguf_package_bit_for_bit(tmp_path: Path, type_name: str) -> None:
    values = (RNG.standard_normal((48, 96)) * RNG.choice([1e-6, 1e-2, 1.0, 300.0], (48, 1))).astype(np.float32)
    values[0] = 0
    path = write_with_oracle(tmp_path / "m.gguf", {"w": (values, type_name)})
    tensor = open_gguf(path).tensors["w"]
    kind = gguf.GGMLQuantizationType[type_name]
    oracle = gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind).astype(np.float32)
    assert (tensor.format, tensor.shape) == (type_name.lower(), (48, 96))
    assert np.array_equal(tensor.dequantize().view(np.uint32), oracle.view(np.uint32))


@pytest.mark.parametrize("type_name", [name for name in SUPPORTED_TYPES if name.startswith("Q")])
def test_any_block_bytes_dequantise_as_the_gguf_package_does(type_name: str) -> None:
    kind = gguf.GGMLQuantizationType[type_name]
    values, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    raw = RNG.integers(0, 256, (64, 3 * block_bytes), dtype=np.uint8)
    with np.errstate(invalid="ignore", over="ignore"):
        ours = Tensor(type_name.lower(), (64, 3 * values), raw).dequantize()
        theirs = gguf.quants.dequantize(raw, kind)
    assert np.array_equal(ours, theirs, equal_nan=True)


def test_shapes_are_in_numpy_order_and_data_is_read_only(tmp_path: Path) -> None:
    values = RNG.standard_normal((2, 3, 5, 32)).astype(np.float32)
    path = write_with_oracle(tmp_path / "m.gguf", {"a": (values, "F32"), "b": (values[0, 0, 0], "F16")})
    file = open_gguf(path)
    assert file.tensors["a"].shape == (2, 3, 5, 32)
    assert file.tensors["b"].shape == (32,)
    assert np.array_equal(file.tensors["a"].dequantize(), values)
    with pytest.raises(ValueError, match="read-only"):
        file.tensors["a"].data[0, 0] = 1


def test_metadata_written_by_the_gguf_package_is_read_back(tmp_path: Path) -> None:
    path = write_with_oracle(
        tmp_path / "m.gguf",
        {"w": (np.ones((1, 32), np.float32), "F32")},
        add_uint32=("llama.block_count", 30),
        add_float32=("llama.rope.freq_base", 1e5),
        add_bool=("tokenizer.ggml.add_bos_token", False),
        add_string=("tokenizer.ggml.pre", "smollm"),
        add_int64=("some.i64", -(1 << 40)),
        add_float64=("some.f64", 0.1),
        add_array=("tokenizer.ggml.tokens", ["a", "Ġb", ""]),
    )
    file = open_gguf(path)
    assert file.get_str("general.architecture") == "llama"
    assert file.get_int("llama.block_count") == 30
    assert file.get_float("llama.rope.freq_base") == 1e5
    assert file.get_bool("tokenizer.ggml.add_bos_token") is False
    assert file.get_int("some.i64", minimum=-(1 << 50)) == -(1 << 40)
    assert file.get_float("some.f64") == 0.1
    assert file.get_strings("tokenizer.ggml.tokens") == ["a", "Ġb", ""]
    assert (file.version, file.alignment, file.num_bytes) == (3, 32, path.stat().st_size)


def test_version_2_and_other_alignments_are_read(tmp_path: Path) -> None:
    source = GGUFBytes(version=2, alignment=256)
    source.metadata.append(("general.alignment", scalar(U32, 256)))
    file = open_gguf(source.write(tmp_path / "m.gguf"))
    assert (file.version, file.alignment) == (2, 256)
    assert list(file.tensors) == ["token_embd.weight", "output_norm.weight", "blk.0.attn_q.weight"]


def test_number_arrays_keep_their_dtype_and_take_no_copy(tmp_path: Path) -> None:
    source = GGUFBytes()
    source.metadata += [
        ("i8", array(I8, [-1, 2])),
        ("u64", array(U64, [1 << 63])),
        ("f64", array(F64, [0.5, -1.5])),
        ("flags", array(BOOL, [True, False])),
        ("none", array(F32, [])),
    ]
    file = open_gguf(source.write(tmp_path / "m.gguf"))
    found = {key: file.metadata[key] for key in ("i8", "u64", "f64", "flags", "none")}
    assert {key: value.dtype.str for key, value in found.items()} == {
        "i8": "|i1", "u64": "<u8", "f64": "<f8", "flags": "|b1", "none": "<f4",
    }  # fmt: skip
    assert not any(found[key].flags.owndata for key in ("i8", "u64", "f64", "flags"))
    assert file.get_ints("i8").tolist() == [-1, 2]
    assert file.get_floats("f64").tolist() == [0.5, -1.5]
    assert found["flags"].tolist() == [True, False]
    assert file.get_floats("none").size == 0


def test_a_file_without_tensors_opens(tmp_path: Path) -> None:
    assert open_gguf(GGUFBytes(tensors=[]).write(tmp_path / "m.gguf")).tensors == {}


def test_views_outlive_the_file_object(tmp_path: Path) -> None:
    path = GGUFBytes().write(tmp_path / "m.gguf")
    tensor = open_gguf(path).tensors["output_norm.weight"]
    path.unlink()
    assert tensor.dequantize().shape == (32,)


@pytest.fixture
def described(tmp_path: Path) -> GGUFFile:
    """A file with metadata of each kind, some of it out of range."""
    source = GGUFBytes()
    source.metadata += [
        ("nan", scalar(F32, float("nan"))),
        ("big", scalar(U64, (1 << 64) - 1)),
        ("negative", scalar(I64, -5)),
        ("inf_array", array(F32, [1.0, float("inf")])),
        ("big_array", array(U64, [(1 << 64) - 1])),
    ]
    return open_gguf(source.write(tmp_path / "m.gguf"))


@pytest.mark.parametrize(
    ("method", "key", "problem"),
    [
        ("get_int", "llama.embedding_length", "is missing"),
        ("get_int", "general.architecture", "must be a whole number, but is str 'llama'"),
        ("get_int", "tokenizer.ggml.add_bos_token", "must be a whole number, but is bool"),
        ("get_int", "tokenizer.ggml.token_type", "array of 4 int32"),
        ("get_int", "big", "outside 0 to"),
        ("get_int", "negative", "is -5, outside 0"),
        ("get_float", "nan", "is nan, which is not finite"),
        ("get_float", "tokenizer.ggml.tokens", "must be a number, but is an array of 4 strings"),
        ("get_bool", "llama.block_count", "must be a truth value, but is int '2'"),
        ("get_str", "llama.block_count", "must be a string"),
        ("get_strings", "tokenizer.ggml.token_type", "must be an array of strings"),
        ("get_strings", "tokenizer.ggml.merges", "is missing"),
        ("get_ints", "inf_array", "must be an array of whole numbers, but is an array of 2 float32"),
        ("get_ints", "big_array", "out of range"),
        ("get_floats", "inf_array", "not finite"),
    ],
)
def test_wrong_metadata_is_refused_with_key_and_reason(
    described: GGUFFile, method: str, key: str, problem: str
) -> None:
    with pytest.raises(ModelError) as error:
        getattr(described, method)(key)
    assert str(described.path) in str(error.value)
    assert repr(key) in str(error.value)
    assert problem in str(error.value)


def test_a_default_stands_in_only_for_a_missing_key(described: GGUFFile) -> None:
    assert described.get_int("absent", 7) == 7
    assert described.get_float("absent", 0.5) == 0.5
    assert described.get_bool("absent", True) is True
    assert described.get_str("absent", "x") == "x"
    assert not described.has("absent")
    with pytest.raises(ModelError, match="outside 3 to"):
        described.get_int("llama.block_count", 7, minimum=3)


def test_every_type_that_the_gguf_package_knows_has_its_name() -> None:
    oracle = {kind.value: kind.name for kind in gguf.GGMLQuantizationType}
    assert {type_id: GGML_TYPES[type_id] for type_id in oracle} == oracle


@pytest.mark.model
def test_the_default_model_is_read_as_the_gguf_package_reads_it() -> None:
    try:
        path = resolve("smollm2-135m", download=False)
    except ModelError as error:
        pytest.skip(str(error))
    file = open_gguf(path)
    assert (len(file.tensors), len(file.metadata)) == (272, 33)
    assert len(file.get_strings("tokenizer.ggml.tokens")) == len(file.get_ints("tokenizer.ggml.token_type")) == 49152
    assert file.get_strings("tokenizer.ggml.tokens")[1] == "<|im_start|>"
    for tensor in gguf.GGUFReader(path).tensors[:12]:
        oracle = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(file.tensors[tensor.name].dequantize(), oracle)


@pytest.mark.parametrize(
    "odd",
    ["", "x" * 127, "x" * 128, "é" * 127, "x" * 256, "x" * 70_000, "\0", "\0a", "a\0", "a" + "\0" * 7 + "b", "é\0é"],
)
@pytest.mark.parametrize("at", [0, 1, 2047, 2048, 4000, 4999])
def test_a_string_of_any_length_and_content_is_read_among_short_ones(tmp_path: Path, odd: str, at: int) -> None:
    strings = [f"é{i:x}" for i in range(5000)]
    strings[at] = odd
    path = GGUFBytes(metadata=[("k", array(STRING, strings)), ("last", scalar(U32, 7))]).write(tmp_path / "m.gguf")
    file = open_gguf(path)
    assert file.get_strings("k") == strings
    assert file.get_int("last") == 7


def test_a_string_that_is_no_text_is_named_by_its_place_among_many(tmp_path: Path) -> None:
    strings: list[object] = ["token"] * 5000
    strings[3210] = b"half of \xc3"
    path = GGUFBytes(metadata=[("k", array(STRING, strings))]).write(tmp_path / "m.gguf")
    with pytest.raises(ModelError, match=r"'k'\[3210\]: is not UTF-8"):
        open_gguf(path)
