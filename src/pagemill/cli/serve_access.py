"""Who may enter a server, what it tells and where its operator asks: put together from the options of `pagemill serve`.

Owns the wiring and the refusals at the start; the parts are in `server/access*.py`, `limits*.py`, `admin*.py` and
`telemetry/`.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

import uvicorn
from fastapi import APIRouter, Request, Response

from pagemill import __version__
from pagemill.base.clock import MonotonicClock
from pagemill.base.errors import ConfigError
from pagemill.base.units import parse_bytes, parse_count, parse_seconds
from pagemill.build import Built
from pagemill.llm.async_llm import AsyncLLM
from pagemill.server.access import KeyRing
from pagemill.server.access_door import Door, Visit
from pagemill.server.access_keys import given_key
from pagemill.server.access_listen import HostCheck, TlsOptions, check_address, check_admin_address
from pagemill.server.admin import Draining, admin_app, admin_key, admin_key_of
from pagemill.server.admin_metrics import EngineFigures
from pagemill.server.limits import Limits
from pagemill.server.limits_body import BodyLimits
from pagemill.server.limits_connection import guarded_protocol
from pagemill.server.limits_tls import GuardedServer
from pagemill.server.service import Service
from pagemill.telemetry.logs import configure_logging
from pagemill.telemetry.metrics import Metrics
from pagemill.telemetry.observe import EngineObserver
from pagemill.telemetry.otlp import OtlpSink
from pagemill.telemetry.trace import Sampling, Tracer, sibling_of

OPERATIONS: Final = {"/v1/completions": "text_completion", "/v1/chat/completions": "chat"}
NO_ADMIN: Final = -1


class Drain:
    """What the admin port asks of the server's life. Mutated by `drain`."""

    def __init__(self, server: uvicorn.Server, service: Service, llm: AsyncLLM) -> None:
        self._server = server
        self._service = service
        self._llm = llm

    @property
    def is_draining(self) -> bool:
        return self._service.draining

    @property
    def num_open(self) -> int:
        return self._llm.num_open

    def drain(self) -> None:
        """As a SIGTERM does: no new requests, and the process ends when those inside have ended or their time has."""
        self._service.drain()
        self._server.should_exit = True


class _AdminServer(GuardedServer):
    """A server beside another one, which handles the signals."""

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        yield


