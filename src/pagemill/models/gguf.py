"""GGUF files, memory-mapped. Owns the reading of hostile files: every count, offset, length and size is checked against
the file before it is used. Does not know what a key or a tensor is for, and never writes.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little endian. Beyond the mapped
file itself, opening takes memory for the strings (at most MAX_STRINGS) and one small object per tensor.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from mmap import ACCESS_READ, mmap
from pathlib import Path
from stat import S_ISREG
from typing import Any, Final, NoReturn

import numpy as np
from numpy.typing import NDArray

from pagemill.base.errors import ModelError
from pagemill.kernels.tensors import BLOCK_BYTES, Tensor
from pagemill.models.gguf_values import GGUFCursor, MetadataValue

MAX_METADATA: Final = 4096
MAX_TENSORS: Final = 1 << 15
MAX_KEY_BYTES: Final = 65_535
MAX_TENSOR_NAME_BYTES: Final = 64
MAX_DIMS: Final = 4
MAX_ALIGNMENT: Final = 1 << 20

_MAGIC: Final = 0x46554747  # "GGUF" read as a little-endian u32
_VERSIONS: Final = (2, 3)
_MIN_METADATA_BYTES: Final = 8 + 1 + 4 + 1
_MIN_TENSOR_BYTES: Final = 8 + 1 + 4 + 8 + 4 + 8

# ggml's type ids (ggml.h, `enum ggml_type`), those withdrawn from the format included.
GGML_TYPES: Final[dict[int, str]] = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 4: "Q4_2", 5: "Q4_3", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1",
    10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS",
    18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32",
    27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 34: "TQ1_0",
    35: "TQ2_0", 36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip
SUPPORTED_TYPES: Final = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0")


@dataclass(frozen=True, slots=True, eq=False)
class GGUFFile:
    """An open GGUF file. Views stay valid as long as anything holds them; the file must not be cut while it is open.

    metadata: key -> bool, int, float, str, list[str] or a read-only array [count] of the file's dtype. tensors: name ->
    Tensor in numpy order ([out, in]), its data a read-only view into the map.
    """

    path: Path
    version: int
    alignment: int
    num_bytes: int
    metadata: dict[str, MetadataValue]
    tensors: dict[str, Tensor]

    def has(self, key: str) -> bool:
        """Whether the metadata holds `key`."""
        return key in self.metadata

    def get_int(self, key: str, default: int | None = None, *, minimum: int = 0, maximum: int = (1 << 31) - 1) -> int:
        """The whole number at `key`, or `default` where the key is missing. Raises ModelError when it is missing
        without default, is no whole number, or is outside [minimum, maximum]."""
        value = self._find(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            self._refuse_kind(key, value, "a whole number")
        self._check_range(key, value, minimum, maximum)
        return value

    def get_float(
        self, key: str, default: float | None = None, *, minimum: float = -math.inf, maximum: float = math.inf
    ) -> float:
        """The number at `key` (a whole one counts), finite and inside [minimum, maximum]; else as `get_int`."""
        value = self._find(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            self._refuse_kind(key, value, "a number")
        if not math.isfinite(value):
            self._refuse(key, f"is {value}, which is not finite")
        self._check_range(key, value, minimum, maximum)
        return float(value)

    def get_bool(self, key: str, default: bool | None = None) -> bool:
        """The truth value at `key`; else as `get_int`."""
        value = self._find(key, default)
        if not isinstance(value, bool):
            self._refuse_kind(key, value, "a truth value")
        return value

    def get_str(self, key: str, default: str | None = None) -> str:
        """The string at `key`; else as `get_int`."""
        value = self._find(key, default)
        if not isinstance(value, str):
            self._refuse_kind(key, value, "a string")
        return value

    def get_strings(self, key: str) -> list[str]:
        """The array of strings at `key`. Raises ModelError when it is missing or holds something else."""
        value = self._find(key, None)
        if not isinstance(value, list):
            self._refuse_kind(key, value, "an array of strings")
        return value

    def get_ints(self, key: str) -> NDArray[np.int64]:
        """The array of whole numbers at `key`, [count] i64, a copy. Raises ModelError as `get_strings`."""
        value = self._find(key, None)
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu":
            self._refuse_kind(key, value, "an array of whole numbers")
        if value.dtype == np.uint64 and value.size and int(value.max()) >= 1 << 63:
            self._refuse(key, f"holds {int(value.max()):,}, which is out of range")
        return value.astype(np.int64)

    def get_floats(self, key: str) -> NDArray[np.float64]:
        """The array of numbers at `key`, [count] f64, a copy, all finite. Raises ModelError as `get_strings`."""
        value = self._find(key, None)
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "iuf":
            self._refuse_kind(key, value, "an array of numbers")
        floats = value.astype(np.float64)
        if not np.isfinite(floats).all():
            self._refuse(key, "holds numbers that are not finite")
        return floats

    def _find(self, key: str, default: MetadataValue | None) -> MetadataValue:
        value = self.metadata.get(key, default)
        if value is None:
            self._refuse(key, "is missing, and the model cannot be described without it")
        return value

    def _check_range(self, key: str, value: float, minimum: float, maximum: float) -> None:
        if not minimum <= value <= maximum:
            self._refuse(key, f"is {value:,}, outside {minimum:,} to {maximum:,}")

    def _refuse_kind(self, key: str, value: MetadataValue, expected: str) -> NoReturn:
        if isinstance(value, np.ndarray):
            found = f"an array of {value.size:,} {value.dtype.name}"
        elif isinstance(value, list):
            found = f"an array of {len(value):,} strings"
        else:
            found = f"{type(value).__name__} {_shown(str(value))}"
        self._refuse(key, f"must be {expected}, but is {found}")

    def _refuse(self, key: str, problem: str) -> NoReturn:
        raise ModelError(
            f"{self.path}: metadata {key!r}: {problem}. Convert the model again with a current convert_hf_to_gguf.py, "
            "or fetch another conversion of it."
        )


def open_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Map a GGUF file and read its metadata and tensor table; tensor bytes are not touched.

    Raises ModelError, naming path and field, when the file is missing, damaged, lies about itself, or holds tensors of
    a type that is not supported.
    """
    path = Path(path)
    cursor = GGUFCursor(path, _map(path))
    version, num_tensors, num_metadata = _read_header(cursor)
    metadata = _read_metadata(cursor, num_metadata)
    alignment = _read_alignment(cursor, metadata)
    if isinstance(parts := metadata.get("split.count", 0), int) and parts > 1:
        cursor.refuse("split.count", f"is one of {parts} parts", "Join them first: llama-gguf-split --merge FIRST OUT")
    infos = [_read_tensor_info(cursor) for _ in range(num_tensors)]
    _check_types(path, infos)
    tensors = _map_tensors(cursor, infos, alignment)
    return GGUFFile(path, version, alignment, len(cursor.buffer), metadata, tensors)


