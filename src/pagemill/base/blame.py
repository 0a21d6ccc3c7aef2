"""For whom the work was that failed, and what that one is told. Owns the walk through the calls that led to an error.

An exception in work for many at a time says what failed and not for whom. The calls that it came through do: the
innermost of them that was given something of one alone was made for that one. Asked after a failure only, it costs the
work itself nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from inspect import CO_VARARGS
from traceback import walk_tb
from typing import TypeVar

from pagemill.base.errors import PagemillError
from pagemill.base.step import SampleFailure

_T = TypeVar("_T")


def blamed(error: BaseException, whose: Callable[[str, object], _T | None]) -> _T | None:
    """Whom the calls that led to an error were made for, None where that cannot be told.

    whose: name and value of an argument -> whom it belongs to, None where to nobody or to several. Of the calls the
    innermost one counts that has such an argument, and of its arguments the first.
    """
    for values in reversed(list(_arguments(error))):
        for name, value in values:
            found = whose(name, value)
            if found is not None:
                return found
    return None


def _arguments(error: BaseException) -> Iterator[list[tuple[str, object]]]:
    """Arguments of each call, the outermost first; those that the call has given another value have that one, and those
    of `*args` the name of all of them."""
    for frame, _ in walk_tb(error.__traceback__):
        code, values = frame.f_code, frame.f_locals
        count = code.co_argcount + code.co_kwonlyargcount
        found = [(name, values[name]) for name in code.co_varnames[:count] if name in values]
        if code.co_flags & CO_VARARGS and isinstance(more := values.get(code.co_varnames[count]), tuple):
            found += [(code.co_varnames[count], each) for each in more]
        yield found


def failure_of(seq_id: int, error: Exception, log: logging.Logger) -> SampleFailure:
    """The failure of a sequence for which the work failed, with the parameter that the error names."""
    param = getattr(error, "param", None) if isinstance(error, PagemillError) else None
    return SampleFailure(seq_id, reason_of(error, log), param)


def reason_of(error: Exception, log: logging.Logger) -> str:
    """What the one for whom the work failed is told: an error of ours by its message; of any other the log has more."""
    if isinstance(error, PagemillError):
        return str(error)
    log.error("work for one request failed: %s", type(error).__name__, exc_info=error)
    return "internal error; the server's log has it"
