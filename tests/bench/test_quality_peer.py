"""llama.cpp beside `bench quality`: a made-up one that is a real process, and the real one's arithmetic on a made-up
library."""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from pagemill.base.config import EngineConfig
from pagemill.base.errors import ConfigError
from pagemill.bench import quality_peer
from pagemill.bench.peers_catalog import SCRIPTS, Peer
from pagemill.bench.quality import Measurement, Scores, Settings, Subject, measure, open_subject
from pagemill.bench.quality_modes import REFERENCE
from pagemill.bench.quality_peer import PeerPlace, find_peer, measure_peer
from pagemill.bench.quality_report import make_peer_rows, make_report, make_tables, remarks
from pagemill.cli import quality as command
from tests.fixtures.tiny import tiny_llama

VOCAB = 272

# Every token costs its own id in thousandths of a nat, so that windows and what is scored of them can be told.
FAKE = """
import sys
sys.path.insert(0, {scripts!r})
from worker_protocol import serve

class Fake:
    def __init__(self, model, num_threads, options):
        if {behaviour!r} == "refuse":
            raise ValueError(f"cannot read {{model}}")
        self.versions, self.num_alternatives, self.num_windows = {{"fake": "1"}}, 1, 0

    def prepare(self, prompts, num_tokens, alternative):
        pass

    def generate(self, prompts, first, alternative):
        self.num_windows += 1
        if {behaviour!r} == "crash later" and self.num_windows == 2:
            sys.exit(3)
        if {behaviour!r} == "not finite":
            return [[float("nan"), len(prompts[0]) - 1 - first]]
        if {behaviour!r} == "short":
            return [[1.0, 2]]
        if {behaviour!r} == "nonsense":
            return ["warm"]
        return [[sum(window[first + 1:]) / 1000, len(window) - 1 - first] for window in prompts]

serve(Fake)
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 random capital letters, a token each."""
    path = tmp_path_factory.mktemp("text") / "letters.txt"
    path.write_bytes(bytes(np.random.RandomState(3).randint(65, 91, 300).astype(np.uint8)))
    return path


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Subject:
    """A random llama in a GGUF file, float32 alone."""
    model = tiny_llama(tmp_path_factory.mktemp("q4"), format="gguf", weight_format="q4_1", vocab=VOCAB)
    return open_subject(EngineConfig(model=str(model), num_threads=1), Settings(text, (REFERENCE,), (64, 100)))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> PeerPlace:
    """The made-up peer."""
    script = tmp_path / "worker.py"
    script.write_text(FAKE.format(scripts=str(SCRIPTS), behaviour=getattr(request, "param", "good")))
    monkeypatch.setattr(quality_peer, "PEER_SCRIPT", script)
    return PeerPlace(Path(sys.executable))


class Unwatched:
    def advanced(self, num_tokens: int) -> None: ...

    def ended(self, scores: Scores, num_windows: int) -> None: ...


def measured(subject: Subject, text: Path, contexts: tuple[int, ...] = (64,), windows: int = 3) -> Measurement:
    return measure(subject, Settings(text, (REFERENCE,), contexts, (windows,)), Unwatched())


def told(line: str) -> None:
    assert line.startswith("llama.cpp: ")


