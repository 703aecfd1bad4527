"""The vision server's routes."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from fp8pipe import __version__
from serving.http.encoding import accepted_encoding, compress
from serving.http.identity import identity_of
from serving.http.presence import while_connected
from serving.http.problems import Problem, install_problem_handlers
from serving.vision import oip
from serving.vision.answers import artifact_facts, class_answers, feature_answers, read_top_k, timing
from serving.vision.bodies import read_body, read_images
from serving.vision.openapi import IMAGES_BODY, INFER_BODY, TOP_K
from serving.vision.state import VisionState

__all__ = ["build_app"]

_WORTH_COMPRESSING = 500
_PAGE = Path(__file__).with_name("page")


def build_app(state: VisionState) -> FastAPI:
    """The app over a loaded model; without the layers of `serving.http.stack`."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
        state.lifecycle.ready = True
        yield
        state.close()

    app = FastAPI(title=f"fp8pipe: {state.model.name}", version=__version__, docs_url=None, redoc_url=None,
                  lifespan=lifespan)  # fmt: skip
    install_problem_handlers(app)
    _add_operations(app, state)
    _add_images(app, state)
    _add_protocol(app, state)
    if state.config.page:
        _add_page(app)
    return app


def _add_operations(app: FastAPI, state: VisionState) -> None:
    engine = state.engine
    about = identity_of(state.model.artifact) | {
        "task": "embed" if state.model.classes is None else "classify",
        "classes": state.model.classes,
        "outputs": engine.width,
        "preprocessing": state.model.preprocessing.model_dump(mode="json"),
        "engine": {
            "provider": engine.provider, "threads": engine.threads, "streams": len(engine.runs),
            "batch_sizes": engine.sizes,
            "measured": [asdict(measured) for measured in engine.measured],
        },
    }  # fmt: skip

    @app.get("/healthz", tags=["operations"])
    async def healthz() -> Response:
        """The process answers."""
        return JSONResponse({"status": "ok"})

    @app.get("/readyz", tags=["operations"])
    async def readyz() -> Response:
        """Requests are taken; 503 while the service drains."""
        _require_ready(state)
        return JSONResponse({"status": "ready"})

    @app.get("/metrics", tags=["operations"])
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(state.metrics.text(), headers={"Content-Type": state.metrics.content_type})

    @app.get("/v1/artifact", tags=["operations"])
    async def artifact() -> Response:
        """Which artifact this is, by digest, and how it is run."""
        return JSONResponse(about)


def _add_images(app: FastAPI, state: VisionState) -> None:
    facts, model = artifact_facts(state.model), state.model

    async def infer(request: Request) -> tuple[Any, Any, Any]:
        sent = await read_images(request, state.config.max_body_bytes, state.config.max_images)
        images, done = await while_connected(request, state.answer(sent.images))
        return sent, images, done

    @app.post("/v1/classify", tags=["images"], openapi_extra={**IMAGES_BODY, "parameters": [TOP_K]})
    async def classify(request: Request) -> Response:
        """The best classes of one or several images."""
        started = time.perf_counter()
        if model.classes is None:
            raise Problem(404, "no_classes", "this model is a backbone: it has no classes", "use /v1/embed")
        asked = read_top_k(request.query_params.get("top_k"), len(model.classes))
        sent, images, done = await infer(request)
        top_k = asked if sent.top_k is None else read_top_k(sent.top_k, len(model.classes))
        results = class_answers(done.outputs, model.classes, top_k)
        times = timing(images, done, time.perf_counter() - started)
        return JSONResponse({**facts, "results": results, "timing_ms": times})

    @app.post("/v1/embed", tags=["images"], openapi_extra=IMAGES_BODY)
    async def embed(request: Request) -> Response:
        """The features of one or several images."""
        started = time.perf_counter()
        if model.classes is not None:
            raise Problem(404, "no_features", "this model is a classifier: it gives classes", "use /v1/classify")
        _, images, done = await infer(request)
        times = timing(images, done, time.perf_counter() - started)
        return JSONResponse({**facts, "results": feature_answers(done.outputs), "timing_ms": times})


def _add_protocol(app: FastAPI, state: VisionState) -> None:
    model, described = state.model, oip.metadata(state.model, state.engine.width)
    server = {"name": "fp8pipe", "version": __version__, "extensions": ["binary_tensor_data"]}

    def known(name: str, version: str = oip.VERSION) -> None:
        if name != model.name or version != oip.VERSION:
            raise Problem(404, "unknown_model", "there is no such model or version", f"this server has {model.name}")

    async def meta(name: str, version: str = oip.VERSION) -> Response:
        """The model's inputs and outputs."""
        known(name, version)
        return JSONResponse(described)

    async def model_ready(name: str, version: str = oip.VERSION) -> Response:
        """The model takes requests."""
        known(name, version)
        _require_ready(state)
        return JSONResponse({"name": model.name, "ready": True})

    async def infer(request: Request, name: str, version: str = oip.VERSION) -> Response:
        """Run preprocessed tensors, as JSON or in binary."""
        known(name, version)
        body = await read_body(request, state.config.max_body_bytes)
        asked = oip.parse_infer(body, request.headers.get(oip.HEADER_LENGTH), model, state.config.max_images)
        done = await while_connected(request, state.run(asked.pixels))
        answer, headers = oip.write_infer(asked, done.outputs, model)
        encoding = accepted_encoding(request.headers.get("accept-encoding"))
        if encoding is not None and len(answer) >= _WORTH_COMPRESSING:
            answer = await asyncio.get_running_loop().run_in_executor(None, compress, answer, encoding)
            headers |= {"Content-Encoding": encoding}
        return Response(answer, headers=headers | {"Vary": "Accept-Encoding"})

    async def about() -> Response:
        """The server and its extensions."""
        return JSONResponse(server)

    async def live() -> Response:
        """The process answers."""
        return JSONResponse({"live": True})

    async def ready() -> Response:
        """Requests are taken."""
        _require_ready(state)
        return JSONResponse({"ready": True})

    for path, endpoint in (("/v2", about), ("/v2/health/live", live), ("/v2/health/ready", ready)):
        app.add_api_route(path, endpoint, methods=["GET"], tags=["v2"])
    for base in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
        suffix = base.count("{")
        app.add_api_route(base, meta, methods=["GET"], tags=["v2"], name=f"meta{suffix}")
        app.add_api_route(f"{base}/ready", model_ready, methods=["GET"], tags=["v2"], name=f"model_ready{suffix}")
        app.add_api_route(
            f"{base}/infer", infer, methods=["POST"], tags=["v2"], name=f"infer{suffix}", openapi_extra=INFER_BODY
        )


def _add_page(app: FastAPI) -> None:
    """One file with its style and script inside, allowed by their digests and nothing else."""
    style, script = ((_PAGE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    html = (_PAGE / "page.html").read_text(encoding="utf-8")
    body = html.replace("/*STYLE*/", style).replace("/*SCRIPT*/", script).encode()
    allowed = {name: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
               for name, text in (("style", style), ("script", script))}  # fmt: skip
    policy = (
        f"default-src 'none'; script-src 'sha256-{allowed['script']}'; style-src 'sha256-{allowed['style']}'; "
        "img-src blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {
        "Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }  # fmt: skip

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return Response(body, media_type="text/html", headers=headers)


def _require_ready(state: VisionState) -> None:
    if not state.lifecycle.accepting:
        raise Problem(503, "not_ready", "the service drains", "use another instance", {"Retry-After": "5"})
