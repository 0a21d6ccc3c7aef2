"""R14: scheduler, cache, clock and faults in one thread, all drawn from one seed.

A seed draws an engine over the fake executor (`tests/fixtures/fake_engine.py`), tenants with quotas, requests whose
prompts begin alike, and what befalls them: aborts, failing steps, rows without an answer, decoders that raise, pins,
purges, other sizes, time that passes. What must hold: each answer equals the specification's as far as it goes, what
ends otherwise says a reason that it may have, what is pinned stays until its lease ends, no block is lost, everything
ends within a bound of steps, and what is purged is wiped. What it cannot see, as nothing of it changes an answer: who
shared what with whom (S2), and which block was evicted (R5).
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pagemill.base.errors import CapacityError, ConfigError, RequestError
from pagemill.base.params import CacheOptions, Retain, SamplingParams
from pagemill.base.step import SampleFailure, StepPlan, StepResult
from pagemill.cache.leases import Lease
from tests.fixtures.fake_engine import Rig
from tests.fixtures.fake_executor import InjectedFaultError, answer, decode_bytes
from tests.fixtures.policy_makers import SHIPPED, sharing_of
from tests.trust.figures import Figure

VOCAB = 64
EOS = (3,)
MOST_STEPS = 20_000
TENANTS = ("a", "b", "c")
SALTS = (None, "x")
FAULTS = ("InjectedFaultError", "status 500", "DecodeError")


class WrongError(AssertionError):
    """The simulation found something that must not be."""


class DecodeError(ValueError):
    """A decoder that a test told to fail."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A request as a seed draws it. most_positions: that its tenant's cap has; None for no cap."""

    prompt: tuple[int, ...]
    params: SamplingParams
    options: CacheOptions
    most_positions: int | None

    def expected(self, choice: int, max_model_len: int) -> list[int]:
        """What the specification answers. Behind the last position of a cap is a token that is never computed."""
        assert self.params.max_tokens is not None
        assert self.params.seed is not None
        most = min(self.params.max_tokens, max_model_len - len(self.prompt))
        if self.most_positions is not None:
            most = min(most, self.most_positions + 1 - len(self.prompt))
        return answer(self.prompt, most, VOCAB, seed=self.params.seed, choice=choice, stop_ids=EOS)


@dataclass(slots=True)
class Counts:
    """What simulations met. Mutated by each."""

    steps: int = 0
    requests: int = 0
    preemptions: int = 0
    evictions: int = 0
    faults: int = 0
    hits: int = 0


