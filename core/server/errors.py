"""Errors as clients see them: an HTTP status and a body in OpenAI's shape."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

MAX_MESSAGE = 1000
"""Characters of a message; what a client sent is not sent back at length."""

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    500: "server_error",
    503: "service_unavailable_error",
}


class ApiError(Exception):
    """Ends an HTTP request with a status and a message. param: the field at fault, if it is one."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = dict(headers or {})


class ClientLeftError(Exception):
    """The client has closed its connection, so nobody reads an answer."""


class EngineStoppedError(ApiError):
    """The engine process is gone; what happened is in the server's own log."""

    def __init__(self) -> None:
        super().__init__(500, "the engine has stopped, and the server ends: try again when it is back")


def error_object(error: ApiError) -> dict[str, dict[str, str | None]]:
    """The body of an error."""
    message = str(error).encode(errors="replace").decode()
    shown = message if len(message) <= MAX_MESSAGE else f"{message[:MAX_MESSAGE]}…"
    kind = _TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return {"error": {"message": shown, "type": kind, "param": error.param, "code": error.code}}


def error_response(error: ApiError) -> Response:
    """The answer that an error makes."""
    body = msgspec.json.encode(error_object(error))
    return Response(body, status_code=error.status, headers=error.headers, media_type="application/json")


async def on_api_error(_: Request, error: Exception) -> Response:
    """Exception handler for ApiError."""
    assert isinstance(error, ApiError)
    return error_response(error)


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Exception handler for what routing itself refuses: unknown paths and methods."""
    assert isinstance(error, HTTPException)
    message = str(error.detail)
    if message == "Not Found":  # the router's own words
        message = "there is no such path: see /v1/models, /v1/completions and /v1/chat/completions"
    if message == "Method Not Allowed":
        message = f"{request.method} is not allowed on this path"
    return error_response(ApiError(error.status_code, message, headers=error.headers))


async def on_client_left(_: Request, error: Exception) -> Response:
    """Exception handler for ClientLeftError; the status is only for logs."""
    assert isinstance(error, ClientLeftError)
    return Response(status_code=499)


async def on_crash(_: Request, error: Exception) -> Response:
    """Exception handler for everything else; the traceback goes to the server's log, not to the client."""
    return error_response(ApiError(500, "the server failed at an error of its own: its log says more"))
