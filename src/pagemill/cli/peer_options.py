"""Options of the benches that have other engines beside them: where these are."""

from __future__ import annotations

from typing import Annotated

import typer

PeerPython = Annotated[
    str | None, typer.Option(help="Python that has this peer already.", metavar="PATH", show_default=False)
]
Environments = Annotated[str, typer.Option(help="Directory of the peers' environments.", metavar="DIRECTORY")]
ENVIRONMENTS = "~/.cache/pagemill/peers"
