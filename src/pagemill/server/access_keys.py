"""The file of keys: who may enter, as whom, and how much. Owns its format, its checks and its changes on disk.

    [keys.alice-laptop]
    id     = "5f0c2a91d3e84b76"        # public half, part of the key
    sha256 = "…64 hexadecimal digits…" # of the whole key, which is nowhere stored
    role   = "user"                    # user | metrics | admin
    tenant = "alice"                   # whose cache it uses; None for metrics and admin
    priority = 0                       # of its requests; lower ones come first, and a request may only ask for later
    requests_per_minute = 600          # each left out where there is no bound
    tokens_per_minute   = 200000
    max_streams         = 16

A key reads pm-<id>-<secret> with 256 bits of chance in the secret, so that a plain SHA-256 of it tells nothing; for
that reason keys are made here and never chosen by people. Standard library only: `pagemill keys` loads nothing else.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import stat
import tempfile
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final, Literal, get_args

from pagemill.base.errors import ConfigError

Role = Literal["user", "metrics", "admin"]

MAX_KEYS: Final = 10_000
MAX_FILE_BYTES: Final = 2**23
MIN_GIVEN_CHARS: Final = 16
MAX_LIMIT: Final = 10**12
MAX_PRIORITY: Final = 100
_ID: Final = re.compile(r"[0-9a-f]{16}", re.ASCII)
_SHA256: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@-]{0,127}", re.ASCII)
_KEY: Final = re.compile(r"pm-([0-9a-f]{16})-[A-Za-z0-9_-]{43}", re.ASCII)
_LIMITS: Final = ("requests_per_minute", "tokens_per_minute", "max_streams")


@dataclass(frozen=True, slots=True)
class KeyEntry:
    """One key as the file has it. Raises ConfigError for values of a wrong type or out of range.

    name: for the operator. id: public half of the key, empty for a key given on the command line. sha256: 64
    hexadecimal digits. The limits hold for each key alone; None is no limit.
    """

    name: str
    id: str
    sha256: str
    role: Role = "user"
    tenant: str | None = None
    priority: int = 0
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_streams: int | None = None

    def __post_init__(self) -> None:
        where = f"key {self.name!r:.60}"
        if not isinstance(self.name, str) or _NAME.fullmatch(self.name) is None:
            raise ConfigError(f"{where}: give a name of 1 to 128 letters, digits and _ . @ -")
        if not isinstance(self.id, str) or (self.id and _ID.fullmatch(self.id) is None):
            raise ConfigError(f"{where}: id is {self.id!r:.40}; give the 16 hexadecimal digits of the key")
        if not isinstance(self.sha256, str) or _SHA256.fullmatch(self.sha256) is None:
            raise ConfigError(f"{where}: sha256 is no 64 hexadecimal digits; make the key with `pagemill keys add`")
        if self.role not in get_args(Role):
            raise ConfigError(f"{where}: role is {self.role!r:.40}; choose one of {', '.join(get_args(Role))}")
        self._check_tenant(where)
        if isinstance(self.priority, bool) or not isinstance(self.priority, int) or abs(self.priority) > MAX_PRIORITY:
            raise ConfigError(f"{where}: priority is {self.priority!r:.40}; give -{MAX_PRIORITY} to {MAX_PRIORITY}")
        for limit in _LIMITS:
            value = getattr(self, limit)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_LIMIT:
                raise ConfigError(f"{where}: {limit} is {value!r:.40}; give a whole number from 1, or leave it out")

    def _check_tenant(self, where: str) -> None:
        tenant: object = self.tenant
        if self.role != "user":
            if tenant is not None:
                raise ConfigError(f"{where}: a key of role {self.role} has no tenant; leave tenant out")
            return
        if not isinstance(tenant, str) or not 0 < len(tenant) <= 256 or not tenant.isprintable():
            raise ConfigError(f"{where}: tenant is {tenant!r:.40}; give 1 to 256 printable letters")

    def describe(self) -> dict[str, object]:
        """What may be shown of it: everything but the hash."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name != "sha256"}


