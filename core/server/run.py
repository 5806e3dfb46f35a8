"""Runs a server from start to end: the port, the engine process, signals, and the order in which all of it closes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shlex
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import uvicorn
from fastapi import FastAPI

from plexor.config import EngineConfig
from plexor.errors import ConfigError, PlexorError
from plexor.extension.catalog import Catalog
from plexor.runtime.prompts import PromptDesk, find_folder
from plexor.server.client import EngineClient
from plexor.server.http import ServerSettings, Serving, make_app
from plexor.server.intake import Intake
from plexor.server.metrics import Metrics
from plexor.server.stream import TokenTexts

GRACE_SECONDS = 5
"""How long aborted requests may take to say so to their clients."""

DEATH_SECONDS = 0.5
"""How long the server lives on after its engine, so that clients and probes hear of it."""

EXIT_ENGINE_DIED = 1
EXIT_FORCED = 130


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where to listen; port 0 takes a free one. shutdown_seconds: how long requests may run on after a signal."""

    host: str
    port: int
    shutdown_seconds: float


def run_server(
    config: EngineConfig,
    catalog: Catalog,
    settings: ServerSettings,
    address: Address,
    progress: Callable[[int, int], None],
) -> int:
    """Serve until a signal comes or the engine dies; the process' exit code. PlexorError if it cannot start."""
    with listen(address.host, address.port) as listener:
        return asyncio.run(_Run(config, catalog, settings, address, listener, progress).run())


@contextlib.contextmanager
def listen(host: str, port: int) -> Iterator[socket.socket]:
    """A bound socket, before anything is loaded; ConfigError if the address cannot be had."""
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"cannot listen on {host} port {port} ({error}): choose another --host or --port") from error
    with listener:
        yield listener


class _Run:
    """One run of the server.

    signal -> nothing new is taken, what runs goes on -> after shutdown_seconds it is aborted -> the engine ends
    second signal -> everything ends at once
    """

    def __init__(
        self,
        config: EngineConfig,
        catalog: Catalog,
        settings: ServerSettings,
        address: Address,
        listener: socket.socket,
        progress: Callable[[int, int], None],
    ) -> None:
        self._config = config
        self._catalog = catalog
        self._settings = settings
        self._address = address
        self._listener = listener
        self._progress = progress
        self._signals = 0
        self._signalled = asyncio.Event()
        self._server: uvicorn.Server | None = None

    async def run(self) -> int:
        """The exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)
        metrics = Metrics(self._settings.model_name)
        folder = find_folder(self._config, self._catalog)
        desk = PromptDesk(folder, self._catalog)
        client = EngineClient(self._config, desk, metrics)
        try:
            settings = self._settings
            intake = Intake(desk, folder, client, max_images=settings.max_images, max_waiting=settings.max_waiting)
            serving = Serving(client, intake, TokenTexts(desk.tokenizer), metrics, settings)
            app = make_app(serving, self._catalog)
            if not await self._start(client):
                return 0
            desk.tokenizer.check_vocabulary(client.limits.vocab_size)
            return await self._serve(app, serving)
        finally:
            await client.close()

    async def _start(self, client: EngineClient) -> bool:
        """Load the model; False if a signal came meanwhile."""
        starting = asyncio.create_task(client.start(self._progress))
        signalled = asyncio.create_task(self._signalled.wait())
        await asyncio.wait((starting, signalled), return_when=asyncio.FIRST_COMPLETED)
        signalled.cancel()
        if starting.done():
            starting.result()
            return True
        starting.cancel()
        return False

    async def _serve(self, app: FastAPI, serving: Serving) -> int:
        config = uvicorn.Config(
            app,
            lifespan="off",
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=int(self._address.shutdown_seconds) + GRACE_SECONDS,
        )
        self._server = _Server(config, self._say_ready)
        tasks = [
            asyncio.create_task(self._drain(serving, self._server)),
            asyncio.create_task(self._follow_engine(serving.client, self._server)),
        ]
        try:
            await self._server.serve([self._listener])
        finally:
            for task in tasks:
                task.cancel()
        if serving.client.failure is not None:
            return EXIT_ENGINE_DIED
        return EXIT_FORCED if self._signals > 1 else 0

    async def _drain(self, serving: Serving, server: uvicorn.Server) -> None:
        """After the first signal: let what runs end, then abort it."""
        await self._signalled.wait()
        serving.is_draining = True
        server.should_exit = True
        await asyncio.sleep(self._address.shutdown_seconds)
        serving.client.abort_all()

    async def _follow_engine(self, client: EngineClient, server: uvicorn.Server) -> None:
        """A server without an engine ends, so that whoever supervises it starts it anew."""
        await client.died.wait()
        await asyncio.sleep(DEATH_SECONDS)
        server.should_exit = True

    def _on_signal(self) -> None:
        self._signals += 1
        self._signalled.set()
        if self._signals > 1 and self._server is not None:
            self._server.force_exit = True

    def _say_ready(self) -> None:
        host, port = self._listener.getsockname()[:2]
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        name = self._settings.model_name
        body = shlex.quote(json.dumps({"model": name, "prompt": "Once upon a time"}))
        key = " -H 'Authorization: Bearer KEY'" if self._settings.api_keys else ""
        print(
            f"ready on {url} (model {name}), try: curl {url}/v1/completions -H 'Content-Type: application/json'{key} "
            f"-d {body}",
            file=sys.stderr,
            flush=True,
        )


class _Server(uvicorn.Server):
    """uvicorn without its own handling of signals, which would end the process by the signal it has just survived."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.started:
            raise PlexorError("the HTTP server did not start: its own message stands above")
        self._on_ready()
