"""The layers around an app, in their one order: log, trace, drain, CORS, key, rate, body."""

from __future__ import annotations

import logging
from typing import Any

from serving.http.access_log import AccessLogMiddleware
from serving.http.auth import OPEN_PATHS, AuthMiddleware, KeyFile
from serving.http.config import ServeConfig
from serving.http.limits import BodyBudget, BodyLimitMiddleware, RateLimitMiddleware
from serving.http.metrics import HttpMetrics
from serving.http.server import DrainMiddleware, Lifecycle
from serving.http.tracing import traced

__all__ = ["wrap"]


def wrap(
    app: Any, config: ServeConfig, *, keys: KeyFile | None, logger: logging.Logger, metrics: HttpMetrics,
    lifecycle: Lifecycle, headers: tuple[tuple[bytes, bytes], ...] = (),
) -> Any:  # fmt: skip
    """`app` behind every layer.

    Args:
        app: ASGI.
        config: of the service.
        keys: the API keys; None leaves the service open.
        logger: of access lines.
        metrics: where requests are counted.
        lifecycle: of the service.
        headers: added to every response.
    """
    budget = BodyBudget(config.max_total_body_bytes)
    metrics.held_bytes.set_function(lambda: budget.held)
    wrapped: Any = BodyLimitMiddleware(app, config.max_body_bytes, config.body_timeout_s, budget)
    wrapped = RateLimitMiddleware(wrapped, config.rate_limit, config.rate_burst, OPEN_PATHS)
    wrapped = AuthMiddleware(wrapped, keys)
    if config.cors_origins:
        from starlette.middleware.cors import CORSMiddleware

        wrapped = CORSMiddleware(
            wrapped, allow_origins=list(config.cors_origins), allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "X-API-Key", "X-Request-Id", "Content-Type"],
        )  # fmt: skip
    wrapped = DrainMiddleware(wrapped, lifecycle)
    return AccessLogMiddleware(traced(wrapped), logger, metrics, headers)
