"""Who is asking: keys compared in constant time, read again when their file changes, and what each may use a minute.

Owns identities, their buckets and the decision; HTTP is in `access_door.py`. One event loop's; not safe for threads.
"""

from __future__ import annotations

import hmac
import logging
import math
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pagemill.base.clock import Clock
from pagemill.base.errors import ConfigError, PagemillError
from pagemill.server.access_keys import KeyEntry, Role, hash_key, id_of, read_keys

RELOAD_S: Final = 1.0  # how soon a change of the file counts, at the latest
MAX_KEY_CHARS: Final = 512
DEFAULT_TENANT: Final = "default"

_LOG: Final = logging.getLogger(__name__)


class RefusedError(PagemillError):
    """The door stays shut. status: 401 without a key that is known, 403 for one of another role, 429 beyond its limits.

    reason: a word for metrics. retry_after_s: when to try again, where waiting helps.
    """

    exit_code = 2

    def __init__(self, message: str, status: int, reason: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.retry_after_s = retry_after_s


class Bucket:
    """Amounts per minute: holds a minute's worth, refills all the time. Mutated by `take`, `charge` and `resize`.

    What is charged afterwards may leave it in debt; nothing is let in until that is paid off.
    """

    __slots__ = ("_level", "_per_minute", "_since_s")

    def __init__(self, per_minute: int, now_s: float) -> None:
        self._per_minute = per_minute
        self._level = float(per_minute)
        self._since_s = now_s

    def wait_s(self, amount: float, now_s: float) -> float:
        """Seconds until `amount` (at the most a minute's worth) is there; 0 where it is."""
        self._refill(now_s)
        missing = min(amount, self._per_minute) - self._level
        return max(0.0, missing * 60.0 / self._per_minute)

    def charge(self, amount: float, now_s: float) -> None:
        """Take `amount`, whether it is there or not; a negative one gives back."""
        self._refill(now_s)
        self._level = min(self._level - amount, float(self._per_minute))

    def resize(self, per_minute: int, now_s: float) -> None:
        """Another limit from now on; what was used stays used."""
        self._refill(now_s)
        self._level += per_minute - self._per_minute
        self._per_minute = per_minute

    def _refill(self, now_s: float) -> None:
        self._level = min(self._level + (now_s - self._since_s) * self._per_minute / 60.0, float(self._per_minute))
        self._since_s = max(now_s, self._since_s)


class Identity:
    """Who a request comes from. Mutated by its own methods: what it uses.

    tenant: whose cache it uses. priority: of its requests that ask for none (lower comes first). name: of the key, for
    the operator's logs; None where no keys are asked for.
    """

    __slots__ = ("_clock", "_requests", "_tokens", "entry", "num_streams")

    def __init__(self, entry: KeyEntry | None, clock: Clock) -> None:
        self._clock = clock
        self.entry = entry
        self.num_streams = 0
        now_s = clock.now()
        self._requests = _bucket(None if entry is None else entry.requests_per_minute, None, now_s)
        self._tokens = _bucket(None if entry is None else entry.tokens_per_minute, None, now_s)

    @property
    def name(self) -> str | None:
        return None if self.entry is None else self.entry.name

    @property
    def tenant(self) -> str:
        return DEFAULT_TENANT if self.entry is None or self.entry.tenant is None else self.entry.tenant

    @property
    def role(self) -> Role:
        """Without keys everybody is a user, who may read the metrics too."""
        return "user" if self.entry is None else self.entry.role

    @property
    def priority(self) -> int:
        return 0 if self.entry is None else self.entry.priority

    def clamp_priority(self, asked: int | None) -> int:
        """The priority of a request: its wish, but never before what its key allows."""
        return self.priority if asked is None else max(asked, self.priority) if self.entry is not None else asked

    def renew(self, entry: KeyEntry) -> None:
        """The file says something new of this key; what it used stays used."""
        old, self.entry = self.entry, entry
        assert old is not None
        now_s = self._clock.now()
        self._requests = _bucket(entry.requests_per_minute, self._requests, now_s)
        self._tokens = _bucket(entry.tokens_per_minute, self._tokens, now_s)

    def enter(self) -> None:
        """Count one request in. Raises RefusedError (429), and counts nothing, beyond a limit of the key."""
        entry, now_s = self.entry, self._clock.now()
        if entry is None:
            self.num_streams += 1
            return
        if entry.max_streams is not None and self.num_streams >= entry.max_streams:
            raise RefusedError(
                f"this key has {self.num_streams} requests under way and may have {entry.max_streams}; wait until one "
                "has ended", 429, "streams", 1.0,
            )  # fmt: skip
        if self._requests is not None and (wait_s := self._requests.wait_s(1, now_s)):
            raise RefusedError(
                f"this key may send {entry.requests_per_minute:,} requests a minute; retry in {math.ceil(wait_s)} s",
                429, "requests", wait_s,
            )  # fmt: skip
        if self._tokens is not None and (wait_s := self._tokens.wait_s(1, now_s)):
            raise RefusedError(
                f"this key has used its {entry.tokens_per_minute:,} tokens a minute; retry in {math.ceil(wait_s)} s",
                429, "tokens", wait_s,
            )  # fmt: skip
        if self._requests is not None:
            self._requests.charge(1, now_s)
        self.num_streams += 1

    def leave(self) -> None:
        """A request that entered has ended."""
        assert self.num_streams > 0
        self.num_streams -= 1

    def charge_tokens(self, count: int) -> None:
        """Tokens were used: of the prompt when it is known, of the answer when it has ended. Never refuses: whoever
        goes beyond the limit waits the longer."""
        if self._tokens is not None and count > 0:
            self._tokens.charge(count, self._clock.now())


def _bucket(per_minute: int | None, old: Bucket | None, now_s: float) -> Bucket | None:
    if per_minute is None:
        return None
    if old is None:
        return Bucket(per_minute, now_s)
    old.resize(per_minute, now_s)
    return old


@dataclass(frozen=True, slots=True)
class _State:
    """What tells one version of a file from another."""

    modified_ns: int
    size: int
    inode: int


class KeyRing:
    """The keys in force. Mutated by `reload`, which `find` calls when the file may have changed.

    path: of the file of keys. extra: further keys, such as one from the command line. Without either everybody may
    enter (`is_open`). A file that has become unreadable or wrong changes nothing: each reason is logged once, and the
    keys as last read stay in force. Raises ConfigError where it is wrong at the start.
    """

    def __init__(self, path: Path | None, extra: Iterable[KeyEntry], clock: Clock) -> None:
        self._path = path
        self._extra = tuple(extra)
        self._clock = clock
        self._checked_s = clock.now()
        self._state: _State | None = None
        self._told: str | None = None  # what was wrong of the file when it was last read
        self._by_id: dict[str, list[Identity]] = {}
        self.nobody = Identity(None, clock)
        if path is not None:
            self._state = _state_of(path)
        self._adopt((*self._extra, *(() if path is None else read_keys(path))))

    @property
    def is_open(self) -> bool:
        """True where no key is asked for."""
        return self._path is None and not self._extra

    @property
    def num_keys(self) -> int:
        return sum(map(len, self._by_id.values()))

    def entries(self) -> list[KeyEntry]:
        """All keys in force."""
        return [each.entry for same in self._by_id.values() for each in same if each.entry is not None]

    def find(self, key: str | None) -> Identity:
        """Whose key this is. Raises RefusedError (401) for none and for one that is not known.

        The public half chooses whom to compare with; of those, every hash is compared, each in constant time, whether
        one has matched or not, and for an unknown half one comparison is made as well. So a known half and an unknown
        one take the same comparisons.
        """
        self._reload_if_due()
        if self.is_open:
            return self.nobody
        if key is None:
            raise RefusedError("no key; send one in the header Authorization: Bearer KEY", 401, "no key")
        key = key[:MAX_KEY_CHARS]
        given = hash_key(key)
        found: Identity | None = None
        for identity in self._by_id.get(id_of(key)) or (self.nobody,):
            known = _NO_HASH if identity.entry is None else identity.entry.sha256
            if hmac.compare_digest(given, known) and identity.entry is not None:
                found = identity
        if found is None:
            raise RefusedError("this key is not known; check it, or ask the operator for one", 401, "unknown key")
        return found

    def reload(self) -> bool:
        """Read the file again where it has changed. True where keys in force are other ones now. Raises ConfigError,
        and changes nothing, where it cannot be read or is wrong."""
        if self._path is None:
            return False
        try:
            state = _state_of(self._path)
            if state == self._state:
                return False
            entries = read_keys(self._path)
        except ConfigError as error:
            if str(error) != self._told:
                _LOG.error("the keys stay as they were: %s", error)
            self._state, self._told = None, str(error)
            raise
        self._state, self._told = state, None
        self._adopt((*self._extra, *entries))
        _LOG.info("read %d keys from %s", len(entries), self._path)
        return True

    def _reload_if_due(self) -> None:
        now_s = self._clock.now()
        if now_s - self._checked_s >= RELOAD_S:
            self._checked_s = now_s
            with suppress(ConfigError):  # logged
                self.reload()

    def _adopt(self, entries: Iterable[KeyEntry]) -> None:
        """These and no others; who stays keeps what it has used."""
        before = {each.entry.sha256: each for same in self._by_id.values() for each in same if each.entry is not None}
        self._by_id = {}
        for entry in entries:
            identity = before.get(entry.sha256)
            if identity is None:
                identity = Identity(entry, self._clock)
            else:
                identity.renew(entry)
            self._by_id.setdefault(entry.id, []).append(identity)


_NO_HASH: Final = "0" * 64


def _state_of(path: Path) -> _State:
    try:
        state = os.stat(path)
    except OSError as error:
        raise ConfigError(
            f"cannot read the file of keys {path}: {error.strerror}; make it with `pagemill keys add`"
        ) from None
    return _State(state.st_mtime_ns, state.st_size, state.st_ino)
