"""The engine's options as options of a command, generated from `EngineConfig`'s fields."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import cache, wraps
from typing import Annotated, Any

import typer

from pagemill.base.config import OPTIONS, Option
from pagemill.base.errors import ConfigError

PANEL = "Engine options (also PAGEMILL_<NAME>, or a TOML file)"
_SHORT_FLAGS = {"model": "-m"}


def engine_options(function: Callable[..., None]) -> Callable[..., None]:
    """Replace a command's keyword parameter `engine` by one option for each field of EngineConfig, and `--config`.

    The command gets `engine`: {"arguments": option name -> text as typed, for those given; "file": path or None}.
    """
    signature = inspect.signature(function, eval_str=True)
    own = [each for each in signature.parameters.values() if each.name != "engine"]

    @wraps(function)
    def command(*args: Any, **kwargs: Any) -> None:
        given = {name: kwargs.pop(name) for name in OPTIONS}
        arguments = {name: value for name, value in given.items() if value is not None}
        function(*args, engine={"arguments": arguments, "file": kwargs.pop("config")}, **kwargs)

    parameters = [*own, *_generated()]
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in parameters} | {"return": None}
    return command


def refuse_unused(arguments: Iterable[str], used: Iterable[str], why: str) -> None:
    """Raise ConfigError for engine options that were given and that the command does not read; why: it does not."""
    idle = sorted(set(arguments) - set(used))
    if idle:
        flags = ", ".join(OPTIONS[name].flag for name in idle)
        raise ConfigError(f"{flags}: {why}, so this would change nothing; leave it out")


@cache
def _generated() -> tuple[inspect.Parameter, ...]:
    """The same for every command."""
    return (*(_parameter(each) for each in OPTIONS.values()), _config_parameter())


def _parameter(each: Option) -> inspect.Parameter:
    flags = [each.flag, _SHORT_FLAGS[each.name]] if each.name in _SHORT_FLAGS else [each.flag]
    default = "" if each.default is None else f" [default: {each.default}]"
    help = typer.Option(
        *flags,
        help=(each.help + default).replace("[", r"\["),  # which would begin a style
        metavar="|".join(each.choices) or (each.unit or each.kind).upper(),
        show_default=False,
        rich_help_panel=PANEL,
    )
    return _keyword(each.name, Annotated[str | None, help])


def _config_parameter() -> inspect.Parameter:
    help = typer.Option(
        "--config", help="TOML file with engine options.", metavar="FILE", show_default=False, rich_help_panel=PANEL
    )
    return _keyword("config", Annotated[str | None, help])


def _keyword(name: str, annotation: object) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
