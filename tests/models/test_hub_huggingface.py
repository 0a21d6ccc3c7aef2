"""The Hugging Face hub as a source: the real library against a server on this machine."""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pagemill.base.errors import CapacityError, ModelError
from pagemill.models import hub, sources
from pagemill.models.gguf import open_gguf
from tests.fixtures.gguf_files import GGUFBytes
from tests.fixtures.model_sources import COMMIT, FakeHub, serve_hub

huggingface_hub = pytest.importorskip("huggingface_hub")

GGUF = GGUFBytes().encode()
CHECKPOINT = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "model.safetensors": bytes(2000),
    "model-00001-of-00002.safetensors": b"unused",
    "pytorch_model.bin": b"never fetched",
    "README.md": b"never fetched",
}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub with a GGUF repository, one of several GGUF files, a checkpoint, and one without a model."""
    repos = {
        "org/one": {"tiny.gguf": GGUF, "README.md": b"x"},
        "org/many": {"a.Q8_0.gguf": GGUF, "b.Q4_1.gguf": GGUF, "sub/c.gguf": GGUF},
        "org/checkpoint": dict(CHECKPOINT),
        "org/none": {"pytorch_model.bin": b"x"},
    }
    monkeypatch.setenv("PAGEMILL_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with serve_hub(FakeHub(repos)) as served:
        monkeypatch.setenv("HF_ENDPOINT", served.endpoint)
        yield served


def leftovers() -> list[str]:
    """Every file in the cache that is no lock."""
    files = (path for path in hub.models_dir().rglob("*") if path.is_file())
    return sorted(path.name for path in files if path.suffix != ".lock")


@pytest.mark.parametrize(
    ("name", "file"),
    [("org/one", "tiny.gguf"), ("org/many/b.Q4_1.gguf", "b.Q4_1.gguf"), ("org/many/sub/c.gguf", "c.gguf")],
)
def test_a_gguf_file_is_fetched_and_found_again(
    server: FakeHub, name: str, file: str, capfd: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[str, int, int | None]] = []
    path = hub.resolve(name, progress=lambda *told: calls.append(told))
    assert path.name == file
    assert set(open_gguf(path).tensors) == {tensor.name for tensor in GGUFBytes().tensors}
    assert leftovers() == sorted([file, "pagemill.json"])
    assert calls[-1] == ("verify", len(GGUF), len(GGUF))
    assert {stage for stage, _, _ in calls} == {"download", "verify"}
    num_requests = server.num_requests
    assert hub.resolve(name) == path
    assert server.num_requests == num_requests
    assert [model.name for model in hub.list_models()] == [name]
    assert hub.list_models()[0].source == f"hub {'/'.join(name.split('/')[:2])}@main"
    assert capfd.readouterr().out == ""


def test_a_checkpoint_is_fetched_without_what_is_not_needed(server: FakeHub) -> None:
    model = hub.pull("org/checkpoint")
    assert (model.format, model.path) == ("safetensors", hub.models_dir() / "org--checkpoint")
    assert leftovers() == ["config.json", "model.safetensors", "pagemill.json", "tokenizer.json"]
    record = json.loads((model.path / "pagemill.json").read_text())
    assert [file["path"] for file in record["files"]] == ["config.json", "model.safetensors", "tokenizer.json"]
    hub.remove("org/checkpoint")
    assert leftovers() == []


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("org/absent", "the hub could not deliver it.*Check the spelling"),
        ("org/many", "holds 3 GGUF files. Name one, as org/many/FILE: a.Q8_0.gguf, b.Q4_1.gguf"),
        ("org/many/d.gguf", "holds no 'd.gguf'. It holds: a.Q8_0.gguf"),
        ("org/none", "neither safetensors with a config.json nor a GGUF file, but: pytorch_model.bin"),
    ],
)
def test_what_the_hub_lacks_is_named(server: FakeHub, name: str, problem: str) -> None:
    with pytest.raises(ModelError, match=problem):
        hub.resolve(name)
    assert leftovers() == []


def test_bytes_that_were_not_promised_are_refused_and_removed(server: FakeHub) -> None:
    server.swapped.add("tiny.gguf")
    with pytest.raises(ModelError, match="has the SHA-256"):
        hub.resolve("org/one")
    server.swapped.add("config.json")
    with pytest.raises(ModelError, match=r"config\.json is not what the hub promised"):
        hub.resolve("org/checkpoint")
    assert leftovers() == []


def test_a_pinned_digest_overrides_what_the_hub_says(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = sources.HubSource("org/one", "tiny.gguf", COMMIT, "0" * 64)
    monkeypatch.setattr(hub, "KNOWN_MODELS", {"tiny": (pinned,)})
    with pytest.raises(ModelError, match="instead of 0000"):
        hub.resolve("tiny")


def test_a_transfer_that_breaks_is_named_and_leaves_nothing(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    server.cut.add("tiny.gguf")
    with pytest.raises(ModelError, match=r"could not deliver it|cut short"):
        hub.resolve("org/one")
    assert leftovers() == []
    server.cut.clear()
    assert hub.resolve("org/one").read_bytes() == GGUF


def test_a_hub_that_cannot_be_reached_is_named(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelError, match=r"could not deliver it.*Check the network"):
        hub.resolve("org/one")


def test_a_full_disk_is_named(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(*args: object, **kwargs: object) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fill)
    with pytest.raises(CapacityError, match="the disk is full"):
        hub.resolve("org/one")
    assert leftovers() == []


def test_a_missing_library_is_named_with_the_extra(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModelError, match=r"pip install '\.\[hub\]'"):
        hub.resolve("org/one")
