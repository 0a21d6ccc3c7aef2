"""`pagemill bench quality` as the command line declares it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from pagemill.cli.options import engine_options
from pagemill.cli.peer_options import ENVIRONMENTS, Environments, PeerPython


def add_bench_quality(app: typer.Typer, act: Callable[..., None]) -> None:
    """Add the command to the group. act: runs an action of the table in `main.py`."""

    @app.command("quality")
    @engine_options
    def bench_quality(
        ctx: typer.Context,
        text: Annotated[
            str | None,
            typer.Option(
                help="UTF-8 text to predict, such as WikiText-2's wiki.test.raw; required.",
                metavar="FILE",
                show_default=False,
            ),
        ] = None,
        n_ctx: Annotated[str, typer.Option(help="Tokens of a window, or several numbers as 512,4096.")] = "512",
        windows: Annotated[
            str,
            typer.Option(help="Windows to run, from the beginning of the text; as 40,10 one number for each --n-ctx."),
        ] = "40",
        apart: Annotated[
            str,
            typer.Option(
                help="Weights for which keys, values, queries and probabilities are also put in int8 one at a time, in "
                "numpy (slow), as float32.",
                metavar="WEIGHTS",
            ),
        ] = "",
        peer: Annotated[
            str,
            typer.Option(
                help="llama.cpp: the same GGUF file and windows there, beside our float32; none: leave it out (unset: "
                "where installed)."
            ),
        ] = "",
        python_llama: PeerPython = None,
        environments: Environments = ENVIRONMENTS,
        output: Annotated[str, typer.Option(help="Directory for JSON.")] = "bench-results",
        json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
        engine: dict[str, Any] | None = None,
    ) -> None:
        """Perplexity and KL divergence of weights and KV types against our own float32, by llama.cpp's procedure.

        --dtype, --weight-format and --kv-cache-dtype take several names, separated by commas; each weights of the first
        two is run with each KV type.
        """
        act(
            ctx,
            "bench.quality",
            text=text,
            n_ctx=n_ctx,
            windows=windows,
            apart=apart,
            peer=peer,
            python_llama=python_llama,
            environments=environments,
            output=output,
            as_json=json,
            engine=engine,
        )
