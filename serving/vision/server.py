"""`fp8pipe serve` for a vision export: loads the model and serves it until a signal stops the process.

This module has the routes for images, operations and the web page; those of the Open Inference Protocol are in `oip`.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from fp8pipe.artifact import installed_versions
from fp8pipe.core.version import __version__
from fp8pipe.models.vision.answers import Activation, probabilities
from serving.config import VisionConfig
from serving.http.problems import Problem, install_problem_handlers
from serving.http.server import Lifecycle
from serving.http.service import identity_of, page_headers, proof_of, read_keys, serve
from serving.vision.batcher import Batcher, VisionMetrics
from serving.vision.bodies import IMAGES_BODY, TOP_K, read_images
from serving.vision.engine import Engine, ServedModel, open_engine, read_model
from serving.vision.oip import add_protocol
from serving.vision.state import VisionState, while_connected

logger = logging.getLogger(__name__)
_PAGE = Path(__file__).with_name("page")
_TOP_K = 5
_GIVES = {"classify": "classes", "predict": "values without probabilities", "embed": "features"}
_OTHER = {
    "classify": ("no_classes", "this model is not a classifier"),
    "predict": ("no_values", "this model does not predict values"),
    "embed": ("no_features", "this model is not a backbone"),
}  # fmt: skip


def serve_vision(export: Path, config: VisionConfig, language: None = None) -> int:
    """Check the export's files, load it, run the benchmark, and serve until SIGTERM; returns the exit code (0).

    `language` is not used; it is there because all services are called with the same arguments.

    Raises:
        BadArtifactError: a file does not match the manifest, or the engine rejects the graph.
        GateFailedError: no validation accepted the export for this engine and provider, and `unvalidated` is not set.
        ConfigurationError: the key file is invalid, or the service cannot listen on the address.
        MissingCapabilityError: a package or the GPU is missing.
    """
    keys = read_keys(config)
    state = open_state(export, config)
    return serve(build_app(state), state.model.artifact, config, proof=state.proof, keys=keys, metrics=state.metrics,
                 lifecycle=state.lifecycle)  # fmt: skip


def open_state(export: Path, config: VisionConfig) -> VisionState:
    """Check the export's files, load it, and run the benchmark; raises what `serve_vision` raises for these."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = config.max_pixels
    logging.getLogger("PIL").setLevel(logging.CRITICAL)  # an invalid image is a client error and need not be logged
    model = read_model(export)
    engine = open_engine(model, config)
    proof = proof_of(model.artifact, config, *_engine_facts(model, engine))
    said = f"{len(engine.runs)} concurrent batches of up to {engine.sizes[-1]} images, {engine.threads} threads each"
    logger.info("%s on %s: %s", model.name, engine.provider, said)
    metrics = VisionMetrics()
    return VisionState(
        model, engine, config, proof, metrics, Lifecycle(),
        Batcher(engine.runs, engine.sizes, max_wait_s=config.max_wait_ms / 1000, capacity=config.queue,
                metrics=metrics),
        ThreadPoolExecutor(max(2, min(8, os.cpu_count() or 2)), thread_name_prefix="decode"),
    )  # fmt: skip


def _engine_facts(model: ServedModel, engine: Engine) -> tuple[dict[str, str], str]:
    """Versions of the engine's packages, and the form for `proof_of`: the provider, unless validations use it too."""
    if model.engine == "tensorrt":
        return installed_versions(("tensorrt-rtx", "tensorrt")), ""
    import onnxruntime

    usual = engine.provider == "CPUExecutionProvider"
    return {"onnxruntime": str(onnxruntime.__version__)}, "" if usual else f"in {engine.provider}"


def build_app(state: VisionState) -> FastAPI:
    """The app for a loaded model, without the middleware of `serving.http.service`."""

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
        "task": state.model.task,
        "classes": state.model.classes,
        "activation": state.model.activation,
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
        """Liveness: the process responds."""
        return JSONResponse({"status": "ok"})

    @app.get("/readyz", tags=["operations"])
    async def readyz() -> Response:
        """Readiness: requests are accepted; 503 while the service is draining."""
        state.require_ready()
        return JSONResponse({"status": "ready"})

    @app.get("/metrics", tags=["operations"])
    async def metrics() -> Response:
        """Metrics in Prometheus text format."""
        return Response(state.metrics.text(), headers={"Content-Type": state.metrics.content_type})

    @app.get("/v1/artifact", tags=["operations"])
    async def artifact() -> Response:
        """The artifact that is served, with its digest, and how the engine runs it."""
        return JSONResponse(about)


def _add_images(app: FastAPI, state: VisionState) -> None:
    model = state.model

    async def answer(request: Request, results: Any) -> Response:
        """Respond to an image request; `results(outputs, top_k of the body)` returns a list, one entry per image."""
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

    def require(task: str) -> tuple[str, ...]:
        """The names of the outputs. Raises a `Problem` if the model is for another task."""
        if model.task != task:
            code, what = _OTHER[task]
            raise Problem(404, code, f"{what}: it returns {_GIVES[model.task]}", f"use /v1/{model.task}")
        return model.classes or ()

    @app.post("/v1/classify", tags=["images"], openapi_extra={**IMAGES_BODY, "parameters": [TOP_K]})
    async def classify(request: Request) -> Response:
        """The most probable classes of one or more images."""
        classes = require("classify")
        in_query = read_top_k(request.query_params.get("top_k"), len(classes))

        def results(logits: np.ndarray, in_body: Any) -> list[dict[str, Any]]:
            top_k = in_query if in_body is None else read_top_k(in_body, len(classes))
            return class_answers(logits, classes, top_k, model.activation)

        return await answer(request, results)

    @app.post("/v1/predict", tags=["images"], openapi_extra=IMAGES_BODY)
    async def predict(request: Request) -> Response:
        """The values that the model predicts for one or more images, by name."""
        names = require("predict")
        return await answer(request, lambda values, _: value_answers(values, names))

    @app.post("/v1/embed", tags=["images"], openapi_extra=IMAGES_BODY)
    async def embed(request: Request) -> Response:
        """The features of one or more images."""
        require("embed")
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


def read_top_k(value: Any, classes: int) -> int:
    """Parse `top_k`, the number of classes to return; 5 if it is None, and at most `classes`.

    Raises:
        Problem: 400, not a whole number of at least 1.
    """
    if value is None:
        return min(_TOP_K, classes)
    text = str(value) if type(value) is int else value
    if not isinstance(text, str) or not (text.isascii() and text.isdigit()) or len(text) > 6 or int(text) < 1:
        what = "top_k must be a whole number, at least 1"
        raise Problem(400, "invalid_top_k", what, f"the model has {classes} classes")
    return min(int(text), classes)


def class_answers(
    logits: np.ndarray, classes: tuple[str, ...], top_k: int, activation: Activation
) -> list[dict[str, Any]]:
    """The JSON results of a classifier: the `top_k` most probable classes of each image, from logits (n, C).

    Classes of equal probability keep the order of `classes`.
    """
    shares = probabilities(logits, activation)
    best = np.argsort(-shares, axis=1, kind="stable")[:, :top_k]
    return [
        {"classes": [{"index": int(i), "name": classes[i], "probability": float(row[i])} for i in order]}
        for row, order in zip(shares, best, strict=True)
    ]


def value_answers(values: np.ndarray, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """The JSON results of a regression model: all values of each image, from outputs (n, C), in their order."""
    return [
        {"values": [{"index": i, "name": name, "value": float(row[i])} for i, name in enumerate(names)]}
        for row in values
    ]
