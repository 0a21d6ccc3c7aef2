"""Random requests, aborts and faults over tiny caches in every mode: each answer equals that of a run alone, blocks are
conserved after each step, nothing leaks, and everything finishes."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pagemill.base.errors import CapacityError, RequestError
from pagemill.base.params import SamplingParams
from pagemill.cache.entry import SharingConfig
from pagemill.cache.manager import CacheMode
from tests.fixtures.fake_engine import Rig
from tests.fixtures.fake_executor import InjectedFaultError, answer

VOCAB = 32
EOS = (3,)
SETTINGS = settings(max_examples=60, stateful_step_count=25, deadline=None)
MODES: tuple[CacheMode, ...] = ("paged", "contiguous", "none")


@dataclass(frozen=True, slots=True)
class Ask:
    """A request as a test draws it."""

    prompt: tuple[int, ...]
    max_tokens: int
    min_tokens: int = 0
    n: int = 1
    seed: int = 0

    def params(self) -> SamplingParams:
        return SamplingParams(
            temperature=1.0, seed=self.seed, n=self.n, max_tokens=self.max_tokens, min_tokens=self.min_tokens
        )

    def answer(self, choice: int, max_model_len: int) -> list[int]:
        """What the specification answers, cut at the context's end."""
        num_tokens = min(self.max_tokens, max_model_len - len(self.prompt))
        return answer(
            self.prompt, num_tokens, VOCAB, seed=self.seed, choice=choice, min_tokens=self.min_tokens, stop_ids=EOS
        )

    def alone(self, choice: int, max_model_len: int) -> list[int]:
        """What an engine of its own with a cache without bounds answers."""
        rig = Rig(256, 16, max_model_len=max_model_len, vocab_size=VOCAB, eos=EOS, max_num_batched_tokens=1024)
        rig.engine.add_request("alone", self.prompt, self.params())
        return rig.run()["alone", choice].token_ids


@st.composite
def asks(draw: st.DrawFn) -> Ask:
    max_tokens = draw(st.integers(1, 14))
    return Ask(
        prompt=tuple(draw(st.lists(st.integers(0, 2), min_size=0, max_size=12)))
        + tuple(draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6))),
        max_tokens=max_tokens,
        min_tokens=draw(st.integers(0, max_tokens)),
        n=draw(st.sampled_from([1, 1, 1, 2, 3])),
        seed=draw(st.integers(0, 3)),
    )


@st.composite
def rigs(draw: st.DrawFn, mode: CacheMode, sharing: SharingConfig | None) -> Rig:
    """Caches from too small for anything to ample, any chunk size, any number of places."""
    return Rig(
        num_blocks=draw(st.integers(1, 24)),
        block_size=draw(st.integers(1, 5)),
        mode=mode,
        max_model_len=draw(st.integers(4, 40)),
        vocab_size=VOCAB,
        max_num_seqs=draw(st.integers(1, 5)),
        max_num_batched_tokens=draw(st.sampled_from([1, 2, 3, 7, 16, 64])),
        eos=EOS,
        sharing=sharing,
    )


