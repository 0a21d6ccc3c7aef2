"""The memory of the hot tier: one aligned allocation of fixed-size blocks. Owns the bytes, not who uses which block."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pagemill.base.kv_spec import KVSpec
from pagemill.kernels.native import allocate


@dataclass(frozen=True, slots=True, eq=False)
class Arena:
    """Blocks of a KV spec's geometry, zeroed at first. data: u8 [num_blocks * block_bytes], aligned to 64 bytes."""

    spec: KVSpec
    num_blocks: int
    data: NDArray[np.uint8]

    @classmethod
    def allocate(cls, spec: KVSpec, num_blocks: int) -> Arena:
        """Take memory for `num_blocks` blocks. Raises CapacityError where there is none."""
        purpose = f"a KV cache of {num_blocks:,} blocks of {spec.block_bytes:,} bytes"
        return cls(spec, num_blocks, allocate(num_blocks * spec.block_bytes, purpose))

    def block(self, block_id: int) -> NDArray[np.uint8]:
        """The bytes of one block, u8 [block_bytes], a view."""
        start = block_id * self.spec.block_bytes
        return self.data[start : start + self.spec.block_bytes]
