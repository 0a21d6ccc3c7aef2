"""R15: the engine by itself, and a whole AsyncLLM with real weights, with an exception planted at one function for one
request. Which functions there are is found by watching a run (`planting.py`).

Whatever the victim is (it may end by a stop, a deadline or its length, leave while it waits, is read or decodes, bring
a grammar, penalties, log-probabilities), it may fail. The others are answered as if nothing had been; no thread ends;
no cache is dropped; nothing is held.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, cast

from pagemill.base.errors import IntegrityError
from pagemill.base.params import CacheOptions, Grammar, SamplingParams
from pagemill.cache.entry import SharingConfig
from pagemill.llm.async_llm import AsyncLLM
from tests.fixtures.fake_engine import Answer, Rig
from tests.fixtures.fake_executor import answer
from tests.trust.figures import Figure
from tests.trust.planting import VICTIM, Owners, Place, PlantedError, Planter
from tests.trust.serving import tiny_model

VOCAB: Final = 1000
NUM_TOKENS: Final = 9
PROMPTS: Final = {
    "one": list(range(10, 23)),
    "two": list(range(10, 19)),
    VICTIM: list(range(500, 511)),
    "three": [7] * 6,
    "four": list(range(10, 25)),
    "five": [*range(500, 508), 3],
}
LATER: Final = ("four", "five")
MOST_STEPS: Final = 200


@dataclass(frozen=True, slots=True, eq=False)
class Life:
    """What the victim asks for, and how it ends. leaves: at this step. num_blocks: of the cache."""

    name: str
    options: dict[str, Any]
    leaves: int = -1
    num_blocks: int = 64

    def __str__(self) -> str:
        return self.name


LIVES: Final = (
    Life("ends by its length", {"n": 2, "stop": ("zz",), "logprobs": 2}),
    Life("leaves while it decodes", {"n": 2, "deadline_s": 9.0}, leaves=5),
    Life("leaves while it waits", {"frequency_penalty": 1.0}, leaves=0),
    Life("runs out of time", {"deadline_s": 0.045}),
    Life("is too late from the beginning", {"deadline_s": 0.02}, num_blocks=12),
    Life("gives way", {"n": 3, "min_tokens": 3}, num_blocks=12),
)


@dataclass(slots=True)
class Run:
    """What one run came to. Mutated by it. wrong: what is wrong, "" where nothing is. victim: what it was told, or the
    error that it ended by; of an AsyncLLM."""

    calls: Counter[Place]
    reached: bool = False
    wrong: str = ""
    num_rebuilds: int = 0
    victim: object = None


def run_engine(life: Life, place: Place | None = None, at: int = 1, *, sharing: bool = True) -> Run:
    """An engine over the fake executor, with the exception at the at-th call of a place for the victim."""
    rig = Rig(
        life.num_blocks, 4, vocab_size=VOCAB, max_num_batched_tokens=16,
        sharing=SharingConfig() if sharing else None,
    )  # fmt: skip
    owners = Owners()
    planter = Planter(owners, place, at, lambda: owners.look_into(rig.engine))
    run = Run(planter.calls)
    try:
        _serve(rig, life, owners, planter)
    except PlantedError as error:
        run.wrong = f"the engine raised what concerns one request: {error}"
    except (AssertionError, IntegrityError) as error:
        run.wrong = f"the engine did not come to an end: {error}"
    run.reached, run.num_rebuilds = planter.raised, rig.engine.stats().cache.num_rebuilds
    run.wrong = run.wrong or _wrong(rig)
    return run


@contextmanager
def _watched(planter: Planter) -> Iterator[None]:
    """The planter sees what is called; a profile function that was there before comes back."""
    before = sys.getprofile()
    sys.setprofile(None if planter.raised else planter)
    try:
        yield
    finally:
        sys.setprofile(before)


def _serve(rig: Rig, life: Life, owners: Owners, planter: Planter) -> None:
    for number in range(MOST_STEPS):
        for name, prompt in PROMPTS.items():
            if number != (8 if name in LATER else 0):
                continue
            options = life.options if name == VICTIM else {}
            params = SamplingParams(temperature=1.0, seed=0, max_tokens=NUM_TOKENS, **options)
            owners.learn(name, params, prompt)
            try:
                with _watched(planter):
                    rig.engine.add_request(name, prompt, params, cache=CacheOptions("t"))
            except PlantedError:
                if name != VICTIM:
                    raise
        if number == life.leaves:
            with _watched(planter):
                try:
                    deltas = rig.engine.abort(VICTIM)
                except PlantedError as error:  # as the engine's thread does
                    deltas = rig.engine.discard(VICTIM, error)
            _take(rig, deltas)
        with _watched(planter):
            deltas = rig.engine.step()
        rig.clock.advance(0.01)
        _take(rig, deltas)
        if number > 8 and not rig.engine.has_unfinished:
            break
    rig.cache.check()  # as the next step does
    rig.cache.verify()
    rig.num_rebuilds = rig.engine.stats().cache.num_rebuilds  # counted apart
    rig.run(most_steps=0)


def _take(rig: Rig, deltas: list[Any]) -> None:
    for delta in deltas:
        got = rig.answers.setdefault((delta.request_id, delta.choice), Answer())
        assert got.finish_reason is None, f"a delta after the last one: {delta}"
        got.token_ids += delta.token_ids
        got.deltas.append(delta)


def _wrong(rig: Rig) -> str:
    for name, prompt in PROMPTS.items():
        for choice in range(3 if name == VICTIM else 1):
            got = rig.answers.get((name, choice))
            whole = answer(prompt, NUM_TOKENS, VOCAB, choice=choice)
            if name != VICTIM and (got is None or (got.finish_reason, got.token_ids) != ("length", whole)):
                return f"request {name!r} was changed: {got and (got.finish_reason, got.token_ids, got.deltas[-1:])}"
            if name == VICTIM and got is not None and got.token_ids != whole[: len(got.token_ids)]:
                return f"the victim was answered wrongly: {got.token_ids}"
            if name == VICTIM and got is not None and got.finish_reason is None:
                return f"the victim's choice {choice} has no end"
    return ""


def plants(found: dict[Life, Counter[Place]], calls: tuple[int, ...]) -> list[tuple[Life, Place, int]]:
    """What to plant of the functions found in each life: each at these of its calls in every life that has it; without
    any calls each once, their lives in turn, at the first, middle and last call in turn."""
    if calls:
        return [
            (life, place, at) for life in found for place in found[life] for at in calls if at <= found[life][place]
        ]
    planted = []
    for index, place in enumerate(sorted({each for life in found.values() for each in life}, key=str)):
        lives = [life for life in found if place in found[life]]
        life = lives[index % len(lives)]
        count = found[life][place]
        planted.append((life, place, (1, (count + 1) // 2, count)[index % 3]))
    return planted


def count_engine(calls: tuple[int, ...] = ()) -> list[Figure]:
    """Every function that works for the victim in any of its lives (`plants`)."""
    found: dict[Life, Counter[Place]] = {}
    for life in LIVES:
        quiet = run_engine(life)
        assert (quiet.wrong, quiet.num_rebuilds) == ("", 0), f"without an exception, the victim {life}"
        found[life] = quiet.calls
    runs = [
        (f"{place}, call {at}, the victim {life}", run_engine(life, place, at))
        for life, place, at in plants(found, calls)
    ]
    return figures_of("of an engine", {each for life in found.values() for each in life}, runs)


def figures_of(where: str, places: set[Place], runs: list[tuple[str, Run]]) -> list[Figure]:
    """What was wrong in runs with an exception each, and how many caches were dropped."""
    reached = [(name, run) for name, run in runs if run.reached]
    wrong = [f"{name}: {run.wrong}" for name, run in runs if run.wrong]
    dropped = [name for name, run in reached if run.num_rebuilds]
    also = {"functions": len(places), **Counter(f"in {place.file.partition('/')[0]}" for place in places)}
    return [
        Figure("R15", f"other requests {where} changed", len(wrong), len(reached), "planted exceptions", also, wrong),
        Figure("R15", f"KV caches {where} dropped", len(dropped), len(reached), "planted exceptions", {}, dropped),
    ]


OTHERS: Final = {
    "one": ([*range(40, 60)], SamplingParams(temperature=0, max_tokens=10, ignore_eos=True, logprobs=2)),
    "two": ([*range(40, 52), 9], SamplingParams(temperature=1, seed=5, max_tokens=10, ignore_eos=True)),
    "three": ([70, 71, 72, 73, 74], SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, prompt_logprobs=1)),
}
VICTIMS_IDS: Final = [*range(100, 121)]
_ASKED: Final = {"temperature": 1.0, "seed": 3, "max_tokens": 8, "ignore_eos": True}
REAL_LIVES: Final = (
    Life(
        "brings a grammar",
        {"grammar": Grammar("regex", "[a-z ]{40,}"), "logprobs": 2, "frequency_penalty": 0.5, "ignore_eos": False},
    ),
    Life("has its prompt reported", {"prompt_logprobs": 2, "n": 2, "stop": ("zzz",), "min_tokens": 2}),
    Life("leaves", {"logit_bias": ((3, 1.0),), "max_tokens": 60}, leaves=2),
    Life("runs out of time", {"deadline_s": 0.02, "max_tokens": 400}),
)
OPTIONS: Final[dict[str, Any]] = {
    "kv_cache_memory_bytes": "8MiB", "max_num_seqs": 6, "packed_weights_cache": "off", "max_num_batched_tokens": 32,
}  # fmt: skip
SETTLED_S: Final = 10.0
Told = tuple[list[int], str, object]


async def run_llm(llm: AsyncLLM, life: Life, place: Place | None = None, at: int = 1) -> tuple[Run, dict[str, Told]]:
    """The same with an AsyncLLM, real weights, real decoding and delivery. Returns the run and what was answered."""
    owners = Owners()
    built = llm.built
    adjuster = built.executor._adjuster  # type: ignore[attr-defined]
    planter = Planter(owners, place, at, lambda: owners.look_into(built.engine, adjuster))
    run = Run(planter.calls)
    victims = SamplingParams(**{**_ASKED, **life.options})
    before = (await llm.stats()).cache.num_rebuilds
    await llm.call(lambda _: sys.setprofile(planter))
    sys.setprofile(planter)
    try:
        asks = [_ask(llm, owners, name, *OTHERS[name]) for name in OTHERS]
        asks.insert(1, _ask(llm, owners, VICTIM, VICTIMS_IDS, victims, leaves=life.leaves))
        one, run.victim, two, three = await asyncio.wait_for(asyncio.gather(*asks, return_exceptions=True), SETTLED_S)
    except TimeoutError:
        run.wrong = "somebody waits for ever"
        return run, {}
    finally:
        sys.setprofile(None)
    told = dict(zip(OTHERS, (one, two, three), strict=True))
    run.reached = planter.raised
    run.wrong = await _left_by(llm)
    if llm.status == "ready":
        await llm.call(lambda _: sys.setprofile(None))
        run.num_rebuilds = (await llm.stats()).cache.num_rebuilds - before
    return run, told  # type: ignore[return-value]


def lost(run: Run, quiet: Run, life: Life) -> str:
    """What is wrong with the victim's own answer: it is whole, or ends by an error; a piece of it is never left out."""
    if isinstance(run.victim, Exception) or life.leaves > 0 or "deadline_s" in life.options:
        return ""
    (tokens, reason, _), (expected, expected_reason, _) = cast(Told, run.victim), cast(Told, quiet.victim)
    if (sorted(tokens), reason) == (sorted(expected), expected_reason):
        return ""
    return f"the victim was answered {len(tokens)} tokens ({reason}) and no error, not {len(expected)}"


