"""What an operator grants each tenant, and the file's `[tenants.NAME]` tables. Owns names, ranges and messages.

[tenants.interactive]
floor_tokens = "64k"      # token positions that other tenants' demand cannot push it below
cap_tokens   = "256k"     # and that it never rises above
weight       = 4          # of its share where tenants compete for steps
priority     = 0          # each lower unit counts as four times the weight
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any

from pagemill.base.errors import ConfigError
from pagemill.base.units import parse_count

MAX_NAME = 256
MAX_WEIGHT = 1e6
MAX_PRIORITY = 10


@dataclass(frozen=True, slots=True)
class TenantOptions:
    """One tenant's grants. Token positions of the KV cache: floor_tokens are kept for it, cap_tokens are the most it
    may have (None: no bound of its own). weight: its share where tenants compete for steps. priority: -10 to 10,
    each unit below 0 counts as four times the weight and each above as a quarter, so that who comes last still comes.

    Raises ConfigError for values of a wrong type, out of range or contradictory.
    """

    name: str
    floor_tokens: int = 0
    cap_tokens: int | None = None
    weight: float = 1.0
    priority: int = 0

    def __post_init__(self) -> None:
        _check_name(self.name, "a tenant")
        for each in ("floor_tokens", "cap_tokens"):
            value = getattr(self, each)
            if each == "cap_tokens" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < (each == "cap_tokens"):
                least = "1 or more" if each == "cap_tokens" else "0 or more"
                raise ConfigError(f"tenant {self.name!r}: {each} is {value!r}; give {least} tokens")
        if self.cap_tokens is not None and self.cap_tokens < self.floor_tokens:
            raise ConfigError(
                f"tenant {self.name!r}: cap_tokens ({self.cap_tokens:,}) is below floor_tokens "
                f"({self.floor_tokens:,}); raise the cap"
            )
        weight = self.weight
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight <= MAX_WEIGHT:
            raise ConfigError(f"tenant {self.name!r}: weight is {weight!r}; give a number above 0 (1 is usual)")
        priority = self.priority
        if isinstance(priority, bool) or not isinstance(priority, int) or abs(priority) > MAX_PRIORITY:
            raise ConfigError(f"tenant {self.name!r}: priority is {priority!r}; give -{MAX_PRIORITY} to {MAX_PRIORITY}")

    def describe(self) -> dict[str, object]:
        """The grants without the name, as a `[tenants.NAME]` table has them."""
        return {each.name: getattr(self, each.name) for each in fields(self)[1:]}


def parse_tenants(value: object) -> tuple[TenantOptions, ...]:
    """Tenants from a mapping name -> table, or from TenantOptions. Raises ConfigError."""
    if isinstance(value, Mapping):
        found = [_parse_tenant(name, table) for name, table in value.items()]
    elif isinstance(value, Iterable) and not isinstance(value, str | bytes):
        found = list(value)
        if not all(isinstance(each, TenantOptions) for each in found):
            raise ConfigError("tenants: give {name: {option: value}}, or a list of TenantOptions")
    else:
        raise ConfigError(f"tenants is {value!r:.40}; give {{name: {{option: value}}}}, in a file [tenants.NAME]")
    names = [each.name for each in found]
    if len(set(names)) != len(names):
        raise ConfigError(f"tenants names {max(names, key=names.count)!r} twice; give each tenant once")
    return tuple(found)


def parse_names(option: str, value: object) -> tuple[str, ...]:
    """Names from a list, or from a text with commas between them. Raises ConfigError."""
    if isinstance(value, str):
        given = value
        value = [each.strip() for each in given.split(",")] if given.strip() else []
        if any(each.split() != [each] for each in value):
            raise ConfigError(f"{option} is {given!r:.60}; give names without spaces, with one comma between two")
    if not isinstance(value, Iterable) or isinstance(value, bytes | Mapping):
        raise ConfigError(f"{option} is {value!r:.40}; give names with commas between them")
    names = tuple(value)
    for name in names:
        _check_name(name, option)
    return tuple(dict.fromkeys(names))


def tenants_schema() -> dict[str, Any]:
    """JSON Schema of the `tenants` table."""
    amount = {"type": ["integer", "string"], "minimum": 0, "x-unit": "tokens"}
    properties = {
        "floor_tokens": amount | {"default": 0},
        "cap_tokens": amount | {"minimum": 1},
        "weight": {"type": "number", "exclusiveMinimum": 0, "default": 1.0},
        "priority": {"type": "integer", "default": 0},
    }
    table = {"type": "object", "properties": properties, "additionalProperties": False}
    return {"description": "What each tenant is granted.", "type": "object", "additionalProperties": table}


def _parse_tenant(name: object, table: object) -> TenantOptions:
    _check_name(name, "a tenant")
    if not isinstance(table, Mapping):
        raise ConfigError(f"tenant {name!r} is {table!r:.40}; give a table, [tenants.{name}]")
    known = [each.name for each in fields(TenantOptions)[1:]]
    values: dict[str, Any] = {}
    for key, value in table.items():
        option = str(key).replace("-", "_")
        if option not in known:
            near = get_close_matches(option, known, n=1)
            raise ConfigError(
                f"tenant {name!r}: unknown option {key!r};"
                + (f" did you mean {near[0]}?" if near else "")
                + f" options: {', '.join(known)}"
            )
        if option.endswith("_tokens") and isinstance(value, str):
            try:
                value = parse_count(value)
            except ConfigError as error:
                raise ConfigError(f"tenant {name!r}: {option}: {error}") from None
        values[option] = value
    return TenantOptions(str(name), **values)


def _check_name(name: object, what: str) -> None:
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or not name.isprintable():
        raise ConfigError(f"{what} is named {name!r:.40}; give 1 to {MAX_NAME} printable letters")