def hash_key(key: str) -> str:
    """SHA-256 of a key's text, 64 hexadecimal digits."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def id_of(key: str) -> str:
    """The public half of a key; empty where it is not of our making."""
    match = _KEY.fullmatch(key)
    return "" if match is None else match[1]


def make_key() -> tuple[str, str, str]:
    """A new key: its text, told once; its id; its hash."""
    id = secrets.token_hex(8)
    key = f"pm-{id}-{secrets.token_urlsafe(32)}"
    return key, id, hash_key(key)


def given_key(key: str, name: str, role: Role, tenant: str | None = None) -> KeyEntry:
    """The entry of a key that the operator gives at the start, whatever it looks like. Raises ConfigError for one too
    short to resist guessing, or that no header can hold."""
    if len(key) < MIN_GIVEN_CHARS or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(
            f"the key {name} has {len(key)} characters; give {MIN_GIVEN_CHARS} or more of ASCII without spaces, such as"
            " `pagemill keys add` makes"
        )
    return KeyEntry(name, id_of(key), hash_key(key), role=role, tenant=tenant)


def read_keys(path: Path) -> tuple[KeyEntry, ...]:
    """The keys of a file. Raises ConfigError where it cannot be read, is not such a file, is too large, holds a key
    twice, or may be written by others than its owner."""
    try:
        with path.open("rb") as stream:
            state = os.fstat(stream.fileno())
            data = stream.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            f"cannot read the file of keys {path}: {error.strerror}; make it with `pagemill keys add`"
        ) from None
    if state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(f"others may write the file of keys {path}; `chmod 600 {path}`")
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"the file of keys {path} has more than {MAX_FILE_BYTES:,} bytes; take keys out")
    try:
        table = tomllib.loads(data.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not a TOML file: {error}") from None
    return _parse(path, table)


def _parse(path: Path, table: Mapping[str, Any]) -> tuple[KeyEntry, ...]:
    keys = table.get("keys", {})
    if set(table) - {"keys"} or not isinstance(keys, Mapping):
        raise ConfigError(f"{path}: give tables [keys.NAME] and nothing else")
    if len(keys) > MAX_KEYS:
        raise ConfigError(f"{path} holds {len(keys):,} keys; give up to {MAX_KEYS:,}")
    known = [each.name for each in fields(KeyEntry)[1:]]
    found = []
    for name, values in keys.items():
        if not isinstance(values, Mapping):
            raise ConfigError(f"{path}: key {name!r:.60} is no table; give [keys.{name:.60}]")
        for option in values:
            if option not in known:
                near = get_close_matches(option, known, n=1)
                hint = f" did you mean {near[0]}?" if near else ""
                raise ConfigError(f"{path}: key {name!r:.60}: unknown {option!r:.40};{hint} known: {', '.join(known)}")
        missing = [option for option in ("id", "sha256") if option not in values]
        if missing:
            raise ConfigError(f"{path}: key {name!r:.60} has no {missing[0]}; make it with `pagemill keys add`")
        try:
            found.append(KeyEntry(name, **values))
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
    for what in ("id", "sha256"):
        values_of = [getattr(each, what) for each in found]
        if len(set(values_of)) != len(values_of):
            twice = max(found, key=lambda each: values_of.count(getattr(each, what)))
            raise ConfigError(f"{path}: key {twice.name!r} has the {what} of another one; make it anew")
    return tuple(found)


def write_keys(path: Path, entries: tuple[KeyEntry, ...]) -> None:
    """Replace the file in one move, readable by its owner alone; a crash leaves the old one or the new one.

    Raises ConfigError where it cannot be written.
    """
    text = "# Keys of a Pagemill server, hashed. Change it with `pagemill keys`; a running server reads it again.\n"
    for entry in entries:
        text += f"\n[keys.{_quoted(entry.name)}]\n"
        for each in fields(entry)[1:]:
            value = getattr(entry, each.name)
            if value is not None:
                text += f"{each.name} = {value if isinstance(value, int) else _quoted(value)}\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=".keys-", dir=path.parent)  # mode 0600
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(text.encode())
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise ConfigError(
            f"cannot write the file of keys {path}: {error.strerror}; give a path that you may write"
        ) from None


def _quoted(text: str) -> str:
    """A TOML basic string."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(each if each.isprintable() else f"\\U{ord(each):08X}" for each in escaped) + '"'
