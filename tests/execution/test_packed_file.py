"""The file of packed weights: what is written is read back, and no damaged, cut or hostile file is taken for one."""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import resource
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pagemill.base.errors import IntegrityError
from pagemill.execution import packed_file
from pagemill.execution.packed_file import ALIGNMENT, FileStamp, PackedKey, open_packed, write_packed
from pagemill.kernels.native import PackedMatrix

KEY = PackedKey("0" * 64, "auto", 1, 1)
STAMPS = (FileStamp("model.gguf", 1000, 1, 2, 3),)
PREFIX_BYTES = 48


def matrices() -> dict[str, PackedMatrix]:
    numbers = np.random.RandomState(0)
    return {
        handle: PackedMatrix("f16", n, k, numbers.randint(0, 256, num_bytes).astype(np.uint8))
        for handle, n, k, num_bytes in (("embed", 40, 3, 400), ("up", 32, 2, 128), ("down", 64, 1, 65))
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_packed(tmp_path / "m.packed", KEY, STAMPS, matrices())
    return tmp_path / "m.packed"


def header_of(data: bytes) -> Any:
    return json.loads(data[PREFIX_BYTES : PREFIX_BYTES + struct.unpack("<I", data[12:16])[0]])


def with_header(data: bytes, text: bytes) -> bytes:
    """The file with another header, its length and digest put right."""
    old_bytes = struct.unpack("<I", data[12:16])[0]
    payload = data[-(-(PREFIX_BYTES + old_bytes) // 64) * 64 :]
    head = data[:12] + struct.pack("<I", len(text)) + hashlib.sha256(text).digest() + text
    return head + bytes(-len(head) % 64) + payload


def test_what_was_written_is_read_back_aligned_and_mapped(path: Path) -> None:
    file = open_packed(path)
    assert (file.header.key, file.header.sources, file.as_published) == (KEY, STAMPS, True)
    file.check_payload()
    for entry, (handle, matrix) in zip(file.header.entries, matrices().items(), strict=True):
        found = file.matrix(entry)
        assert (entry.handle, found.layout, found.n, found.k) == (handle, matrix.layout, matrix.n, matrix.k)
        np.testing.assert_array_equal(found.data, matrix.data)
        assert found.data.ctypes.data % ALIGNMENT == 0
        assert not found.data.flags.writeable
    maps = Path("/proc/self/maps").read_text().splitlines()
    assert any(" r--s " in line and line.endswith(str(path)) for line in maps)


def huge_bytes_of(path: Path) -> int:
    """Bytes of the file that this process sees in huge pages."""
    found, is_of_it = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if " r--s " in line or "-" in line.partition(" ")[0]:
            is_of_it = line.endswith(str(path))
        elif is_of_it and line.startswith("FilePmdMapped:"):
            found += int(line.split()[1]) << 10
    return found


def has_huge_files(directory: Path) -> bool:
    """Whether a file that was read with the advice is in huge pages there."""
    path = directory / "probe"
    path.write_bytes(bytes(8 << 20))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            mapped.madvise(mmap.MADV_HUGEPAGE)
            assert sum(mapped[::4096]) == 0
            return huge_bytes_of(path) > 0


def test_weights_are_seen_in_huge_pages_where_the_system_has_them_for_files(tmp_path: Path) -> None:
    if not has_huge_files(tmp_path):
        pytest.skip("the file system of the temporary directory has no huge pages (ext4 of Linux 6.16 has)")
    piece = np.ones(100_000, np.uint8)
    weights = {f"up{index}": PackedMatrix("f16", 32, 2, piece) for index in range(160)}
    path = tmp_path / "large.packed"
    write_packed(path, KEY, STAMPS, weights)
    file = open_packed(path)
    assert int(file.payload.sum()) == 16_000_000
    assert huge_bytes_of(path) >= 12_000_000


def test_a_system_that_takes_no_advice_is_no_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 12345)
    open_packed(path).check_payload()
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE")
    open_packed(path).check_payload()


def test_nothing_but_the_file_is_left_in_the_directory(path: Path) -> None:
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_an_absent_file_is_told_from_a_damaged_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_packed(tmp_path / "m.packed")


@pytest.mark.parametrize("where", [0, 3, 8, 9, 12, 14, 16, 47, 48, 60, 200])
def test_a_changed_byte_before_the_payload_is_found(path: Path, where: int) -> None:
    data = bytearray(path.read_bytes())
    data[where] ^= 0x41
    path.write_bytes(data)
    with pytest.raises(IntegrityError):
        open_packed(path)


@pytest.mark.parametrize("where", [-1, -64, -65, -129, -576])
def test_a_changed_byte_of_a_matrix_or_between_two_fails_the_digest(path: Path, where: int) -> None:
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(data)
    file = open_packed(path)
    assert not file.as_published
    with pytest.raises(IntegrityError, match="not what was written"):
        file.check_payload()


def test_a_copy_is_not_as_published_and_passes_the_digest(path: Path) -> None:
    copy = path.with_name("copy.packed")
    copy.write_bytes(path.read_bytes())
    file = open_packed(copy)
    assert not file.as_published
    file.check_payload()


@pytest.mark.parametrize("num_bytes", [0, 1, 47, 48, 49, 100, -64, -1])
def test_a_file_cut_short_is_found(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(IntegrityError):
        open_packed(path)


@pytest.mark.parametrize("extra", [1, 64])
def test_a_file_with_more_at_the_end_is_found(path: Path, extra: int) -> None:
    path.write_bytes(path.read_bytes() + bytes(extra))
    with pytest.raises(IntegrityError, match="too long"):
        open_packed(path)


@pytest.mark.parametrize("begin", [b"GGUF", b"{}", b"PMPACKEE"])
def test_another_kind_of_file_is_found(tmp_path: Path, begin: bytes) -> None:
    (tmp_path / "m.packed").write_bytes(begin + np.random.RandomState(0).bytes(4096))
    with pytest.raises(IntegrityError, match="not a file of packed weights"):
        open_packed(tmp_path / "m.packed")


def test_another_version_of_the_format_is_named(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:8] + struct.pack("<I", 7) + data[12:])
    with pytest.raises(IntegrityError, match="version 7 of the file format, not 1"):
        open_packed(path)


@pytest.mark.parametrize("num_bytes", [2**32 - 1, packed_file.MAX_HEADER_BYTES + 1, 100_000])
def test_a_header_longer_than_the_file_is_not_read(path: Path, num_bytes: int) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:12] + struct.pack("<I", num_bytes) + data[16:])
    with pytest.raises(IntegrityError, match="header cannot have"):
        open_packed(path)


