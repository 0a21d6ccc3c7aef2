"""Packed weights kept from one start to the next. Owns where they are looked for, when they may be used, and when they
are written; the file's format is `packed_file.py`, packing itself `kernels/native.py`.

A file is used if it holds exactly the wanted matrices (names, formats, shapes, lengths), was made by the same versions
from a checkpoint of the same content, and is what was written. The content is a SHA-256 of the whole checkpoint. It is
not computed anew while the checkpoint's files have the stamps that they were hashed with. As a last check some rows of
each matrix are packed and compared. Anything else is packed again, with a notice; nothing here ends a start.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final, Protocol
from zlib import crc32

import numpy as np

from pagemill.base.errors import ConfigError, IntegrityError, ModelError
from pagemill.base.units import format_bytes
from pagemill.execution.packed_file import FileStamp, PackedFile, PackedKey, open_packed, write_packed
from pagemill.kernels.native import (
    PACKING_VERSION,
    PANEL,
    PackedMatrix,
    layout_for,
    pack_matrix,
    pack_over,
    packed_bytes,
)
from pagemill.kernels.tensors import Tensor
from pagemill.models.checkpoint import Checkpoint, open_checkpoint
from pagemill.models.store import free_bytes, models_dir

_LOG: Final = logging.getLogger(__name__)
_ABSENT: Final = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)
# Longer than the tick of any file system's clock: a file that changed just now could change again with the same stamp.
_SETTLED_S: Final = 0.05
_ROWS_TO_CHECK: Final = 4


class MatrixWeights(Protocol):
    """A checkpoint's matrices in the formats that are packed."""

    def __getitem__(self, handle: str, /) -> Tensor: ...

    def format_of(self, handle: str, /) -> str:
        """The format of a matrix, without converting it."""
        ...

    def rows_of(self, rows: Mapping[str, slice], /) -> dict[str, Tensor]:
        """Some rows of several matrices, converted."""
        ...


