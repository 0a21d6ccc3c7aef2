"""Options of `pagemill simulate` about serving a trace: declared here, packed into one mapping."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

import typer

from pagemill.base.errors import ConfigError

_PANEL = "Serving the trace (--serve)"


def _option(help: str, metavar: str | None = None) -> Any:
    return typer.Option(help=help, metavar=metavar, rich_help_panel=_PANEL)


# name -> annotation, default
_OPTIONS: dict[str, tuple[Any, Any]] = {
    "pace": (Annotated[float, _option("Factor of the times between requests.")], 1.0),
    "requests": (Annotated[int, _option("Only the first so many requests.")], 1000),
    "streams": (Annotated[int, _option("Sequences that run at the same time.")], 64),
    "deadline": (
        Annotated[float | None, _option("Seconds after its arrival at which a request that is not finished fails.")],
        None,
    ),
    "target_itl_ms": (
        Annotated[float | None, _option("Milliseconds between tokens that steps are held to, as by serve.")],
        None,
    ),
    "cost_model": (
        Annotated[str | None, _option("What steps take: a file, written with what is measured if not there.", "FILE")],
        None,
    ),
}
_SERVE = typer.Option(
    "--serve", help="Serve the trace: scheduler and cache, over a cost model.", rich_help_panel=_PANEL
)


def serving_options(function: Callable[..., None]) -> Callable[..., None]:
    """Replace a command's keyword parameter `served` by these options. The command, which has a parameter `ctx`, gets
    them by name, or None without --serve; where any was given then, it ends with a ConfigError."""
    signature = inspect.signature(function, eval_str=True)
    own = [each for each in signature.parameters.values() if each.name != "served"]
    options = {"serve": (Annotated[bool, _SERVE], False)} | _OPTIONS
    parameters = [
        *own,
        *(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            for name, (annotation, default) in options.items()
        ),
    ]

    @wraps(function)
    def command(*args: Any, **kwargs: Any) -> None:
        serve = kwargs.pop("serve")
        values = {name: kwargs.pop(name) for name in _OPTIONS}
        if not serve:
            _refuse_given(kwargs["ctx"])
        function(*args, served=values if serve else None, **kwargs)

    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in parameters} | {"return": None}
    return command


def _refuse_given(ctx: typer.Context) -> None:
    """Raise ConfigError where the command line has any of these options."""
    sources = {name: ctx.get_parameter_source(name) for name in _OPTIONS}
    given = [f"--{name.replace('_', '-')}" for name, source in sources.items() if source and source.name != "DEFAULT"]
    if given:
        one = len(given) == 1
        raise ConfigError(
            f"{', '.join(given)} {'means' if one else 'mean'} something only where the trace is served; add --serve "
            f"or leave {'it' if one else 'them'} out"
        )
