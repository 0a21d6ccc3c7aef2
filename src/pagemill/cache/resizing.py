"""Another number of blocks while sequences live. Owns the choice of what goes and what moves, no bytes.

Growth adds free blocks. Shrinking evicts by policy, above floors first, until what is left fits, and has what lies
beyond the new end copied to where room is, cached or in use; tables, tree and leases follow.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping

from pagemill.base.errors import CapacityError, ConfigError
from pagemill.base.kv_spec import KVSpec
from pagemill.base.transfer import Copy, Moves
from pagemill.cache.pool import BlockPool
from pagemill.cache.sharing import SharedBlocks


def check_size(
    pool: BlockPool, shared: SharedBlocks | None, num_blocks: int, mode: str, kv_spec: KVSpec | None = None
) -> None:
    """Raise CapacityError or ConfigError where the cache cannot have `num_blocks`, and change nothing.

    kv_spec: what blocks take, for messages in bytes.
    """
    active = pool.num_active
    if num_blocks < 1:
        least = _size(max(active, 1), kv_spec)
        raise ConfigError(f"that much memory holds no block of the KV cache; give at least {least}")
    if num_blocks < active:
        raise CapacityError(
            f"a KV cache of {_size(num_blocks, kv_spec)} cannot hold the {_size(active, kv_spec)} that sequences and "
            f"pins use; give at least that, or wait until they end",
            retry_after_s=1.0,
        )
    if mode != "paged":
        raise CapacityError(f"a KV cache of mode {mode} cannot be resized; set kv_cache to paged")
    floors = 0 if shared is None else shared.tenancy.num_promised
    if floors > num_blocks:
        raise ConfigError(
            f"tenants' floors need {_size(floors, kv_spec)} of KV cache and {_size(num_blocks, kv_spec)} would be "
            f"left; lower the floors first, or give at least that"
        )


def _size(num_blocks: int, kv_spec: KVSpec | None) -> str:
    """So many blocks in bytes, to the byte, so that who gives them gets these blocks."""
    blocks = f"{num_blocks:,} block{'s' * (num_blocks != 1)}"
    return blocks if kv_spec is None else f"{kv_spec.memory_bytes(num_blocks):,} bytes ({blocks})"


def pin_error(count: int, num_pinned: int, num_blocks: int) -> CapacityError | None:
    """The error of `count` blocks that are there but for pins, None where pins are not what stands in the way."""
    if not num_pinned or count > num_blocks:
        return None
    return CapacityError(
        f"{count:,} blocks of the KV cache are needed, and pins hold {num_pinned:,} of {num_blocks:,}; unpin some, try "
        f"again when they end, or raise kv_cache_memory_bytes",
        retry_after_s=1.0,
    )


def vacate(
    pool: BlockPool, shared: SharedBlocks | None, num_blocks: int, block_size: int
) -> tuple[dict[int, int], Moves]:
    """Leave blocks from `num_blocks` on: free ones out of service, and a place held for each that has contents.

    Returns where these go, and the copies that must be made before `relocate`. No other moves may be pending.
    """
    beyond = range(num_blocks, pool.num_blocks)
    if shared is not None:
        while pool.num_active + pool.num_cached > num_blocks:
            shared.evict_any()
    pool.withdraw([block for block in beyond if pool.is_vacant(block)])
    homeless = [block for block in beyond if not pool.is_withdrawn(block)]
    targets = dict(zip(homeless, pool.allocate(len(homeless)), strict=True))
    wipes = tuple(target for target in targets.values() if target in pool.dirty)
    return targets, Moves(wipes, tuple(Copy(block, target, block_size) for block, target in targets.items()))


def relocate(
    pool: BlockPool, shared: SharedBlocks | None, tables: Iterable[array[int]], targets: Mapping[int, int]
) -> None:
    """Tables, tree and leases follow blocks that were copied; the old ones are out of service."""
    if not targets:
        return
    for block, target in targets.items():
        pool.take_over(block, target)
    for table in tables:
        for index, block in enumerate(table):
            if block in targets:
                table[index] = targets[block]
    if shared is not None:
        shared.renumber(targets)