class EngineMachine(RuleBasedStateMachine):
    """Requests come, run, are aborted and fail in any order."""

    mode: CacheMode = "paged"
    sharing: SharingConfig | None = None

    @initialize(data=st.data())
    def start(self, data: st.DataObject) -> None:
        self.rig = data.draw(rigs(self.mode, self.sharing))
        self.rig.executor._fault = lambda call: self.fault_next
        self.fault_next = False
        self.asked: dict[str, Ask] = {}
        self.aborted: set[str] = set()

    @rule(ask=asks())
    def add(self, ask: Ask) -> None:
        name = f"r{len(self.asked)}"
        limits, cache = self.rig.engine.limits, self.rig.cache
        longest = min(len(ask.prompt) + ask.max_tokens, limits.max_model_len) - 1  # the last token is never computed
        reserve = limits.max_model_len if self.mode == "contiguous" else max(longest, len(ask.prompt))
        fits = cache.blocks_for(reserve) <= cache.num_blocks
        try:
            self.rig.engine.add_request(name, ask.prompt, ask.params())
        except RequestError:
            assert len(ask.prompt) >= limits.max_model_len
        except CapacityError:
            assert not fits
        else:
            assert fits
            self.asked[name] = ask

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            busy = self.rig.engine.has_unfinished
            before = self.rig.executor.num_calls
            deltas = self.rig.step()
            assert bool(deltas) or self.rig.executor.num_calls == before + busy, "an idle turn while work waits"

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.asked)))
        self.rig.abort(name)
        self.aborted.add(name)

    @rule()
    def fail_a_step(self) -> None:
        self.fault_next = True
        self.rig.step()
        self.fault_next = False

    @invariant()
    def budget_and_places_hold(self) -> None:
        if not hasattr(self, "rig") or not self.rig.rows:
            return
        limits, rows = self.rig.engine.limits, self.rig.rows[-1]
        assert len(rows) <= limits.max_num_seqs
        assert sum(row.count for row in rows) <= limits.max_num_batched_tokens or (
            self.mode == "none" and len(rows) == 1
        )

    def teardown(self) -> None:
        if not hasattr(self, "rig"):
            return
        self.rig.run(most_steps=20_000)
        for name, ask in self.asked.items():
            for choice in range(ask.n):
                self.compare(name, ask, choice)

    def compare(self, name: str, ask: Ask, choice: int) -> None:
        limits = self.rig.engine.limits
        got = self.rig.answers[name, choice]
        expected = ask.answer(choice, limits.max_model_len)
        assert got.token_ids == expected[: len(got.token_ids)]
        if got.finish_reason in ("stop", "length"):
            assert got.token_ids == expected
            assert (got.finish_reason == "stop") == (expected[-1] in EOS)
        elif got.finish_reason == "error":
            assert isinstance(got.deltas[-1].error, InjectedFaultError)
        else:
            assert name in self.aborted


class ContiguousMachine(EngineMachine):
    mode: CacheMode = "contiguous"


class RecomputeMachine(EngineMachine):
    mode: CacheMode = "none"


class SharingMachine(EngineMachine):
    """Prompts of few tokens, so that most begin like another."""

    sharing = SharingConfig()


TestPagedEngine = EngineMachine.TestCase
TestSharingEngine = SharingMachine.TestCase
TestSharingEngine.settings = SETTINGS
TestContiguousEngine = ContiguousMachine.TestCase
TestRecomputeEngine = RecomputeMachine.TestCase
TestPagedEngine.settings = SETTINGS
TestContiguousEngine.settings = SETTINGS
TestRecomputeEngine.settings = SETTINGS


@pytest.mark.parametrize(
    ("mode", "sharing"), [*((mode, None) for mode in MODES), ("paged", SharingConfig())], ids=[*MODES, "shared"]
)
@settings(max_examples=40, deadline=None)
@given(data=st.data(), asked=st.lists(asks(), min_size=1, max_size=7))
def test_every_request_is_answered_as_if_it_were_alone(
    mode: CacheMode, sharing: SharingConfig | None, data: st.DataObject, asked: list[Ask]
) -> None:
    block_size = data.draw(st.integers(1, 5))
    max_model_len = 40
    enough = -(-max_model_len // block_size)  # for one sequence of the longest length, so that none need fail
    rig = Rig(
        num_blocks=enough + data.draw(st.integers(0, 8)),
        block_size=block_size,
        mode=mode,
        max_model_len=max_model_len,
        vocab_size=VOCAB,
        max_num_seqs=data.draw(st.integers(1, 6)),
        max_num_batched_tokens=data.draw(st.sampled_from([1, 2, 3, 7, 16, 64])),
        eos=EOS,
        sharing=sharing,
    )
    for index, ask in enumerate(asked):
        rig.engine.add_request(f"r{index}", ask.prompt, ask.params())
        for _ in range(data.draw(st.integers(0, 3))):
            rig.step()
    rig.run()
    for index, ask in enumerate(asked):
        for choice in range(ask.n):
            tokens = rig.tokens(f"r{index}", choice)
            assert tokens == ask.alone(choice, max_model_len) == ask.answer(choice, max_model_len)
