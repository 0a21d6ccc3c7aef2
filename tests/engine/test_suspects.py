"""For whom the work was that failed: told by the calls that led to an error."""

from __future__ import annotations

from array import array

from pagemill.base.params import SamplingParams
from pagemill.cache.sequences import SequenceBlocks
from pagemill.engine.request import Marks, Request, Sequence
from pagemill.engine.suspects import suspect_of


def sequence(number: int) -> Sequence:
    request = Request(f"r{number}", array("i", [1, 2]), SamplingParams(seed=number), 0, 4, (), 0.0)
    made = Sequence(number, request, 0, array("i", [1, 2]), Marks(0.0))
    made.blocks = SequenceBlocks()
    return made


ONE, TWO = sequence(1), sequence(2)


def fails(*_: object) -> None:
    raise RuntimeError("planted")


def of_a_sequence(each: Sequence) -> None:
    fails(each)


def of_two(first: Sequence, second: Sequence) -> None:
    fails(first, second)


def by_number(seq_id: int) -> None:
    fails(seq_id)


def by_blocks(blocks: SequenceBlocks) -> None:
    fails(blocks)


def by_parameters(params: SamplingParams) -> None:
    fails(params)


def for_all(each: list[Sequence]) -> None:
    of_a_sequence(each[-1])


def error_of(function: object, *arguments: object) -> RuntimeError:
    try:
        function(*arguments)  # type: ignore[operator]
    except RuntimeError as error:
        return error
    raise AssertionError("nothing was raised")


def suspect(function: object, *arguments: object) -> Sequence | None:
    return suspect_of(error_of(function, *arguments), [ONE, TWO])


def test_the_innermost_call_that_has_something_of_one_tells() -> None:
    assert suspect(of_a_sequence, TWO) is TWO
    assert suspect(for_all, [ONE, TWO]) is TWO
    assert suspect(of_two, TWO, ONE) is TWO
    assert suspect(by_number, 2) is TWO
    assert suspect(by_blocks, TWO.blocks) is TWO
    assert suspect(by_parameters, TWO.request.params) is TWO
    assert suspect(fails, TWO) is TWO


def test_what_is_nobodys_or_of_one_that_is_gone_tells_nothing() -> None:
    assert suspect(fails) is None
    assert suspect(fails, 1, "one") is None
    assert suspect(by_number, 7) is None
    assert suspect(of_a_sequence, sequence(3)) is None


def test_what_two_requests_share_tells_nothing() -> None:
    other = Request("r3", array("i", [1]), ONE.request.params, 0, 4, (), 0.0)
    shares = Sequence(3, other, 0, array("i", [1]), Marks(0.0))
    assert suspect_of(error_of(by_parameters, ONE.request.params), [ONE, shares]) is None
