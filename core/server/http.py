"""The HTTP application: routes, the checks before them, and what happens when a client leaves."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from plexor import __version__
from plexor.errors import RequestError
from plexor.extension.catalog import Catalog
from plexor.server.client import EngineClient, Group
from plexor.server.errors import (
    ApiError,
    ClientLeftError,
    error_response,
    on_api_error,
    on_client_left,
    on_crash,
    on_http_exception,
)
from plexor.server.intake import Intake, Work, as_api_error
from plexor.server.metrics import Metrics
from plexor.server.protocol import AnyRequest, ChatRequest, CompletionRequest, parse
from plexor.server.stream import (
    Job,
    TokenTexts,
    chat_body,
    chat_events,
    completion_body,
    completion_events,
    engine_error,
)

MAX_HEADER_BYTES = 64 * 1024
MAX_HEADERS = 100
RETRY_SECONDS = 1
"""What a client is told to wait when the line is full."""

OPEN_PATHS = frozenset({"/health"})
"""What needs no API key: probes have none."""

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """What a server is told.

    model_name: what requests must call the model. api_keys: any of them opens every path; none means no key is needed.
    max_waiting: answers that may wait beside those that run. max_body: bytes. max_images: in one request.
    enable_routes: plugins that may add routes.
    """

    model_name: str
    api_keys: tuple[str, ...] = ()
    max_waiting: int = 1024
    max_body: int = 64 * 1024 * 1024
    max_images: int = 16
    enable_routes: tuple[str, ...] = ()


class Serving:
    """What the routes share. is_draining: set when the server is about to end, so that nothing new begins."""

    def __init__(
        self, client: EngineClient, intake: Intake, texts: TokenTexts, metrics: Metrics, settings: ServerSettings
    ) -> None:
        self.client = client
        self.metrics = metrics
        self.settings = settings
        self._started = int(time.time())
        self.is_draining = False
        self._intake = intake
        self._texts = texts

    async def completion(self, request: Request) -> Response:
        """POST /v1/completions"""
        body = await self._parse(request, CompletionRequest)
        job = await self._begin(request, body, self._intake.completion, "cmpl")
        return await self._answer(request, job, completion_events, completion_body)

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions"""
        body = await self._parse(request, ChatRequest)
        job = await self._begin(request, body, self._intake.chat, "chatcmpl")
        return await self._answer(request, job, chat_events, chat_body)

    def model_card(self) -> dict[str, Any]:
        """One entry of /v1/models."""
        return {
            "id": self.settings.model_name,
            "object": "model",
            "created": self._started,
            "owned_by": "plexor",
            "root": self.settings.model_name,
            "parent": None,
            "max_model_len": self.client.limits.max_length,
        }

    def check_model(self, name: str) -> None:
        """ApiError with status 404 for any name but the served one."""
        if name != self.settings.model_name:
            shown = name if len(name) <= 100 else f"{name[:100]}…"
            raise ApiError(
                404,
                f"there is no model {shown!r}: this server has {self.settings.model_name!r}",
                param="model",
                code="model_not_found",
            )

    async def _parse(self, request: Request, model: type[AnyRequest]) -> AnyRequest:
        body = parse(model, await read_body(request, self.settings.max_body))
        self.check_model(body.model)
        return body

    async def _begin(
        self,
        request: Request,
        body: AnyRequest,
        prepare: Callable[[str, AnyRequest], Work],
        prefix: str,
    ) -> Job:
        """Prepare, submit, and wait until the engine has given or refused something."""
        self._check_room(1)
        work = await while_connected(request, asyncio.to_thread(prepare, f"{prefix}-{uuid.uuid4().hex}", body))
        self._check_room(len(work.requests))
        group = self.client.submit(work.id, work.requests)
        try:
            first = await while_connected(request, group.wait())
            if first.delta.finish == "error":
                raise engine_error(work.id, first.delta)
        except RequestError as error:
            raise as_api_error(error, body) from error
        except BaseException:
            group.abort()
            raise
        return Job(body, work, group, self.settings.model_name, self._texts)

    def _check_room(self, num_answers: int) -> None:
        """Back-pressure: more than the engine will soon get to is turned away at once."""
        if self.is_draining:
            self.metrics.on_rejection("shutdown")
            raise ApiError(503, "the server is shutting down", headers={"Retry-After": str(RETRY_SECONDS)})
        most = self.client.limits.max_sequences + self.settings.max_waiting
        if self.client.num_live + num_answers > most:
            self.metrics.on_rejection("queue_full")
            raise ApiError(
                503,
                f"{self.client.num_live} answers run or wait, and at most {most} may: try again later",
                headers={"Retry-After": str(RETRY_SECONDS)},
            )

    async def _answer(
        self,
        request: Request,
        job: Job,
        as_events: Callable[[Job], AsyncIterator[bytes]],
        as_body: Callable[[Job], Coroutine[Any, Any, dict[str, Any]]],
    ) -> Response:
        if job.body.stream:
            return EventStream(as_events(job), job.group)
        try:
            return json_response(await while_connected(request, as_body(job)))
        finally:
            job.group.abort()