class Simulation:
    """One seed. Mutated by `run`."""

    def __init__(self, seed: int) -> None:
        self.draw = draw = random.Random(seed)
        block_size = draw.randint(1, 6)
        self.rig = Rig(
            num_blocks=draw.choice((draw.randint(2, 12), draw.randint(12, 60))),
            block_size=block_size,
            max_model_len=draw.randint(12, 48),
            vocab_size=VOCAB,
            max_num_seqs=draw.randint(1, 6),
            max_num_batched_tokens=draw.choice((1, 3, 8, 32, 128)),
            eos=EOS,
            fault=lambda _step: self._strikes("step"),
            decode=self._decode,
            seed=seed,
            sharing=sharing_of(draw.choice(SHIPPED)),
        )
        run = self.rig.executor.run
        self.rig.executor.run = lambda plan: self._with_failures(run(plan), plan)  # type: ignore[method-assign]
        self.rate = draw.choice((0.0, 0.01, 0.1))
        self.calm = False
        self.asked: dict[str, Ask] = {}
        self.aborted: set[str] = set()
        self.counts = Counts()
        self._pins: list[tuple[CacheOptions, array[int], Lease]] = []
        self._texts: list[tuple[int, ...]] = [tuple(draw.randrange(4) for _ in range(20))]
        self._caps: dict[str, int] = {}  # blocks by tenant
        self._quotas()

    def _strikes(self, _where: str) -> bool:
        struck = not self.calm and self.draw.random() < self.rate
        self.counts.faults += struck
        return struck

    def _decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        if token_ids and self._strikes("decode"):
            raise DecodeError("a decoder was told to fail")
        return decode_bytes(token_ids, skip_special_tokens)

    def _with_failures(self, result: StepResult, plan: StepPlan) -> StepResult:
        """Some rows come without an answer, as where their logits hold no number."""
        lost = [sample.seq_id for sample in result.samples if self._strikes("row")]
        if not lost:
            return result
        kept = tuple(sample for sample in result.samples if sample.seq_id not in lost)
        return StepResult(kept, tuple(SampleFailure(seq_id, "status 500") for seq_id in lost))

    def _quotas(self) -> None:
        shared, draw = self.rig.cache.shared, self.draw
        assert shared is not None
        shared.tenancy.declare_public("p")
        for tenant in TENANTS:
            if draw.random() < 0.3:
                floor, cap = draw.randint(0, 4), draw.choice((None, draw.randint(1, 30)))
                try:
                    shared.set_quota(tenant, floor, cap)
                except ConfigError:
                    continue
                if cap is not None:
                    self._caps[tenant] = cap

    def run(self) -> Counts:
        """Traffic for a while, then calm until all has ended; raises what it finds."""
        for _ in range(self.draw.randint(20, 120)):
            self._befall()
        self.calm = True
        self._finish()
        for name, ask in self.asked.items():
            for choice in range(ask.params.n):
                self._compare(name, ask, choice)
        stats = self.rig.engine.stats()
        self.counts.steps, self.counts.preemptions = stats.num_steps, stats.num_preemptions
        self.counts.evictions, self.counts.hits = stats.cache.num_evicted_blocks, stats.cache.num_hit_tokens
        self.counts.requests = len(self.asked)
        return self.counts

    def _finish(self) -> None:
        for _ in range(MOST_STEPS):
            if not self.rig.engine.has_unfinished:
                break
            self.rig.step()
        else:
            raise WrongError(f"still unfinished after {MOST_STEPS} steps: {self.rig.engine.stats()}")
        self.rig.engine.settle()
        self.rig.clock.advance(1e6)
        self.rig.engine.advance_clock()
        self.rig.assert_empty()
        self._purge_all()

    def _purge_all(self) -> None:
        """Nothing is left of any text, in the index or in a block."""
        rig, shared = self.rig, self.rig.cache.shared
        assert shared is not None
        for tenant in TENANTS:
            shared.purge_tenant(tenant)
        for salt in SALTS:
            shared.purge_namespace(CacheOptions(TENANTS[0], salt, "p"))
        rig.engine.settle()
        stats, written = rig.cache.stats(), [each for each in rig.executor._store if each is not None]
        if stats.num_free_blocks != rig.cache.num_blocks or written:
            raise WrongError(f"{len(written)} positions are left after a purge of all: {stats}")

    def _check_pins(self) -> None:
        """What is under a lease is there."""
        rig, shared = self.rig, self.rig.cache.shared
        assert shared is not None
        self._pins = [each for each in self._pins if each[2].expires_s > rig.clock.now()]
        for options, tokens, lease in self._pins:
            found = shared.chain_of(options, tokens, covering=True)[: len(lease.blocks)]
            if [node.block for node in found] != list(lease.blocks):
                raise WrongError(f"of {lease} only blocks {[node.block for node in found]} are left")

    def _befall(self) -> None:
        draw, rig = self.draw, self.rig
        kind = draw.random()
        if kind < 0.25:
            self._ask()
        elif kind < 0.85:
            for _ in range(draw.randint(1, 4)):
                rig.step()
        elif kind < 0.91 and self.asked:
            name = draw.choice(list(self.asked))
            rig.abort(name)
            self.aborted.add(name)
        elif kind < 0.94:
            rig.clock.advance(draw.choice((0.5, 5.0, 100.0)))
        else:
            self._operate(draw.choice(("pin", "purge", "tenant", "resize")))
        self._check_pins()

    def _operate(self, kind: str) -> None:
        draw, rig, options = self.draw, self.rig, self._options()
        shared = rig.cache.shared
        assert shared is not None
        rig.engine.advance_clock()
        tokens = array("i", draw.choice(self._texts))
        if kind == "pin":
            try:
                lease = shared.pin(options, tokens, draw.choice((0.05, 1.0)))
            except CapacityError:
                return
            except RequestError as error:
                if "nothing of this text" not in str(error):
                    raise
                return
            self._pins.append((options, tokens, lease))
            rig.cache.verify()
            return
        self._pins = []  # those of what is purged end, and another size moves blocks
        if kind == "purge":
            shared.purge_prefix(options, tokens[: draw.randint(0, len(tokens))])
            rig.engine.settle()
        elif kind == "tenant":
            shared.purge_tenant(options.tenant)
            rig.engine.settle()
        else:
            self._resize()
        rig.cache.verify()

    def _resize(self) -> None:
        rig = self.rig
        before = rig.cache.stats()
        try:
            rig.engine.resize_cache(self.draw.randint(1, 60))
        except (CapacityError, ConfigError):
            if rig.cache.num_blocks != before.num_blocks:
                raise WrongError("a refused size was taken") from None

    def _ask(self) -> None:
        draw, rig, name = self.draw, self.rig, f"r{len(self.asked)}"
        begin = draw.choice(self._texts)
        prompt = (*begin[: draw.randint(1, len(begin))], *(draw.randrange(VOCAB) for _ in range(draw.randint(0, 6))))
        choices = draw.choice((1, 1, 1, 2, 3))
        params = SamplingParams(
            temperature=1.0, seed=draw.randrange(4), n=choices, max_tokens=draw.randint(1, 14), logprobs=None
        )
        options = self._options(len(prompt))
        cap = None if options.public else self._caps.get(options.tenant)
        ask = Ask(prompt, params, options, cap and cap * rig.cache.block_size)
        try:
            rig.engine.add_request(name, prompt, params, cache=ask.options)
        except CapacityError as error:
            if error.param != "max_tokens":
                return
            most = rig.cache.num_blocks * rig.cache.block_size + 1 - len(prompt)  # as the message says
            ask = replace(ask, params=replace(params, max_tokens=most))
            rig.engine.add_request(name, prompt, ask.params, cache=ask.options)
        except RequestError:
            return
        self.asked[name] = ask
        self._texts.append((*prompt, *ask.expected(0, rig.engine.limits.max_model_len)))

    def _options(self, length: int = 0) -> CacheOptions:
        draw = self.draw
        retain = ()
        if length and draw.random() < 0.2:
            retain = (Retain(0, draw.randint(1, length), draw.choice((0, 20, 90)), draw.choice((None, 0.1))),)
        return CacheOptions(
            draw.choice(TENANTS),
            draw.choice((None, *SALTS)),
            draw.choice((None, None, "p")),
            draw.random() < 0.1,
            retain,
        )

    def _compare(self, name: str, ask: Ask, choice: int) -> None:
        got = self.rig.answers.get((name, choice))
        if got is None or got.finish_reason is None:
            raise WrongError(f"{name}.{choice} never ended")
        expected = ask.expected(choice, self.rig.engine.limits.max_model_len)
        if got.token_ids != expected[: len(got.token_ids)]:
            raise WrongError(f"{name}.{choice} was answered {got.token_ids}, not {expected}")
        if got.finish_reason in ("stop", "length"):
            if got.token_ids != expected:
                raise WrongError(f"{name}.{choice} ended early: {got.token_ids} of {expected}")
        elif got.finish_reason == "abort":
            if name not in self.aborted:
                raise WrongError(f"{name}.{choice} was aborted by nobody")
        else:
            error = got.deltas[-1].error
            known = isinstance(error, InjectedFaultError | DecodeError | CapacityError)
            if not known and "status 500" not in str(error):
                raise WrongError(f"{name}.{choice} failed with {error!r}")


def replay(seed: int) -> Counts:
    """One seed; raises what it finds."""
    return Simulation(seed).run()


def count(seeds: range) -> Figure:
    """Seeds until there are none, and how many found something."""
    total = Counts()
    replays = []
    for seed in seeds:
        try:
            met = replay(seed)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            replays.append(f"python scripts/trust.py --replay R14:{seed}  # {type(error).__name__}: {error}")
            continue
        for name in Counts.__slots__:
            setattr(total, name, getattr(total, name) + getattr(met, name))
    also = {name: getattr(total, name) for name in Counts.__slots__}
    return Figure("R14", "simulations gone wrong", len(replays), len(seeds), "seeds", also, replays)
