"""Everything joined: an export becomes a service that runs until it is told to stop."""

from __future__ import annotations

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from logging.handlers import QueueListener
from pathlib import Path
from typing import Any

from serving.http.access_log import start_access_log
from serving.http.auth import KeyFile
from serving.http.identity import identity_headers, identity_labels
from serving.http.server import Lifecycle, run_service
from serving.http.stack import wrap
from serving.vision.app import build_app
from serving.vision.batcher import Batcher
from serving.vision.config import VisionConfig
from serving.vision.engine import open_engine
from serving.vision.metrics import VisionMetrics
from serving.vision.model import read_model
from serving.vision.state import VisionState

__all__ = ["VisionService", "open_service", "serve_vision"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class VisionService:
    """A service that is loaded and not yet listening.

    Attributes:
        app: ASGI, with every layer.
        state: what the routes share.
        keys: the API keys, or None.
        access: the thread that writes access lines, or None.
    """

    app: Any
    state: VisionState
    keys: KeyFile | None
    access: QueueListener | None


def open_service(export: Path, config: VisionConfig) -> VisionService:
    """Check the export's files, load it, and measure.

    Raises:
        BadArtifactError: a file is not what the manifest says, or the engine refuses it.
        ConfigurationError: the key file cannot be used.
        MissingCapabilityError: a package or the GPU is missing.
    """
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = config.max_pixels
    logging.getLogger("PIL").setLevel(logging.CRITICAL)  # a hostile picture is the client's error, not ours
    keys = None if config.api_key_file is None else KeyFile(config.api_key_file)
    model = read_model(export)
    engine = open_engine(model, config)
    said = f"{len(engine.runs)} at once of batches up to {engine.sizes[-1]}, {engine.threads} threads each"
    logger.info("%s on %s: %s", model.name, engine.provider, said)
    metrics, lifecycle = VisionMetrics(), Lifecycle()
    metrics.identify(identity_labels(model.artifact))
    lifecycle.on_drain.append(lambda: metrics.in_drain.set(1))
    wait_s = config.max_wait_ms / 1000
    state = VisionState(
        model, engine, config, metrics, lifecycle,
        Batcher(engine.runs, engine.sizes, max_wait_s=wait_s, capacity=config.queue, metrics=metrics),
        ThreadPoolExecutor(max(2, min(8, os.cpu_count() or 2)), thread_name_prefix="decode"),
    )  # fmt: skip
    lines, access = start_access_log(config.access_log)
    headers = identity_headers(model.artifact)
    app = wrap(build_app(state), config, keys=keys, logger=lines, metrics=metrics, lifecycle=lifecycle, headers=headers)
    return VisionService(app, state, keys, access)


def serve_vision(export: Path, config: VisionConfig, language: None = None) -> int:
    """Serve until SIGTERM; the exit code. Raises as `open_service`."""
    service = open_service(export, config)
    reload = (lambda: None) if service.keys is None else service.keys.reload
    try:
        return run_service(service.app, config, service.state.lifecycle, reload=reload)
    finally:
        if service.access is not None:
            service.access.stop()