@dataclass(frozen=True, slots=True)
class _TensorInfo:
    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int


def _shown(name: str) -> str:
    return repr(name if len(name) <= 80 else name[:77] + "...")


def _map(path: Path) -> mmap:
    try:
        status = path.stat()
        if not S_ISREG(status.st_mode):
            raise ModelError(f"{path}: is not a file. Give the path of a .gguf file.")
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise ModelError(f"{path}: the file is empty. Fetch it again.")
            return mmap(file.fileno(), 0, access=ACCESS_READ)
    except FileNotFoundError:
        raise ModelError(f"{path}: there is no such file. Check the path; `pagemill models ls` lists models.") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read: {error}. Check the path and the permissions.") from error


def _read_header(cursor: GGUFCursor) -> tuple[int, int, int]:
    if cursor.u32("magic") != _MAGIC:
        cursor.refuse("magic", "is not 'GGUF'", "Give a GGUF file, or a directory with safetensors files")
    version = cursor.u32("version")
    if version not in _VERSIONS:
        if version and version & 0xFFFF == 0:
            cursor.refuse("version", "the file is big endian", "Convert it with gguf-py's gguf_convert_endian.py")
        mend = "Convert the model again with a current convert_hf_to_gguf.py"
        cursor.refuse("version", f"is {version}; supported: {', '.join(map(str, _VERSIONS))}", mend)
    num_tensors = cursor.u64("tensor count")
    num_metadata = cursor.u64("metadata count")
    for what, count, most, least_bytes in (
        ("tensor count", num_tensors, MAX_TENSORS, _MIN_TENSOR_BYTES),
        ("metadata count", num_metadata, MAX_METADATA, _MIN_METADATA_BYTES),
    ):
        if count > most:
            cursor.refuse(what, f"is {count:,}; at most {most:,} are accepted")
        if count * least_bytes > cursor.num_left:
            cursor.refuse(what, f"is {count:,}, more than {cursor.num_left:,} bytes can hold")
    return version, num_tensors, num_metadata


