"""`pagemill keys`: makes, lists and removes keys of a server. Owns the talk; the file is `server/access_keys.py`'s."""

from __future__ import annotations

import os
import shlex
import sys
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

_PIPE_WIDTH = 500  # of a table that no terminal folds


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
            f"{path} has a key {name!r}; remove it first with `pagemill keys rm {name}{_again(file)}`, or take another "
            f"name"
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
    """List the keys; their text is nowhere stored. Raises ConfigError where a file is named that is not there."""
    path = _path(file)
    _check_there(path, file)
    entries = _read(path)
    if as_json:
        print_json({"file": str(path), "keys": [each.describe() for each in entries]})
        return
    if not entries:
        hint = f"`pagemill keys add NAME{_again(file)}` makes one"
        note(f"{path} has no keys; {hint}" if path.exists() else f"there are no keys yet, nor a file {path}; {hint}")
        return
    Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH).print(_table(entries))


def rm(*, name: str, file: str | None, as_json: bool) -> None:
    """Remove a key; a running server refuses it from a second later on."""
    path = _path(file)
    _check_there(path, file)
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


def _table(entries: tuple[KeyEntry, ...]) -> Table:
    """Ids are shown whole; names and tenants are folded where the terminal is narrow."""
    table = Table(box=None, pad_edge=False)
    for heading in ("name", "role", "tenant", "priority", "requests\n/min", "tokens\n/min", "streams", "id"):
        table.add_column(heading, no_wrap=heading not in ("name", "tenant"), overflow="fold")
    for each in entries:
        table.add_row(*map(_shown, (
            each.name, each.role, each.tenant, each.priority, each.requests_per_minute, each.tokens_per_minute,
            each.max_streams, each.id,
        )))  # fmt: skip
    return table


def _again(file: str | None) -> str:
    """The option that names the same file in another command."""
    return "" if file is None else f" --file {shlex.quote(file)}"


def _check_there(path: Path, file: str | None) -> None:
    if file is not None and not path.exists():
        raise ConfigError(
            f"there is no file {path}; give another --file, or make its first key with "
            f"`pagemill keys add NAME{_again(file)}`"
        )


def _path(file: str | None) -> Path:
    if file is not None and not file.strip():
        raise ConfigError(f"--file is empty; name a file, or leave it out for {FILE_VARIABLE}, else {DEFAULT_FILE}")
    return Path(file or os.environ.get(FILE_VARIABLE) or DEFAULT_FILE).expanduser()


def _read(path: Path) -> tuple[KeyEntry, ...]:
    return read_keys(path) if path.exists() else ()


def _shown(value: Any) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
