"""`pagemill serve`: the HTTP server around one engine. Owns the life of the process: listening before the model is
loaded, the ready line, draining on signals, and the exit code; the application is `server/app.py`'s."""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Final

import uvicorn

from pagemill import __version__
from pagemill.base.config import EngineConfig, for_serving, resolve_config
from pagemill.base.errors import ConfigError, PagemillError
from pagemill.base.units import parse_seconds
from pagemill.cli.garbage import collect_in_pauses, settle
from pagemill.cli.progress import byte_progress
from pagemill.cli.serve_access import Drain, ServeAccess
from pagemill.cli.terminal import YELLOW, paint, print_error
from pagemill.llm.async_llm import AsyncLLM
from pagemill.server.app import create_app
from pagemill.server.limits_tls import GuardedServer
from pagemill.server.ports import ServerSettings
from pagemill.server.service import Service

SWITCH_INTERVAL_S = 0.0005  # of the interpreter's threads; its own 5 ms is longer than a step
STOP_TIMEOUT_S = 5.0
KEEP_ALIVE_S = 75
BACKLOG = 1024

_LOG: Final = logging.getLogger(__name__)


def run(*, name: str | None, server: dict[str, Any], engine: dict[str, Any]) -> int:
    """Serve until a signal comes. Returns 0 after a drain, 2 where the model cannot be loaded."""
    arguments = dict(engine["arguments"])
    if name is not None:
        if "model" in arguments:
            raise ConfigError("the model is given twice, as an argument and by --model; give it once")
        arguments["model"] = name
    config = for_serving(resolve_config(arguments, file=engine["file"], origin="command line").config)
    settings = ServerSettings(
        served_names=_served_names(server["served_model_name"] or [_name_of(config)]),
        version=__version__,
        created_s=int(time.time()),
        strict=server["strict"],
        chat_template=_read_template(server["chat_template"]),
    )
    timeout_s = parse_seconds(server["shutdown_timeout"])
    access = ServeAccess(server["access"], server["host"], settings.served_names[0])
    _warn_without_users(access)
    listener = _listen(server["host"], server["port"])
    access.listen_admin(_listen)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    uvicorn_config = uvicorn.Config(
        _not_yet,
        log_level="warning",
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=max(1, round(timeout_s)),
        ws="none",
        **access.uvicorn_options(),
    )
    try:
        with asyncio.Runner(loop_factory=uvicorn_config.get_loop_factory()) as runner:
            exit_code, is_stopped = runner.run(_serve(config, settings, uvicorn_config, listener, access))
    except PagemillError:
        raise
    except Exception as error:  # whose words may quote a client: the log decides whether to tell them
        _LOG.critical("the server ends on an error that nothing caught", exc_info=error)
        raise PagemillError(
            f"the server ended on a mistake of Pagemill's ({type(error).__name__}); its log says where; report it, "
            f"with what --log-level debug says"
        ) from error
    if not is_stopped:  # a model that is still being loaded cannot be told to stop
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    uvicorn_config.app = _not_yet
    gc.unfreeze()
    gc.collect()  # weights go before the interpreter does
    return exit_code


async def _serve(
    config: EngineConfig,
    settings: ServerSettings,
    uvicorn_config: uvicorn.Config,
    listener: socket.socket,
    access: ServeAccess,
) -> tuple[int, bool]:
    """Serve until the server ends. Returns the exit code, and whether the engine's thread has ended."""
    with ExitStack() as progress:  # left when the model is loaded
        llm = AsyncLLM.from_config(config, load_progress=progress.enter_context(byte_progress()))
        service = Service(llm, settings)
        service.opened, llm.observe, llm.leaving = access.opened, access.figures.saw, access.figures.left
        app = create_app(llm, settings, service=service, routers=[access.metrics_router(llm)])
        uvicorn_config.app = access.wrap(app)
        server = _Server(uvicorn_config, service, access)
        url = _url_of(listener, access.tls.enabled)
        loading = asyncio.create_task(_load(llm, server, url, access, progress))
        admin = asyncio.create_task(access.run_admin(llm, Drain(server, service, llm)))
        collecting = asyncio.create_task(collect_in_pauses(lambda: not llm.num_open))
        try:
            await server.serve(sockets=[listener])
        finally:
            loading.cancel()
            admin.cancel()
            collecting.cancel()
            await asyncio.to_thread(access.close)
            await asyncio.to_thread(llm.shutdown, STOP_TIMEOUT_S if llm.status == "ready" else 0.1)
    return server.exit_code, llm.is_stopped


async def _load(llm: AsyncLLM, server: _Server, url: str, access: ServeAccess, progress: ExitStack) -> None:
    """Wait for the model, then say in one line that requests are answered; or end the server with the reason."""
    try:
        built = await llm.ready()
        progress.close()
        await access.loaded(llm, built)
    except Exception as error:
        progress.close()
        print_error(str(error) if isinstance(error, PagemillError) else f"internal error: {error!r}")
        server.exit_code = error.exit_code if isinstance(error, PagemillError) else 1
        server.should_exit = True
        return
    settle()
    facts = llm.facts
    print(
        f"ready: {url}  {server.service.settings.served_names[0]}  "
        f"KV cache {facts['kv_cache_tokens']:,} tokens in memory  {access.who_may_enter()}",
        flush=True,
    )


class _Server(GuardedServer):
    """A server that a signal drains, and that then ends as one that did what it was told. Mutated by signals.

    exit_code: of the process.
    """

    def __init__(self, config: uvicorn.Config, service: Service, access: ServeAccess) -> None:
        super().__init__(config, access.tls.context(), access.limits, access.metrics)
        self.service = service
        self.exit_code = 0

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        before = {each: signal.signal(each, self.handle_exit) for each in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:  # the second one is in a hurry
            self.force_exit = True
        self.service.drain()
        self.should_exit = True


async def _not_yet(scope: Any, receive: Any, send: Any) -> None:
    raise AssertionError("replaced before the server starts")


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ConfigError for a port in use and an address that is not this machine's."""
    if not 0 <= port <= 65535:
        raise ConfigError(f"port is {port}; give a number from 0 to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"port {port} of {host} is in use; give another --port, or 0 for any") from None
        raise ConfigError(f"cannot listen at {host} port {port}: {error.strerror or error}") from None


def _url_of(listener: socket.socket, is_tls: bool) -> str:
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    return f"http{'s' if is_tls else ''}://{shown}:{port}"


def _name_of(config: EngineConfig) -> str:
    """What clients call the model: its name, or the end of its path."""
    return Path(config.model).name if "/" in config.model else config.model


def _served_names(given: Sequence[str]) -> tuple[str, ...]:
    for name in given:
        if not name.strip() or not name.isprintable():
            raise ConfigError(f"--served-model-name is {name!r:.60}; give a name that clients can ask for, or none")
    return tuple(given)


def _warn_without_users(access: ServeAccess) -> None:
    if not access.ring.is_open and not any(each.role == "user" for each in access.ring.entries()):
        told = "--keys names a file without a key of role user, so nobody can generate; add one by `pagemill keys add`"
        print(f"{paint('warning:', YELLOW, sys.stderr)} {told}", file=sys.stderr)


def _read_template(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        template = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the chat template {path}: {error}; give a text file") from None
    if not template.strip():
        raise ConfigError(f"the chat template {path} is empty, and so would every prompt be; give one, or leave it out")
    return template
