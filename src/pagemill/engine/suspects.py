"""Which sequence the work was for that failed, where a step was worked on for many. Owns what belongs to a sequence."""

from __future__ import annotations

from collections.abc import Iterable

from pagemill.base.blame import blamed
from pagemill.base.params import SamplingParams
from pagemill.cache.sequences import SequenceBlocks
from pagemill.engine.request import Request, Sequence


def suspect_of(error: Exception, sequences: Iterable[Sequence]) -> Sequence | None:
    """Which of the sequences the innermost call on the way to the error was made for; None where for nobody alone."""
    known = {each.seq_id: each for each in sequences}
    by_blocks = {id(each.blocks): each for each in known.values() if each.blocks is not None}

    def whose(name: str, value: object) -> Sequence | None:
        if isinstance(value, Sequence):
            return known.get(value.seq_id)
        if isinstance(value, SequenceBlocks):
            return by_blocks.get(id(value))
        if name == "seq_id" and isinstance(value, int):
            return known.get(value)
        if isinstance(value, Request | SamplingParams):
            owners = [each for each in known.values() if value is each.request or value is each.request.params]
            return owners[0] if len({each.request.request_id for each in owners}) == 1 else None
        return None

    return blamed(error, whose)
