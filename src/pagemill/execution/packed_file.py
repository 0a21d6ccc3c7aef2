"""The file that packed weights are kept in. Owns its format: the checks of a hostile header, the memory map, the atomic
publication. Does not know which weights are wanted; that is `packed.py`.

    offset  bytes
    0       8      "PMPACKED"
    8       4      FILE_VERSION, u32 little endian, as all numbers here
    12      4      bytes of the header
    16      32     SHA-256 of the header
    48      ...    the header, JSON in UTF-8, then zeros up to a multiple of 64
    ...     ...    the payload: packed matrices in the order of the header, each at a multiple of 64, zeros in between

The header's fields are those of `PackedHeader`; offsets count from the payload's begin. The header also says which
inode and time the file was published with: a file that still has both is the one that was written and flushed; any
other, a copy or a changed one, is to be hashed before its weights are used.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pagemill.base.errors import IntegrityError
from pagemill.kernels.native import PackedMatrix

FILE_VERSION: Final = 1
ALIGNMENT: Final = 64
MAX_HEADER_BYTES: Final = 1 << 25

_MAGIC: Final = b"PMPACKED"
_PREFIX: Final = struct.Struct("<8sII32s")
_ABANDONED_S: Final = 3600.0
_EARLIEST_NS: Final = -(1 << 63)  # files may be dated before 1970
_BUFFER_BYTES: Final = 32 << 20


@dataclass(frozen=True, slots=True)
class FileStamp:
    """One file as the file system knows it. name: relative to the checkpoint. Times in nanoseconds.

    The time of change (ctime) cannot be set by programs, so that equal stamps mean equal bytes.
    """

    name: str
    num_bytes: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path, name: str) -> FileStamp:
        """The stamp of a file now. Raises OSError."""
        status = path.stat()
        return cls(name, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


@dataclass(frozen=True, slots=True)
class PackedKey:
    """Which weights these are. checkpoint: digest of the checkpoint's content. weights: the format asked for, as in
    `EngineConfig.weights`. packing, conversion: versions of the layout and of the arithmetic that made the weights."""

    checkpoint: str
    weights: str
    packing: int
    conversion: int


@dataclass(frozen=True, slots=True)
class PackedEntry:
    """Where a matrix [n, k] stands in the payload."""

    handle: str
    layout: str
    n: int
    k: int
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class PackedHeader:
    """What a file says of itself. sources: stamps of the checkpoint's files whose content was hashed into the key.

    inode, mtime_ns: of this file when it was published. payload_sha256: hex.
    """

    key: PackedKey
    sources: tuple[FileStamp, ...]
    inode: int
    mtime_ns: int
    payload_sha256: str
    entries: tuple[PackedEntry, ...]


@dataclass(frozen=True, slots=True, eq=False)
class PackedFile:
    """An open file, memory-mapped; the map lasts as long as any view of it. The file must not be cut while it is open.

    payload: u8, read-only. as_published: inode and time are those that it was published with. owner: user id.
    """

    path: Path
    header: PackedHeader
    payload: NDArray[np.uint8]
    as_published: bool
    owner: int

    def matrix(self, entry: PackedEntry) -> PackedMatrix:
        """A view of one matrix."""
        data = self.payload[entry.offset : entry.offset + entry.num_bytes]
        return PackedMatrix(entry.layout, entry.n, entry.k, data)

    def check_payload(self) -> None:
        """Hash the payload. Raises IntegrityError where it is not what was written."""
        if hashlib.sha256(self.payload.data).hexdigest() != self.header.payload_sha256:
            raise IntegrityError("its content is not what was written")


def open_packed(path: Path) -> PackedFile:
    """Map a file and check all of its header and its size. Raises FileNotFoundError, other OSError where it cannot be
    read, IntegrityError where it is damaged, cut short, or no such file; messages do not name the path."""
    # Opening a pipe for reading would wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        if not S_ISREG(status.st_mode):
            raise IntegrityError("it is not a regular file")
        mapped = _map(descriptor)
    except ValueError:
        raise IntegrityError("it is empty") from None
    finally:
        os.close(descriptor)
    if len(mapped) < _PREFIX.size:
        raise IntegrityError(f"it is cut short: {len(mapped)} bytes")
    magic, version, header_bytes, digest = _PREFIX.unpack(mapped[: _PREFIX.size].tobytes())
    if magic != _MAGIC:
        raise IntegrityError("it is not a file of packed weights")
    if version != FILE_VERSION:
        raise IntegrityError(f"it has version {version} of the file format, not {FILE_VERSION}")
    if header_bytes > min(MAX_HEADER_BYTES, len(mapped) - _PREFIX.size):
        raise IntegrityError(f"its header cannot have {header_bytes:,} bytes")
    text = mapped[_PREFIX.size : _PREFIX.size + header_bytes].tobytes()
    if hashlib.sha256(text).digest() != digest:
        raise IntegrityError("its header is damaged")
    header = _parse_header(text)
    payload = mapped[_aligned(_PREFIX.size + header_bytes) :]
    _check_places(header.entries, len(payload))
    same = (status.st_ino, status.st_mtime_ns) == (header.inode, header.mtime_ns)
    return PackedFile(path, header, payload, same, status.st_uid)


def _map(descriptor: int) -> NDArray[np.uint8]:
    """The whole file, to be read. In huge pages, where the system's cache of files has them (Linux 5.18 with XFS, 6.16
    with ext4): a step reads all weights, and of small pages that takes 33,000 translations of addresses for 135 MB.
    Raises ValueError for an empty file."""
    mapped = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):
            mapped.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(mapped, np.uint8)


def write_packed(
    path: Path, key: PackedKey, sources: tuple[FileStamp, ...], matrices: Mapping[str, PackedMatrix]
) -> None:
    """Publish matrices under `path`, whole or not at all, also when several processes do so at once: a temporary file
    beside it, flushed, then renamed. Raises OSError, with nothing left behind."""
    _remove_abandoned(path)
    entries, digest = _lay_out(matrices)
    partial = path.parent / f".{path.name}.{os.urandom(8).hex()}.partial"
    try:
        # What is written in large pieces the system's cache of files holds in huge pages (`_map`).
        with partial.open("xb", buffering=_BUFFER_BYTES) as file:
            now_ns = time.time_ns()
            os.utime(file.fileno(), ns=(now_ns, now_ns))
            stamp = os.fstat(file.fileno())  # as coarse as the file system keeps it
            mtime_ns = stamp.st_mtime_ns
            text = _header_text(PackedHeader(key, sources, stamp.st_ino, mtime_ns, digest, entries))
            file.write(_PREFIX.pack(_MAGIC, FILE_VERSION, len(text), hashlib.sha256(text).digest()))
            file.write(text)
            file.write(_padding(_PREFIX.size + len(text)))
            for entry in entries:
                file.write(matrices[entry.handle].data.data)
                file.write(_padding(entry.num_bytes))
            file.flush()
            os.utime(file.fileno(), ns=(mtime_ns, mtime_ns))
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
    _flush_directory(path.parent)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _padding(num_bytes: int) -> bytes:
    return bytes(_aligned(num_bytes) - num_bytes)


def _lay_out(matrices: Mapping[str, PackedMatrix]) -> tuple[tuple[PackedEntry, ...], str]:
    """Places of matrices one after the other, and the digest of the payload."""
    entries: list[PackedEntry] = []
    offset, state = 0, hashlib.sha256()
    for handle, matrix in matrices.items():
        num_bytes = matrix.data.nbytes
        entries.append(PackedEntry(handle, matrix.layout, matrix.n, matrix.k, offset, num_bytes))
        state.update(matrix.data.data)
        state.update(_padding(num_bytes))
        offset += _aligned(num_bytes)
    return tuple(entries), state.hexdigest()


def _header_text(header: PackedHeader) -> bytes:
    table = {
        "key": [header.key.checkpoint, header.key.weights, header.key.packing, header.key.conversion],
        "sources": [[s.name, s.num_bytes, s.mtime_ns, s.ctime_ns, s.inode] for s in header.sources],
        "published": [header.inode, header.mtime_ns, header.payload_sha256],
        "matrices": [[e.handle, e.layout, e.n, e.k, e.offset, e.num_bytes] for e in header.entries],
    }
    return json.dumps(table, separators=(",", ":")).encode()


def _parse_header(text: bytes) -> PackedHeader:
    """A header whose fields have the right types, counts at least 0. Their values are checked by who uses them."""
    try:
        table = json.loads(text)
        inode, mtime_ns, digest = _row(table["published"], (int, int, str))
        return PackedHeader(
            key=PackedKey(*_row(table["key"], (str, str, int, int))),
            sources=tuple(FileStamp(*_row(row, (str, int, int, int, int), _EARLIEST_NS)) for row in table["sources"]),
            inode=inode,
            mtime_ns=mtime_ns,
            payload_sha256=digest,
            entries=tuple(PackedEntry(*_row(row, (str, str, int, int, int, int))) for row in table["matrices"]),
        )
    except (ValueError, TypeError, KeyError, RecursionError):
        raise IntegrityError("its header does not say what it should") from None


def _row(values: list[Any], kinds: tuple[type, ...], lowest: int = 0) -> list[Any]:
    if not isinstance(values, list) or [type(value) for value in values] != list(kinds):
        raise TypeError
    if any(isinstance(value, int) and not lowest <= value < 1 << 64 for value in values):
        raise ValueError
    return values


def _check_places(entries: tuple[PackedEntry, ...], payload_bytes: int) -> None:
    """Refuse a header unless its matrices fill the payload, one after the other, with nothing over."""
    end = 0
    for entry in entries:
        if entry.offset != end:
            raise IntegrityError("its header places matrices where none can be")
        end = _aligned(end + entry.num_bytes)
    if end != payload_bytes:
        raise IntegrityError(f"it is cut short or too long: {payload_bytes:,} bytes of weights, not {end:,}")
    if len({entry.handle for entry in entries}) != len(entries):
        raise IntegrityError("its header names a matrix twice")


def _remove_abandoned(path: Path) -> None:
    """Delete what processes that were killed while writing have left."""
    with suppress(OSError):
        for found in path.parent.iterdir():
            if found.name.startswith(f".{path.name}.") and found.name.endswith(".partial"):
                with suppress(OSError):
                    if time.time() - found.stat().st_mtime > _ABANDONED_S:
                        found.unlink()


def _flush_directory(directory: Path) -> None:
    with suppress(OSError):  # some network file systems refuse it
        descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
