"""The HTTP application: routes, errors, and what is laid around them. Owns the putting together; routes are in files of
their own, who may enter is in `access*.py`, limits in `limits*.py`.

    door (keys, hosts, log line) -> limits -> routes
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastapi import APIRouter, FastAPI

from pagemill.server import chat, completions, routes
from pagemill.server.error_shape import described_errors
from pagemill.server.errors import install_errors
from pagemill.server.ports import ServerSettings, Serving
from pagemill.server.service import Service

# An ASGI application, and what wraps one in another.
ASGIApp = Callable[..., Any]
Wrapper = Callable[[ASGIApp], ASGIApp]


def create_app(
    serving: Serving,
    settings: ServerSettings,
    *,
    routers: Sequence[APIRouter] = (),
    service: Service | None = None,
) -> FastAPI:
    """The application with its routes. routers: further ones, such as /metrics. service: where it is needed outside.

    Middleware is laid around by `wrapped`, so that a stream passes through it as it is.
    """
    app = FastAPI(
        title="Pagemill",
        version=settings.version,
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
        responses=described_errors(),
    )
    app.state.service = service or Service(serving, settings)
    for router in (routes.router, completions.router, chat.router, *routers):
        app.include_router(router)
    install_errors(app)
    return app


def wrapped(app: ASGIApp, wrappers: Sequence[Wrapper]) -> ASGIApp:
    """The application within its wrappers, the first outermost."""
    for wrapper in reversed(wrappers):
        app = wrapper(app)
    return app
