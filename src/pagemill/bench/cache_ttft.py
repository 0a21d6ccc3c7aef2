"""Time to the first token of a prompt whose beginning is in the cache: cold, warm, beside llama.cpp, and where it goes.

Owns these runs. llama.cpp runs in a process of its own (`peers/run_llama_cpp_cached.py`) and keeps the same prefix.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path

from pagemill.base.errors import ConfigError, IntegrityError, ModelError
from pagemill.base.params import SamplingParams
from pagemill.bench.cache_figures import Figure, Settings, Subject, Tell, raise_failures
from pagemill.bench.peers_catalog import PEERS, SCRIPTS, Form
from pagemill.bench.peers_setup import SetupError, find_environment, form_path
from pagemill.bench.peers_worker import Worker, WorkerError
from pagemill.bench.report import Row
from pagemill.bench.step_profile import StageWatch
from pagemill.engine.engine import Engine
from pagemill.execution.runner import Runner
from pagemill.llm import LLM
from pagemill.models.checkpoint import open_checkpoint
from pagemill.text.remembered import RememberingEncoder

GROUP = "ttft"
PEER = "llama.cpp"
PEER_SCRIPT = SCRIPTS / "run_llama_cpp_cached.py"
PEER_WEIGHTS = "Q4_0"  # in which it is fastest
NEW_TOKENS = (4, 32)
CACHED_TOKENS = 4096
GOALS_MS = {4: 15.0, 32: 45.0}
COLD_GOAL = 40.0
PEER_GOAL = 2.0

_LEAST_CACHED = 64
_SHORT = 16
_SENTENCE = "A mill has a wheel, a shaft and two stones, and a miller who minds them all the year. "
_WARM_A_RUN = 3
_STAGE_STEPS = 12
_WORKER_S = 900.0
_FIRST_TOKEN = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, seed=0)


@dataclass(frozen=True, slots=True)
class PeerSettings:
    """Where llama.cpp is: environments as `bench peers` sets them up, or a Python that has it. weights: the model's
    GGUF file, None where it has none."""

    root: Path
    python: str | None
    weights: Path | None


@dataclass(slots=True)
class _Samples:
    """Seconds by engine, and by what was new (0: everything). Mutated as runs end."""

    seconds: dict[tuple[str, int], list[float]] = field(default_factory=lambda: defaultdict(list))

    def ratios(self, above: tuple[str, int], below: tuple[str, int]) -> tuple[float, ...]:
        """Run by run, how many times longer one took than the other, each by its fastest of the run."""
        one, other = self.seconds[above], self.seconds[below]
        runs = min(len(one), len(other) // _WARM_A_RUN) if above[1] == 0 else len(one) // _WARM_A_RUN
        return tuple(self._best(one, above[1], run) / self._best(other, below[1], run) for run in range(runs))

    @staticmethod
    def _best(samples: list[float], new: int, run: int) -> float:
        return samples[run] if new == 0 else min(samples[run * _WARM_A_RUN : (run + 1) * _WARM_A_RUN])


def measure(subject: Subject, settings: Settings, peer: PeerSettings, tell: Tell) -> list[Figure]:
    """Cold and warm runs in turns, ours and llama.cpp's where it can be had.

    Raises IntegrityError where a warm run did not find what it should.
    """
    cached = subject.longest(settings.size(CACHED_TOKENS, 256) + 64) // 16 * 16 - 64
    if cached < _LEAST_CACHED:
        raise ConfigError(
            f"max_model_len is {subject.built.max_model_len:,}, too short for a prefix to be worth caching; raise it, "
            "or leave ttft out of --rows"
        )
    engine = subject.engine(
        2 * cached + 4096, max_num_seqs=4, max_num_batched_tokens=subject.built.config.max_num_batched_tokens
    )
    llm = LLM.from_built(replace(subject.built, engine=engine))
    worker = _start_peer(peer, subject.built.num_threads, tell)
    samples = _Samples()
    try:
        for run in range(settings.num_runs):
            tell(f"first token over {cached:,} cached tokens: run {run + 1} of {settings.num_runs}")
            base = subject.prompt(cached)
            _run_ours(subject, llm, base, samples)
            if worker is not None and not _run_peer(subject, worker, base, samples, tell, cpu_time=settings.cpu_time):
                worker.close()
                worker = None
    finally:
        if worker is not None:
            worker.close()
    found = _figures(samples, cached, full=not settings.quick)
    if isinstance(subject.built.executor, Runner):
        found += _stages(subject, engine, cached)
    return found + _encoding(subject, cached)


def _run_ours(subject: Subject, llm: LLM, base: list[int], samples: _Samples) -> None:
    for new in (0, *(each for _ in range(_WARM_A_RUN) for each in NEW_TOKENS)):
        ids = base + subject.prompt(new or NEW_TOKENS[0])
        began = subject.clock.now()
        [answer] = llm.generate({"prompt_token_ids": ids}, _FIRST_TOKEN)
        samples.seconds["pagemill", new].append(subject.clock.now() - began)
        if answer.error is not None:
            raise answer.error
        wanted = len(base) if new else 0
        # A random token may be the one that came after the same text before: then one more is found.
        if not wanted <= answer.num_cached_tokens <= wanted + max(0, new - 1):
            raise IntegrityError(
                f"{answer.num_cached_tokens:,} of {len(ids):,} prompt tokens were found in the cache and {wanted:,} "
                "should be: a defect of Pagemill; please report it with these options"
            )


def _start_peer(peer: PeerSettings, num_threads: int, tell: Tell) -> Worker | None:
    [known] = [each for each in PEERS if each.name == PEER]
    if peer.weights is None:
        tell(f"{PEER} is left out: the model is no GGUF file")
        return None
    environment = find_environment(known, peer.root, peer.python)
    if environment is None:
        tell(f"{PEER} is left out: `pagemill bench peers --peers {PEER}` sets it up, --python-llama names a Python")
        return None
    try:
        source = open_checkpoint(peer.weights).weight_format
        weights = form_path(Form(PEER_WEIGHTS, PEER_WEIGHTS), peer.weights, source, peer.root, tell)
        worker = Worker((str(environment.python), str(PEER_SCRIPT)), timeout_s=_WORKER_S)
    except (SetupError, WorkerError) as error:
        tell(f"{PEER} is left out: it {error}" if isinstance(error, WorkerError) else f"{PEER} is left out: {error}")
        return None
    try:
        worker.load(str(weights), num_threads, {})
        return worker
    except BaseException as error:
        worker.close()
        if not isinstance(error, WorkerError):
            raise
        tell(f"{PEER} is left out: it {error}")
        return None


def _run_peer(
    subject: Subject, worker: Worker, base: list[int], samples: _Samples, tell: Tell, *, cpu_time: bool
) -> bool:
    """False where it failed. Of a cold run and of each number of new tokens, the faster of its settings counts."""

    try:
        for new in (0, *(each for _ in range(_WARM_A_RUN) for each in NEW_TOKENS)):
            prompt = [base + subject.prompt(new or NEW_TOKENS[0])]
            took = [worker.generate(prompt, 1, setting, cpu_time=cpu_time) for setting in (0, 1)]
            samples.seconds[PEER, new].append(min(took))
    except WorkerError as error:
        tell(f"{PEER} failed and is left out from here on: it {error}")
        return False
    return True


def _figures(samples: _Samples, cached: int, *, full: bool) -> list[Figure]:
    found = []
    for (engine, new), seconds in samples.seconds.items():
        name = f"first token, {new} new over {cached:,} cached" if new else f"first token of {cached + 4:,}, cold"
        goal = GOALS_MS.get(new) if full and engine == "pagemill" else None
        mode = ("warm" if new else "cold") + (f", {PEER_WEIGHTS}" if engine == PEER else "")
        row = Row(name, mode, "ms", tuple(1e3 * each for each in seconds), engine)
        found.append(Figure(GROUP, row, at_most=goal, more={"new": new, "cached": cached}))
    for new in NEW_TOKENS:
        ratios = samples.ratios(("pagemill", 0), ("pagemill", new))
        goal = COLD_GOAL if full and new == NEW_TOKENS[-1] else None
        found.append(Figure(GROUP, Row(f"cold ÷ {new} new", "ratio", "×", ratios), at_least=goal))
        if samples.seconds[PEER, new]:
            ratios = samples.ratios((PEER, new), ("pagemill", new))
            goal = PEER_GOAL if full else None
            found.append(Figure(GROUP, Row(f"{PEER} ÷ pagemill, {new} new", "ratio", "×", ratios), at_least=goal))
    return found


def _stages(subject: Subject, engine: Engine, cached: int) -> list[Figure]:
    """Where a warm first token's time goes. The native call is told apart by repeating it over a short text, which
    leaves weights and head; the rest is attention over what was cached."""
    runner = subject.built.executor
    assert isinstance(runner, Runner)
    base = subject.prompt(cached)
    found = []
    for new in NEW_TOKENS:
        _timed_steps(subject, engine, runner, base, new)  # fills the cache, warms up
        warm = _timed_steps(subject, engine, runner, base, new)
        short = _timed_steps(subject, engine, runner, base[:_SHORT], new)
        weights = min(min(short["native"]), min(warm["native"]))
        parts = {
            "check and queue": warm["queue"],
            "hash, look up, take blocks": warm["schedule"],
            "weights and head": [weights] * len(warm["native"]),
            "attention": [each - weights for each in warm["native"]],
            "sample": warm["sampling"],
            "commit and answer": [sum(each) for each in zip(warm["commit"], warm["deltas"], strict=True)],
        }
        for name, seconds in parts.items():
            row = Row(f"of {new} new over {cached:,}", name, "ms", tuple(1e3 * each for each in seconds))
            found.append(Figure(GROUP, row, more={"new": new, "stage": name}))
    return found


def _timed_steps(subject: Subject, engine: Engine, runner: Runner, base: list[int], new: int) -> dict[str, list[float]]:
    """Seconds of each stage, request by request, each of one step."""
    watch = StageWatch(subject.clock.now)
    steps: dict[str, list[float]] = defaultdict(list)
    engine.on_stage = runner.on_stage = watch.reach
    try:
        for index in range(_STAGE_STEPS):
            ids = base + subject.prompt(new)
            began = subject.clock.now()
            engine.add_request(f"stage {index}", ids, _FIRST_TOKEN)
            queued_s = subject.clock.now() - began
            while engine.has_unfinished:
                watch.begin()
                raise_failures(engine.step())
                spent = watch.end()
            if index:  # the first one reads what is to be cached
                for stage, seconds in spent.items():
                    steps[stage].append(seconds)
                steps["queue"].append(queued_s)
    finally:
        engine.on_stage = runner.on_stage = None
    return steps


def _encoding(subject: Subject, cached: int) -> list[Figure]:
    """What comes before all that where a text is asked and not token ids: making ids of it, anew as for `generate`, and
    of what a turn adds, as sessions do."""
    tokenizer = subject.built.tokenizer
    if tokenizer is None:
        return []
    text = _SENTENCE * -(-cached // len(tokenizer.encode(_SENTENCE, add_special=False)))
    encoder = RememberingEncoder(tokenizer)
    seconds: dict[str, list[float]] = defaultdict(list)
    for index in range(_STAGE_STEPS):
        asked = f"{text} And what is number {index}?"
        for name, encode in (("anew", tokenizer.encode), ("next turn of a session", encoder.encode)):
            began = subject.clock.now()
            encode(asked, add_special=False)
            seconds[name].append(subject.clock.now() - began)
    work = f"ids of a text of {cached:,} tokens"
    return [Figure(GROUP, Row(work, name, "ms", tuple(1e3 * s for s in each[1:]))) for name, each in seconds.items()]


def weights_file(path: Path) -> Path | None:
    """The file that llama.cpp reads too, None where the model is in another form. Raises ModelError without any."""
    if not path.exists():
        raise ModelError(f"{path} is gone; fetch the model again")
    return path if path.is_file() and path.suffix == ".gguf" else None
