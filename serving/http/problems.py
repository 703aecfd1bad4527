"""Errors as clients see them: one JSON shape with what to do about it, and nothing of the server's inside.

    {"error": {"code": "not_an_image", "message": ..., "fix": ..., "request_id": ...}}

Clients of the Open Inference Protocol read `error` as a string: routes below /v2 answer with one, and put the object
under `problem`.
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
    405: ("method_not_allowed", "the header Allow names the methods"),
    415: ("unsupported_media_type", ""),
}


class Problem(Exception):
    """A request that is not answered with a result.

    Args:
        status: of HTTP, 4xx, 503 or 504.
        code: a stable word for programs.
        message: what happened.
        fix: what the client can do.
        headers: to add to the response.
    """

    def __init__(
        self, status: int, code: str, message: str, fix: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.fix = status, code, message, fix
        self.headers = dict(headers or {})


def overloaded(message: str, headers: Mapping[str, str] | None = None) -> Problem:
    """503: more than the service can take now."""
    return Problem(503, "overloaded", message, "try again in a second", {"Retry-After": "1", **(headers or {})})


def too_many_images(limit: int) -> Problem:
    """413: one request with more than `limit` images."""
    return Problem(413, "too_many_images", f"more than {limit} images in a request", "send several requests")


def _response(problem: Problem, scope: Scope) -> Response:
    body = {"code": problem.code, "message": problem.message, "fix": problem.fix, "request_id": _request_id(scope)}
    document: dict[str, Any] = {"error": body}
    if str(scope.get("path", "")).startswith("/v2"):
        document = {"error": f"{problem.message}; {problem.fix}" if problem.fix else problem.message, "problem": body}
    # Lone surrogates of a client's text cannot be encoded: ASCII escapes can.
    return Response(
        json.dumps(document), status_code=problem.status, headers=problem.headers, media_type="application/json"
    )


async def send_problem(problem: Problem, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with `problem` from a middleware."""
    await _response(problem, scope)(scope, receive, send)


def install_problem_handlers(app: FastAPI) -> None:
    """Answer every exception of a route in the one shape."""

    async def answer(request: Request, error: Exception) -> Response:
        return _response(_as_problem(error, request.scope), request.scope)

    for kind in (Problem, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, answer)


def _as_problem(error: Exception, scope: Scope) -> Problem:
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
