"""The commands of `pagemill keys` as the command line declares them."""

from __future__ import annotations

from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
File = Annotated[
    str | None,
    typer.Option(
        help="File of keys (unset: PAGEMILL_KEYS, else ~/.config/pagemill/keys.toml).",
        metavar="FILE",
        show_default=False,
    ),
]
Name = Annotated[str, typer.Argument(help="Name of the key, for you: letters, digits and _ . @ -")]
Count = Annotated[str | None, typer.Option(help="As 600 or 20k (unset: no limit).", metavar="N", show_default=False)]


def keys_app(settings: dict[str, Any]) -> typer.Typer:
    """The group of commands. settings: of every group of the program."""
    app = typer.Typer(help="Keys of a server: make, list and remove them.", **settings)

    @app.command("add")
    def add(
        ctx: typer.Context,
        name: Name,
        file: File = None,
        role: Annotated[
            str, typer.Option(help="user (generates), metrics (reads /metrics) or admin (the admin port).")
        ] = "user",
        tenant: Annotated[
            str | None, typer.Option(help="Whose cache it uses (unset: the key's name).", show_default=False)
        ] = None,
        priority: Annotated[int, typer.Option(help="Of its requests; lower ones come first.")] = 0,
        requests_per_minute: Count = None,
        tokens_per_minute: Count = None,
        max_streams: Count = None,
        json: Json = False,
    ) -> None:
        """Make a key and print it; only its hash is kept."""
        limits = {
            "requests_per_minute": requests_per_minute,
            "tokens_per_minute": tokens_per_minute,
            "max_streams": max_streams,
        }
        ctx.obj("keys.add")(
            name=name, file=file, role=role, tenant=tenant, priority=priority, limits=limits, as_json=json
        )

    @app.command("ls")
    def ls(ctx: typer.Context, file: File = None, json: Json = False) -> None:
        """List the keys of a file."""
        ctx.obj("keys.ls")(file=file, as_json=json)

    @app.command("rm")
    def rm(ctx: typer.Context, name: Name, file: File = None, json: Json = False) -> None:
        """Remove a key; a running server refuses it within a second."""
        ctx.obj("keys.rm")(name=name, file=file, as_json=json)

    return app