class EventStream(StreamingResponse):
    """Server-sent events; whatever ends the sending, what has not ended in the engine is aborted."""

    def __init__(self, events: AsyncIterator[bytes], group: Group) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._group = group

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._group.abort()


class Guard:
    """Stands before every route: refuses floods of headers, and everything without a key where keys are set.

    Keys are compared by their hashes, each with all, so that the time taken tells nothing about them. The path comes
    from the request line alone; no header has a say.
    """

    def __init__(self, app: ASGIApp, *, api_keys: Iterable[str]) -> None:
        self._app = app
        self._digests = tuple(_digest(key) for key in api_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await error_response(refusal)(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        if len(headers) > MAX_HEADERS or sum(len(name) + len(value) for name, value in headers) > MAX_HEADER_BYTES:
            return ApiError(431, f"there may be {MAX_HEADERS} headers of together {MAX_HEADER_BYTES} bytes: send fewer")
        if not self._digests or scope["path"] in OPEN_PATHS or self._has_key(Headers(scope=scope)):
            return None
        return ApiError(
            401,
            "this server wants an API key: send it as Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )

    def _has_key(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = _digest(key)
        matches = [secrets.compare_digest(given, digest) for digest in self._digests]
        return scheme.lower() == "bearer" and any(matches)


def make_app(serving: Serving, catalog: Catalog) -> FastAPI:
    """The application over an engine; PluginError if a plugin's routes cannot be added."""
    app = FastAPI(title="Plexor", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, api_keys=serving.settings.api_keys)
    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_exception_handler(ClientLeftError, on_client_left)
    app.add_exception_handler(Exception, on_crash)
    _add_answers(app, serving)
    _add_reports(app, serving)
    catalog.add_routes(app, serving.client, serving.settings.enable_routes)
    return app


def _add_answers(app: FastAPI, serving: Serving) -> None:
    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await serving.completion(request)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await serving.chat(request)


def _add_reports(app: FastAPI, serving: Serving) -> None:
    @app.get("/v1/models")
    async def models() -> Response:
        return json_response({"object": "list", "data": [serving.model_card()]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        serving.check_model(name)
        return json_response(serving.model_card())

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> Response:
        return Response(status_code=200 if serving.client.is_alive else 503)

    @app.get("/version")
    async def version() -> Response:
        return json_response({"version": __version__})

    @app.api_route("/metrics", methods=["GET", "HEAD"])
    async def metrics() -> Response:
        return Response(serving.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")


def json_response(content: dict[str, Any]) -> Response:
    """A body of status 200."""
    return Response(msgspec.json.encode(content), media_type="application/json")


async def read_body(request: Request, limit: int) -> bytes:
    """The JSON body's bytes; ApiError with status 413 for more than the limit, 415 for another type or an encoding."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "the body must be JSON: set Content-Type: application/json")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "compressed bodies are not read: send it without Content-Encoding")
    too_large = ApiError(413, f"the body is larger than the {limit} bytes that this server takes")
    stated = request.headers.get("content-length", "")
    if stated.isascii() and stated.isdecimal() and int(stated[:20]) > limit:
        raise too_large
    body = bytearray()
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientLeftError()
        body += message.get("body", b"")
        if len(body) > limit:
            raise too_large
        if not message.get("more_body", False):
            return bytes(body)


async def while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of work that is given up when the client closes its connection: ClientLeftError then.

    The server cancels nothing by itself while a handler computes an answer.
    """
    task = asyncio.create_task(work)
    watch = asyncio.create_task(_left(request))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientLeftError()
        return task.result()
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="replace")).digest()
