"""R15: exceptions at every function that works for one request, which are found by watching a run.

`Planter` is a profile function (`sys.setprofile`): it sees each call of the product's own functions and for whom it is,
by the first of its arguments that belongs to a request. Told to, it raises at the beginning of the at-th call of one
function for the victim; Python then takes the profile function away, so that this happens once. Functions that work for
many at a time (a step, a batch) are nobody's.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pagemill
from pagemill.base.params import SamplingParams
from pagemill.base.step import Sample, SequenceStep
from pagemill.cache.sequences import SequenceBlocks
from pagemill.decoding.grammar import GrammarState
from pagemill.decoding.penalties import TokenCounts
from pagemill.engine import request as requests
from pagemill.engine.engine import Engine
from pagemill.engine.output import ChoiceText, Delta
from pagemill.llm.async_llm import RequestStream
from pagemill.llm.engine_thread import Abort, Enter, Entrant
from pagemill.text.stop import StopMatcher
from pagemill.text.stream import IncrementalDetokenizer

VICTIM = "victim"
ROOT = str(Path(pagemill.__file__).parent) + "/"
_PARTS = tuple(ROOT + each for each in ("engine/", "cache/", "llm/", "decoding/", "execution/", "text/", "kernels/"))
_PARTS_OF_ONE = (SequenceBlocks, ChoiceText, IncrementalDetokenizer, StopMatcher, TokenCounts, GrammarState)
_FEWEST, _TELLING = 5, 9  # tokens: how many a text has at least, and those that tell whose it is


class PlantedError(RuntimeError):
    """Raised by a planter because a test told it to."""


@dataclass(frozen=True, slots=True)
class Place:
    """A function of the product, as a file and a name: "engine/output.py ChoiceText.push"."""

    file: str
    name: str

    @classmethod
    def of(cls, code: CodeType) -> Place:
        """Where a code object comes from."""
        return cls(code.co_filename.removeprefix(ROOT), code.co_qualname)

    def __str__(self) -> str:
        return f"{self.file} {self.name}"


@dataclass(slots=True)
class Owners:
    """Whose things are: what a request has, by what it was asked with. Mutated by `learn`.

    params: id of its parameters, an object of its own -> name. prompts: name -> first tokens of its prompts.
    """

    params: dict[int, str] = field(default_factory=dict)
    prompts: dict[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    kept: list[SamplingParams] = field(default_factory=list)
    parts: dict[int, tuple[str, Any]] = field(default_factory=dict)  # by id: whose it is; the thing is kept alive
    numbers: dict[int, str] = field(default_factory=dict)  # of sequences
    names: dict[str, str] = field(default_factory=dict)  # request ids of an AsyncLLM

    def learn(self, name: str, params: SamplingParams, *prompts: Sequence[int]) -> None:
        """A request that will be made."""
        self.params[id(params)] = name
        self.kept.append(params)
        self.prompts[name] = tuple(tuple(each[:_TELLING]) for each in prompts)

    def of(self, name: str, value: object) -> str | None:
        """Whose an argument is, None where nobody's."""
        if isinstance(value, requests.Sequence):
            return self._of_request(value.request, value)
        if isinstance(value, requests.Request):
            return self._of_request(value)
        if isinstance(value, SamplingParams):
            return self.params.get(id(value))
        if isinstance(value, SequenceStep):
            return self.params.get(id(value.params))
        if isinstance(value, Entrant):
            self.names[value.request_id] = self.params.get(id(value.params), "")
            return self.names[value.request_id]
        if isinstance(value, Enter):
            return self.of("", value.entrants[0])
        if isinstance(value, Abort | RequestStream):
            request_ids = getattr(value, "request_ids", ("",))  # a stream that is being made has none yet
            return self.names.get(request_ids[0])
        if isinstance(value, Delta):
            return self.names.get(value.request_id, value.request_id)
        if isinstance(value, Sample) or name == "seq_id":
            return self.numbers.get(value.seq_id if isinstance(value, Sample) else value)  # type: ignore[call-overload, no-any-return]
        if isinstance(value, _PARTS_OF_ONE):
            return self.parts.get(id(value), (None,))[0]
        if name == "request_id" and isinstance(value, str):
            return self.names.get(value, value)
        if isinstance(value, list | array) and len(value) >= _FEWEST and isinstance(value[0], int):
            first = tuple(value[:_TELLING])
            return next((each for each, prompts in self.prompts.items() if first in prompts), None)
        return None

    def _of_request(self, request: requests.Request, sequence: requests.Sequence | None = None) -> str | None:
        owner = self.params.get(id(request.params))
        if owner is not None and sequence is not None:
            self.numbers[sequence.seq_id] = owner
            if sequence.blocks is not None:
                self.parts[id(sequence.blocks)] = owner, sequence.blocks
        return owner

    def look_into(self, engine: Engine, adjuster: Any = None) -> None:
        """Learn whose the texts are that are open."""
        for number, text in list(engine._output._texts.items()):
            owner = self.params.get(id(text._request.params))
            if owner is not None:
                for part in (text, text._detokenizer, text._matcher):
                    self.parts[id(part)] = owner, part
                self.numbers[number] = owner
        for number, text in list(adjuster._texts.items() if adjuster is not None else ()):
            if (owner := self.numbers.get(number)) is not None:
                for part in (text.counts, text.grammar):
                    self.parts[id(part)] = owner, part


class Planter:
    """The profile function. Mutated by each call that it sees.

    calls: how often each function was called for the victim. raised: it has come to that.
    """

    def __init__(self, owners: Owners, place: Place | None = None, at: int = 1, look: Callable[[], None] | None = None):
        self.calls: Counter[Place] = Counter()
        self.raised = False
        self._owners = owners
        self._place = place
        self._at = at
        self._look = look
        self._known: dict[CodeType, tuple[Place, tuple[str, ...]] | None] = {}

    def __call__(self, frame: FrameType, event: str, _argument: object) -> None:
        if event != "call":
            return
        code = frame.f_code
        known = self._known.get(code, False)
        if known is False:
            known = self._known[code] = self._told_of(code)
        if known is None or known is True:
            return
        place, names = known
        if self._look is not None and place.name == "Engine.step":
            self._look()
        if self.raised or not self._is_victims(frame, names):  # which is asked of all, for it teaches whose things are
            return
        self.calls[place] += 1
        if place == self._place and self.calls[place] == self._at:
            self.raised = True
            raise PlantedError(f"{place} was told to raise")

    @staticmethod
    def _told_of(code: CodeType) -> tuple[Place, tuple[str, ...]] | None:
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        if not names or not code.co_filename.startswith(_PARTS) or "<" in code.co_name or code.co_flags & 0x2A0:
            return None  # no function, or a generator or coroutine, whose beginning comes later
        return Place.of(code), names

    def _is_victims(self, frame: FrameType, names: tuple[str, ...]) -> bool:
        values = frame.f_locals
        for name in names:
            if name in values and (owner := self._owners.of(name, values[name])) is not None:
                return owner == VICTIM
        return False