class PackedWeights:
    """Packed matrices of one checkpoint: from a file where there is a good one, else packed as they are asked for.

    Mutated by `matrix`, which keeps what it packed until `keep`. checkpoint: a file or directory on disk; one made in
    memory is packed and not kept. handles: all matrices that will be asked for. weight_format, conversion_version:
    what `weights` converts to and which version of that arithmetic. target: whose layouts are wanted. cache: "auto"
    (beside the checkpoint, else in `$PAGEMILL_HOME/packed`), "off", or a directory. Raises ConfigError where `cache`
    names something else.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        weights: MatrixWeights,
        handles: Iterable[str],
        *,
        weight_format: str,
        target: str,
        conversion_version: int,
        cache: str,
    ) -> None:
        self._checkpoint = checkpoint
        self._weights = weights
        self._handles = dict.fromkeys(handles)
        self._target = target
        formats = {weights.format_of(handle) for handle in self._handles}
        tiles = any(layout_for(each, target) != each for each in formats)
        name = f"{weight_format}.tiles" if tiles else weight_format
        self._key = PackedKey("", name, PACKING_VERSION, conversion_version)
        self._packed: dict[str, PackedMatrix] = {}
        self._candidates = _candidates(checkpoint, name, cache)
        self._stamps: tuple[FileStamp, ...] = ()
        self._to_write = False
        self.file: PackedFile | None = None
        if self._candidates:
            try:
                self._stamps = _stamps(checkpoint.path)
                self.file = self._find()
            except OSError as error:
                self._to_write = False
                _LOG.warning(f"{checkpoint.path}: packed weights are not kept: {error}")

    @property
    def found(self) -> frozenset[str]:
        """Handles of the matrices that come from a file: made from a checkpoint of this content, whose values were
        checked then."""
        return frozenset() if self.file is None else frozenset(self._handles)

    def matrix(self, handle: str) -> PackedMatrix:
        """One matrix, packed: a view of the file, or packed now."""
        if handle not in self._packed:
            self._packed[handle] = pack_matrix(self._weights[handle], self._target)
        return self._packed[handle]

    @property
    def source_digest(self) -> str:
        """Digest of the checkpoint's content (`Checkpoint.digest`): as the file says, which was checked, else computed,
        which reads all weights once; of weights made in memory a random number."""
        if self._checkpoint.source_format == "random":
            return os.urandom(32).hex()
        if self.file is not None:
            return self.file.header.key.checkpoint
        return self._checkpoint.digest

    def keep(self) -> None:
        """Write what was packed for the next start, once all matrices were asked for. Where that cannot be, a notice
        says why."""
        if self._to_write:
            num_bytes = sum(matrix.data.nbytes for matrix in self._packed.values())
            obstacles = {path: _obstacle(path.parent, num_bytes) for path in self._candidates}
            open_to_us = [path for path, obstacle in obstacles.items() if obstacle is None]
            key = self._key_of_settled_content() if open_to_us else self._key
            if key is not None:
                reasons = [f"{path.parent}: {obstacle}" for path, obstacle in obstacles.items() if obstacle is not None]
                self._write(key, open_to_us, reasons)
        self._packed.clear()

    def _find(self) -> PackedFile | None:
        """The first good file, those first that need no hashing. Raises OSError where the checkpoint cannot be read."""
        rejected: dict[Path, str] = {}
        files: list[PackedFile] = []
        for path in self._candidates:
            try:
                files.append(self._open(path))
            except OSError as error:
                if error.errno not in _ABSENT:
                    rejected[path] = f"they cannot be read: {error.strerror}"
            except IntegrityError as error:
                rejected[path] = str(error)
        found = None
        for file in sorted(files, key=self._needs_hashing):
            try:
                self._verify(file)
            except IntegrityError as error:
                rejected[file.path] = str(error)
                continue
            found = file
            break
        instead = "packing them again" if found is None else "other ones are used; delete these"
        for path, reason in rejected.items():
            _LOG.warning(f"{path}: packed weights are not used, {reason}; {instead}")
        self._to_write = found is None or self._needs_hashing(found)
        if self._to_write:
            self._stamps = _settled_stamps(self._checkpoint.path)
        if found is not None:
            self._packed = {entry.handle: found.matrix(entry) for entry in found.header.entries}
        return found

    def _open(self, path: Path) -> PackedFile:
        """A file that holds the wanted matrices by its own account. Raises OSError, IntegrityError."""
        file = open_packed(path)
        if file.owner not in (os.geteuid(), 0, self._checkpoint.path.stat().st_uid):
            raise IntegrityError("they belong to another user")
        if replace(file.header.key, checkpoint="") != self._key:
            raise IntegrityError("they were made by another version or in another format")
        self._check_entries(file)
        return file

    def _needs_hashing(self, file: PackedFile) -> bool:
        """Whether it is a copy, was changed, or was made from files that have been replaced or moved since."""
        return not file.as_published or file.header.sources != self._stamps

    def _verify(self, file: PackedFile) -> None:
        """Raise IntegrityError unless the file's account is true."""
        if file.header.sources != self._stamps and file.header.key.checkpoint != self._checkpoint.digest:
            raise IntegrityError("they were made from other weights")
        if not file.as_published:
            file.check_payload()
        self._check_rows(file)

    def _check_entries(self, file: PackedFile) -> None:
        entries = file.header.entries
        if {entry.handle for entry in entries} != set(self._handles):
            raise IntegrityError("they are not this model's matrices")
        for entry in entries:
            n, k = self._checkpoint.tensors[entry.handle].shape
            layout = layout_for(self._weights.format_of(entry.handle), self._target)
            if (entry.layout, entry.n, entry.k) != (layout, n, k):
                raise IntegrityError(f"{entry.handle} has another format or shape")
            if entry.num_bytes != packed_bytes(layout, n, k):
                raise IntegrityError(f"{entry.handle} has another length")

    def _check_rows(self, file: PackedFile) -> None:
        """Pack some rows of each matrix and compare: catches a layout or a conversion that changed unannounced."""
        entries = {entry.handle: entry for entry in file.header.entries}
        rows = self._rows_to_check(file)
        for handle, tensor in self._weights.rows_of(rows).items():
            entry, (panel, column) = entries[handle], divmod(rows[handle].start, PANEL)
            num_bytes = packed_bytes(entry.layout, PANEL, entry.k)
            found = file.matrix(entry).data[panel * num_bytes : (panel + 1) * num_bytes]
            is_whole = tensor.num_rows == min(PANEL, entry.n - panel * PANEL)
            expected = np.zeros_like(found) if is_whole else found.copy()
            pack_over(tensor, entry.layout, column, expected)
            if not np.array_equal(found, expected):
                raise IntegrityError(f"{handle} is not what packing gives")

    def _rows_to_check(self, file: PackedFile) -> dict[str, slice]:
        """Of each matrix a few rows within a panel, spread over all of its columns from one matrix to the next; of the
        first one of each kind the whole panel."""
        rows: dict[str, slice] = {}
        kinds: set[tuple[str, str, int]] = set()
        for entry in file.header.entries:
            chosen = crc32(entry.handle.encode())
            begin = chosen % -(-entry.n // PANEL) * PANEL
            end = min(entry.n, begin + PANEL)
            kind = self._checkpoint.tensors[entry.handle].format, entry.layout, entry.k
            if kind in kinds:
                begin += (chosen >> 16) % max(1, end - begin - _ROWS_TO_CHECK + 1)
                end = min(end, begin + _ROWS_TO_CHECK)
            kinds.add(kind)
            rows[entry.handle] = slice(begin, end)
        return rows

    def _key_of_settled_content(self) -> PackedKey | None:
        """The key of what was packed, None where the checkpoint's files were changed meanwhile: the stamps are older
        than the packing, and what is on disk under them now has the digest of what was packed."""
        digest = self._checkpoint.digest
        try:
            unchanged = open_checkpoint(self._checkpoint.path, check_values=False).digest == digest
            if unchanged and _stamps(self._checkpoint.path) == self._stamps:
                return replace(self._key, checkpoint=digest)
        except (OSError, ModelError):
            pass
        _LOG.warning(f"{self._checkpoint.path}: was changed while it was loaded; packed weights are not kept")
        return None

    def _write(self, key: PackedKey, candidates: Iterable[Path], reasons: list[str]) -> None:
        for path in candidates:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_packed(path, key, self._stamps, self._packed)
                return
            except OSError as error:
                reasons.append(f"{path.parent}: {error.strerror or error}")
        if self.file is None:
            _LOG.warning(
                f"packed weights cannot be kept ({'; '.join(reasons)}), so that each start packs them again; set "
                "packed_weights_cache to a directory that can be written, or to off"
            )


def _beside(checkpoint: Checkpoint) -> Path:
    return checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent


def _candidates(checkpoint: Checkpoint, name: str, cache: str) -> tuple[Path, ...]:
    """Files to look for, in order; name: of the weights. None for weights that no file holds."""
    directory = None if cache in ("auto", "off") else Path(cache).expanduser()
    if directory is not None and directory.exists() and not directory.is_dir():
        raise ConfigError(f"packed_weights_cache is {cache!r}, which is no directory; give a directory, auto or off")
    path = checkpoint.path
    if cache == "off" or checkpoint.source_format == "random" or not path.exists():
        return ()
    beside = _beside(checkpoint) / f"{'weights' if path.is_dir() else path.name}.{name}.packed"
    place = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16]
    elsewhere = f"{path.stem[:40]}-{place}.{name}.packed"
    if directory is not None:
        return (directory / elsewhere,)
    return (beside, models_dir().parent / "packed" / elsewhere)