def _edit(*place: Any) -> Callable[[Any], Any]:
    """A header with one value replaced: keys and indices, then the value."""
    *keys, last, value = place

    def edit(header: Any) -> Any:
        target = header
        for key in keys:
            target = target[key]
        target[last] = value
        return header

    return edit


HOSTILE: dict[str, Callable[[Any], Any]] = {
    "offset beyond the file": _edit("matrices", 2, 4, 1 << 40),
    "offset that wraps": _edit("matrices", 1, 4, (1 << 64) - 64),
    "offset below zero": _edit("matrices", 1, 4, -64),
    "overlap": _edit("matrices", 1, 4, 0),
    "unaligned offset": _edit("matrices", 1, 4, 401),
    "length beyond the file": _edit("matrices", 2, 5, 1 << 63),
    "length too small": _edit("matrices", 0, 5, 64),
    "length below zero": _edit("matrices", 2, 5, -1),
    "length no integer": _edit("matrices", 2, 5, 65.0),
    "length true": _edit("matrices", 2, 5, True),
    "length of 2^70": _edit("matrices", 2, 5, 1 << 70),
    "the same handle twice": _edit("matrices", 1, 0, "embed"),
    "handle no text": _edit("matrices", 1, 0, None),
    "row too short": _edit("matrices", 1, ["up"]),
    "row no list": _edit("matrices", 1, "upperf"),
    "matrices a number": _edit("matrices", 3),
    "no matrix": _edit("matrices", []),
    "key too short": _edit("key", ["x"]),
    "key of other types": _edit("key", [1, 2, 3, 4]),
    "version below zero": _edit("key", 2, -1),
    "sources a text": _edit("sources", "model.gguf"),
    "inode a text": _edit("published", 0, "3"),
    "digest a number": _edit("published", 2, 3),
    "field missing": lambda header: {name: value for name, value in header.items() if name != "sources"},
    "a list": lambda header: [header],
    "null": lambda header: None,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_header_that_lies_with_a_right_digest_is_refused(path: Path, name: str) -> None:
    data = path.read_bytes()
    path.write_bytes(with_header(data, json.dumps(HOSTILE[name](header_of(data))).encode()))
    with pytest.raises(IntegrityError):
        open_packed(path)


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"key":' + b"9" * 5000 + b"}", b"NaN"],
    ids=["empty", "cut", "no UTF-8", "deep", "long number", "NaN"],
)
def test_a_header_that_is_no_json_is_refused(path: Path, text: bytes) -> None:
    path.write_bytes(with_header(path.read_bytes(), text))
    with pytest.raises(IntegrityError, match="does not say what it should"):
        open_packed(path)


def test_a_directory_or_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.packed").mkdir()
    os.mkfifo(tmp_path / "b.packed")
    for name in ("a.packed", "b.packed"):
        with pytest.raises(IntegrityError, match="not a regular file"):
            open_packed(tmp_path / name)


def test_a_write_that_is_cut_off_leaves_the_old_file_and_nothing_else(path: Path) -> None:
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, hard))  # the file has more; writing past it fails half-way
    try:
        with pytest.raises(OSError, match="too large") as caught:
            write_packed(path, KEY, STAMPS, matrices())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    assert path.read_bytes() == before


def test_a_file_that_cannot_be_flushed_is_not_published(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    inode = path.stat().st_ino
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_packed(path, KEY, STAMPS, matrices())
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    assert path.stat().st_ino == inode


def test_a_reader_keeps_its_weights_when_the_file_is_replaced_or_removed(path: Path) -> None:
    file = open_packed(path)
    write_packed(path, KEY, STAMPS, {"embed": matrices()["up"]})
    path.unlink()
    np.testing.assert_array_equal(file.matrix(file.header.entries[0]).data, matrices()["embed"].data)


def test_what_killed_writers_left_goes_and_what_others_write_now_stays(path: Path) -> None:
    old, young, foreign = (
        path.with_name(name) for name in (".m.packed.1.partial", ".m.packed.2.partial", ".n.partial")
    )
    for each in (old, young, foreign):
        each.write_bytes(b"x")
    for each in (old, foreign):
        os.utime(each, (time.time() - 7200, time.time() - 7200))
    write_packed(path, KEY, STAMPS, matrices())
    assert sorted(each.name for each in path.parent.iterdir()) == sorted([young.name, foreign.name, path.name])
