"""R15: an exception of our own making at every place where the engine works for one request.

A hook is a method that is called on behalf of one sequence. It raises once, at its first, second … call for the victim;
the victim may fail, and nobody else: the others are answered as if nothing had been, the engine goes on without being
made anew, no KV cache is dropped, what comes later is answered too, and nothing is left in the cache. These hooks are
raised at many of their calls; `planted.py` finds all that there are.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Any, NoReturn
from unittest.mock import patch

from pagemill.base.errors import IntegrityError
from pagemill.base.params import CacheOptions, SamplingParams
from pagemill.base.step import SampleFailure, StepPlan, StepResult
from pagemill.cache.entry import SharingConfig
from pagemill.cache.manager import CacheManager
from pagemill.engine.admission import Admission
from pagemill.engine.deadlines import Deadlines
from pagemill.engine.engine import Engine
from pagemill.engine.entering import Entering
from pagemill.engine.output import ChoiceText, Output
from pagemill.engine.ports import Decode
from pagemill.engine.queue import TenantQueue
from pagemill.engine.receipt import PrefillRate
from pagemill.engine.request import Sequence
from pagemill.engine.scheduler import Scheduler
from tests.fixtures.fake_engine import Answer, Rig
from tests.fixtures.fake_executor import answer, decode_bytes
from tests.trust.figures import Figure

VOCAB = 1000
NUM_TOKENS = 9
VICTIM = list(range(500, 511))
OTHERS = {"one": list(range(10, 23)), "two": list(range(10, 19)), "three": [7] * 6}
LATER = {"four": list(range(10, 25)), "five": [*VICTIM[:6], 3]}
CALLS = (1, 2, 3, 5)
MOST_STEPS = 200
ROOMY, TIGHT = 64, 12


class PlantedError(RuntimeError):
    """Raised by a hook because a test told it to."""


@dataclass(frozen=True, slots=True)
class Hook:
    """A method of `owner` that is called for one sequence, or for one of several."""

    owner: type
    method: str

    def __str__(self) -> str:
        return f"{self.owner.__name__}.{self.method}"

    def concerns(self, rig: Rig, arguments: tuple[Any, ...]) -> bool:
        """True where a call is about the victim: by its sequence, number, tokens, blocks or text."""
        victims = rig.engine._unfinished.get("victim", [])
        numbers = {each.seq_id for each in victims}
        if self.owner is CacheManager and arguments[1] in numbers:
            return True
        if self.owner is PrefillRate:
            return bool(arguments[1] == len(VICTIM))
        return any(_is_victims(each, victims) for each in arguments)


def _is_victims(value: Any, victims: list[Sequence]) -> bool:
    if isinstance(value, Sequence):
        return value.request.request_id == "victim"
    if isinstance(value, ChoiceText):
        return list(value._request.prompt_token_ids) == VICTIM
    if isinstance(value, list | array):
        return list(value[: len(VICTIM)]) == VICTIM
    return False


HOOKS = tuple(
    Hook(owner, method)
    for owner, methods in (
        (Admission, ("admit",)),
        (Scheduler, ("add", "remove")),
        (TenantQueue, ("add", "remove")),
        (Deadlines, ("add", "forget")),
        (Entering, ("enters",)),
        (Output, ("open", "delta", "close")),
        (ChoiceText, ("push",)),
        (PrefillRate, ("receipt",)),
        (Engine, ("receipt_of",)),
        (CacheManager, ("open", "block_table", "blocks_of", "commit", "publish_tail", "close")),
    )
    for method in methods
)


def _rig(num_blocks: int, decode: Decode = decode_bytes) -> Rig:
    return Rig(num_blocks, 4, vocab_size=VOCAB, max_num_batched_tokens=16, sharing=SharingConfig(), decode=decode)


def _params(**options: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, seed=0, max_tokens=NUM_TOKENS, **options)


def run_with(hook: Hook, at: int, num_blocks: int) -> tuple[bool, str]:
    """One run with the hook raising at its at-th call. Returns whether it came to that, and what is wrong ("")."""
    rig = _rig(num_blocks)
    calls = 0
    inner = getattr(hook.owner, hook.method)

    def raising(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        if hook.concerns(rig, arguments):
            calls += 1
            if calls == at:
                _raise(hook, arguments[1])
        return inner(*arguments, **named)

    with patch.object(hook.owner, hook.method, raising):
        wrong = _serve(rig)
    return calls >= at, wrong


def _raise(hook: Hook, seq_id: object) -> NoReturn:
    """Raise as the hook itself would, whose first argument the engine sees; for methods of the cache it is this."""
    raise PlantedError(f"{hook} was told to raise for {seq_id!r:.40}")


def _serve(rig: Rig) -> str:
    try:
        for name, prompt in [*list(OTHERS.items())[:2], ("victim", VICTIM), *list(OTHERS.items())[2:]]:
            try:
                rig.engine.add_request(name, prompt, _params(), cache=CacheOptions("t"))
            except PlantedError:
                if name != "victim":
                    raise
        for _ in range(8):
            _step(rig)
        for name, prompt in LATER.items():
            rig.engine.add_request(name, prompt, _params(), cache=CacheOptions("t"))
        for _ in range(MOST_STEPS):
            _step(rig)
        rig.cache.verify()
        rig.run(most_steps=0)
    except PlantedError as error:
        return f"the engine raised what concerns one request: {error}"
    except (AssertionError, IntegrityError) as error:
        return f"the engine did not come to an end: {error}"
    for name, prompt in {**OTHERS, **LATER}.items():
        got = rig.answers[name, 0]
        if got.finish_reason != "length" or got.token_ids != answer(prompt, NUM_TOKENS, VOCAB):
            return f"request {name!r} was changed: {got.finish_reason} {got.token_ids}"
    victim = rig.answers.get(("victim", 0))
    whole = answer(VICTIM, NUM_TOKENS, VOCAB)
    if victim is not None and victim.token_ids != whole[: len(victim.token_ids)]:
        return f"the victim was answered wrongly: {victim.token_ids}"
    return ""


def _step(rig: Rig) -> None:
    """A step whose end need not find the cache in order: what is damaged is mended at the next."""
    for delta in rig.engine.step():
        got = rig.answers.setdefault((delta.request_id, delta.choice), Answer())
        got.token_ids += delta.token_ids
        got.deltas.append(delta)


def run_with_decoder() -> str:
    """A decoder that raises for the victim's first token."""
    first = answer(VICTIM, 1, VOCAB)[0]

    def decode(token_ids: Any, skip_special_tokens: bool) -> str:
        if first in token_ids:
            raise PlantedError("the decoder was told to raise")
        return decode_bytes(token_ids, skip_special_tokens)

    return _serve(_rig(ROOMY, decode))


