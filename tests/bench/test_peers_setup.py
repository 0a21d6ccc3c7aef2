from __future__ import annotations

import json
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pagemill import LLM, SamplingParams
from pagemill.base.errors import ConfigError
from pagemill.bench import peers_setup
from pagemill.bench.peers_catalog import Form, Peer
from pagemill.bench.peers_setup import SetupError, explicit_flags, find_environment, form_path, set_up
from pagemill.models.checkpoint import open_checkpoint
from tests.fixtures import fake_peer
from tests.fixtures.tiny import tiny_llama

ABSENT = Peer("absent", "no_such_module_anywhere", "", ("no-such-module==1",), (), 1000)
TOLD: list[str] = []


def wheel(directory: Path, name: str, requires: tuple[str, ...] = ()) -> str:
    """A package of one empty module, as a file that pip installs without an index."""
    path = directory / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    lines = "".join(f"Requires-Dist: {each}\n" for each in requires)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}.py", "")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{lines}")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return str(path)


@pytest.fixture(autouse=True)
def no_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))


def test_environment_is_made_without_the_dependencies_left_out_and_found_again(tmp_path: Path) -> None:
    wheel(tmp_path, "fake_engine", ("fake_needed", "fake_unwanted>=1", "fake_more; extra == 'more'"))
    wheel(tmp_path, "fake_needed")
    peer = Peer("fake", "fake_engine", "", ("fake_engine==1.0",), (), 1000, without=("fake_unwanted",))
    root = tmp_path / "root"
    assert find_environment(peer, root, None) is None
    environment = set_up(peer, root, TOLD.append)
    assert find_environment(peer, root, None) == environment
    assert find_environment(replace(peer, module="fake_needed"), root, None) == environment
    assert find_environment(replace(peer, module="fake_unwanted"), root, None) is None
    assert "Successfully installed" in (root / "fake.log").read_text()


def test_package_that_cannot_be_had_is_a_reason_and_leaves_no_environment(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"ended with code 1: .*no-such-module.*see .*absent\.log"):
        set_up(ABSENT, tmp_path, TOLD.append)
    assert not (tmp_path / "absent").exists()


def test_build_that_dies_of_an_illegal_instruction_is_made_again_and_said_so(tmp_path: Path) -> None:
    built = wheel(tmp_path, "fake_engine")
    script = tmp_path / "worker.py"
    source = Path(__file__).resolve().parents[2] / "src"
    script.write_text(
        f"import runpy, sys\nsys.path.insert(0, {str(source)!r})\nsys.path += {[each for each in sys.path if each]!r}\n"
        f"sys.argv = ['fake', 'illegal once']\nrunpy.run_path({fake_peer.__file__!r}, run_name='__main__')\n"
    )
    peer = Peer("fake", "fake_engine", str(script), (built,), (), 1000, from_sdist=True)
    environment = set_up(peer, tmp_path / "root", TOLD.append, tmp_path / "model.gguf")
    assert "GGML_NATIVE=OFF" in environment.note
    assert "illegal instruction" in environment.note
    assert find_environment(peer, tmp_path / "root", None) == environment


def test_too_little_room_is_said_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="free some room or give --environments another directory"):
        set_up(replace(ABSENT, disk_bytes=10**18), tmp_path / "root", TOLD.append)
    assert not list((tmp_path / "root").iterdir())


def test_directory_that_cannot_be_written_is_a_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match="cannot be written"):
        set_up(ABSENT, tmp_path / "file" / "below", TOLD.append)


def test_step_that_takes_too_long_is_ended_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers_setup, "_INSTALL_S", 0.01)
    with pytest.raises(SetupError, match="took more than 0 s"):
        set_up(ABSENT, tmp_path, TOLD.append)
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize("python", [sys.executable, "/nowhere/python", "/bin/true", "/bin/echo"])
def test_given_python_that_lacks_the_peer_is_refused(python: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{python} cannot import no_such_module_anywhere; give a Python that has"):
        find_environment(ABSENT, tmp_path, python)


def test_given_python_that_has_the_peer_is_taken(tmp_path: Path) -> None:
    found = find_environment(replace(ABSENT, module="json"), tmp_path, sys.executable)
    assert found is not None
    assert found.python == Path(sys.executable)


def test_flags_follow_the_processor_and_never_ask_for_amx() -> None:
    flags = explicit_flags("processor: 0\nflags\t\t: sse4_2 avx avx2 fma f16c bmi2 amx_tile avx512f\n").split()
    assert flags[0] == "-DGGML_NATIVE=OFF"
    assert {"-DGGML_AVX2=ON", "-DGGML_FMA=ON", "-DGGML_AVX512=OFF", "-DGGML_AVX512_BF16=OFF"} <= set(flags)
    assert not any("AMX" in flag for flag in flags)


def test_form_that_the_model_is_in_already_is_the_file_itself(tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    for form in (Form("shipped", "shipped"), Form("Q4_0", "Q4_0")):
        assert form_path(form, model, "q4_0", tmp_path, TOLD.append) == model


def test_gguf_is_made_again_in_another_format_once(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path, format="gguf", weight_format="q4_1")
    form = Form("Q8_0", "Q8_0")
    path = form_path(form, model, "q4_1", tmp_path / "root", TOLD.append)
    before = path.stat().st_mtime_ns
    assert form_path(form, model, "q4_1", tmp_path / "root", TOLD.append).stat().st_mtime_ns == before
    assert {each.name for each in path.parent.iterdir()} == {path.name, "remake.log"}
    old, new = open_checkpoint(model), open_checkpoint(path)
    assert (old.weight_format, new.weight_format) == ("q4_1", "q8_0")
    assert old.vocab == new.vocab
    for name, tensor in old.tensors.items():
        values = tensor.dequantize()
        assert np.abs(new.tensors[name].dequantize() - values).max() <= np.abs(values).max() / 127, name


def test_safetensors_form_is_the_same_model(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path, format="gguf", weight_format="bf16")
    path = form_path(Form("bfloat16", "safetensors"), model, "bf16", tmp_path / "root", TOLD.append)
    assert json.loads((path / "config.json").read_text())["model_type"] == "llama"
    prompt = {"prompt_token_ids": list(range(40, 72))}
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, logprobs=1)
    answers = []
    for each in (model, path):
        with LLM(str(each), dtype="float32", kv_cache_memory_bytes="16MiB", num_threads=1) as llm:
            answers.append(llm.generate(prompt, params)[0].outputs[0])
    assert answers[0].token_ids == answers[1].token_ids
    assert answers[0].cumulative_logprob == pytest.approx(answers[1].cumulative_logprob, rel=1e-4)


def test_model_that_cannot_be_made_again_is_a_reason(tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF but no more")
    with pytest.raises(SetupError, match=r"ended with code 1: .*see .*remake\.log"):
        form_path(Form("Q8_0", "Q8_0"), model, "q4_1", tmp_path / "root", TOLD.append)
