"""How many blocks each tenant has and may have. Owns the accounts, their floors and caps; evicts nothing.

A floor is what other tenants' demand cannot push a tenant below; a cap is what it cannot rise above, whoever else is
idle. Texts of a public namespace count for an account of their own. Without floors and caps one sum is all there is.
"""

from __future__ import annotations

from dataclasses import dataclass

from pagemill.base.errors import ConfigError, RequestError
from pagemill.cache.keys import Namespace


@dataclass(slots=True, eq=False)
class Account:
    """Blocks of one tenant. Mutated by Tenancy and the manager.

    used: blocks charged to it, whoever reads them. cached: those of them that nobody holds. pinned: those under a
    lease. partition: whose orders of eviction its blocks stand in; 0 is shared by all without floor and cap.
    """

    index: int
    name: str
    floor: int = 0
    cap: int | None = None
    used: int = 0
    cached: int = 0
    pinned: int = 0
    partition: int = 0

    @property
    def spare(self) -> int:
        """Cached blocks that others may take without pushing it below its floor."""
        return min(self.cached, max(self.used - self.floor, 0))


class Tenancy:
    """Accounts by name. Mutated by `account`, `set_quota` and `declare_public`.

    known_only: refuse tenants that were never declared (`set_quota`), as an operator may wish.
    """

    __slots__ = ("_by_name", "_floored", "_known_only", "_public", "accounts", "num_blocks")

    def __init__(self, num_blocks: int, *, known_only: bool = False) -> None:
        self.num_blocks = num_blocks
        self.accounts: list[Account] = []
        self._by_name: dict[tuple[bool, str], Account] = {}  # public or not, name
        self._floored: list[Account] = []
        self._public: set[str] = set()
        self._known_only = known_only
        self._open(False, "default")

    def namespace(self, tenant: str, salt: str | None, public: str | None) -> Namespace:
        """Where a request's text belongs. Raises RequestError for a public name that nobody declared and, where only
        known tenants may enter, for an unknown one."""
        if public is not None:
            if public not in self._public:
                raise RequestError(f"there is no public namespace {public!r}; the operator declares them", status=403)
            return Namespace(public, salt, public=True)
        if self._known_only and (False, tenant) not in self._by_name:
            raise RequestError(f"tenant {tenant!r} is unknown; the operator adds tenants with a quota", status=403)
        return Namespace(tenant, salt)

    def account(self, namespace: Namespace) -> Account:
        """The account that a namespace's blocks count for, opened at first use."""
        name = (namespace.public, namespace.tenant)
        return self._by_name.get(name) or self._open(*name)

    def declare_public(self, name: str) -> None:
        """Let requests name this namespace and share across tenants in it."""
        if not name:
            raise ConfigError("a public namespace has an empty name; give one")
        self._public.add(name)

    def set_quota(self, tenant: str, floor: int, cap: int | None) -> Account:
        """A tenant's floor and cap in blocks, from now on.

        Raises ConfigError, and changes nothing, where floors would exceed the memory or the cap lies below the floor.
        """
        if not tenant:
            raise ConfigError("a tenant has an empty name; give one")
        if floor < 0 or (cap is not None and cap < 1):
            raise ConfigError(f"tenant {tenant!r}: a floor is 0 or more blocks, a cap 1 or more; got {floor} and {cap}")
        known = self._by_name.get((False, tenant))
        if cap is not None and cap < floor:
            raise ConfigError(f"tenant {tenant!r}: the cap ({cap} blocks) is below the floor ({floor}); raise the cap")
        if cap is not None and cap > self.num_blocks:
            raise ConfigError(
                f"tenant {tenant!r}: the cap is {cap} blocks and the cache has {self.num_blocks}; lower it"
            )
        others = sum(each.floor for each in self._floored) - (known.floor if known else 0)
        if others + floor > self.num_blocks:
            raise ConfigError(
                f"tenant {tenant!r}: a floor of {floor} blocks beside {others} promised to others exceeds the "
                f"{self.num_blocks} of the cache; lower it or raise kv_cache_memory_bytes"
            )
        account = known or self._open(False, tenant)
        account.floor, account.cap = floor, cap
        self._floored = [each for each in self.accounts if each.floor]
        return account

    def own_partition(self, account: Account) -> bool:
        """True where the account needs orders of its own, because it has a floor or a cap."""
        return bool(account.floor) or account.cap is not None

    def available(self, account: Account, num_free: int, num_cached: int) -> int:
        """Blocks that the account could take now: free ones, its own cached ones, and what others can spare."""
        possible = self.room(account, num_free, num_cached)
        if account.cap is not None:
            possible = min(possible, account.cap - account.used + account.cached)
        return possible

    def room(self, account: Account, num_free: int, num_cached: int) -> int:
        """The same, whatever its cap."""
        floored = (other.cached - other.spare for other in self._floored if other is not account)
        return num_free + num_cached - sum(floored)

    def givers(self, account: Account) -> list[Account | None]:
        """Whose blocks may go for one that the account takes, the one furthest above its floor first; None stands for
        all accounts without floor and cap."""
        if account.cap is not None and account.used >= account.cap:
            return [account]
        found: list[tuple[int, int, Account | None]] = []
        shared = 0
        for each in self.accounts:
            if not each.partition:
                shared += each.cached
            elif (count := each.cached if each is account else each.spare) > 0:
                found.append((-count, each.index, each))
        if shared:
            found.append((-shared, -1, None))
        return [each for _, _, each in sorted(found, key=lambda entry: entry[:2])]

    def above_floors(self) -> list[Account | None]:
        """Whose blocks may go for nobody's sake, the one furthest above its floor first; None as in `givers`."""
        return self.givers(Account(-1, ""))

    def check_resize(self, num_blocks: int) -> None:
        """Raise ConfigError where floors would exceed `num_blocks`."""
        floors = sum(each.floor for each in self._floored)
        if floors > num_blocks:
            raise ConfigError(f"tenants' floors need {floors} blocks and {num_blocks} are left; lower the floors first")

    def _open(self, public: bool, name: str) -> Account:
        account = Account(len(self.accounts), f"public {name}" if public else name)
        self.accounts.append(account)
        self._by_name[public, name] = account
        return account