def _obstacle(directory: Path, num_bytes: int) -> str | None:
    """Why a directory, which need not exist yet, cannot take a file of that size; None where nothing is seen."""
    existing = next((each for each in (directory, *directory.parents) if each.exists()), directory)
    if not os.access(existing, os.W_OK | os.X_OK):
        return "cannot be written"
    try:
        room_bytes = free_bytes(existing)
    except OSError as error:
        return error.strerror
    if room_bytes > num_bytes:
        return None
    return f"{format_bytes(num_bytes)} are needed and {format_bytes(room_bytes)} are free"


def _stamps(path: Path) -> tuple[FileStamp, ...]:
    """Stamps of every file that the weights of a checkpoint come from. Raises OSError."""
    if not path.is_dir():
        return (FileStamp.of(path, path.name),)
    names = sorted(
        each.name
        for each in path.iterdir()
        if each.name == "config.json" or each.name.endswith((".safetensors", ".safetensors.index.json"))
    )
    return tuple(FileStamp.of(path / name, name) for name in names)


def _settled_stamps(path: Path) -> tuple[FileStamp, ...]:
    """Stamps that no later change can leave as they are; waits a moment where a file changed just now."""
    stamps = _stamps(path)
    age_s = (time.time_ns() - max(stamp.ctime_ns for stamp in stamps)) / 1e9
    if age_s >= _SETTLED_S:
        return stamps
    time.sleep(_SETTLED_S)
    return _stamps(path)