async def _ask(
    llm: AsyncLLM, owners: Owners, name: str, ids: list[int], params: SamplingParams, leaves: int = -1
) -> Told:
    """One request to its end, or left at its leaves-th piece; as the server's routes do."""
    owners.learn(name, params, ids)
    stream = await llm.open([(ids, params, CacheOptions("t"))])
    taken: list[int] = []
    reason, told = "", []
    try:
        while not stream.finished:
            for delta in await stream.next():
                if delta.error is not None:
                    raise delta.error
                taken += delta.token_ids
                told += [delta.logprobs, delta.prompt_logprobs] if name in ("one", "three") else []
                reason = delta.finish_reason or reason
            leaves -= 1
            if leaves == 0:
                break
    finally:
        stream.close()
    return taken, reason, told


async def _left_by(llm: AsyncLLM) -> str:
    """What is wrong with an engine that should be idle now."""
    end_s = asyncio.get_running_loop().time() + SETTLED_S
    while llm.status == "ready":
        stats = await llm.stats()
        idle = not (stats.num_running or stats.num_waiting or llm.num_open or llm._thread._open or llm._tickets)
        if idle:
            break
        if asyncio.get_running_loop().time() > end_s:
            return f"something still runs: {stats.num_running} and {stats.num_waiting}, {llm.num_open} open"
        await asyncio.sleep(0.002)
    if llm.status != "ready":
        return f"the engine's status is {llm.status}"
    if stats.cache.num_active_blocks or stats.cache.num_leaked_blocks or stats.cache.num_sequences:
        return f"something is held: {stats.cache}"
    try:
        await llm.call(lambda engine: engine.cache.check())  # as the next step does
        await llm.call(lambda engine: engine.cache.verify())
        if unwiped := await llm.call(lambda engine: engine.cache.moves()):
            return f"nobody runs, and blocks wait to be wiped: {unwiped}"
    except (IntegrityError, AssertionError) as error:
        return f"the cache is wrong: {error}"
    return ""


