"""Pagemill: an LLM inference engine built around its KV cache.

Owns the public names and nothing else; each is imported when it is first used (PEP 562), so that `import pagemill`
costs a millisecond and the command line can print its help without numpy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from pagemill.base.errors import (
        CapacityError,
        ConfigError,
        IntegrityError,
        ModelError,
        PagemillError,
        RequestError,
    )
    from pagemill.base.params import CacheOptions, Grammar, Retain, SamplingParams
    from pagemill.llm import LLM, CompletionOutput, RequestOutput, Session
    from pagemill.llm.async_llm import AsyncLLM

_HOMES = {
    "LLM": "pagemill.llm",
    "AsyncLLM": "pagemill.llm.async_llm",
    "RequestOutput": "pagemill.llm",
    "CompletionOutput": "pagemill.llm",
    "Session": "pagemill.llm",
    "SamplingParams": "pagemill.base.params",
    "CacheOptions": "pagemill.base.params",
    "Retain": "pagemill.base.params",
    "Grammar": "pagemill.base.params",
    "PagemillError": "pagemill.base.errors",
    "ConfigError": "pagemill.base.errors",
    "ModelError": "pagemill.base.errors",
    "RequestError": "pagemill.base.errors",
    "CapacityError": "pagemill.base.errors",
    "IntegrityError": "pagemill.base.errors",
}

__all__ = [
    "LLM",
    "AsyncLLM",
    "CacheOptions",
    "CapacityError",
    "CompletionOutput",
    "ConfigError",
    "Grammar",
    "IntegrityError",
    "ModelError",
    "PagemillError",
    "RequestError",
    "RequestOutput",
    "Retain",
    "SamplingParams",
    "Session",
    "__version__",
]


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
