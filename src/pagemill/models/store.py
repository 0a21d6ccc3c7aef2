"""Models on this machine, in `$PAGEMILL_HOME/models/<name>/` with a record beside the files. Owns the layout, the lock,
the atomic publication and the digests; does not know where models come from.

A model appears by one rename after its files were verified and flushed to disk, so that no reader ever sees half of
one. `pagemill.json` records what was verified; a file whose size and time are still the recorded ones is not hashed
again.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from pagemill.base.errors import CapacityError, ConfigError, ModelError

RECORD_NAME: Final = "pagemill.json"
MAX_RECORD_BYTES: Final = 1 << 20
_PARTIAL: Final = ".partial"
_LOCKS: Final = ".locks"
_HOW_TO_MOVE: Final = "Set PAGEMILL_HOME to a directory that you can write to"


class Progress(Protocol):
    """Told how far a fetch is. May be called from another thread, never from two at once.

    stage: "wait" (another process fetches the same model), "download", "verify". done_bytes never passes total_bytes;
    total_bytes is None where it is not known.
    """

    def __call__(self, stage: str, done_bytes: int, total_bytes: int | None, /) -> None: ...


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One verified file of a model; `path` is relative to the model's directory."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model in the cache. path: the file of a "gguf" model, the directory of a "safetensors" one. sha256: the file's,
    or of the sorted lines `<sha256>  <path>` of several files. source: where it was fetched from."""

    name: str
    path: Path
    bytes: int
    format: str
    sha256: str
    source: str


def models_dir() -> Path:
    """Where models are kept: `$PAGEMILL_HOME/models`, by default `~/.cache/pagemill/models`."""
    home = os.environ.get("PAGEMILL_HOME") or "~/.cache/pagemill"
    return Path(os.path.expanduser(home)).absolute() / "models"


def find_model(name: str) -> LocalModel | None:
    """The model of that name if it is whole: a file whose size or time changed since it was verified is hashed again,
    and a model with a wrong file counts as absent."""
    directory = _directory(name)
    record = _read_record(directory)
    if record is None or record["name"] != name:
        return None
    files = [StoredFile(file["path"], file["bytes"], file["sha256"]) for file in record["files"]]
    changed = False
    for file, recorded in zip(files, record["files"], strict=True):
        try:
            status = (directory / file.path).stat()
            if status.st_size != file.bytes:
                return None
            if status.st_mtime_ns != recorded["mtime_ns"]:
                if hash_file(directory / file.path) != file.sha256:
                    return None
                changed = True
        except OSError:
            return None
    if changed:
        with suppress(OSError):  # a cache that cannot be written is hashed each time
            _write_record(directory, name, record["source"], files)
    return _describe(directory, name, record["source"], files)


def list_models() -> list[LocalModel]:
    """All whole models in the cache, by name. Raises ConfigError when the directory cannot be read."""
    with naming_os_errors():
        if not models_dir().is_dir():
            return []
        found = (_read_record(path) for path in models_dir().iterdir() if not path.name.startswith("."))
        names = [record["name"] for record in found if record is not None and _is_name(record["name"])]
        models = (find_model(name) for name in names)
        return sorted((model for model in models if model is not None), key=lambda model: model.name)


def remove_model(name: str) -> bool:
    """Delete the model of that name, whole or damaged; says whether there was one. Waits while it is being fetched."""
    with naming_os_errors():
        if not _directory(name).is_dir():
            return False
        with lock_model(name, None):
            staging = _fresh_staging(name)
            try:
                with suppress(FileNotFoundError):
                    _directory(name).rename(staging / "removed")
            finally:
                _remove_tree(staging, ignore_errors=True)
    return True


