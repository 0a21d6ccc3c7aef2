"""Safetensors checkpoints, memory-mapped: single files and sharded directories. Owns the reading of hostile headers:
every length, offset and shape is checked against the file before it is used. Does not read configuration files.

Format: https://github.com/huggingface/safetensors#format. The header's length (u64, little endian), the header (JSON),
then the tensors' bytes without holes.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from mmap import ACCESS_READ, mmap
from pathlib import Path
from stat import S_ISREG
from typing import Final

import numpy as np

from pagemill.base.errors import ModelError
from pagemill.kernels.tensors import Tensor
from pagemill.models.json_scanner import JsonScanner

MAX_HEADER_BYTES: Final = 100_000_000
MAX_INDEX_BYTES: Final = 64 << 20
MAX_TENSORS: Final = 1 << 16
MAX_SHARDS: Final = 1024
MAX_DIMS: Final = 8
SUPPORTED_DTYPES: Final = ("F32", "F16", "BF16")
NOTHING: Final = r"(?!)"  # matches no name

INDEX_NAME: Final = "model.safetensors.index.json"
SINGLE_NAME: Final = "model.safetensors"
# Bytes of a value, by dtype; those of other widths are known by their offsets alone.
_DTYPE_BYTES: Final = {
    "BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8,
    "I64": 8, "F64": 8,
}  # fmt: skip
_SHARD_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors")
_FETCH_AGAIN: Final = "The file is damaged or cut short: fetch it again"


def read_safetensors(path: str | os.PathLike[str], *, ignored: str = NOTHING) -> dict[str, Tensor]:
    """Map a .safetensors file, or all shards of a checkpoint directory; tensor bytes are not touched.

    ignored: regular expression of names that are left out, whatever their dtype (masks that a checkpoint stores beside
    its weights). Returns name -> Tensor (f32, f16, bf16), its data a read-only view into the map; a scalar has shape
    (1,). Raises ModelError, naming file and tensor, when a file is missing, damaged, lies about itself, or holds other
    dtypes.
    """
    path = Path(path)
    if not os.path.isdir(path):
        return _read_file(path, ignored)
    single, index = path / SINGLE_NAME, path / INDEX_NAME
    if single.exists():
        return _read_file(single, ignored)
    if index.exists():
        return _read_shards(index, ignored)
    found = sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return _read_file(found[0], ignored)
    if found:
        raise ModelError(
            f"{path}: holds {len(found)} .safetensors files and no {INDEX_NAME} that joins them. Fetch the index too."
        )
    if any(path.glob("*.bin")) or any(path.glob("*.pt*")):
        raise ModelError(
            f"{path}: holds no .safetensors file, only PyTorch pickles, which can run code when they are read and are "
            "therefore refused. Save the model again with save_pretrained(…, safe_serialization=True)."
        )
    raise ModelError(f"{path}: holds no .safetensors file. Give a checkpoint directory or the path of a model file.")


@dataclass(frozen=True, slots=True)
class _Entry:
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def _open_map(path: Path) -> mmap:
    try:
        if not S_ISREG(path.stat().st_mode):
            raise ModelError(f"{path}: is not a file. Give the path of a .safetensors file.")
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise ModelError(f"{path}: the file is empty. Fetch it again.")
            return mmap(file.fileno(), 0, access=ACCESS_READ)
    except FileNotFoundError:
        raise ModelError(f"{path}: there is no such file. Check the path, or fetch the missing file.") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read: {error}. Check the path and the permissions.") from error


def _read_file(path: Path, ignored: str) -> dict[str, Tensor]:
    buffer = _open_map(path)
    header_end = _find_header_end(path, buffer)
    scanner = JsonScanner(buffer, f"{path}: header", 8, header_end)
    entries: list[_Entry] = []
    for name in scanner.members():
        if name == "__metadata__":
            scanner.skip_value()
            continue
        if len(entries) >= MAX_TENSORS:
            scanner.refuse(f"more than {MAX_TENSORS:,} tensors")
        entries.append(_read_entry(scanner, name))
    scanner.finish()
    needed = [entry for entry in entries if not re.fullmatch(ignored, entry.name)]
    _check_dtypes(path, needed)
    _check_places(path, entries, len(buffer) - header_end)
    file_bytes = np.frombuffer(buffer, np.uint8)
    tensors: dict[str, Tensor] = {}
    for entry in needed:
        data = file_bytes[header_end + entry.begin : header_end + entry.end]
        tensors[entry.name] = Tensor(entry.dtype.lower(), entry.shape, data.reshape(math.prod(entry.shape[:-1]), -1))
    return tensors


def _find_header_end(path: Path, buffer: mmap) -> int:
    if len(buffer) < 10:
        raise ModelError(f"{path}: is {len(buffer)} bytes long, too short for a header. {_FETCH_AGAIN}.")
    num_bytes = int.from_bytes(buffer[:8], "little")
    if num_bytes > MAX_HEADER_BYTES:
        raise ModelError(
            f"{path}: claims a header of {num_bytes:,} bytes; at most {MAX_HEADER_BYTES:,} are allowed. It is damaged "
            "or no safetensors file: fetch it again."
        )
    if num_bytes > len(buffer) - 8:
        raise ModelError(f"{path}: its header of {num_bytes:,} bytes is longer than the file. {_FETCH_AGAIN}.")
    return 8 + num_bytes


def _read_entry(scanner: JsonScanner, name: str) -> _Entry:
    dtype: str | None = None
    shape: list[int] | None = None
    offsets: list[int] | None = None
    for key in scanner.members():
        if key == "dtype":
            dtype = scanner.string()
        elif key == "shape":
            shape = scanner.whole_numbers(MAX_DIMS)
        elif key == "data_offsets":
            offsets = scanner.whole_numbers(2)
        else:
            scanner.refuse(f"tensor {_shown(name)} has the unknown field {_shown(key)}")
    if dtype is None or shape is None or offsets is None or len(offsets) != 2:
        scanner.refuse(f"tensor {_shown(name)} lacks dtype, shape or two data_offsets")
    return _Entry(name, dtype, tuple(shape) or (1,), offsets[0], offsets[1])


def _shown(name: str) -> str:
    return repr(name if len(name) <= 80 else name[:77] + "...")


def _check_dtypes(path: Path, entries: list[_Entry]) -> None:
    wrong = [entry for entry in entries if entry.dtype not in SUPPORTED_DTYPES]
    if wrong:
        counts = Counter(entry.dtype[:16] for entry in wrong)
        listed = ", ".join(f"{dtype} ({count} tensors)" for dtype, count in counts.most_common(8))
        raise ModelError(
            f"{path}: tensors of dtypes that are not supported: {listed}, the first {_shown(wrong[0].name)}. "
            f"Supported: {', '.join(SUPPORTED_DTYPES)}. Save the model in one of these, "
            "without buffers that are not weights."
        )


def _check_places(path: Path, entries: list[_Entry], num_data_bytes: int) -> None:
    """Refuse empty tensors, sizes that disagree with shapes, overlaps, holes, and data outside the file."""
    for entry in entries:
        num_bytes = math.prod(entry.shape) * _DTYPE_BYTES.get(entry.dtype, 0)
        if entry.dtype not in _DTYPE_BYTES:
            num_bytes = max(0, entry.end - entry.begin)
        if num_bytes == 0:
            raise ModelError(f"{path}: tensor {_shown(entry.name)}: shape {entry.shape} is empty. {_FETCH_AGAIN}.")
        if entry.end - entry.begin != num_bytes:
            raise ModelError(
                f"{path}: tensor {_shown(entry.name)}: shape {entry.shape} of {entry.dtype} takes {num_bytes:,} bytes, "
                f"but data_offsets span {entry.end - entry.begin:,}. {_FETCH_AGAIN}."
            )
        if entry.end > num_data_bytes:
            raise ModelError(
                f"{path}: tensor {_shown(entry.name)}: ends at byte {entry.end:,} of {num_data_bytes:,} bytes of data. "
                f"{_FETCH_AGAIN}."
            )
    ordered = sorted(entries, key=lambda entry: entry.begin)
    for before, after in pairwise(ordered):
        if before.end != after.begin:
            kind = "overlap" if after.begin < before.end else "have a hole between them"
            raise ModelError(f"{path}: tensors {_shown(before.name)} and {_shown(after.name)} {kind}. {_FETCH_AGAIN}.")
    covered = ordered[-1].end if ordered else 0
    if (ordered and ordered[0].begin != 0) or covered != num_data_bytes:
        raise ModelError(
            f"{path}: the tensors do not cover the {num_data_bytes:,} bytes of data: bytes belong to none. "
            f"{_FETCH_AGAIN}."
        )


def _read_shards(index: Path, ignored: str) -> dict[str, Tensor]:
    shard_of = _read_weight_map(index)
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(shard_of.values())):
        for name, tensor in _read_file(index.parent / shard, ignored).items():
            if shard_of.get(name) != shard:
                raise ModelError(
                    f"{index.parent / shard}: tensor {_shown(name)} is not in this shard by {index.name}. The files do "
                    "not belong together: fetch all of them again."
                )
            tensors[name] = tensor
    missing = sorted(name for name in set(shard_of) - set(tensors) if not re.fullmatch(ignored, name))
    if missing:
        raise ModelError(
            f"{index}: {len(missing)} tensors are in no shard, the first {_shown(missing[0])}. The files do not belong "
            "together: fetch all of them again."
        )
    return tensors


def _read_weight_map(index: Path) -> dict[str, str]:
    buffer = _open_map(index)
    if len(buffer) > MAX_INDEX_BYTES:
        raise ModelError(
            f"{index}: is {len(buffer):,} bytes long; at most {MAX_INDEX_BYTES:,} are accepted. Fetch it again."
        )
    scanner = JsonScanner(buffer, str(index), 0, len(buffer))
    shard_of: dict[str, str] = {}
    shards: set[str] = set()
    for key in scanner.members():
        if key != "weight_map":
            scanner.skip_value()
            continue
        for name in scanner.members():
            shard = scanner.string()
            if not _SHARD_NAME.fullmatch(shard):
                scanner.refuse(f"{_shown(shard)} is no plain name of a .safetensors file in this directory")
            shards.add(shard)
            if len(shard_of) >= MAX_TENSORS or len(shards) > MAX_SHARDS:
                scanner.refuse(f"more than {MAX_TENSORS:,} tensors or {MAX_SHARDS:,} shards")
            shard_of[name] = shard
    scanner.finish()
    if not shard_of:
        scanner.refuse("no weight_map that names the shards")
    return shard_of
