"""What must hold between pool, tree and accounts, looked at from end to end. Owns nothing; for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pagemill.base.errors import IntegrityError
from pagemill.base.transfer import Copy
from pagemill.cache.pool import BlockPool
from pagemill.cache.prefix import PrefixTree
from pagemill.cache.tenancy import Tenancy


def verify_blocks(
    pool: BlockPool, tree: PrefixTree, tenancy: Tenancy, owner: Sequence[int], copies: Mapping[int, Copy]
) -> None:
    """What is published is in the tree, accounts count what they own, copies read what is held. Raises IntegrityError.

    owner: account of each block. copies: by target.
    """
    tree.verify()
    published = {block for block in range(pool.num_blocks) if pool.is_published(block)}
    if published != set(tree.nodes):
        raise IntegrityError(f"published blocks {sorted(published)} are not the tree's {sorted(tree.nodes)}")
    used = [0] * len(tenancy.accounts)
    cached = list(used)
    for block in range(pool.num_blocks):
        if pool.num_holders(block) or block in published:
            used[owner[block]] += 1
            cached[owner[block]] += not pool.num_holders(block)
    for account in tenancy.accounts:
        if (account.used, account.cached) != (used[account.index], cached[account.index]):
            raise IntegrityError(f"{account} counts other than {used[account.index]}, {cached[account.index]}")
        if account.cap is not None and account.used > account.cap and account.cached:
            raise IntegrityError(f"{account} is above its cap and holds cached blocks")
    for target, copy in copies.items():
        if not pool.num_holders(copy.source) or not pool.num_holders(target) or copy.target != target:
            raise IntegrityError(f"{copy} names a block that nobody holds")
