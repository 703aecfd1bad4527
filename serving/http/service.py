"""Turns an ASGI app into a running service: checks the validation, adds middleware, and runs the server.

The middleware, from the outermost to the innermost: telemetry, tracing, CORS, API keys, rate limit, body limits.

`page_headers` builds the HTTP headers of the services' web pages. Each page is a single HTML document that loads
nothing from other sites, so it also works without internet access.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fp8pipe.artifact import Artifact
from fp8pipe.artifact.gate import Verdict
from fp8pipe.artifact.record import DIGEST_HEADER, VERDICT_HEADER, record_path
from fp8pipe.artifact.verdict import require_accept
from fp8pipe.core.errors import BadArtifactError, ConfigurationError, GateFailedError, word
from serving.config import ServeConfig
from serving.http.admission import (
    OPEN_PATHS,
    AuthMiddleware,
    BodyBudget,
    BodyLimitMiddleware,
    KeyFile,
    RateLimitMiddleware,
)
from serving.http.problems import Receive, Scope, Send
from serving.http.server import Lifecycle, Service
from serving.http.telemetry import HttpMetrics, TelemetryMiddleware, access_log, traced

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Proof:
    """The validation that applies to a service."""

    verdict: str  # its verdict; `unvalidated` if no validation applies
    form: str  # the engine settings that the validation covers, as text; empty if the engine has no such settings
    versions: Mapping[str, str]  # versions of the engine's packages


def proof_of(artifact: Artifact, config: ServeConfig, versions: Mapping[str, str], form: str = "") -> Proof:
    """Check that an accepted validation of the export applies to the engine and settings that will serve it.

    With `config.unvalidated` a failed check is only logged, and the result says `unvalidated`.

    Args:
        artifact: the export that is served.
        config: the service's settings, of which `record`, `unvalidated` and the options for signatures are used.
        versions: installed versions of the engine's packages.
        form: the engine settings, as text in the form used by validation records; empty if the engine has none.

    Raises:
        BadArtifactError: the record is damaged, does not match its signature, or belongs to another export.
        GateFailedError: there is no record, its verdict is not ACCEPT, or it was made with other versions or another
            form.
    """
    config.require(artifact.root, config.record or record_path(artifact.root))
    versions = {name: version for name, version in versions.items() if name != "python"}
    try:
        record = require_accept(artifact, config.record)
        was = {name: record.versions.get(name, "absent") for name in versions} | {"form": record.form}
        others = [f"{name} {was[name] or 'unnamed'}, but here it is {now}"
                  for name, now in {**versions, "form": form}.items() if was[name] != now]  # fmt: skip
        if others:
            raise GateFailedError(
                f"{artifact.root} was not validated as it would be served",
                why=f"its record names {'; '.join(others)}", fix=f"run fp8pipe validate {word(artifact.root)} here",
            )  # fmt: skip
    except (BadArtifactError, GateFailedError) as error:
        if not config.unvalidated:
            error.fix += "; or serve it with --unvalidated, as every response will say"
            raise
        logger.warning("%s is served UNVALIDATED: %s: %s", artifact.root, error.what, error.why)
        return Proof("unvalidated", form, versions)
    return Proof(Verdict.ACCEPT, form, versions)


def identity_of(artifact: Artifact, proof: Proof) -> dict[str, Any]:
    """Describe the artifact and its validation, for /v1/artifact. File system paths are not disclosed."""
    manifest = artifact.manifest
    return {
        "name": artifact.root.absolute().name,
        "kind": artifact.kind,
        "digest": artifact.digest,
        "validation": {"verdict": proof.verdict, "form": proof.form, "versions": dict(proof.versions)},
        "created": manifest.created,
        "tool_version": manifest.tool_version,
        "number_format": None if manifest.number_format is None else manifest.number_format.model_dump(mode="json"),
        "parents": [{"kind": parent.kind, "digest": parent.digest} for parent in manifest.parents],
        "files": [entry.model_dump(mode="json") for entry in manifest.files],
        "warnings": list(manifest.warnings),
    }


def read_keys(config: ServeConfig) -> KeyFile | None:
    """Read the API keys of the configured file; None if no key is required. Raises the errors of `KeyFile`."""
    return None if config.api_key_file is None else KeyFile(config.api_key_file)


def wrap(
    app: Any, config: ServeConfig, *, keys: KeyFile | None, lines: logging.Logger, metrics: HttpMetrics,
    lifecycle: Lifecycle, headers: tuple[tuple[bytes, bytes], ...] = (),
) -> Any:  # fmt: skip
    """Wrap `app` in all middleware.

    Args:
        app: the ASGI app.
        config: the service's settings.
        keys: the accepted API keys; None if no key is required.
        lines: the access logger.
        metrics: the metrics to update.
        lifecycle: the service's state; while it drains, every response has `Connection: close`.
        headers: (name, value) pairs that are added to every response.

    Returns:
        The wrapped ASGI app. Scopes other than `http` are passed to `app` directly.
    """
    budget = BodyBudget(config.max_total_body_bytes)
    metrics.held_bytes.set_function(lambda: budget.held)
    layers: Any = BodyLimitMiddleware(app, config.max_body_bytes, config.body_timeout_s, budget)
    layers = RateLimitMiddleware(layers, config.rate_limit, config.rate_burst, OPEN_PATHS)
    layers = AuthMiddleware(layers, keys)
    if config.cors_origins:
        from starlette.middleware.cors import CORSMiddleware

        layers = CORSMiddleware(
            layers, allow_origins=list(config.cors_origins), allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "X-API-Key", "X-Request-Id", "Content-Type"],
        )  # fmt: skip
    while_draining = (*headers, (b"connection", b"close"))
    layers = TelemetryMiddleware(
        traced(layers), lines, metrics, lambda: while_draining if lifecycle.draining else headers
    )

    async def dispatch(scope: Scope, receive: Receive, send: Send) -> None:
        await (layers if scope["type"] == "http" else app)(scope, receive, send)

    return dispatch


def identified(
    app: Any, artifact: Artifact, config: ServeConfig, *, proof: Proof, keys: KeyFile | None, lines: logging.Logger,
    metrics: HttpMetrics, lifecycle: Lifecycle,
) -> Any:  # fmt: skip
    """Wrap `app` in all middleware; metrics and the headers of every response name the artifact and its verdict.

    For the arguments see `wrap` and `serve`.
    """
    metrics.identify({"name": artifact.root.absolute().name, "kind": artifact.kind, "digest": artifact.digest})
    lifecycle.on_drain.append(lambda: metrics.in_drain.set(1))
    headers = ((DIGEST_HEADER.encode(), b"sha256:" + artifact.digest.encode()),
               (VERDICT_HEADER.encode(), proof.verdict.encode()))  # fmt: skip
    return wrap(app, config, keys=keys, lines=lines, metrics=metrics, lifecycle=lifecycle, headers=headers)


def serve(
    app: Any, artifact: Artifact, config: ServeConfig, *, proof: Proof, keys: KeyFile | None, metrics: HttpMetrics,
    lifecycle: Lifecycle, drain_s: float | None = None,
) -> int:  # fmt: skip
    """Serve `app` with all middleware until a signal stops it; returns the exit code of the process (0).

    Args:
        app: the ASGI app.
        artifact: the export that is served.
        config: the service's settings.
        proof: the validation that applies, from `proof_of`.
        keys: the accepted API keys; None if no key is required.
        metrics: the metrics to update.
        lifecycle: the service's state, shared with `app`.
        drain_s: seconds that requests in progress have to finish after a signal; by default, the longest time that one
            request may take.

    Raises:
        ConfigurationError: the service cannot listen on the address.
    """
    reload: Callable[[], None] = (lambda: None) if keys is None else keys.reload
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    with access_log(config.access_log) as lines:
        layers = identified(
            app, artifact, config, proof=proof, keys=keys, lines=lines, metrics=metrics, lifecycle=lifecycle
        )
        server = Service(layers, config, lifecycle, reload=reload, drain_s=drain_s)
        server.run(sockets=[_listen(config)])
    return 0


def _listen(config: ServeConfig) -> socket.socket:
    """Bind the socket before anything is started, so that a port in use gives a readable error."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise ConfigurationError(
            f"cannot listen on {config.host}:{config.port}", why=error.strerror or str(error),
            fix="give another --host or --port; --port 0 takes a free one",
        ) from error  # fmt: skip
    return listener


def page_headers(html: str, *, images: str = "data:", cache: str = "no-store") -> dict[str, str]:
    """The headers of a page, whose security policy allows only its inline style and script (by hash) and its server.

    Args:
        html: the page, with one inline `<style>` and one inline `<script>`.
        images: sources from which images may be loaded.
        cache: the value of Cache-Control.
    """

    def digest(tag: str) -> str:
        text = html.split(f"<{tag}>", 1)[1].split(f"</{tag}>", 1)[0]
        return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"

    return {
        "Content-Security-Policy": (
            f"default-src 'none'; script-src {digest('script')}; style-src {digest('style')}; img-src {images}; "
            "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        ),
        "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": cache,
    }  # fmt: skip