def _read_metadata(cursor: GGUFCursor, count: int) -> dict[str, MetadataValue]:
    metadata: dict[str, MetadataValue] = {}
    for index in range(count):
        key = cursor.string(f"metadata key {index}", MAX_KEY_BYTES)
        what = f"metadata {_shown(key)}"
        if not key:
            cursor.refuse(what, "is an empty key")
        if key in metadata:
            cursor.refuse(what, "appears twice")
        metadata[key] = cursor.value(what)
    return metadata


def _read_alignment(cursor: GGUFCursor, metadata: dict[str, MetadataValue]) -> int:
    alignment = metadata.get("general.alignment", 32)
    if isinstance(alignment, bool) or not isinstance(alignment, int):
        cursor.refuse("general.alignment", "is not a whole number")
    if not 8 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        cursor.refuse("general.alignment", f"is {alignment:,}, not a power of two from 8 to {MAX_ALIGNMENT:,}")
    return alignment


def _read_tensor_info(cursor: GGUFCursor) -> _TensorInfo:
    name = cursor.string("tensor name", MAX_TENSOR_NAME_BYTES)
    what = f"tensor {_shown(name)}"
    if not name:
        cursor.refuse(what, "has an empty name")
    num_dims = cursor.u32(f"{what}, number of dimensions")
    if not 1 <= num_dims <= MAX_DIMS:
        cursor.refuse(what, f"has {num_dims:,} dimensions, not 1 to {MAX_DIMS}")
    dims = [cursor.u64(f"{what}, dimension {index}") for index in range(num_dims)]
    if not all(0 < dim < 1 << 63 for dim in dims) or math.prod(dims) >= 1 << 63:
        cursor.refuse(what, f"has the impossible dimensions {dims}")
    type_id = cursor.u32(f"{what}, type")
    return _TensorInfo(name, tuple(reversed(dims)), type_id, cursor.u64(f"{what}, offset"))


def _check_types(path: Path, infos: list[_TensorInfo]) -> None:
    wrong = [info for info in infos if GGML_TYPES.get(info.type_id) not in SUPPORTED_TYPES]
    if not wrong:
        return
    counts = Counter(GGML_TYPES.get(info.type_id, f"unknown type {info.type_id}") for info in wrong)
    listed = ", ".join(f"{name} ({count} tensors)" for name, count in counts.most_common(8))
    raise ModelError(
        f"{path}: tensors of types that are not supported: {listed}, the first {_shown(wrong[0].name)}. Supported: "
        f"{', '.join(SUPPORTED_TYPES)}. Fetch the model in one of these, or re-quantise the original with "
        "`llama-quantize MODEL-F16.gguf OUT.gguf Q8_0` (or Q4_1, with --pure to keep other types out)."
    )


def _map_tensors(cursor: GGUFCursor, infos: list[_TensorInfo], alignment: int) -> dict[str, Tensor]:
    """Check every tensor's place, then cut the map into read-only views, [rows, bytes per row] u8 each."""
    data_start = -(-cursor.position // alignment) * alignment
    file_bytes: NDArray[Any] = np.frombuffer(cursor.buffer, np.uint8)
    tensors: dict[str, Tensor] = {}
    spans: list[tuple[int, int, str]] = []
    for info in infos:
        what = f"tensor {_shown(info.name)}"
        if info.name in tensors:
            cursor.refuse(what, "appears twice")
        type_name = GGML_TYPES[info.type_id]
        values, block_bytes = BLOCK_BYTES[type_name.lower()]
        if info.shape[-1] % values:
            cursor.refuse(
                what, f"has rows of {info.shape[-1]:,} values, which {type_name} cannot hold ({values} a block)"
            )
        if info.offset % alignment:
            cursor.refuse(what, f"starts at offset {info.offset:,}, which is not a multiple of {alignment}")
        num_rows, row_bytes = math.prod(info.shape[:-1]), info.shape[-1] // values * block_bytes
        start, end = data_start + info.offset, data_start + info.offset + num_rows * row_bytes
        if end > file_bytes.size:
            cursor.refuse(what, f"ends at byte {end:,} of a file of {file_bytes.size:,} bytes")
        data = file_bytes[start:end].reshape(num_rows, row_bytes)
        tensors[info.name] = Tensor(type_name.lower(), info.shape, data)
        spans.append((start, end, info.name))
    spans.sort()
    for (_, end, name), (next_start, _, next_name) in pairwise(spans):
        if next_start < end:
            cursor.refuse(f"tensor {_shown(next_name)}", f"overlaps tensor {_shown(name)}")
    return tensors
