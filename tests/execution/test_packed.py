"""Packed weights from one start to the next: the same bits as without, and never weights of another model."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pagemill.base.config import resolve_config
from pagemill.base.errors import ConfigError
from pagemill.base.params import SamplingParams
from pagemill.execution import loader, packed
from pagemill.execution.packed_file import PackedFile, open_packed
from pagemill.kernels.target import arithmetic_of, available_targets, rotates
from pagemill.llm import LLM
from pagemill.models.random_init import SHAPES, random_checkpoint
from tests.fixtures.default_model import default_model_path
from tests.fixtures.packed_starts import Starter, only, packed_of, rewrite, same
from tests.fixtures.tiny import tiny_gpt2, tiny_llama

USERS_HOME = os.environ.get("PAGEMILL_HOME", "")

pytestmark = pytest.mark.usefixtures("home")


FORMATS = [("gguf", name) for name in ("f32", "f16", "bf16", "q4_0", "q4_1", "q8_0")] + [("safetensors", "bf16")]


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
@pytest.mark.parametrize(("format", "weight_format"), FORMATS)
def test_a_start_from_the_file_packs_nothing_and_gives_the_same_bits(
    tmp_path: Path, start: Starter, format: str, weight_format: str, dtype: str
) -> None:
    path = tiny_llama(tmp_path, format=format, weight_format=weight_format)
    without, first, second = (start(path, cache, dtype=dtype) for cache in ("off", "auto", "auto"))
    assert without.converted == first.converted > 0
    assert second.converted == 0
    assert same(without, first)
    assert same(without, second)
    assert not first.notices + second.notices


def test_a_model_with_biases_a_tied_head_and_turned_matrices_gives_the_same_bits(
    tmp_path: Path, start: Starter
) -> None:
    path = tiny_gpt2(tmp_path, weight_format="f16")
    without, _, second = (start(path, cache) for cache in ("off", "auto", "auto"))
    assert same(without, second)
    assert second.converted < without.converted


@pytest.mark.model
def test_the_default_model_gives_the_same_bits(tmp_path: Path, start: Starter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGEMILL_HOME", USERS_HOME)
    cache = str(tmp_path / "packed")
    without, _, second = (start(default_model_path(), each) for each in ("off", cache, cache))
    assert second.converted == 0
    assert same(without, second)


def test_files_of_each_weight_format_stand_side_by_side_and_none_is_used_for_another(
    model: Path, start: Starter
) -> None:
    formats = ("auto", "f32", "bf16", "q8_0")
    expected = {each: start(model, "off", weight_format=each) for each in formats}
    for each in formats:
        assert start(model, weight_format=each).converted > 0
        assert packed_of(model, each).is_file()
    for each in formats:
        found = start(model, weight_format=each)
        assert (found.converted, found.notices) == (0, [])
        assert same(found, expected[each])
    assert not any(same(expected[a], expected[b]) for a in formats for b in formats if a < b)


def test_targets_on_which_auto_differs_do_not_take_turns_with_one_file(
    model: Path, start: Starter, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = {(rotates(each), arithmetic_of(each)): each for each in available_targets()}.values()
    if len(targets) == 1:
        pytest.skip("auto is the same on every target of this machine")
    for target in targets:
        monkeypatch.setenv("PAGEMILL_FORCE_TARGET", target)
        start(model)
        assert packed_of(model).is_file()
    for target in targets:
        monkeypatch.setenv("PAGEMILL_FORCE_TARGET", target)
        found = start(model)
        assert (found.converted, found.notices) == (0, [])
        assert same(found, start(model, "off"))


def test_a_dtype_and_its_weight_format_share_a_file(model: Path, start: Starter) -> None:
    start(model, dtype="float32")
    assert start(model, weight_format="f32").converted == 0
    assert len(list(model.parent.iterdir())) == 2


def test_off_and_the_reference_write_nothing(model: Path, start: Starter, home: Path) -> None:
    start(model, "off")
    start(model, executor="reference")
    assert [each.name for each in model.parent.iterdir()] == [model.name]
    assert not home.exists()


def test_weights_made_in_memory_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shape = replace(
        SHAPES["gpt2-medium"], num_layers=1, hidden_dim=64, num_q_heads=1, num_kv_heads=1, ffn_dim=64, vocab_size=64
    )
    loader.load_executor(random_checkpoint(shape), num_blocks=1, packed_weights_cache="auto")
    assert not list(tmp_path.iterdir())


def test_a_directory_that_is_named_is_made_and_used_alone(model: Path, start: Starter, tmp_path: Path) -> None:
    cache = tmp_path / "a" / "b"
    start(model, str(cache))
    assert start(model, str(cache)).converted == 0
    assert len(list(cache.iterdir())) == 1
    assert not packed_of(model).exists()


def test_models_of_one_name_do_not_share_a_file(tmp_path: Path, start: Starter) -> None:
    one = tiny_llama(tmp_path / "1", format="gguf", seed=1)
    two = one.rename(tmp_path / one.name)
    one = tiny_llama(tmp_path / "1", format="gguf", seed=2).rename(one)
    expected = [start(path, "off") for path in (one, two)]
    for path in (one, two, one, two):
        found = start(path, str(tmp_path / "packed"))
        assert same(found, expected[path is two])
        assert not found.notices
    assert len(list((tmp_path / "packed").iterdir())) == 2


def test_a_directory_that_is_a_file_is_refused(model: Path, start: Starter) -> None:
    with pytest.raises(ConfigError, match="no directory; give a directory, auto or off"):
        start(model, str(model))


@pytest.mark.parametrize("value", ["of", "", "no", "packed"])
def test_a_value_that_is_neither_a_word_nor_a_path_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=r"packed_weights_cache is .* give auto, off, or a directory"):
        resolve_config({"packed_weights_cache": value}, environ={})


# --- bad files


def _flip(where: float) -> Callable[[bytes], bytes]:
    def damage(data: bytes) -> bytes:
        at = int(where * (len(data) - 1))
        return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]

    return damage


BAD: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut short": lambda data: data[: len(data) // 2],
    "one byte short": lambda data: data[:-1],
    "longer": lambda data: data + bytes(64),
    "foreign": lambda data: np.random.RandomState(0).bytes(len(data)),
    "zeros": lambda data: bytes(len(data)),
    "payload of zeros": lambda data: data[:4096] + bytes(len(data) - 4096),
    "bit of the prefix": _flip(0),
    "bit of the header": lambda data: data[:60] + bytes([data[60] ^ 1]) + data[61:],
    "bit of a matrix": _flip(0.5),
    "bit of the last matrix": _flip(1),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_told_of_and_made_again(model: Path, start: Starter, name: str) -> None:
    expected = start(model)
    packed_of(model).write_bytes(BAD[name](packed_of(model).read_bytes()))
    found = start(model)
    assert same(found, expected)
    assert found.converted == expected.converted
    assert [str(packed_of(model)) in notice and "packing them again" in notice for notice in found.notices] == [True]
    again = start(model)
    assert (again.converted, again.notices) == (0, [])
    assert same(again, expected)


UP = "layers.1.up"
FOREIGN: dict[str, tuple[dict[str, object], str]] = {
    "other weight format": ({"weights": "f32"}, "another version or in another format"),
    "older layout": ({"packing": 0}, "another version"),
    "newer layout": ({"packing": 99}, "another version"),
    "other conversion": ({"conversion": 99}, "another version"),
    "matrix missing": ({"alter": only(UP, lambda m: None)}, "not this model's matrices"),
    "other format": ({"alter": only(UP, lambda m: replace(m, layout="f32"))}, f"{UP} has another format"),
    "unknown format": ({"alter": only(UP, lambda m: replace(m, layout="q9_9"))}, f"{UP} has another format"),
    "other shape": ({"alter": only(UP, lambda m: replace(m, n=m.k, k=m.n))}, f"{UP} has another format or shape"),
    "shorter matrix": ({"alter": only(UP, lambda m: replace(m, data=m.data[:-64]))}, f"{UP} has another length"),
    "no bytes": ({"alter": only(UP, lambda m: replace(m, data=m.data[:0]))}, f"{UP} has another length"),
    "unannounced layout": ({"alter": lambda name, m: replace(m, data=m.data[::-1].copy())}, "not what packing gives"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_whole_file_of_other_weights_is_told_of_and_made_again(model: Path, start: Starter, name: str) -> None:
    expected = start(model)
    changes, reason = FOREIGN[name]
    rewrite(packed_of(model), **changes)
    found = start(model)
    assert same(found, expected)
    assert len(found.notices) == 1
    assert reason in found.notices[0]
    assert (start(model).converted, start(model).notices) == (0, [])


@pytest.mark.parametrize("constant", [(packed, "PACKING_VERSION"), (loader, "CONVERSION_VERSION")])
def test_a_new_version_makes_the_file_again(
    model: Path, start: Starter, monkeypatch: pytest.MonkeyPatch, constant: tuple[object, str]
) -> None:
    expected = start(model)
    monkeypatch.setattr(*constant, 1000)
    found = start(model)
    assert "another version" in found.notices[0]
    assert same(found, expected)
    assert start(model).converted == 0


def test_a_file_of_another_user_is_not_used(model: Path, start: Starter, monkeypatch: pytest.MonkeyPatch) -> None:
    def strangers(path: Path) -> PackedFile:
        return replace(open_packed(path), owner=os.geteuid() + 12345)

    start(model)
    monkeypatch.setattr(packed, "open_packed", strangers)
    found = start(model)
    assert found.converted > 0
    assert "belong to another user" in found.notices[0]


# --- the model changes, or moves


def test_weights_changed_in_place_with_their_old_size_and_time_are_noticed(model: Path, start: Starter) -> None:
    before, status = start(model), model.stat()
    other = tiny_llama(model.parent / "other", format="gguf", weight_format="q4_1", seed=1).read_bytes()
    assert len(other) == status.st_size
    with model.open("r+b") as file:
        file.write(other)
    os.utime(model, ns=(status.st_atime_ns, status.st_mtime_ns))
    found = start(model)
    assert "made from other weights" in found.notices[0]
    assert not same(found, before)
    assert same(found, start(model, "off"))
    assert start(model).converted == 0


def test_one_changed_weight_in_a_shard_is_noticed(tmp_path: Path, start: Starter) -> None:
    model = tiny_llama(tmp_path)
    start(model)
    shard = model / "model.safetensors"
    data = bytearray(shard.read_bytes())
    data[-2] ^= 0x40
    shard.write_bytes(data)
    found = start(model)
    assert "made from other weights" in found.notices[0]
    assert same(found, start(model, "off"))


def test_a_changed_configuration_is_noticed(tmp_path: Path, start: Starter) -> None:
    model = tiny_llama(tmp_path)
    start(model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    found = start(model)
    assert "made from other weights" in found.notices[0]
    assert same(found, start(model, "off"))


def test_a_model_that_was_copied_with_its_file_or_touched_packs_nothing(
    model: Path, start: Starter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, hashed = start(model), []
    original = PackedFile.check_payload

    def spied(self: PackedFile) -> None:
        hashed.append(self.path)
        original(self)

    monkeypatch.setattr(PackedFile, "check_payload", spied)
    copy = Path(shutil.copytree(model.parent, tmp_path / "copy")) / model.name
    found = start(copy)
    assert (found.converted, found.notices, len(hashed)) == (0, [], 1)
    assert same(found, expected)
    os.utime(copy)
    assert (start(copy).converted, start(copy).notices) == (0, [])
    assert len(hashed) == 1, "written again with its new stamps, it is not hashed any more"


def test_a_model_that_is_replaced_while_it_is_loaded_is_not_kept(model: Path, start: Starter, tmp_path: Path) -> None:
    other = tiny_llama(tmp_path / "other", format="gguf", weight_format="q4_1", seed=1)

    def progress(done: int, total: int) -> None:
        if done == 1:
            other.replace(model)

    found = start(model, progress=progress)
    assert "changed while it was loaded" in found.notices[0]
    assert not packed_of(model).exists()
    assert same(start(model), start(model, "off"))


# --- where it cannot be written


def _fail_at(directory: Path | None, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the file system refuse files in a directory, or everywhere."""
    original = packed.write_packed

    def write(path: Path, *arguments: object) -> None:
        if directory is None or path.parent == directory:
            raise OSError(number, os.strerror(number))
        original(path, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(packed, "write_packed", write)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_beside_a_model_that_cannot_be_written_the_home_is_used(
    model: Path, start: Starter, home: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    _fail_at(model.parent, number, monkeypatch)
    expected = start(model)
    assert not packed_of(model).exists()
    assert len(list((home / "packed").iterdir())) == 1
    second = start(model)
    assert (second.converted, expected.notices + second.notices) == (0, [])
    assert same(second, expected)


def test_a_bad_file_that_cannot_be_replaced_does_not_hide_the_good_one(
    model: Path, start: Starter, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = start(model)
    packed_of(model).write_bytes(b"foreign")
    _fail_at(model.parent, errno.EROFS, monkeypatch)
    start(model)
    found = start(model)
    assert found.converted == 0
    assert "other ones are used; delete these" in found.notices[0]
    assert same(found, expected)


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EDQUOT])
def test_where_nothing_can_be_written_a_notice_says_why_and_the_model_runs(
    model: Path, start: Starter, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    _fail_at(None, number, monkeypatch)
    found = start(model)
    assert same(found, start(model, "off"))
    assert len(found.notices) == 1
    assert os.strerror(number) in found.notices[0]
    assert "set packed_weights_cache to a directory that can be written, or to off" in found.notices[0]


def test_a_directory_that_cannot_be_made_is_a_notice(model: Path, start: Starter) -> None:
    found = start(model, "/proc/pagemill/packed")
    assert same(found, start(model, "off"))
    assert "/proc/pagemill/packed: " in found.notices[0]


def test_a_disk_without_room_is_not_filled(
    model: Path, start: Starter, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    usage = shutil.disk_usage(model.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    found = start(model)
    assert "are needed and" in found.notices[0]
    assert not packed_of(model).exists()
    assert not home.exists()


def test_a_directory_in_the_files_place_is_no_obstacle(model: Path, start: Starter, home: Path) -> None:
    packed_of(model).mkdir()
    found = start(model)
    assert "not a regular file" in found.notices[0]
    assert start(model).converted == 0
    assert len(list((home / "packed").iterdir())) == 1


# --- several processes

_PROGRAM = """
import sys, hashlib
import numpy as np
from pathlib import Path
from pagemill.execution.loader import load_executor
from pagemill.models.checkpoint import open_checkpoint
from tests.fixtures.greedy import run
for _ in range(int(sys.argv[2])):
    runner = load_executor(open_checkpoint(sys.argv[1]), num_blocks=8, packed_weights_cache="auto")
    logits, _ = run(runner.model, [np.arange(10, 30, dtype=np.int32)], [[0, 19]], 3)
    print(hashlib.sha256(logits[0].tobytes()).hexdigest())
"""


def test_processes_that_pack_at_once_do_not_disturb_each_other(model: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    command = [sys.executable, "-c", _PROGRAM, str(model), "4"]
    programs = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    answers = [program.communicate(timeout=120) for program in programs]
    assert [program.returncode for program in programs] == [0, 0], answers
    assert [errors for _, errors in answers] == ["", ""]
    assert len({line for output, _ in answers for line in output.split()}) == 1
    file = open_packed(packed_of(model))
    file.check_payload()
    assert sorted(each.name for each in model.parent.iterdir()) == sorted([model.name, packed_of(model).name])


def test_a_language_model_keeps_its_packed_weights_by_default_and_answers_the_same(model: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    answers = []
    for options in ({"packed_weights_cache": "off"}, {}, {}):
        with LLM(str(model), max_num_seqs=2, max_model_len=64, num_threads=1, **options) as llm:
            answers.append(llm.generate("a page", params)[0].outputs[0].token_ids)
        assert packed_of(model).exists() == (not options)
    assert answers[0] == answers[1] == answers[2]
