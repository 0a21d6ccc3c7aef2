"""How many blocks each tenant has and may have. Owns the accounts, their floors and caps; evicts nothing.

A floor is what other tenants' demand cannot push a tenant below; a cap is what it cannot rise above, whoever else is
idle. Texts of a public namespace count for an account of their own. Without floors and caps one sum is all there is.
Accounts that are idle and that nobody declared are closed when there are many, so that names cost no memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from pagemill.base.errors import CapacityError, ConfigError, RequestError
from pagemill.base.params import CacheOptions
from pagemill.cache.keys import Namespace

MOST_IDLE_ACCOUNTS = 1024


@dataclass(slots=True, eq=False)
class Account:
    """Blocks of one tenant. Mutated by Tenancy and the manager.

    used: blocks charged to it, whoever reads them. cached: those of them that nobody holds. pinned: those under a
    lease. num_sequences: that are open. partition: whose orders of eviction its blocks stand in; 0 is shared by all
    without floor and cap. declared: the operator has named it. tenant, public: as in a Namespace.
    """

    index: int
    name: str
    tenant: str = ""
    public: bool = False
    declared: bool = False
    floor: int = 0
    cap: int | None = None
    used: int = 0
    cached: int = 0
    pinned: int = 0
    num_sequences: int = 0
    partition: int = 0

    @property
    def is_idle(self) -> bool:
        """True where nothing is lost with it: no block, no sequence, and nobody has declared it."""
        return not (self.used or self.pinned or self.num_sequences or self.declared)

    @property
    def spare(self) -> int:
        """Cached blocks that others may take without pushing it below its floor."""
        return min(self.cached, max(self.used - self.floor, 0))

    def shortage(self, count: int) -> CapacityError | None:
        """The error of `count` blocks that the cap denies now, None where that is not what stands in the way."""
        if self.cap is None or count <= self.cap - self.used + self.cached:
            return None
        return CapacityError(
            f"{count} blocks of the KV cache are needed; tenant {self.name!r} may have {self.cap} and uses "
            f"{self.used}; raise its quota or run fewer or shorter sequences",
            retry_after_s=1.0,
        )

    def never(self, count: int) -> CapacityError | None:
        """The error of `count` blocks that the cap denies for ever, None where it does not."""
        if self.cap is None or count <= self.cap:
            return None
        return CapacityError(
            f"the sequence needs {count} blocks of the KV cache and tenant {self.name!r} may have {self.cap}; "
            f"shorten it or raise the tenant's quota"
        )

    def beside_pins(self, count: int) -> CapacityError | None:
        """The error of a sequence of `count` blocks that the cap denies while the tenant's own pins last, None where
        it does not."""
        if self.cap is None or not self.pinned or count <= self.cap - self.pinned:
            return None
        return CapacityError(
            f"the sequence needs {count:,} blocks of the KV cache; tenant {self.name!r} may have {self.cap:,} and its "
            f"pins hold {self.pinned:,} of them; unpin some, try again when they end, or raise the tenant's quota",
            retry_after_s=1.0,
        )


class Tenancy:
    """Accounts by name. Mutated by `account`, `set_quota`, `declare_public`, `drop_idle` and `clear`.

    block_size: token positions in a block, for messages. known_only: refuse tenants that were never declared
    (`set_quota`), as an operator may wish. accounts: by index; one that was dropped stays as an empty place until
    another tenant takes it, and blocks name accounts by their index.
    """

    __slots__ = (
        "_block_size", "_by_name", "_crowd", "_floored", "_known_only", "_parted", "_public", "_vacant", "accounts",
        "num_blocks",
    )  # fmt: skip

    def __init__(self, num_blocks: int, block_size: int = 1, *, known_only: bool = False) -> None:
        self.num_blocks = num_blocks
        self._block_size = block_size
        self.accounts: list[Account] = []
        self._by_name: dict[tuple[bool, str], Account] = {}  # public or not, name
        self._floored: list[Account] = []
        self._parted: list[Account] = []  # those with orders of eviction of their own
        self._public: set[str] = set()
        self._known_only = known_only
        self._vacant: list[int] = []
        self._crowd = MOST_IDLE_ACCOUNTS
        self._open(False, "default")

    def check(self, options: CacheOptions) -> None:
        """Raise RequestError (403) for a public name that nobody declared and, where only known tenants may enter, for
        an unknown one. Asked when a request comes; what has come runs on though its tenant is removed."""
        known = self._by_name.get((False, options.tenant))
        if self._known_only and (known is None or not known.declared):
            raise RequestError(
                f"tenant {options.tenant!r} is unknown; the operator names tenants under [tenants] in the file",
                status=403,
            )
        if options.public is not None and options.public not in self._public:
            raise RequestError(
                f"there is no public namespace {options.public!r}; the operator declares them", status=403
            )

    def namespace(self, tenant: str, salt: str | None, public: str | None) -> Namespace:
        """Where a request's text belongs."""
        return Namespace(tenant, salt) if public is None else Namespace(public, salt, public=True)

    def account(self, namespace: Namespace) -> Account:
        """The account that a namespace's blocks count for, opened at first use."""
        name = (namespace.public, namespace.tenant)
        return self._by_name.get(name) or self._open(*name)

    def is_known(self, tenant: str) -> bool:
        """True where the tenant has an account."""
        return (False, tenant) in self._by_name

    def partition_of(self, tenant: str) -> int:
        """In whose orders of eviction a tenant's blocks stand, 0 where it has no account."""
        known = self._by_name.get((False, tenant))
        return 0 if known is None else known.partition

    @property
    def is_crowded(self) -> bool:
        """True where so many accounts are open that idle ones should go."""
        return len(self._by_name) > self._crowd

    def drop_idle(self) -> list[Account]:
        """Close accounts that nothing is lost with. Returns them; O(accounts), seldom enough to cost O(1) for each that
        was opened."""
        dropped = [each for each in self.accounts[1:] if each.tenant and each.is_idle]
        for each in dropped:
            del self._by_name[each.public, each.tenant]
            self.accounts[each.index] = Account(each.index, "")
            self._vacant.append(each.index)
        self._crowd = max(MOST_IDLE_ACCOUNTS, 2 * len(self._by_name))
        return dropped

    def declare_public(self, name: str) -> None:
        """Let requests name this namespace and share across tenants in it."""
        if not name:
            raise ConfigError("a public namespace has an empty name; give one")
        self._public.add(name)

    def set_quota(self, tenant: str, floor: int, cap: int | None) -> Account:
        """A tenant's floor and cap in blocks, from now on.

        Raises ConfigError, and changes nothing, where floors would exceed the memory or the cap lies below the floor.
        """
        self.check_quota(tenant, floor, cap)
        account = self._by_name.get((False, tenant)) or self._open(False, tenant)
        account.floor, account.cap, account.declared = floor, cap, True
        account.partition = account.index + 1 if floor or cap is not None else 0
        self._floored = [each for each in self.accounts if each.floor]
        self._parted = [each for each in self.accounts if each.partition]
        return account

    def undeclare(self, tenant: str) -> None:
        """The operator does not know this tenant any more; its account is closed once it is idle."""
        known = self._by_name.get((False, tenant))
        if known is not None:
            known.declared = False

    def check_quota(self, tenant: str, floor: int, cap: int | None) -> None:
        """Raise what `set_quota` would raise."""
        if not tenant:
            raise ConfigError("a tenant has an empty name; give one")
        if floor < 0:
            raise ConfigError(f"tenant {tenant!r}: the floor is {self._tokens(floor)}; give 0 or more tokens")
        if cap is not None and cap < 1:
            size = self._block_size
            raise ConfigError(f"tenant {tenant!r}: the cap is less than a block; give at least {size:,} tokens")
        if cap is not None and cap < floor:
            raise ConfigError(
                f"tenant {tenant!r}: in whole blocks of {self._block_size:,} tokens the cap, {self._tokens(cap)}, is "
                f"below the floor, {self._tokens(floor)}; raise the cap"
            )
        if cap is not None and cap > self.num_blocks:
            raise ConfigError(
                f"tenant {tenant!r}: the cap is {self._tokens(cap)} and the cache has {self._tokens(self.num_blocks)}; "
                f"lower it"
            )
        known = self._by_name.get((False, tenant))
        others = self.num_promised - (known.floor if known else 0)
        if others + floor > self.num_blocks:
            raise ConfigError(
                f"tenant {tenant!r}: a floor of {self._tokens(floor)} beside {self._tokens(others)} promised to others "
                f"exceeds the {self._tokens(self.num_blocks)} of the cache; lower it or raise kv_cache_memory_bytes"
            )

    def available(self, account: Account, num_free: int, num_cached: int) -> int:
        """Blocks that the account could take now: free ones, its own cached ones, and what others can spare."""
        possible = self.room(account, num_free, num_cached)
        if account.cap is not None:
            possible = min(possible, account.cap - account.used + account.cached)
        return possible

    def room(self, account: Account, num_free: int, num_cached: int) -> int:
        """The same, whatever its cap."""
        if not self._floored:
            return num_free + num_cached
        floored = (other.cached - other.spare for other in self._floored if other is not account)
        return num_free + num_cached - sum(floored)

    def kept_for_others(self, account: Account, count: int) -> CapacityError | None:
        """The error of `count` blocks that could not be had though everybody else ended: others keep their floors."""
        if not self._floored:
            return None
        kept = sum(min(other.used, other.floor) for other in self._floored if other is not account)
        if count <= self.num_blocks - kept:
            return None
        return CapacityError(
            f"the sequence needs {count:,} of the {self.num_blocks:,} blocks of the KV cache, more than the floors of "
            f"other tenants leave; shorten it, raise kv_cache_memory_bytes or lower floors"
        )

    def givers(self, account: Account, num_cached: int) -> list[Account | None]:
        """Whose blocks may go for one that the account takes, the one furthest above its floor first; None stands for
        all accounts without floor and cap. num_cached: blocks that nobody holds, of all accounts."""
        if not self._parted:
            return [None]
        if account.cap is not None and account.used >= account.cap:
            return [account]
        found: list[tuple[int, int, Account | None]] = []
        shared = num_cached
        for each in self._parted:
            shared -= each.cached
            if (count := each.cached if each is account else each.spare) > 0:
                found.append((-count, each.index, each))
        if shared:
            found.append((-shared, -1, None))
        return [each for _, _, each in sorted(found, key=lambda entry: entry[:2])]

    @property
    def is_parted(self) -> bool:
        """True where any tenant's blocks stand in orders of their own, so that who gives may change with each block."""
        return bool(self._parted)

    def to_shrink(self, num_cached: int) -> list[Account | None]:
        """Whose blocks may go for nobody's sake: of those above their floors the one furthest above first, and of
        anyone where there is none."""
        return self.givers(Account(-1, ""), num_cached) or [*self._parted]

    @property
    def num_promised(self) -> int:
        """Blocks of all floors together."""
        return sum(each.floor for each in self._floored)

    def clear(self) -> None:
        """No account has any block. Quotas and names stay."""
        for each in self.accounts:
            each.used = each.cached = each.pinned = each.num_sequences = 0

    def _tokens(self, num_blocks: int) -> str:
        """So many blocks as operators give them."""
        return f"{num_blocks * self._block_size:,} tokens ({num_blocks:,} block{'s' * (num_blocks != 1)})"

    def _open(self, public: bool, name: str) -> Account:
        index = self._vacant.pop() if self._vacant else len(self.accounts)
        account = Account(index, f"public {name}" if public else name, name, public)
        if index == len(self.accounts):
            self.accounts.append(account)
        else:
            self.accounts[index] = account
        self._by_name[public, name] = account
        return account


def quota_blocks(floor_tokens: int, cap_tokens: int | None, block_size: int) -> tuple[int, int | None]:
    """Floor and cap in blocks of what is granted in token positions: a floor is rounded up, a cap down. Raises
    ConfigError for less than 0 and 1 of them."""
    if floor_tokens < 0:
        raise ConfigError(f"floor_tokens is {floor_tokens:,}; give 0 or more tokens")
    if cap_tokens is not None and cap_tokens < 1:
        raise ConfigError(f"cap_tokens is {cap_tokens:,}; give at least a block of {block_size:,} tokens")
    return -(-floor_tokens // block_size), None if cap_tokens is None else cap_tokens // block_size
