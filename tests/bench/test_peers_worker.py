from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pagemill.bench.peers_worker import Worker, WorkerError
from tests.fixtures import fake_peer

SOURCE = str(Path(__file__).resolve().parents[2] / "src")


@contextmanager
def worker(behaviour: str = "good", timeout_s: float = 60.0) -> Iterator[Worker]:
    command = (sys.executable, fake_peer.__file__, behaviour)
    with Worker(command, timeout_s=timeout_s, python_path=SOURCE) as started:
        yield started


def test_worker_loads_and_answers_whatever_its_libraries_print() -> None:
    with worker() as peer:
        loaded = peer.load("model.gguf", 2, {})
        assert loaded.versions == {"fake": "1", "threads": "2"}
        assert loaded.num_alternatives == 1
        assert peer.generate([[1, 2, 3, 4], [5, 6, 7, 8]], 11) == pytest.approx(0.008 + 0.1)
        assert peer.cpu_s() > 0.0


def test_large_requests_pass_the_pipe() -> None:
    with worker() as peer:
        peer.load("model.gguf", 1, {})
        assert peer.generate([[40_000] * 2048] * 16, 1) == pytest.approx(2048 * 16 / 1000)


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("crash at load", "ended with code 3: no such model here"),
        ("refuse", "ValueError: cannot read model.gguf"),
        ("nonsense", "answered no JSON object: 'warming up!'"),
        ("list", r"answered no JSON object: '\[1, 2\]'"),
        ("empty", "answered a load with {}"),
        ("endless", "with more than 1,048,576 bytes"),
    ],
)
def test_worker_that_fails_to_load_says_how(behaviour: str, message: str) -> None:
    with worker(behaviour) as peer, pytest.raises(WorkerError, match=message):
        peer.load("model.gguf", 2, {})


def test_illegal_instruction_is_recognised() -> None:
    with worker("illegal") as peer:
        with pytest.raises(WorkerError, match="SIGILL \\(an instruction that this machine does not run\\)") as raised:
            peer.load("model.gguf", 2, {})
        assert raised.value.ended_by == signal.SIGILL


def test_worker_that_hangs_is_ended_at_the_timeout() -> None:
    with worker("hang", timeout_s=3.0) as peer:
        peer.load("model.gguf", 2, {})
        began = time.monotonic()
        with pytest.raises(WorkerError, match="no answer to 'generate' within 3 s"):
            peer.generate([[1]], 1)
        assert time.monotonic() - began < 60.0
        with pytest.raises(WorkerError, match="was ended by SIGKILL"):
            peer.generate([[1]], 1)


def test_worker_that_does_not_read_is_ended_at_the_timeout() -> None:
    with worker("deaf", timeout_s=1.0) as peer, pytest.raises(WorkerError, match="no answer to 'generate' within 1 s"):
        peer.generate([[40_000] * 2048] * 32, 1)


def test_answers_of_a_wrong_length_are_refused() -> None:
    with worker("short") as peer:
        peer.load("model.gguf", 2, {})
        with pytest.raises(WorkerError, match=r"asked for 5 tokens of 2 streams and gave \[4, 4\]"):
            peer.generate([[1], [2]], 5)


def test_command_that_cannot_be_started_is_named() -> None:
    with pytest.raises(WorkerError, match="cannot start /nowhere/python"):
        Worker(("/nowhere/python", "x.py"), timeout_s=1.0)


def test_ending_a_worker_twice_does_nothing() -> None:
    with worker() as peer:
        peer.close()
        peer.close()


def test_a_worker_keeps_compiled_modules_whatever_this_process_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """So that a second start is measured, and not the compiler."""
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    (tmp_path / "imported_once.py").write_text("")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import imported_once; input()"
    with Worker((sys.executable, "-c", code), timeout_s=60.0) as peer, pytest.raises(WorkerError, match="ended"):
        peer.load("model.gguf", 1, {})
    assert list((tmp_path / "__pycache__").glob("imported_once.*.pyc"))
