"""`pagemill keys`: makes, lists and removes keys of a server. Owns the talk; the file is `server/access_keys.py`'s."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pagemill.base.errors import ConfigError
from pagemill.base.units import parse_count
from pagemill.cli.terminal import note, print_json
from pagemill.server.access_keys import KeyEntry, Role, make_key, read_keys, write_keys

DEFAULT_FILE = "~/.config/pagemill/keys.toml"
FILE_VARIABLE = "PAGEMILL_KEYS"


def add(
    *,
    name: str,
    file: str | None,
    role: Role,
    tenant: str | None,
    priority: int,
    limits: dict[str, str | None],
    as_json: bool,
) -> None:
    """Make a key and print it, this once."""
    path = _path(file)
    entries = _read(path)
    if any(each.name == name for each in entries):
        raise ConfigError(
            f"{path} has a key {name!r}; remove it first with `pagemill keys rm {name}`, or take another name"
        )
    key, id, sha256 = make_key()
    if role == "user" and tenant is None:
        tenant = name
    counts = {each: None if text is None else parse_count(text) for each, text in limits.items()}
    entry = replace(KeyEntry(name, id, sha256, role=role, tenant=tenant, priority=priority), **counts)  # type: ignore[arg-type]
    write_keys(path, (*entries, entry))
    if as_json:
        print_json({"key": key, "file": str(path), **entry.describe()})
        return
    print(key)
    note(f"written to {path}, hashed: the key above is told only now")


def ls(*, file: str | None, as_json: bool) -> None:
    """List the keys; their text is nowhere stored."""
    path = _path(file)
    entries = _read(path)
    if as_json:
        print_json({"file": str(path), "keys": [each.describe() for each in entries]})
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("name", "role", "tenant", "priority", "requests/min", "tokens/min", "streams", "id"):
        table.add_column(heading)
    for each in entries:
        table.add_row(*map(_shown, (
            each.name, each.role, each.tenant, each.priority, each.requests_per_minute, each.tokens_per_minute,
            each.max_streams, each.id,
        )))  # fmt: skip
    Console(highlight=False).print(table)


def rm(*, name: str, file: str | None, as_json: bool) -> None:
    """Remove a key; a running server refuses it from a second later on."""
    path = _path(file)
    entries = _read(path)
    left = tuple(each for each in entries if each.name != name)
    if len(left) == len(entries):
        known = ", ".join(each.name for each in entries) or "no keys"
        raise ConfigError(f"{path} has no key {name!r}; it has {known}")
    write_keys(path, left)
    if as_json:
        print_json({"removed": name, "file": str(path), "keys": len(left)})
    else:
        print(f"removed {name}; {len(left)} keys are left in {path}")


def _path(file: str | None) -> Path:
    return Path(file or os.environ.get(FILE_VARIABLE) or DEFAULT_FILE).expanduser()


def _read(path: Path) -> tuple[KeyEntry, ...]:
    return read_keys(path) if path.exists() else ()


def _shown(value: Any) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
