"""Options of `pagemill serve` about who may enter, how large requests may be, and what is told: declared here, packed
into one mapping, and read by `cli/serve_access.py`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

import typer

_ACCESS = "Who may enter"
_TOLD = "Metrics, logs, traces"
_SIZES = "Limits"


def _option(panel: str, help: str, metavar: str | None = None, *flags: str) -> Any:
    return typer.Option(*flags, help=help, metavar=metavar, rich_help_panel=panel, show_default=metavar is not None)


# name -> annotation, default
_OPTIONS: dict[str, tuple[Any, Any]] = {
    "keys": (
        Annotated[str | None, _option(_ACCESS, "File of keys; see `pagemill keys add`.", "FILE")],
        None,
    ),
    "api_key": (
        Annotated[
            list[str] | None,
            typer.Option(
                help="A key of the default tenant, 16 or more characters; may be given several times. Others on this "
                "machine can see it in the list of processes: PAGEMILL_API_KEY or --keys keeps it from them.",
                envvar="PAGEMILL_API_KEY",
                metavar="KEY",
                rich_help_panel=_ACCESS,
                show_default=False,
                show_envvar=True,
            ),
        ],
        None,
    ),
    "insecure": (
        Annotated[
            bool,
            typer.Option(
                "--insecure",
                help="Listen on other addresses without keys, and for the operator without TLS.",
                rich_help_panel=_ACCESS,
            ),
        ],
        False,
    ),
    "allowed_hosts": (
        Annotated[str, _option(_ACCESS, "Names to answer to besides this machine's own, with commas.", "NAMES")],
        "",
    ),
    "admin_host": (Annotated[str, _option(_ACCESS, "Address of the admin port.", "HOST")], "127.0.0.1"),
    "admin_port": (
        Annotated[int, _option(_ACCESS, "Port for the operator (0: any that is free; -1: none).", "PORT")],
        -1,
    ),
    "admin_key": (
        Annotated[
            str | None,
            typer.Option(
                help="Key of the admin port (unset: one is made and told in the ready line).",
                envvar="PAGEMILL_ADMIN_KEY",
                metavar="KEY",
                rich_help_panel=_ACCESS,
                show_default=False,
                show_envvar=True,
            ),
        ],
        None,
    ),
    "ssl_certfile": (Annotated[str | None, _option(_ACCESS, "TLS certificate, PEM.", "FILE")], None),
    "ssl_keyfile": (Annotated[str | None, _option(_ACCESS, "Its key, PEM, readable by you alone.", "FILE")], None),
    "ssl_ca_certs": (
        Annotated[str | None, _option(_ACCESS, "Ask clients for a certificate of this authority.", "FILE")],
        None,
    ),
    "limit": (
        Annotated[
            list[str] | None,
            _option(_SIZES, "Another limit, as max_body_bytes=1MiB; may be given several times.", "NAME=VALUE"),
        ],
        None,
    ),
    "max_open_requests": (
        Annotated[int, _option(_SIZES, "Requests under way at a time; more are told to come back.", "N")],
        1024,
    ),
    "log_level": (Annotated[str, _option(_TOLD, "debug, info, warning or error.", "LEVEL")], "warning"),
    "log_format": (Annotated[str, _option(_TOLD, "text or json.", "FORMAT")], "text"),
    "metrics_tenants": (
        Annotated[
            bool,
            typer.Option("--metrics-tenants", help="Name tenants in the metric of quotas.", rich_help_panel=_TOLD),
        ],
        False,
    ),
    "otlp_traces_endpoint": (
        Annotated[str | None, _option(_TOLD, "OpenTelemetry collector, HTTP with protobuf (extra otel).", "URL")],
        None,
    ),
    "trace_sample_ratio": (Annotated[float, _option(_TOLD, "Share of requests that are traced.", "0..1")], 1.0),
    "trace_slow": (
        Annotated[str | None, _option(_TOLD, "Trace every request that takes this long, as 2s or 500ms.", "TIME")],
        None,
    ),
}


def access_options(function: Callable[..., None]) -> Callable[..., None]:
    """Replace a command's keyword parameter `access` by the options; it gets a mapping of all of them."""
    signature = inspect.signature(function, eval_str=True)
    own = [each for each in signature.parameters.values() if each.name != "access"]

    @wraps(function)
    def command(*args: Any, **kwargs: Any) -> None:
        access = {name: kwargs.pop(name) for name in _OPTIONS}
        function(*args, access=access, **kwargs)

    kind = inspect.Parameter.KEYWORD_ONLY
    generated = [
        inspect.Parameter(name, kind, default=default, annotation=annotation)
        for name, (annotation, default) in _OPTIONS.items()
    ]
    parameters = [*own, *generated]
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in parameters} | {"return": None}
    return command
