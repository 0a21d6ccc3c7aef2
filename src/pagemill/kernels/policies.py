"""The eviction policies in native code, by name: those of `cache/policies`, which says what they do, with the same
victims call by call. Whoever composes a cache or a simulation passes `POLICIES`; the Python ones are the default.

Owns names and makers. `cache.policies.registry.make_policy` makes one, and refuses an unknown name.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from pagemill.kernels._native import NativePolicy, policy_names

POLICIES: dict[str, Callable[[int], NativePolicy]] = {name: partial(NativePolicy, name) for name in policy_names()}
