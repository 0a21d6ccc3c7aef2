"""llama.cpp's perplexity on the very file and the very windows of `bench quality`, beside our float32.

Owns where it is found, the worker, and its windows. It runs in a process of its own
(`peers/run_llama_cpp_scores.py`) once our modes are done; rows and their gate are `quality_report`'s.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pagemill.base.errors import ConfigError
from pagemill.bench.peers_catalog import PEERS, SCRIPTS
from pagemill.bench.peers_setup import Tell, find_environment
from pagemill.bench.peers_worker import Worker, WorkerError
from pagemill.bench.quality import Measurement, Scores, Subject

PEER = "llama.cpp"
PEER_SCRIPT = SCRIPTS / "run_llama_cpp_scores.py"
NO_PEER = "none"

_WORKER_S = 900.0
_LINE_S = 10.0
_INTERRUPTED = "interrupted"


@dataclass(frozen=True, slots=True)
class PeerPlace:
    """A Python that has llama.cpp, or why there is none."""

    python: Path | None = None
    absent: str = "not asked for"


@dataclass(slots=True)
class PeerScores:
    """What llama.cpp found. Mutated as windows end. nll: by n_ctx, of each window the mean over its scored tokens, in
    nats. absent: why there are no windows, or no more of them; None where all are there. interrupted: by the user."""

    nll: dict[int, list[float]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    absent: str | None = None
    interrupted: bool = False

    @property
    def absence(self) -> str | None:
        """`absent` as a line for people."""
        if self.absent is None:
            return None
        return f"{PEER} {'stopped early' if any(self.nll.values()) else 'is left out'}: {self.absent}"


class ScoringWorker(Worker):
    """The process of `run_llama_cpp_scores.py`."""

    def __enter__(self) -> ScoringWorker:
        return self

    def score(self, window: list[int], first: int) -> float:
        """Mean of the negative log-likelihoods, in nats, of the tokens after positions first … len - 2.

        Raises WorkerError.
        """
        answer = self._ask({"do": "generate", "prompts": [window], "tokens": first, "alternative": 0})
        try:
            [[nats, count]] = answer["tokens"]
            nats, count = float(nats), int(count)
        except (KeyError, TypeError, ValueError):
            raise WorkerError(f"answered a window with {str(answer)[:200]}") from None
        if count != len(window) - 1 - first or not math.isfinite(nats):
            raise WorkerError(f"scored {count} tokens with {nats:g} nats; {len(window) - 1 - first} were asked for")
        return nats / count


def find_peer(name: str, root: Path, python: str | None) -> PeerPlace:
    """Where llama.cpp is. name: as `--peer` gives it, "" where it does not. root: directory of environments. python:
    one that has it.

    Raises ConfigError for another name, and for a Python that has no llama.cpp.
    """
    if name not in ("", PEER, NO_PEER):
        raise ConfigError(f"--peer: unknown {name!r}; give {PEER}, or {NO_PEER} to leave it out")
    if name == NO_PEER:
        if python is not None:
            raise ConfigError(f"--python-llama is of no use with --peer {NO_PEER}; leave one of them out")
        return PeerPlace(absent=f"--peer {NO_PEER} was given")
    [known] = [each for each in PEERS if each.name == PEER]
    environment = find_environment(known, root, python)
    if environment is None:
        how = f"`pagemill bench peers --peers {PEER}` sets it up, --python-llama names a Python that has it"
        return PeerPlace(absent=f"not installed in {root}; {how}")
    return PeerPlace(environment.python)


def measure_peer(
    subject: Subject,
    found: Measurement,
    place: PeerPlace,
    tell: Tell,
    *,
    interrupted: Callable[[], bool] = lambda: False,
) -> PeerScores:
    """llama.cpp on the windows that `found` holds. A failure of its is told and ends its windows, nothing else.

    interrupted: asked between windows; once True, those measured by then are returned.
    """
    peer = PeerScores()
    if place.python is None:
        peer.absent = place.absent
    elif subject.checkpoint.source_format != "gguf":
        peer.absent = f"it reads GGUF files alone, and {subject.checkpoint.path} is none"
    elif found.interrupted or interrupted():
        peer.absent, peer.interrupted = _INTERRUPTED, True
    else:
        tell(f"{PEER}: {subject.checkpoint.path.name} over the same windows …")
        try:
            with ScoringWorker((str(place.python), str(PEER_SCRIPT)), timeout_s=_WORKER_S) as worker:
                peer.versions = worker.load(str(subject.checkpoint.path), subject.num_threads, {}).versions
                peer.interrupted = not all(
                    _run(subject, worker, each, peer, tell, interrupted) for each in found.scores
                )
                peer.absent = _INTERRUPTED if peer.interrupted else None
        except WorkerError as error:
            peer.absent = f"it {error}"
    return peer


def _run(
    subject: Subject,
    worker: ScoringWorker,
    scores: Scores,
    peer: PeerScores,
    tell: Tell,
    interrupted: Callable[[], bool],
) -> bool:
    """Every window of one n_ctx; False where it was interrupted."""
    means = peer.nll.setdefault(scores.n_ctx, [])
    told_s = time.monotonic()
    for index in range(scores.num_windows):
        if interrupted():
            return False
        if time.monotonic() - told_s > _LINE_S:
            told_s = time.monotonic()
            tell(f"{PEER}: n_ctx {scores.n_ctx:,}, window {index + 1} of {scores.num_windows}")
        means.append(worker.score(subject.window(scores.n_ctx, index).tolist(), scores.n_ctx // 2))
    return True