@contextmanager
def lock_model(name: str, progress: Progress | None) -> Iterator[None]:
    """Hold the model's lock: of several processes that fetch it, one does, the others wait and find it there."""
    locks = models_dir() / _LOCKS
    with naming_os_errors():
        locks.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(locks / f"{_slug(name)}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        with naming_os_errors():
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if progress is not None:
                    progress("wait", 0, None)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def staging_dir(name: str) -> Iterator[Path]:
    """An empty directory on the cache's file system, for the holder of the lock; removed at the end."""
    with naming_os_errors():
        staging = _fresh_staging(name)
    try:
        yield staging
    finally:
        _remove_tree(staging, ignore_errors=True)


def publish_model(name: str, source: str, content: Path, files: list[StoredFile]) -> LocalModel:
    """Make the directory `content`, inside the staging directory, the model of that name, by one rename; a damaged
    predecessor goes. The caller holds the lock and has verified `files`."""
    target = _directory(name)
    with naming_os_errors():
        for file in files:
            _flush(content / file.path)
        _write_record(content, name, source, files)
        for directory, _, _ in os.walk(content):
            _flush(Path(directory))
        if target.exists():
            target.rename(content.parent / "replaced")
        content.rename(target)
        _flush(target.parent)
    return _describe(target, name, source, files)


def free_bytes(directory: Path) -> int:
    """Room on a directory's file system. Raises OSError."""
    import shutil  # brings three compressors, and most starts neither write nor delete a model

    return shutil.disk_usage(directory).free


def check_space(directory: Path, num_bytes: int, what: str) -> None:
    """Raise CapacityError when the file system of `directory` has not room for `num_bytes` more."""
    room_bytes = free_bytes(directory)
    if room_bytes < num_bytes:
        raise CapacityError(
            f"{models_dir()}: fetching {what} takes {num_bytes / 1e6:,.0f} MB, and {room_bytes / 1e6:,.0f} MB are "
            f"free. Free some room (`pagemill models ls`, `pagemill models rm`). Or: {_HOW_TO_MOVE}."
        )


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def naming_os_errors() -> Iterator[None]:
    """Turn what the file system says into CapacityError (full), ConfigError (not writable) or ModelError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CapacityError(
                f"{models_dir()}: the disk is full ({error}). What was written has been removed. Free some room "
                f"(`pagemill models ls`, `pagemill models rm`). Or: {_HOW_TO_MOVE}."
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise ConfigError(f"{models_dir()}: the model cache cannot be used: {error}. {_HOW_TO_MOVE}.") from error
        raise ModelError(f"{models_dir()}: the model cache failed: {error}. Try again. Or: {_HOW_TO_MOVE}.") from error


def _is_name(name: str) -> bool:
    """Whether `name` can name a directory of the cache, and no other place."""
    parts = name.split("/")
    return all(parts) and not any(part.startswith(".") for part in parts) and "\0" not in name and len(name) <= 240


def _slug(name: str) -> str:
    """The directory's name. Repositories of the hub hold no "--", so slugs are distinct for all but some GGUF files
    with "--" in their names; the record's own name settles those."""
    if not _is_name(name):
        raise ModelError(f"{name!r} is no model name. A name is `smollm2-135m`, `org/repo` or `org/repo/file.gguf`.")
    return name.replace("/", "--")


def _remove_tree(directory: Path, *, ignore_errors: bool = False) -> None:
    import shutil

    shutil.rmtree(directory, ignore_errors=ignore_errors)


def _directory(name: str) -> Path:
    return models_dir() / _slug(name)


def _fresh_staging(name: str) -> Path:
    staging = models_dir() / _PARTIAL / _slug(name)
    if staging.exists():  # left by a process that was killed
        _remove_tree(staging)
    staging.mkdir(parents=True)
    return staging


def _describe(directory: Path, name: str, source: str, files: list[StoredFile]) -> LocalModel:
    num_bytes = sum(file.bytes for file in files)
    if len(files) == 1 and files[0].path.endswith(".gguf"):
        return LocalModel(name, directory / files[0].path, num_bytes, "gguf", files[0].sha256, source)
    lines = "".join(f"{file.sha256}  {file.path}\n" for file in sorted(files, key=lambda file: file.path))
    return LocalModel(name, directory, num_bytes, "safetensors", hashlib.sha256(lines.encode()).hexdigest(), source)


def _read_record(directory: Path) -> dict[str, Any] | None:
    """The record, or None where there is none, it is damaged, or it names files outside of its directory."""
    try:
        with (directory / RECORD_NAME).open("rb") as file:
            record = json.loads(file.read(MAX_RECORD_BYTES))
        wanted = {"path": str, "bytes": int, "sha256": str, "mtime_ns": int}
        whole = (
            isinstance(record["name"], str)
            and isinstance(record["source"], str)
            and len(record["files"]) > 0
            and all(isinstance(item[key], kind) for item in record["files"] for key, kind in wanted.items())
            and not any(
                Path(item["path"]).is_absolute() or ".." in Path(item["path"]).parts for item in record["files"]
            )
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return record if whole else None


def _write_record(directory: Path, name: str, source: str, files: list[StoredFile]) -> None:
    listed = [asdict(file) | {"mtime_ns": (directory / file.path).stat().st_mtime_ns} for file in files]
    partial = directory / f".{RECORD_NAME}.{os.getpid()}"
    try:
        with partial.open("w") as file:
            json.dump({"name": name, "source": source, "files": listed}, file, indent=1)
        _flush(partial)
        partial.replace(directory / RECORD_NAME)
    finally:
        partial.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Have the file's bytes, or the directory's entries, on disk before going on."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
