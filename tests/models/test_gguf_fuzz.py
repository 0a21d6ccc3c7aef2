"""Fuzzing the model file readers: valid small files, mutated. A reader opens the file or raises ModelError; it takes
bounded memory and raises nothing else. `scripts/fuzz_gguf.py` does the same with coverage guidance, by hand."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pagemill.base.errors import ModelError
from pagemill.kernels.tensors import Tensor
from pagemill.models.gguf import open_gguf
from pagemill.models.safetensors import read_safetensors
from tests.fixtures.gguf_files import F32, I32, STRING, U64, GGUFBytes, TensorBytes, array, scalar

EXTRA_BYTES = 1 << 20
EXTREMES = [0, 1, 2, 7, 31, 32, 33, 255, 1 << 62, (1 << 64) - 1] + [
    (1 << bits) - 1 + i for bits in (31, 32, 63) for i in (0, 1)
]


def gguf_seeds() -> list[bytes]:
    """Small valid files that between them use every value type and tensor format."""
    rich = GGUFBytes(version=2)
    rich.metadata += [
        ("general.alignment", scalar(U64, 64)),
        ("floats", array(F32, [0.0, 1.5])),
        ("merges", array(STRING, ["a b", "", "é"])),
        *((f"scalar.{kind}", scalar(kind, 1)) for kind in range(13) if kind not in (8, 9)),
    ]
    rich.alignment = 64
    rich.tensors = [TensorBytes(name, [64, 2, 1], name) for name in ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0")]
    return [GGUFBytes().encode(), rich.encode(), GGUFBytes(tensors=[], metadata=[("k", array(I32, [1]))]).encode()]


def safetensors_seeds() -> list[bytes]:
    """Small valid files."""
    arrays = {"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.float16)}
    return [
        safetensors.numpy.save(arrays, metadata={"format": "pt", "x": 'quoted "\\ é'}),
        safetensors.numpy.save({"model.layers.0.w": arrays["a"]}),
    ]


@st.composite
def mutated(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A seed after one to four changes: bits, overwritten numbers, cuts, removed or doubled or foreign pieces."""
    raw = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        if not raw:
            break
        at = draw(st.integers(0, len(raw) - 1))
        kind = draw(st.sampled_from(["bit", "u32", "u64", "u64", "cut", "remove", "double", "insert", "digits"]))
        length = draw(st.integers(1, 40))
        if kind == "bit":
            raw[at] ^= 1 << draw(st.integers(0, 7))
        elif kind in ("u32", "u64"):
            width = int(kind[1:]) // 8
            number = draw(st.sampled_from(EXTREMES) | st.integers(0, (1 << 64) - 1)) % (1 << 8 * width)
            raw[at : at + width] = number.to_bytes(width, "little")
        elif kind == "cut":
            del raw[at:]
        elif kind == "remove":
            del raw[at : at + length]
        elif kind == "double":
            raw[at:at] = raw[at : at + length]
        elif kind == "insert":
            raw[at:at] = draw(st.binary(min_size=1, max_size=16))
        else:
            raw[at:at] = draw(st.sampled_from([b"9" * 30, b"-1", b"1e9", b"[[", b"{", b'"', b"\\ud800", b"null"]))
    return bytes(raw)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place for one file."""
    return tmp_path_factory.mktemp("fuzz") / "model"


def check(raw: bytes, path: Path, read: Callable[[Path], Mapping[str, Tensor]]) -> None:
    """Read `raw` as a file; what opens must be usable to its last byte."""
    path.unlink(missing_ok=True)
    path.write_bytes(raw)
    tracemalloc.start()
    try:
        tensors = read(path)
    except ModelError as error:
        message = str(error)
        assert str(path) in message
        assert len(message) < 2000
        return
    finally:
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak_bytes < 2 * len(raw) + EXTRA_BYTES
    assert sum(tensor.data.nbytes for tensor in tensors.values()) <= len(raw)
    with np.errstate(all="ignore"):
        for tensor in tensors.values():
            assert tensor.dequantize().shape == tensor.shape


fuzzed = settings(
    max_examples=700, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)


@fuzzed
@given(raw=mutated(gguf_seeds()))
def test_a_mutated_gguf_file_opens_or_is_refused(path: Path, raw: bytes) -> None:
    check(raw, path, lambda path: open_gguf(path).tensors)


@fuzzed
@given(raw=mutated(safetensors_seeds()))
def test_a_mutated_safetensors_file_opens_or_is_refused(path: Path, raw: bytes) -> None:
    check(raw, path, read_safetensors)


@settings(fuzzed, max_examples=300)
@given(raw=st.binary(max_size=300), prefix=st.sampled_from([b"", b"GGUF\3\0\0\0", b"GGUF\2\0\0\0\1" + bytes(7)]))
def test_any_bytes_open_or_are_refused(path: Path, raw: bytes, prefix: bytes) -> None:
    check(prefix + raw, path, lambda path: open_gguf(path).tensors)
    check(len(raw).to_bytes(8, "little") + raw, path, read_safetensors)


@settings(fuzzed, max_examples=400)
@given(data=st.data())
def test_a_file_that_lies_in_its_fields_opens_or_is_refused(path: Path, data: st.DataObject) -> None:
    numbers = st.sampled_from(EXTREMES)
    source = GGUFBytes(tail=bytes(data.draw(st.integers(0, 64))))
    tensor = data.draw(st.sampled_from(source.tensors))
    field = data.draw(
        st.sampled_from(["dims", "offset", "type_id", "num_dims", "num_tensors", "num_metadata", "count"])
    )
    if field == "dims":
        tensor.dims, tensor.data = data.draw(st.lists(numbers, max_size=5)), b""
    elif field == "offset":
        tensor.offset = data.draw(numbers)
    elif field == "count":
        kind = data.draw(st.integers(0, 12).filter(lambda kind: kind not in (8, 9)))
        source.metadata.append(("k", array(kind, [0, 1], count=data.draw(numbers))))
    elif field in ("type_id", "num_dims"):
        setattr(tensor, field, data.draw(numbers) % (1 << 32))
    else:
        setattr(source, field, data.draw(numbers))
    check(source.encode(), path, lambda path: open_gguf(path).tensors)
