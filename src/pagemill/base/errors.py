"""The error tree. Owns the names, exit codes and HTTP statuses of every error that a user can meet.

    PagemillError
    ├── ConfigError      an option is unknown, misspelt, out of range or contradicts another       exit 2
    ├── ModelError       a model file, tokeniser or template is missing, damaged or unsupported    exit 2
    ├── RequestError     one request is wrong (`status` is its HTTP status)                        exit 2
    │   ├── LengthError      its prompt is longer than the model's context                         exit 2
    │   └── DeadlineError    it was not finished in the time it was given                          exit 2
    ├── CapacityError    there is not enough memory or room (`retry_after_s` where waiting helps)  exit 2
    │   └── QueueFullError   too many requests wait (`status` 429: the tenant's own; 503: all)     exit 2
    └── IntegrityError   stored data is not what was stored: quarantined, recomputed, counted      exit 1

Messages say what is wrong and how to mend it. `assert` is for our own mistakes and never for these.
"""

from __future__ import annotations


class PagemillError(Exception):
    """Base of every error that Pagemill raises on purpose. `exit_code` is what the command line ends with."""

    exit_code = 1


class ConfigError(PagemillError):
    """An option is unknown, out of range, or contradicts another one."""

    exit_code = 2


class ModelError(PagemillError):
    """A model (file, tokeniser, chat template) is missing, damaged, or of a kind that is not supported."""

    exit_code = 2


class RequestError(PagemillError):
    """One request is wrong; no other request is affected.

    `status`: the HTTP status that a server answers with (400 unless said otherwise). `param`: the parameter that is
    wrong, by the name that it has in Python (`prompt`, a field of `SamplingParams` or of `CacheOptions`); None where it
    is none of these, or several.
    """

    exit_code = 2

    def __init__(self, message: str, *, status: int = 400, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param


class CapacityError(PagemillError):
    """Not enough memory, blocks or queue room.

    `retry_after_s`: seconds after which trying again may help, or None where only another setting helps. `param`: the
    parameter of a request that asks for too much, as of `RequestError`.
    """

    exit_code = 2

    def __init__(self, message: str, *, retry_after_s: float | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.param = param


class LengthError(RequestError):
    """A prompt is longer than the model's context."""


class DeadlineError(RequestError):
    """A request was not finished within its `deadline_s`. `status` is 504."""

    def __init__(self, message: str) -> None:
        super().__init__(message, status=504)


class QueueFullError(CapacityError):
    """Too many requests wait. `retry_after_s` is always given.

    `status`: the HTTP status, 429 where the tenant's own requests are too many, 503 where everybody's together are.
    """

    def __init__(self, message: str, *, retry_after_s: float, status: int) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.status = status


class IntegrityError(PagemillError):
    """Stored data is not byte for byte what was stored. It is quarantined, recomputed and counted."""