async def count_llm(model: str, calls: tuple[int, ...] = ()) -> list[Figure]:
    """Every function of an AsyncLLM that works for the victim in any of its lives (`plants`)."""
    found: dict[Life, Counter[Place]] = {}
    whole: dict[Life, Run] = {}
    runs: list[tuple[str, Run]] = []
    llm = AsyncLLM(model, **OPTIONS)
    try:
        await llm.ready()
        for life in REAL_LIVES:
            await run_llm(llm, life)  # nothing is in the cache before
            quiet, expected = await run_llm(llm, life)
            assert (quiet.wrong, quiet.num_rebuilds) == ("", 0), f"without an exception, the victim {life}"
            found[life], whole[life] = quiet.calls, quiet
        for life, place, at in plants(found, calls):
            run, told = await run_llm(llm, life, place, at)
            if not run.wrong and told != expected:
                run.wrong = f"others were answered otherwise: {told}"
            run.wrong = run.wrong or lost(run, whole[life], life)
            runs.append((f"{place}, call {at}, the victim {life}", run))
            if run.wrong:  # what is left is not to be counted again
                llm.shutdown(10)
                llm = AsyncLLM(model, **OPTIONS)
                await llm.ready()
                await run_llm(llm, life)
    finally:
        llm.shutdown(10)
    return figures_of("of an AsyncLLM", {each for life in found.values() for each in life}, runs)


def shard(_number: int) -> list[Figure]:
    """The release size: every function at several of its calls, in every life."""
    logging.disable(logging.CRITICAL)  # each is told to the log
    with tiny_model() as model:
        return [*count_engine((1, 2, 3, 5)), *asyncio.run(count_llm(model, (1, 2, 3)))]
