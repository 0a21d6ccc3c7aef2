"""`pagemill top` as the command line declares it."""

from __future__ import annotations

from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else; as --once.")]


def add_top(app: typer.Typer, panel: str) -> None:
    """Declare the command. panel: of the program's help."""

    @app.command(rich_help_panel=panel)
    def top(
        ctx: typer.Context,
        url: Annotated[
            str | None,
            typer.Option(help="Address of a running server (unset: http://127.0.0.1:8000).", metavar="URL"),
        ] = None,
        key: Annotated[
            str | None,
            typer.Option(help="Key of role metrics, where keys are asked for (unset: PAGEMILL_METRICS_KEY)."),
        ] = None,
        admin_url: Annotated[
            str | None,
            typer.Option(
                help="Its admin port, for tenants; without --url everything is asked there (unset: "
                "PAGEMILL_ADMIN_URL).",
                metavar="URL",
            ),
        ] = None,
        admin_key: Annotated[
            str | None, typer.Option(help="The operator's key (unset: PAGEMILL_ADMIN_KEY).", metavar="KEY")
        ] = None,
        interval: Annotated[str, typer.Option(help="Time between two looks, as 1 or 500ms.", metavar="TIME")] = "1",
        once: Annotated[bool, typer.Option("--once", help="Look once, print it and end; as where no terminal is.")] = (
            False
        ),
        json: Json = False,
    ) -> None:
        """Watch a running server: requests, tokens a second, latencies, what the cache holds and finds. q ends it."""
        given = {"url": url, "key": key, "admin_url": admin_url, "admin_key": admin_key, "interval": interval}
        code = ctx.obj("top")(**given, once=once, as_json=json)
        if code:
            raise typer.Exit(int(code))
