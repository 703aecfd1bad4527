"""Error responses: one JSON format that says how to fix the error, and reveals nothing of the server's internals.

    {"error": {"code": "not_an_image", "message": ..., "fix": ..., "request_id": ...}}

Clients of the Open Inference Protocol expect `error` to be a string, so routes under /v2 send a string there and put
the object under `problem`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

logger = logging.getLogger(__name__)

_KNOWN = {
    404: ("not_found", "the paths are listed at /openapi.json"),
    405: ("method_not_allowed", "the header Allow lists the methods"),
    415: ("unsupported_media_type", ""),
}


class Problem(Exception):
    """A request that is answered with an error.

    Args:
        status: HTTP status, 4xx, 503 or 504.
        code: a stable identifier for programs.
        message: what happened.
        fix: what the client can do about it.
        headers: additional headers of the response.
    """

    def __init__(
        self, status: int, code: str, message: str, fix: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.fix = status, code, message, fix
        self.headers = dict(headers or {})


def overloaded(message: str, headers: Mapping[str, str] | None = None) -> Problem:
    """A problem with status 503: the service cannot take more load at the moment."""
    return Problem(503, "overloaded", message, "try again in a second", {"Retry-After": "1", **(headers or {})})


def too_many_images(limit: int) -> Problem:
    """A problem with status 413: a request contains more than `limit` images."""
    return Problem(413, "too_many_images", f"more than {limit} images in a request", "send several requests")


def _response(problem: Problem, scope: Scope) -> Response:
    # The JSON response for a problem, in the format for the request's path.
    body = {"code": problem.code, "message": problem.message, "fix": problem.fix, "request_id": _request_id(scope)}
    document: dict[str, Any] = {"error": body}
    if str(scope.get("path", "")).startswith("/v2"):
        document = {"error": f"{problem.message}; {problem.fix}" if problem.fix else problem.message, "problem": body}
    # Text from a client may contain lone surrogates, which UTF-8 cannot encode; json.dumps escapes them as ASCII.
    return Response(
        json.dumps(document), status_code=problem.status, headers=problem.headers, media_type="application/json"
    )


async def send_problem(problem: Problem, scope: Scope, receive: Receive, send: Send) -> None:
    """Send `problem` as the response of an ASGI request."""
    await _response(problem, scope)(scope, receive, send)


def install_problem_handlers(app: FastAPI) -> None:
    """Turn every exception of a route into an error response of this format."""

    async def answer(request: Request, error: Exception) -> Response:
        return _response(_as_problem(error, request.scope), request.scope)

    for kind in (Problem, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, answer)


def _as_problem(error: Exception, scope: Scope) -> Problem:
    # The problem that describes an exception of a route to the client; unexpected exceptions are logged.
    if isinstance(error, Problem):
        return error
    if isinstance(error, HTTPException):
        code, fix = _KNOWN.get(error.status_code, ("bad_request", ""))
        return Problem(error.status_code, code, str(error.detail), fix, error.headers)
    if isinstance(error, RequestValidationError):
        found = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:5])
        return Problem(422, "invalid_request", found)
    logger.error("request %s failed", _request_id(scope), exc_info=error)
    return Problem(500, "internal", "the server failed", "report it with the request id")


def _request_id(scope: Scope) -> str:
    return str((scope.get("state") or {}).get("request_id", ""))
