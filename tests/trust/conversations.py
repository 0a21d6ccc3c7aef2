"""R7: the cache is invisible. Conversations without it, and with it in every state, give the same tokens and logits.

A script of conversations is played once without sharing, one request at a time. Then again in arms: shared, with forks,
in a cache so small that texts are evicted, in one where running sequences are preempted, while texts are purged and
pinned, and while the cache changes its size between steps. Of each token the bits of all its logits are compared.
Models are of every family: with full attention, with layers that all read a window, with some that do.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from pagemill import LLM, SamplingParams
from pagemill.base.errors import CapacityError, RequestError
from pagemill.base.params import CacheOptions
from pagemill.base.step import StepPlan, StepResult
from pagemill.kernels.batch import Batch
from tests.fixtures.tiny import gpt2_config, gpt2_weights, llama_weights, mistral_config, qwen2_config, write_hf
from tests.trust.figures import Figure

CODECS = ("f32", "bf16", "int8", "f16")
FAMILIES = ("llama", "mistral", "qwen2", "gpt2")

Place = tuple[int, int, int]  # seed of the request, choice, position of the token that the logits are for


@dataclass(frozen=True, slots=True)
class Turn:
    """What a user says, and how it is answered: the seed is the turn's own, so that its logits can be told apart."""

    words: list[int]
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class Script:
    """Conversations turn by turn. begins: their first tokens, which some have in common."""

    begins: list[list[int]]
    turns: list[list[Turn]]
    longest: int

    @property
    def num_turns(self) -> int:
        return sum(map(len, self.turns))


def script_of(seed: int, num_conversations: int, num_turns: int, most_words: int, most_tokens: int) -> Script:
    """Conversations over byte tokens. Every third turn has three choices, and one in five a long answer: those grow by
    several blocks, so that sequences are preempted."""
    draw = random.Random(seed)
    systems = [[draw.randrange(250) for _ in range(draw.randint(17, 60))] for _ in range(2)]
    begins = [draw.choice(systems) + [draw.randrange(250)] * draw.randint(0, 2) for _ in range(num_conversations)]
    turns = []
    for conversation in range(num_conversations):
        said = []
        for turn in range(num_turns):
            words = [draw.randrange(250) for _ in range(draw.randint(1, most_words))]
            forks = turn % 3 == 1
            params = SamplingParams(
                temperature=1.0 if forks else 0.0,
                n=3 if forks else 1,
                seed=(seed * 1000 + conversation) * 1000 + turn,
                max_tokens=4 * most_tokens if turn % 5 == 3 else draw.randint(1, most_tokens),
                ignore_eos=True,
            )
            said.append(Turn(words, params))
        turns.append(said)
    num_long = len(range(3, num_turns, 5))
    return Script(begins, turns, 64 + num_turns * (most_words + most_tokens) + num_long * 3 * most_tokens)


@dataclass(slots=True)
class Player:
    """One engine that plays a script. Mutated by `play`. digests: of all logits of each token that was chosen."""

    llm: LLM
    script: Script
    seed: int
    digests: dict[Place, bytes] = field(default_factory=dict)
    answers: dict[tuple[int, int, int], list[int]] = field(default_factory=dict)
    draw: random.Random = field(init=False)
    _plan: StepPlan | None = None

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)
        executor: Any = self.llm.built.executor
        run, forward = executor.run, executor.model.forward_best

        def running(plan: StepPlan) -> StepResult:
            self._plan = plan
            result: StepResult = run(plan)
            return result

        def computing(batch: Batch, _best_only: bool = False) -> Any:
            logits, best = forward(batch)  # all logits, whatever is asked for
            assert self._plan is not None
            sampling = [each for each in self._plan.sequences if each.sample]
            for each, row in zip(sampling, logits, strict=True):
                digest = blake2b(row.tobytes(), digest_size=16).digest()
                self.digests[each.seed, each.choice, each.end] = digest
            return logits, best

        executor.run, executor.model.forward_best = running, computing

    def play(self, together: int, between: Callable[[Player], None] = lambda _player: None) -> Player:
        """All conversations, `together` of them at a time; `between` is called after each step."""
        engine, num_turns = self.llm.built.engine, len(self.script.turns[0])
        histories = [list(each) for each in self.script.begins]
        for turn in range(num_turns):
            for first in range(0, len(histories), together):
                group = range(first, min(first + together, len(histories)))
                for index in group:
                    histories[index] += self.script.turns[index][turn].words
                    engine.add_request(f"{index}.{turn}", histories[index], self.script.turns[index][turn].params)
                while engine.has_unfinished:
                    for delta in engine.step():
                        assert delta.error is None, delta.error
                        name = (*map(int, delta.request_id.split(".")), delta.choice)
                        self.answers.setdefault(name, []).extend(delta.token_ids)  # type: ignore[arg-type]
                    between(self)
                for index in group:
                    histories[index] += self.answers[index, turn, 0]
        return self


