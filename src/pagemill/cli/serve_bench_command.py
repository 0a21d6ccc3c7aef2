"""`pagemill bench serve` as the command line declares it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from pagemill.cli.options import engine_options
from pagemill.cli.peer_options import ENVIRONMENTS, Environments, PeerPython


def add_bench_serve(app: typer.Typer, act: Callable[..., None]) -> None:
    """Add the command to the group. act: runs an action of the table in `main.py`."""

    @app.command("serve")
    @engine_options
    def bench_serve(
        ctx: typer.Context,
        workloads: Annotated[
            str, typer.Option(help="Names separated by commas: distinct, shared, chat, agents, documents; or all.")
        ] = "all",
        users: Annotated[
            int | None,
            typer.Option(
                help="Users at the same time, each asking again when answered (unset: 32, with --quick 4).",
                show_default=False,
            ),
        ] = None,
        rate: Annotated[
            float | None,
            typer.Option(
                help="Instead of users: sessions that begin in a second, at random (Poisson).", show_default=False
            ),
        ] = None,
        trace: Annotated[
            str | None,
            typer.Option(
                help="Instead of workloads: a trace (Mooncake JSONL, agent sessions, Azure CSV) by its times.",
                metavar="FILE",
                show_default=False,
            ),
        ] = None,
        speed: Annotated[float, typer.Option(help="How many times faster a trace is replayed.")] = 1.0,
        at_once: Annotated[
            str | None,
            typer.Option(
                help="Pagemill's --max-num-seqs, a server for each number; N@MS: with --target-itl-ms too, N@peer: "
                "with nine tenths of the peer's p95 between tokens (unset: as many as users, and 8; beside a peer both "
                "@peer too, else 4).",
                metavar="N[@MS],…",
                show_default=False,
            ),
        ] = None,
        duration: Annotated[
            str | None,
            typer.Option(help="How long a run takes, as 30 or 2m (unset: 20 s, with --quick 2).", show_default=False),
        ] = None,
        runs: Annotated[
            int | None,
            typer.Option(
                help="Runs of each workload on each server, in turns (unset: 3, with --quick 1).", show_default=False
            ),
        ] = None,
        slo_ttft: Annotated[str, typer.Option(help="A good request has its first token within this.")] = "2s",
        slo_itl: Annotated[str, typer.Option(help="And 95 of 100 of its times between tokens within this.")] = "100ms",
        quick: Annotated[bool, typer.Option("--quick", help="A few short requests, to try it out.")] = False,
        peers: Annotated[
            str,
            typer.Option(help="llama.cpp: set it up where it is missing; none: leave it out (unset: where installed)."),
        ] = "",
        python_llama: PeerPython = None,
        environments: Environments = ENVIRONMENTS,
        load_seed: Annotated[int, typer.Option(help="Seed of prompts, lengths and arrivals.")] = 0,
        output: Annotated[str, typer.Option(help="Directory for JSON and plots.")] = "bench-results",
        json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
        engine: dict[str, Any] | None = None,
    ) -> None:
        """Many users over HTTP, on Pagemill's server and on llama-cpp-python's in one interleaved run.

        Throughput, first tokens, times between tokens, goodput at an objective, and prompt tokens found in the cache.
        """
        given = {"workloads": workloads, "users": users, "rate": rate, "trace": trace, "speed": speed}
        given |= {"at_once": at_once, "duration": duration, "num_runs": runs, "quick": quick}
        given |= {"slo_ttft": slo_ttft, "slo_itl": slo_itl, "seed": load_seed}
        chosen = {"peers": peers, "python_llama": python_llama, "environments": environments}
        act(ctx, "bench.serve", load=given, chosen=chosen, output=output, as_json=json, engine=engine)