def run_with_failed_row() -> str:
    """A row that comes without an answer in each step in which the victim samples."""
    rig = _rig(ROOMY)
    run = rig.executor.run

    def without(plan: StepPlan) -> StepResult:
        result = run(plan)
        victims = {each.seq_id for each in rig.engine._unfinished.get("victim", [])}
        kept = tuple(each for each in result.samples if each.seq_id not in victims)
        failed = tuple(SampleFailure(each.seq_id, "no number") for each in result.samples if each.seq_id in victims)
        return StepResult(kept, failed)

    rig.executor.run = without  # type: ignore[method-assign]
    return _serve(rig)


def figure_of(num_runs: int, found: list[str]) -> Figure:
    """Runs with an exception each, and what was wrong with some."""
    return Figure("R15", "other requests changed", len(found), num_runs, "planted exceptions", {}, found)


def count_hook(hook: Hook) -> Figure:
    """A hook at each of its calls, with room for all and with so little that sequences are preempted. Nothing ran where
    the hook is not called any more."""
    num_runs, found = 0, []
    for num_blocks in (ROOMY, TIGHT):
        for at in CALLS:
            reached, wrong = run_with(hook, at, num_blocks)
            num_runs += reached
            if wrong:
                found.append(f"{hook}, call {at}, {num_blocks} blocks: {wrong}")
    return figure_of(num_runs, found)