class ServeAccess:
    """All of it for one server. Mutated by `loaded` and `close`.

    options: as `cli/access_options.py` packs them. model_name: the label of metrics and traces. Raises ConfigError for
    options that do not fit, before anything listens.
    """

    def __init__(self, options: Mapping[str, Any], host: str, model_name: str) -> None:
        configure_logging(options["log_level"], options["log_format"])
        clock = MonotonicClock()
        given = [given_key(key, f"api-key-{at}", "user", "default") for at, key in enumerate(options["api_key"] or ())]
        path = None if options["keys"] is None else Path(options["keys"]).expanduser()
        self.ring = KeyRing(path, given, clock)
        allowed = options["allowed_hosts"].split(",")
        has_keys = not self.ring.is_open
        self._insecure = insecure = bool(options["insecure"])
        check_address(host, has_keys=has_keys, insecure=insecure)
        self.hosts = HostCheck.of(host, has_keys=has_keys, insecure=insecure, allowed=allowed)
        self.tls = TlsOptions(*(_path(options[name]) for name in ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs")))
        self.limits = read_limits(options["limit"] or ())
        self.metrics = Metrics(model_name)
        self._max_open = int(options["max_open_requests"])
        if self._max_open < 1:
            raise ConfigError(f"max_open_requests is {self._max_open}; give at least 1")
        self._sink, self._tracer = self._traces(options, model_name)
        finished = None if self._tracer is None else self._tracer.finished
        self.observer = EngineObserver(self.metrics, finished)
        self.figures = EngineFigures(self.metrics, self.observer, clock, tenant_names=options["metrics_tenants"])
        self._admin_host, self._admin_port = str(options["admin_host"]), int(options["admin_port"])
        self._admin_hosts = HostCheck.of(self._admin_host, has_keys=False, insecure=False, allowed=allowed)
        self._admin_key_told: str | None = None
        self._admin_url: str | None = None
        self._admin_listener: socket.socket | None = None
        self._admin_ring = self._admin(options["admin_key"], path, clock)

    def _traces(self, options: Mapping[str, Any], model_name: str) -> tuple[OtlpSink | None, Tracer | None]:
        endpoint, slow = options["otlp_traces_endpoint"], options["trace_slow"]
        sampling = Sampling(options["trace_sample_ratio"], None if slow is None else parse_seconds(slow))
        if endpoint is None:
            return None, None
        sink = OtlpSink(endpoint, version=__version__)
        spans = self.metrics["pagemill:spans"]
        return sink, Tracer(model_name, sampling, sink, on_result=lambda result: spans.add(1, result))

    def _admin(self, given: str | None, path: Path | None, clock: MonotonicClock) -> KeyRing | None:
        """The keys of the admin port, None where there is no such port. Those of role admin in the file count; where
        there are none and none is given, one is made and told in the ready line."""
        if self._admin_port == NO_ADMIN:
            return None
        check_admin_address(self._admin_host, has_tls=self.tls.enabled, insecure=self._insecure)
        if given is not None:
            return KeyRing(path, [admin_key_of(given)], clock)
        if any(each.role == "admin" for each in self.ring.entries()):
            return KeyRing(path, (), clock)
        self._admin_key_told, entry = admin_key()
        return KeyRing(path, [entry], clock)

    def wrap(self, app: Any) -> Any:
        """The public application behind its door and its limits."""
        inner = BodyLimits(app, lambda: self.limits, self.metrics)
        return Door(
            inner, self.ring, self.metrics, hosts=self.hosts, max_open=self._max_open, operations=OPERATIONS
        )  # fmt: skip

    def metrics_router(self, side: Any) -> APIRouter:
        """/metrics of the public port: for everybody where no keys are asked for, else for keys of role metrics."""
        router = APIRouter()

        @router.get("/metrics", include_in_schema=False)
        async def metrics(request: Request) -> Response:
            body, content_type = await self.figures.render(side, request.headers.get("accept", ""))
            return Response(body, headers={"content-type": content_type})

        return router

    def uvicorn_options(self) -> dict[str, Any]:
        """Arguments for uvicorn's Config of the public port: connections that are cut when too slow."""
        return {
            "http": guarded_protocol(self.limits, self.metrics),
            "log_config": None,
            "proxy_headers": False,
        }

    def opened(self, request_ids: Sequence[str], asks: Sequence[tuple[Sequence[int], Any, Any]], visitor: Any) -> None:
        """Requests of a visitor have entered the engine: they are counted from now on, each with a span of its own."""
        trace = visitor.trace if isinstance(visitor, Visit) and self._tracer is not None else None
        for request_id, (token_ids, params, _) in zip(request_ids, asks, strict=True):
            self.observer.added(request_id, len(token_ids), params.n, trace)
            trace = None if trace is None else sibling_of(trace)

    async def loaded(self, side: AsyncLLM, built: Built) -> None:
        """The model is there: limits follow its context, metrics its cache."""
        self.limits = self.limits.for_model(built.max_model_len)
        facts = {
            "block_size": built.kv_spec.block_size,
            "num_blocks": built.num_blocks,
            "block_bytes": [group.spec.block_bytes for group in built.kv_spec.groups],
            "window_pages": built.kv_spec.window_pages,
            "kv_cache_dtype": built.kv_spec.codec,
            "enable_prefix_caching": built.config.enable_prefix_caching,
            "cache_policy": built.config.cache_policy,
        }
        await self.figures.attach(side, facts)

    def who_may_enter(self) -> str:
        """For the ready line: who is asked for a key, and where the operator asks."""
        if not self.ring.is_open:
            public = f"{self.ring.num_keys} keys"
        elif self.hosts.names is None:
            public = "OPEN TO EVERYBODY, without keys (--insecure)"
        else:
            public = "open to this machine, without keys"
        if self._admin_url is None:
            return public
        told = "" if self._admin_key_told is None else f"  key {self._admin_key_told}"
        return f"{public}  admin {self._admin_url}{told}"

    def listen_admin(self, listen: Callable[[str, int], socket.socket]) -> None:
        """Take the admin port, where there is to be one. Raises as `listen` does."""
        if self._admin_ring is None:
            return
        self._admin_listener = listen(self._admin_host, self._admin_port)
        host, port = self._admin_listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        self._admin_url = f"http{'s' if self.tls.enabled else ''}://{shown}:{port}"

    async def run_admin(self, side: AsyncLLM, draining: Draining) -> None:
        """Serve the admin port until cancelled; nothing without one."""
        ring, listener = self._admin_ring, self._admin_listener
        if ring is None or listener is None:
            return

        async def render(accept: str) -> tuple[bytes, str]:
            return await self.figures.render(side, accept)

        app = admin_app(
            side, draining, ring, self.ring, self.metrics, hosts=self._admin_hosts, limits=self.limits,
            render_metrics=render,
        )  # fmt: skip
        config = uvicorn.Config(
            app, http=guarded_protocol(self.limits, self.metrics), lifespan="off", ws="none",
            server_header=False, log_level="warning", log_config=None, access_log=False,
        )  # fmt: skip
        await _AdminServer(config, self.tls.context(), self.limits, self.metrics).serve(sockets=[listener])

    def close(self) -> None:
        """Send the spans that wait."""
        if self._sink is not None:
            self._sink.close()


def read_limits(given: Sequence[str]) -> Limits:
    """Limits from NAME=VALUE each. Raises ConfigError for names that there are not, and values that are none."""
    known = {each.name for each in fields(Limits)}
    values: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or name not in known:
            raise ConfigError(f"unknown limit {text!r:.60}; give NAME=VALUE with one of {', '.join(sorted(known))}")
        parse: Callable[[str], float] = parse_bytes if name.endswith("_bytes") else parse_count
        values[name] = (parse_seconds if name.endswith("_s") else parse)(value.strip())
    return Limits(**values)


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text).expanduser()