def test_the_peer_scores_the_second_half_of_the_very_windows(subject: Subject, text: Path, place: PeerPlace) -> None:
    found = measured(subject, text, (64, 100))
    peer = measure_peer(subject, found, place, told)
    ids = np.frombuffer(text.read_bytes(), np.uint8)
    for n_ctx in (64, 100):
        scored = [ids[i * n_ctx + n_ctx // 2 + 1 : (i + 1) * n_ctx] for i in range(3)]
        assert peer.nll[n_ctx] == pytest.approx([each.mean() / 1000 for each in scored])
    assert (peer.absent, peer.versions) == (None, {"fake": "1"})
    rows = make_peer_rows(subject, found.scores, peer)
    assert [(row["n_ctx"], row["windows"], row["tokens"]) for row in rows] == [(64, 3, 3 * 31), (100, 3, 3 * 49)]
    for row, scores in zip(rows, found.scores, strict=True):
        own = np.concatenate(scores.nll[REFERENCE]).mean()
        assert row["ppl"] == pytest.approx(math.exp(np.mean(peer.nll[row["n_ctx"]])), rel=1e-5)
        assert row["ppl_ref"] == pytest.approx(math.exp(own), rel=1e-5)
        assert row["ppl_ratio"] == pytest.approx(row["ppl"] / row["ppl_ref"], rel=1e-4)
        assert (row["verdict"], row["gate"]) == ("miss", {"ppl_difference": 0.005})


def test_the_row_stands_in_the_table_with_the_goal(subject: Subject, text: Path, place: PeerPlace) -> None:
    found = measured(subject, text)
    report = make_report(
        subject, Settings(text, (REFERENCE,), (64,), (3,)), found, measure_peer(subject, found, place, told)
    )
    printed = io.StringIO()
    for table in make_tables(report):
        Console(width=80, file=printed).print(table)
    lines = printed.getvalue().splitlines()
    [at] = [i for i, line in enumerate(lines) if "llama.cpp" in line]
    assert lines[at].split()[-1] == "miss"
    assert (lines[at + 1].split()[0], lines[at + 1].split()[-1]) == ("float32/f32", "±0.5%")
    assert any("our float32 is to be within 0.5% of it" in line for line in remarks(report))


@pytest.mark.parametrize(
    ("place", "num_windows", "message"),
    [
        ("refuse", 0, "llama.cpp is left out: it ValueError: cannot read "),
        ("crash later", 1, "llama.cpp stopped early: it ended with code 3"),
        ("short", 0, "llama.cpp is left out: it scored 2 tokens with 1 nats; 31 were asked for"),
        ("not finite", 0, "llama.cpp is left out: it scored 31 tokens with nan nats"),
        ("nonsense", 0, "llama.cpp is left out: it answered a window with {"),
    ],
    indirect=["place"],
)
def test_a_peer_that_fails_keeps_its_whole_windows_and_says_how(
    subject: Subject, text: Path, place: PeerPlace, num_windows: int, message: str
) -> None:
    found = measured(subject, text)
    peer = measure_peer(subject, found, place, told)
    assert (peer.absence or "").startswith(message)
    assert [row["windows"] for row in make_peer_rows(subject, found.scores, peer)] == [num_windows] * bool(num_windows)


def test_an_interruption_keeps_the_windows_measured_by_then(subject: Subject, text: Path, place: PeerPlace) -> None:
    calls = iter(range(10))
    peer = measure_peer(subject, measured(subject, text), place, told, interrupted=lambda: next(calls) == 3)
    assert (len(peer.nll[64]), peer.interrupted) == (2, True)
    assert peer.absence == "llama.cpp stopped early: interrupted"


def test_a_model_that_is_no_gguf_file_has_no_row_and_the_reason(tmp_path: Path, text: Path, place: PeerPlace) -> None:
    model = tiny_llama(tmp_path / "hf", vocab=VOCAB)
    safetensors = open_subject(EngineConfig(model=str(model), num_threads=1), Settings(text, (REFERENCE,), (64,)))
    peer = measure_peer(safetensors, measured(safetensors, text, windows=1), place, told)
    assert (peer.absence or "").startswith("llama.cpp is left out: it reads GGUF files alone, and ")
    assert not peer.nll


def test_where_the_peer_is_found_or_why_it_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality_peer, "PEERS", (Peer("llama.cpp", "json", "", ("json",), (), 0),))
    assert find_peer("", tmp_path, sys.executable).python == Path(sys.executable)
    missing = find_peer("llama.cpp", tmp_path, None)
    assert missing.python is None
    assert f"not installed in {tmp_path}; `pagemill bench peers --peers llama.cpp` sets it up" in missing.absent
    assert find_peer("none", tmp_path, None) == PeerPlace(None, "--peer none was given")
    with pytest.raises(ConfigError, match=r"--peer: unknown 'vllm'; give llama\.cpp, or none"):
        find_peer("vllm", tmp_path, None)
    with pytest.raises(ConfigError, match="--python-llama is of no use with --peer none"):
        find_peer("none", tmp_path, sys.executable)
    with pytest.raises(ConfigError, match="cannot import json"):
        find_peer("", tmp_path, "/nowhere/python")


def asked(model: Path, path: Path, output: Path, **more: Any) -> int:
    arguments = {"model": str(model), "num_threads": "1", "dtype": "float32"}
    given = {"text": str(path), "n_ctx": "64", "windows": "2", "apart": "", "output": str(output), "as_json": True}
    engine = {"arguments": arguments, "file": None}
    return command.quality(engine=engine, environments=str(output / "none"), **given | more)


def test_the_command_reports_the_peer_or_one_line_why_not(
    subject: Subject,
    text: Path,
    place: PeerPlace,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quality_peer, "PEERS", (Peer("llama.cpp", "json", "", ("json",), (), 0),))
    assert asked(subject.checkpoint.path, text, tmp_path, python_llama=sys.executable) == 0
    peer = json.loads(capsys.readouterr().out)["peer"]
    assert (peer["name"], peer["weights"], peer["absent"], len(peer["rows"])) == ("llama.cpp", "q4_1", None, 1)
    assert asked(subject.checkpoint.path, text, tmp_path) == 0
    printed = capsys.readouterr()
    assert len([line for line in printed.err.splitlines() if "llama.cpp is left out: not installed" in line]) == 1
    assert json.loads(printed.out)["peer"]["rows"] == []


def test_a_missing_text_says_where_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--text is missing: .*wiki\.test\.raw of WikiText-2.*any other text"):
        asked(tmp_path, tmp_path, tmp_path, text=None)


def test_the_workers_arithmetic_is_that_of_plain_numpy(tmp_path: Path) -> None:
    """The script on a made-up library whose logits follow from token and position."""
    (tmp_path / "llama_cpp.py").write_text(LIBRARY)
    (tmp_path / "worker.py").write_text(
        f"import runpy, sys\nsys.path[:0] = [{str(tmp_path)!r}, {str(SCRIPTS)!r}, *{[p for p in sys.path if p]!r}]\n"
        f"runpy.run_path({str(SCRIPTS / 'run_llama_cpp_scores.py')!r}, run_name='__main__')\n"
    )
    window = np.random.RandomState(5).randint(0, 7, 1200).tolist()
    with quality_peer.ScoringWorker((sys.executable, str(tmp_path / "worker.py")), timeout_s=60.0) as worker:
        worker.load("model.gguf", 1, {})
        for length in (1200, 9, 1200):
            part, first, nats = window[:length], length // 2, []
            for at in range(first, length - 1):
                logits = np.sin(np.arange(7.0) * (part[at] + 1) + at).astype(np.float32).astype(np.float64)
                nats.append(np.log(np.exp(logits).sum()) - logits[part[at + 1]])
            assert worker.score(part, first) == pytest.approx(np.mean(nats), rel=1e-9)


LIBRARY = """
import ctypes
from types import SimpleNamespace
import numpy as np

__version__ = "made up"
LLAMA_FLASH_ATTN_TYPE_DISABLED, LLAMA_FLASH_ATTN_TYPE_ENABLED = 0, 1
llama_backend_init = llama_free = lambda *any: None
llama_log_callback = llama_log_set = lambda *any: None
llama_model_default_params = lambda: None
llama_model_load_from_file = llama_model_get_vocab = lambda *any: "model"
llama_vocab_n_tokens = lambda vocab: 7
llama_print_system_info = lambda: b"none"
llama_context_default_params = SimpleNamespace
llama_get_memory = lambda context: context

def llama_init_from_model(model, params):
    return SimpleNamespace(size=params.n_ctx, read=0, rows={})

def llama_batch_init(size, embedded, sequences):
    empty = lambda: [0] * size
    return SimpleNamespace(
        n_tokens=0, token=empty(), pos=empty(), n_seq_id=empty(), seq_id=[[0] for _ in empty()], logits=empty()
    )

def llama_memory_clear(context, data):
    context.read = 0

def llama_decode(context, batch):
    context.rows = {}
    for index in range(batch.n_tokens):
        if batch.pos[index] != context.read or context.read >= context.size:
            return 1
        context.read += 1
        if batch.logits[index]:
            angle = np.arange(7.0) * (batch.token[index] + 1) + batch.pos[index]
            context.rows[index] = (ctypes.c_float * 7)(*np.sin(angle))
    return 0

def llama_get_logits_ith(context, index):
    return ctypes.cast(context.rows[index], ctypes.POINTER(ctypes.c_float))
"""
