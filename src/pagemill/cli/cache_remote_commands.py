"""The commands of `pagemill cache` as the command line declares them."""

from __future__ import annotations

from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Url = Annotated[
    str | None,
    typer.Option(help="Admin address of a running server (unset: PAGEMILL_ADMIN_URL).", metavar="URL"),
]
Key = Annotated[str | None, typer.Option(help="The operator's key (unset: PAGEMILL_ADMIN_KEY).", metavar="KEY")]
AnyTenant = Annotated[str | None, typer.Option(help="Of this tenant alone.", show_default=False)]
Tenant = Annotated[str, typer.Option(help="Whose text it is.")]
Salt = Annotated[str | None, typer.Option(help="The cache_salt that it was sent with.", show_default=False)]
Public = Annotated[
    str | None, typer.Option(help="The public namespace that it was sent to.", metavar="NAME", show_default=False)
]
TextArgument = Annotated[
    str | None,
    typer.Argument(metavar="[TEXT]", help='The text, as it was sent to be completed; "-" reads it from stdin.'),
]
TokenIds = Annotated[
    str | None,
    typer.Option(
        help='In place of a text: a JSON list of token ids, or what /tokenize answers; "-" reads it from stdin.',
        metavar="FILE",
        show_default=False,
    ),
]


def cache_app(settings: dict[str, Any]) -> typer.Typer:
    """The group of commands. settings: of every group of the program."""
    app = typer.Typer(help="What the prefix cache holds, found, and would find at other sizes.", **settings)

    @app.command("stats")
    def stats(
        ctx: typer.Context,
        trace: Annotated[
            str | None,
            typer.Argument(help="A trace with block ids to replay here, or a load: chat, agents, … (instead of --url)"),
        ] = None,
        url: Url = None,
        key: Key = None,
        blocks: Annotated[
            str, typer.Option(help="Size of the cache that a trace is replayed over, in blocks.")
        ] = "10000",
        seed: Annotated[int, typer.Option(help="Seed of session starts and generated loads.")] = 0,
        json: Json = False,
    ) -> None:
        """Use of the cache, tokens found, and the expected hit ratio at other sizes: of a server, or of a trace."""
        _act(ctx, "cache.stats", trace=trace, url=url, key=key, blocks=blocks, seed=seed, as_json=json)

    @app.command("ls")
    def ls(
        ctx: typer.Context,
        url: Url = None,
        key: Key = None,
        tenant: AnyTenant = None,
        limit: Annotated[str, typer.Option(help="Blocks to list at the most, as 100 or 20k.")] = "100",
        json: Json = False,
    ) -> None:
        """List the blocks that a running server's cache holds. Texts are not told: a block is named by its key."""
        _act(ctx, "cache.ls", url=url, key=key, tenant=tenant, limit=limit, as_json=json)

    @app.command("tree")
    def tree(
        ctx: typer.Context,
        url: Url = None,
        key: Key = None,
        tenant: AnyTenant = None,
        depth: Annotated[int, typer.Option(help="Branchings from the root, 1 to 64.")] = 4,
        limit: Annotated[str, typer.Option(help="Lines to show at the most, up to 10,000.")] = "200",
        json: Json = False,
    ) -> None:
        """Show the tree of prefixes of a running server's cache: which texts begin alike."""
        _act(ctx, "cache.tree", url=url, key=key, tenant=tenant, depth=depth, limit=limit, as_json=json)

    _add_acting(app)
    return app


def _add_acting(app: typer.Typer) -> None:
    """The commands that change something."""

    @app.command("purge")
    def purge(
        ctx: typer.Context,
        text: TextArgument = None,
        token_ids: TokenIds = None,
        what: Annotated[
            str | None,
            typer.Option(
                help="text (this one to its end), prefix (all that begin with it; the default with a text), namespace "
                "(all of the tenant with this salt), tenant (all of it).",
                metavar="text|prefix|namespace|tenant",
                show_default=False,
            ),
        ] = None,
        tenant: Tenant = "default",
        salt: Salt = None,
        public: Public = None,
        url: Url = None,
        key: Key = None,
        yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before.")] = False,
        json: Json = False,
    ) -> None:
        """Drop texts from a running server's cache. Asks before; pages are wiped when it returns."""
        whose = {"tenant": tenant, "salt": salt, "public": public}
        given = {"text": text, "token_ids": token_ids, "what": what, "whose": whose}
        _act(ctx, "cache.purge", **given, url=url, key=key, yes=yes, as_json=json)

    @app.command("pin")
    def pin(
        ctx: typer.Context,
        text: TextArgument = None,
        token_ids: TokenIds = None,
        seconds: Annotated[str, typer.Option("--for", help="How long, as 30m or 2h.", metavar="TIME")] = "10m",
        tenant: Tenant = "default",
        salt: Salt = None,
        public: Public = None,
        url: Url = None,
        key: Key = None,
        json: Json = False,
    ) -> None:
        """Keep what a running server has cached of a text, whatever else wants the room."""
        whose = {"tenant": tenant, "salt": salt, "public": public}
        given = {"text": text, "token_ids": token_ids, "seconds": seconds, "whose": whose}
        _act(ctx, "cache.pin", **given, url=url, key=key, as_json=json)

    @app.command("unpin")
    def unpin(
        ctx: typer.Context,
        pin: Annotated[int, typer.Argument(help="The number that `pagemill cache pin` told.")],
        url: Url = None,
        key: Key = None,
        json: Json = False,
    ) -> None:
        """End a pin."""
        _act(ctx, "cache.unpin", pin_id=pin, url=url, key=key, as_json=json)


def _act(ctx: typer.Context, action: str, /, **arguments: Any) -> None:
    code = ctx.obj(action)(**arguments)
    if code:
        raise typer.Exit(int(code))
