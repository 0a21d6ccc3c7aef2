"""Eviction policies by name. Owns the names; what each does is in its own file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches

from pagemill.base.errors import ConfigError
from pagemill.cache.policies.adaptive import Adaptive
from pagemill.cache.policies.arc import ARC
from pagemill.cache.policies.base import Policy
from pagemill.cache.policies.gdsf import GDSF
from pagemill.cache.policies.gittins import Gittins
from pagemill.cache.policies.lfu import LFU
from pagemill.cache.policies.lru import LRU
from pagemill.cache.policies.s3fifo import S3FIFO

Makers = Mapping[str, Callable[[int], Policy]]  # by name, a policy for a cache of so many blocks
POLICIES: dict[str, Callable[[int], Policy]] = {
    each.name: each for each in (LRU, LFU, S3FIFO, ARC, GDSF, Gittins, Adaptive)
}


def make_policy(name: str, capacity: int, makers: Makers = POLICIES) -> Policy:
    """A policy for a cache of `capacity` blocks (> 0). Raises ConfigError where the name is unknown."""
    maker = makers.get(name)
    if maker is None:
        near = get_close_matches(name, makers, n=1)
        raise ConfigError(
            f"eviction policy {name!r} is unknown"
            + (f"; did you mean {near[0]!r}?" if near else "")
            + f"; there are {', '.join(makers)}"
        )
    if capacity < 1:
        raise ConfigError(f"a cache of {capacity} blocks holds nothing; give a policy at least 1")
    return maker(capacity)
