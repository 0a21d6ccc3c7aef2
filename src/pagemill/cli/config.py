"""`pagemill config`: the options in force with their origins, and their JSON schema."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.table import Table

from pagemill.base.config import OPTIONS, json_schema, resolve_config
from pagemill.cli.terminal import print_json


def show(*, engine: dict[str, Any], as_json: bool) -> None:
    """Print every option: value, where it came from, help."""
    resolved = resolve_config(engine["arguments"], file=engine["file"], origin="command line")
    if as_json:
        print_json(
            {
                name: {"value": getattr(resolved.config, name), "origin": resolved.origins[name], "unit": each.unit}
                for name, each in OPTIONS.items()
            }
            | {
                "tenants": {
                    "value": {each.name: each.describe() for each in resolved.config.tenants},
                    "origin": resolved.origins["tenants"],
                    "unit": "",
                }
            }
        )
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("option", "value", "from", "what it is"):
        table.add_column(heading, overflow="fold", no_wrap=heading == "option")
    for name, each in OPTIONS.items():
        value = getattr(resolved.config, name)
        shown = "unset" if value is None else f"{value:,}" if isinstance(value, int) and each.unit else str(value)
        table.add_row(name, shown, resolved.origins[name], each.help)
    for tenant in resolved.config.tenants:
        granted = ", ".join(f"{name} {value}" for name, value in tenant.describe().items() if value is not None)
        table.add_row(f"tenants.{tenant.name}", granted, resolved.origins["tenants"], "What this tenant is granted.")
    Console(highlight=False).print(table)


def schema() -> None:
    """Print the JSON schema of the options."""
    print(json.dumps(json_schema(), indent=2))
