"""Names, the local cache, and what goes wrong with it. A real pip takes real wheels from a directory."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pagemill.base.errors import CapacityError, ConfigError, ModelError
from pagemill.models import hub, sources, store
from pagemill.models.sources import PackageSource
from tests.fixtures.gguf_files import GGUFBytes
from tests.fixtures.model_sources import write_wheel

CONTENT = GGUFBytes(tail=bytes(300_000)).encode()
MEMBER = "tiny_model/tiny.gguf"
PACKAGE = PackageSource("tiny-model==1.0", MEMBER, len(CONTENT), hashlib.sha256(CONTENT).hexdigest(), 10_000)


class Told:
    """Collects what a progress callback is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int | None]] = []

    def __call__(self, stage: str, done_bytes: int, total_bytes: int | None, /) -> None:
        self.calls.append((stage, done_bytes, total_bytes))

    def stages(self) -> set[str]:
        return {stage for stage, _, _ in self.calls}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and `tiny` as the one known model, its wheel in a directory that pip is told of."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    write_wheel(wheels, MEMBER, CONTENT)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("PAGEMILL_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(hub, "KNOWN_MODELS", {"tiny": (PACKAGE,)})
    return tmp_path / "home"


@pytest.fixture
def quick(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As `home`, but the wheel is copied to where pip would put it, without starting pip."""
    wheel = next((tmp_path / "wheels").iterdir())

    def copy(self: PackageSource, staging: Path, progress: store.Progress) -> Path:
        target = staging / wheel.name
        shutil.copyfile(wheel, target)
        return target

    monkeypatch.setattr(PackageSource, "_download", copy)
    return home


def leftovers(home: Path) -> list[str]:
    """Every file in the cache that is no lock."""
    files = (path for path in home.rglob("*") if path.is_file())
    return sorted(str(path.relative_to(home)) for path in files if path.suffix != ".lock")


WHOLE = ["models/tiny/pagemill.json", "models/tiny/tiny.gguf"]


def test_a_model_is_taken_from_a_package_without_its_dependencies(home: Path) -> None:
    told = Told()
    path = hub.resolve("tiny", progress=told)
    assert path == home / "models/tiny/tiny.gguf"
    assert path.read_bytes() == CONTENT
    assert leftovers(home) == WHOLE
    assert told.stages() == {"download", "verify"}
    assert told.calls[-1] == ("verify", len(CONTENT), len(CONTENT))
    assert all(total is None or done <= total for _, done, total in told.calls)


def test_a_model_that_is_there_is_neither_fetched_nor_hashed_again(
    quick: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = hub.resolve("tiny")

    def refuse(*args: object) -> Any:
        raise AssertionError("touched")

    monkeypatch.setattr(PackageSource, "fetch", refuse)
    monkeypatch.setattr(store, "hash_file", refuse)
    assert hub.resolve("tiny") == path
    assert hub.resolve("tiny", download=False) == path
    assert hub.pull("tiny").path == path


def test_the_cache_lists_and_removes_models(quick: Path) -> None:
    assert hub.list_models() == []
    model = hub.pull("tiny")
    assert hub.list_models() == [model]
    assert (model.name, model.bytes, model.format) == ("tiny", len(CONTENT), "gguf")
    assert (model.sha256, model.source) == (PACKAGE.sha256, "package tiny-model==1.0")
    hub.remove("tiny")
    assert hub.list_models() == []
    assert leftovers(quick) == []
    with pytest.raises(ModelError, match="'tiny' is not in the cache"):
        hub.remove("tiny")


def test_a_copied_cache_is_hashed_once_and_recorded(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = hub.resolve("tiny")
    os.utime(path, ns=(1, 1))
    hashed: list[Path] = []
    real = store.hash_file
    monkeypatch.setattr(store, "hash_file", lambda path: hashed.append(path) or real(path))
    assert hub.resolve("tiny", download=False) == path
    assert hub.resolve("tiny", download=False) == path
    assert hashed == [path]


@pytest.mark.parametrize("damage", ["cut", "changed", "gone", "record"])
def test_a_damaged_model_is_absent_and_is_fetched_again(quick: Path, damage: str) -> None:
    path = hub.resolve("tiny")
    if damage == "cut":
        path.write_bytes(CONTENT[:-1])
    elif damage == "changed":
        path.write_bytes(bytes(len(CONTENT)))
    elif damage == "gone":
        path.unlink()
    else:
        (path.parent / "pagemill.json").write_text("{" * 100_000)
    with pytest.raises(ModelError, match="pagemill models pull tiny"):
        hub.resolve("tiny", download=False)
    assert hub.list_models() == []
    assert hub.resolve("tiny").read_bytes() == CONTENT
    assert leftovers(quick) == WHOLE


@pytest.mark.parametrize(
    "change",
    [
        {"name": "other"},
        {"name": "../x"},
        {"name": "a\0b"},
        {"name": 3},
        {"files": []},
        {"files": "x"},
        {"files": [{"path": "../../x"}]},
        {"source": None},
    ],
)
def test_a_record_that_lies_counts_as_none(quick: Path, change: dict[str, object]) -> None:
    record_path = hub.resolve("tiny").parent / "pagemill.json"
    record = json.loads(record_path.read_text())
    record_path.write_text(json.dumps(record | change))
    assert store.find_model("tiny") is None
    assert hub.list_models() == []


def test_a_record_cannot_name_files_outside(quick: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.gguf").write_bytes(CONTENT)
    record_path = hub.resolve("tiny").parent / "pagemill.json"
    record = json.loads(record_path.read_text())
    for outside in ("../../../secret.gguf", str(tmp_path / "secret.gguf")):
        record["files"][0]["path"] = outside
        record_path.write_text(json.dumps(record))
        assert store.find_model("tiny") is None


def test_a_path_wins_over_everything(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    (tmp_path / "m.gguf").touch()
    assert hub.resolve("tiny") == Path("tiny")
    assert hub.resolve(tmp_path / "m.gguf", download=False) == tmp_path / "m.gguf"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.resolve("~/m.gguf") == tmp_path / "m.gguf"
    with pytest.raises(ModelError, match="is a path, not a name"):
        hub.pull("m.gguf")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("tinny", r"'tinny' is no known model and no path\. Did you mean 'tiny'\? Known: tiny"),
        ("TINY", "Did you mean 'tiny'"),
        ("zzzzzzzz", "is no known model and no path. Known: tiny"),
        ("", "name is empty"),
        ("./m.gguv", r"no such file or directory\. Did you mean 'm.gguf'"),
        ("m.gguf2.gguf", "no such file or directory"),
        ("/no/such/dir/m.gguf", "no such file or directory"),
        ("a/b/c/d", "no such file or directory"),
        ("~no-such-user/m.gguf", "no such file or directory"),
        ("org/repo/" + "n" * 300 + ".gguf", "no such file or directory"),
        ("../../etc", "no such file or directory"),
        ("org/..", "no such file or directory"),
        ("org/re--po", "no such file or directory"),
        ("org/m.gguf", "no such file or directory"),
        ("a\0b", "is no known model"),
        ("n" * 5000, "is no known model"),
        ("n" * 5000 + "/x.gguf", "no such file or directory"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, problem: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.gguf").touch()
    for call in (hub.resolve, hub.pull):
        with pytest.raises(ModelError, match=problem):
            call(name)
    with pytest.raises(ModelError, match="is not in the cache"):
        hub.remove(name)


def test_a_link_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "gone.gguf").symlink_to("nothing")
    for name in ("loop", "gone.gguf"):
        with pytest.raises(ModelError, match="the link leads to no file"):
            hub.resolve(tmp_path / name)


def test_a_model_that_is_not_there_is_not_fetched_unasked(home: Path) -> None:
    with pytest.raises(ModelError, match=r"'tiny' is not on this machine.*pagemill models pull tiny"):
        hub.resolve("tiny", download=False)
    assert leftovers(home) == []


def test_a_package_that_the_index_lacks_is_named_with_pips_words(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = PackageSource("no-such-model==9", MEMBER, 1, "0", 1)
    monkeypatch.setattr(hub, "KNOWN_MODELS", {"tiny": (missing,)})
    with pytest.raises(ModelError, match=r"No matching distribution found for no-such-model==9.*Check the network"):
        hub.resolve("tiny")
    assert leftovers(home) == []


def test_a_missing_pip_is_named_with_the_remedy(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip, which fetches the package, is missing.*ensurepip"):
        hub.resolve("tiny")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"sha256": "0" * 64}, f"has the SHA-256 {PACKAGE.sha256} instead of 0000.*do not trust"),
        ({"member_bytes": len(CONTENT) + 1}, "cut short, or the file was changed"),
        ({"member_bytes": len(CONTENT) - 1}, "or more instead of"),
        ({"member": "tiny_model/other.gguf"}, "broken or was cut short.*no item named"),
    ],
)
def test_a_wrong_file_is_refused_and_removed(
    quick: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], problem: str
) -> None:
    fields = {name: getattr(PACKAGE, name) for name in PACKAGE.__slots__} | change
    monkeypatch.setattr(hub, "KNOWN_MODELS", {"tiny": (PackageSource(**fields),)})
    with pytest.raises(ModelError, match=problem):
        hub.resolve("tiny")
    assert leftovers(quick) == []


@pytest.mark.parametrize("damage", ["cut", "flipped", "no_zip"])
def test_a_broken_package_is_refused_and_removed(quick: Path, tmp_path: Path, damage: str) -> None:
    wheel = next((tmp_path / "wheels").iterdir())
    raw = bytearray(wheel.read_bytes())
    with zipfile.ZipFile(wheel) as archive:
        middle = archive.getinfo(MEMBER).header_offset + 200
    if damage == "flipped":
        raw[middle] ^= 0xFF
    wheel.write_bytes({"cut": raw[:-30], "flipped": raw, "no_zip": b"<html>proxy error</html>"}[damage])
    with pytest.raises(ModelError, match=r"broken or was cut short|SHA-256"):
        hub.resolve("tiny")
    assert leftovers(quick) == []


@contextmanager
def failing_writes(error_number: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every file of a model that is opened for writing fails at its first write."""
    real = Path.open

    def open_path(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        file = real(self, mode, *args, **kwargs)
        if "w" not in mode:
            return file
        return FailingFile(file, error_number)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_path)
        yield


class FailingFile:
    """A file that is open, and whose writes fail."""

    def __init__(self, file: Any, error_number: int) -> None:
        self.file, self.error_number = file, error_number

    def __enter__(self) -> FailingFile:
        return self

    def __exit__(self, *args: object) -> None:
        self.file.close()

    def write(self, data: bytes) -> int:
        raise OSError(self.error_number, os.strerror(self.error_number))


@pytest.mark.parametrize(
    ("error_number", "kind", "problem"),
    [
        (errno.ENOSPC, CapacityError, "the disk is full.*Free some room.*PAGEMILL_HOME"),
        (errno.EDQUOT, CapacityError, "the disk is full"),
        (errno.EROFS, ConfigError, "cannot be used.*Set PAGEMILL_HOME to a directory that you can write to"),
        (errno.EIO, ModelError, "the model cache failed"),
    ],
)
def test_failing_writes_are_named_and_leave_nothing(
    quick: Path, monkeypatch: pytest.MonkeyPatch, error_number: int, kind: type[Exception], problem: str
) -> None:
    with failing_writes(error_number, monkeypatch), pytest.raises(kind, match=problem):
        hub.resolve("tiny")
    assert leftovers(quick) == []
    assert hub.resolve("tiny").read_bytes() == CONTENT


def test_a_disk_that_fills_under_pip_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n"
    monkeypatch.setattr(sources, "_run", lambda command, env: subprocess.CompletedProcess(command, 1, "", said))
    with pytest.raises(CapacityError, match=r"the disk is full.*PAGEMILL_HOME"):
        hub.resolve("tiny")
    assert leftovers(home) == []


def test_too_little_room_is_refused_before_the_download(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    monkeypatch.setattr(PackageSource, "_download", lambda *args: pytest.fail("downloaded"))
    with pytest.raises(CapacityError, match=r"takes \d+ MB, and 0 MB are free"):
        hub.resolve("tiny")


def test_a_cache_that_cannot_be_written_is_named(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PAGEMILL_HOME", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="Set PAGEMILL_HOME"):
        hub.resolve("tiny")
    monkeypatch.setenv("PAGEMILL_HOME", str(tmp_path / "locked"))

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "locked"))

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(ConfigError, match=r"Permission denied.*Set PAGEMILL_HOME"):
        hub.resolve("tiny")


def test_an_interrupted_fetch_leaves_nothing(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(stage: str, done_bytes: int, total_bytes: int | None, /) -> None:
        if stage == "verify":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hub.resolve("tiny", progress=interrupt)
    assert leftovers(quick) == []
    assert hub.resolve("tiny").read_bytes() == CONTENT


def test_what_a_killed_process_left_is_cleared(quick: Path) -> None:
    stale = quick / "models/.partial/tiny/model"
    stale.mkdir(parents=True)
    (stale / "half.gguf").write_bytes(b"half")
    hub.resolve("tiny")
    assert leftovers(quick) == WHOLE


def test_the_second_source_is_asked_when_the_first_fails(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = PackageSource("wrong==1", "absent", 1, "0", 1)
    monkeypatch.setattr(hub, "KNOWN_MODELS", {"tiny": (wrong, PACKAGE)})
    assert hub.pull("tiny").source == PACKAGE.description
    hub.remove("tiny")
    monkeypatch.setattr(hub, "KNOWN_MODELS", {"tiny": (wrong, wrong)})
    with pytest.raises(ModelError, match=r"could not be fetched.*wrong==1.*And then: wrong==1"):
        hub.pull("tiny")


def test_a_second_fetch_waits_for_the_first_and_finds_it_done(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started, go_on = threading.Event(), threading.Event()
    fetches: list[str] = []
    real = PackageSource.fetch

    def slow(self: PackageSource, *args: Any) -> Any:
        fetches.append(self.requirement)
        started.set()
        assert go_on.wait(20)
        return real(self, *args)

    monkeypatch.setattr(PackageSource, "fetch", slow)
    first = threading.Thread(target=hub.resolve, args=("tiny",))
    first.start()
    assert started.wait(20)

    def told(stage: str, done_bytes: int, total_bytes: int | None, /) -> None:
        if stage == "wait":
            go_on.set()

    assert hub.resolve("tiny", progress=told).read_bytes() == CONTENT
    first.join()
    assert len(fetches) == 1


def test_two_processes_can_fetch_at_the_same_time(home: Path) -> None:
    program = (
        "from pagemill.models import hub\n"
        "from tests.models.test_hub import PACKAGE\n"
        "hub.KNOWN_MODELS['tiny'] = (PACKAGE,)\n"
        "print(hub.pull('tiny').sha256)\n"
    )
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}", "OPENBLAS_NUM_THREADS": "1"}
    running = [
        subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=120)[0].strip() for process in running]
    assert said == [PACKAGE.sha256] * 2
    assert leftovers(home) == WHOLE


def test_the_default_model_is_pinned_by_size_and_digest() -> None:
    package, from_hub = hub.KNOWN_MODELS["smollm2-135m"]
    assert isinstance(package, PackageSource)
    assert (package.member_bytes, package.sha256[:8]) == (98_362_432, "b179c952")
    assert isinstance(from_hub, sources.HubSource)
    assert from_hub.sha256 == package.sha256
