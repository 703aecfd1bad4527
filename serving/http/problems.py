"""Errors as clients see them: one JSON shape, what to do about it, and nothing of the inside.

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

__all__ = ["Problem", "Receive", "Scope", "Send", "install_problem_handlers", "problem_response", "send_problem"]

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

logger = logging.getLogger(__name__)

_CODES = {404: "not_found", 405: "method_not_allowed", 415: "unsupported_media_type"}
_FIXES = {404: "the paths are listed at /openapi.json", 405: "the header Allow names the methods"}


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


def problem_response(problem: Problem, scope: Scope) -> Response:
    """The response to a request that ran into `problem`."""
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
    await problem_response(problem, scope)(scope, receive, send)


def install_problem_handlers(app: FastAPI) -> None:
    """Answer every exception of a route in the one shape."""

    async def known(request: Request, error: Exception) -> Response:
        assert isinstance(error, Problem)
        return problem_response(error, request.scope)

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code = _CODES.get(error.status_code, "bad_request")
        fix = _FIXES.get(error.status_code, "")
        problem = Problem(error.status_code, code, str(error.detail), fix, error.headers)
        return problem_response(problem, request.scope)

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        found = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:5])
        return problem_response(Problem(422, "invalid_request", found), request.scope)

    async def unforeseen(request: Request, error: Exception) -> Response:
        logger.error("request %s failed", _request_id(request.scope), exc_info=error)
        problem = Problem(500, "internal", "the server failed", "report it with the request id")
        return problem_response(problem, request.scope)

    for kind, handler in ((Problem, known), (HTTPException, http), (RequestValidationError, invalid)):
        app.add_exception_handler(kind, handler)
    app.add_exception_handler(Exception, unforeseen)


def _request_id(scope: Scope) -> str:
    return str((scope.get("state") or {}).get("request_id", ""))
