"""The vision server's routes: images, operations and the page; those of the Open Inference Protocol are in `oip`."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from fp8pipe.core.version import __version__
from serving.http.page import page_headers
from serving.http.problems import Problem, install_problem_handlers
from serving.http.service import identity_of
from serving.vision.answers import class_answers, read_top_k
from serving.vision.bodies import read_images
from serving.vision.oip import add_protocol
from serving.vision.openapi import IMAGES_BODY, TOP_K
from serving.vision.state import VisionState, while_connected

__all__ = ["build_app"]

_PAGE = Path(__file__).with_name("page")


def build_app(state: VisionState) -> FastAPI:
    """The app over a loaded model; without the layers of `serving.http.service`."""

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
    add_protocol(app, state)
    if state.config.page:
        _add_page(app)
    return app


def _add_operations(app: FastAPI, state: VisionState) -> None:
    engine = state.engine
    about = identity_of(state.model.artifact, state.proof) | {
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
        state.require_ready()
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
    model = state.model

    async def answer(request: Request, results: Any) -> Response:
        """`results` makes a list, one entry per image, of the outputs and the `top_k` of the body."""
        started = time.perf_counter()
        sent = await read_images(request, state.config.max_body_bytes, state.config.max_images)
        images, done = await while_connected(request, state.answer(sent.images))
        found = results(done.outputs, sent.top_k)
        seconds = {
            "decode": sum(image.decode_s for image in images),
            "preprocess": sum(image.preprocess_s for image in images),
            "queue": done.queue_s, "inference": done.inference_s, "total": time.perf_counter() - started,
        }  # fmt: skip
        times = {name: round(value * 1000, 4) for name, value in seconds.items()}
        facts = {"model": model.name, "artifact": model.artifact.digest}
        return JSONResponse({**facts, "results": found, "timing_ms": times})

    @app.post("/v1/classify", tags=["images"], openapi_extra={**IMAGES_BODY, "parameters": [TOP_K]})
    async def classify(request: Request) -> Response:
        """The best classes of one or several images."""
        classes = model.classes
        if classes is None:
            raise Problem(404, "no_classes", "this model is a backbone: it has no classes", "use /v1/embed")
        in_query = read_top_k(request.query_params.get("top_k"), len(classes))

        def results(logits: np.ndarray, in_body: Any) -> list[dict[str, Any]]:
            return class_answers(logits, classes, in_query if in_body is None else read_top_k(in_body, len(classes)))

        return await answer(request, results)

    @app.post("/v1/embed", tags=["images"], openapi_extra=IMAGES_BODY)
    async def embed(request: Request) -> Response:
        """The features of one or several images."""
        if model.classes is not None:
            raise Problem(404, "no_features", "this model is a classifier: it gives classes", "use /v1/classify")
        return await answer(request, lambda features, _: [{"embedding": row} for row in features.tolist()])


def _add_page(app: FastAPI) -> None:
    html, style, script = (
        (_PAGE / f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js")
    )  # fmt: skip
    html = html.replace("/*STYLE*/", style).replace("/*SCRIPT*/", script)
    headers = page_headers(html, images="blob: data:", cache="no-cache")

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return Response(html, media_type="text/html", headers=headers)