def purging(player: Player) -> None:
    """Now and then something that is cached goes, or is pinned."""
    draw, engine = player.draw, player.llm.built.engine
    shared = engine.cache.shared
    assert shared is not None
    if draw.random() > 0.1:
        return
    text, options = array("i", draw.choice(player.script.begins)), CacheOptions()
    engine.advance_clock()
    kind = draw.randrange(4)
    if kind == 0:
        shared.purge_prefix(options, text[: draw.randint(0, len(text))])
    elif kind == 1:
        shared.purge_tenant("default")
    elif kind == 2:
        shared.purge_text(options, text)
    else:
        try:
            shared.pin(options, text, 0.01)
        except RequestError as error:
            if "nothing of this text" not in str(error):
                raise
    engine.settle()


def resizing(player: Player) -> None:
    """Now and then another size; one that does not hold what runs is refused."""
    if player.draw.random() < 0.2:
        most = 4 * blocks_of(player)
        try:
            player.llm.built.engine.resize_cache(player.draw.randint(blocks_of(player), most))
        except CapacityError:
            return


def blocks_of(player: Player) -> int:
    """Blocks of the longest conversation."""
    return -(-player.script.longest // player.llm.built.kv_spec.block_size)


def compare(model: str, codec: str, script: Script, seed: int) -> Figure:
    """Every arm against the engine that shares nothing. Counts turns compared."""

    def make(num_blocks: int, **options: object) -> LLM:
        return LLM(
            model, kv_cache_dtype=codec, kv_cache_memory_bytes=str(num_blocks * size), **{**fixed, **options}
        )  # fmt: skip

    fixed: dict[str, object] = {"max_model_len": script.longest, "max_num_batched_tokens": 128}
    with LLM(model, kv_cache_dtype=codec, kv_cache_memory_bytes="64MiB", max_model_len=script.longest) as probe:
        size, block_size = probe.built.kv_spec.block_bytes, probe.built.kv_spec.block_size
    longest = -(-script.longest // block_size)
    count = len(script.begins)
    with make(3 * longest, enable_prefix_caching="off") as llm:
        assert not llm.built.kv_spec.window_pages  # every position of every layer is kept
        plain = Player(llm, script, seed).play(1)
    met = {"logits compared": 0, "arms": 0, "evictions": 0, "preemptions": 0, "tokens hit": 0}
    replays, num_failures = [], 0
    arms: dict[str, tuple[int, int, Callable[[Player], None]]] = {
        "shared": (count * 3 * longest, count, lambda _player: None),
        "evicted": (longest + longest // 2 + 2, 1, lambda _player: None),
        "preempted": (longest + 2, count, lambda _player: None),
        "purged": (2 * longest, count, purging),
        "resized": (2 * longest, count, resizing),
    }
    for name, (num_blocks, together, between) in arms.items():
        with make(num_blocks) as llm:
            arm = Player(llm, script, seed).play(together, between)
            stats = llm.stats()
            shared = llm.built.engine.cache.shared
            windows = shared.windows.groups if shared is not None and shared.windows is not None else ()
        num_wrong, first = difference(plain, arm)
        if num_wrong:
            num_failures += num_wrong
            replays.append(f"arm {name}, {codec}: {first}")
        met["arms"] += 1
        met["logits compared"] += len(arm.digests)
        met["evictions"] += stats.cache.num_evicted_blocks
        met["preemptions"] += stats.num_preemptions
        met["tokens hit"] += stats.cache.num_hit_tokens
        if windows:
            pages = sum(each.num_wiped for each in windows)
            met["pages of windows that left"] = met.get("pages of windows that left", 0) + pages
    num_turns = script.num_turns * len(arms)
    return Figure("R7", "turns whose tokens or logits differ", num_failures, num_turns, "turns in arms", met, replays)


def difference(plain: Player, arm: Player) -> tuple[int, str]:
    """How many turns differ between two players, and the first of them."""
    wrong = [place for place, digest in plain.digests.items() if arm.digests.get(place) != digest]
    seeds = {place[0] for place in wrong}
    for name, tokens in plain.answers.items():
        if arm.answers.get(name) != tokens:
            seeds.add(plain.script.turns[name[0]][name[1]].params.seed or 0)
    first = f"turn {min(seeds)}, logits at {wrong[:1]}" if seeds else ""
    return len(seeds), first


def family_of(seed: int) -> str:
    """Four seeds in a row, which are the codecs, have the same."""
    return FAMILIES[seed // len(CODECS) % len(FAMILIES)]


def checkpoint_of(model: str, family: str) -> str:
    """A tiny checkpoint of a family, beside that of llama."""
    if family == "llama":
        return model
    folder = Path(model).parent / f"conversations-{family}"
    if not folder.exists():
        configs = {
            "mistral": mistral_config(window=40),
            "qwen2": qwen2_config(window=40, first=2, layers=4),
            "gpt2": gpt2_config(),
        }
        config = configs[family]
        write_hf(folder, config, gpt2_weights(config, 5) if family == "gpt2" else llama_weights(config, 5))
    return str(folder)


def count_tiny(model: str, seed: int) -> Figure:
    """One script of 100 turns on a tiny model, in a family and a codec that the seed says. model: a llama."""
    codec = CODECS[seed % len(CODECS)]
    return compare(checkpoint_of(model, family_of(seed)), codec, script_of(seed, 10, 10, 24, 9), seed)


def count_default(model: str, seed: int) -> Figure:
    """One script of 20 turns on the default model."""
    return compare(model, "auto", script_of(seed, 4, 5, 12, 6), seed)
