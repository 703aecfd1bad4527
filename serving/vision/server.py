"""Everything joined: a vision export becomes a service that runs until it is told to stop."""

from __future__ import annotations

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fp8pipe.artifact import installed_versions
from serving.http.server import Lifecycle
from serving.http.service import proof_of, read_keys, serve
from serving.vision.app import build_app
from serving.vision.batcher import Batcher, VisionMetrics
from serving.vision.config import VisionConfig
from serving.vision.engine import Engine, open_engine
from serving.vision.model import ServedModel, read_model
from serving.vision.state import VisionState

__all__ = ["serve_vision"]

logger = logging.getLogger(__name__)


def serve_vision(export: Path, config: VisionConfig, language: None = None) -> int:
    """Check the export's files, load it, measure, and serve until SIGTERM; the exit code (0).

    Raises:
        BadArtifactError: a file is not what the manifest says, or the engine refuses it.
        GateFailedError: no validation accepts it as it would be served, and `unvalidated` is not set.
        ConfigurationError: the key file cannot be used, or the address cannot be listened on.
        MissingCapabilityError: a package or the GPU is missing.
    """
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = config.max_pixels
    logging.getLogger("PIL").setLevel(logging.CRITICAL)  # a hostile picture is the client's error, not ours
    keys, model = read_keys(config), read_model(export)
    engine = open_engine(model, config)
    proof = proof_of(model.artifact, config, *_engine_facts(model, engine))
    said = f"{len(engine.runs)} at once of batches up to {engine.sizes[-1]}, {engine.threads} threads each"
    logger.info("%s on %s: %s", model.name, engine.provider, said)
    metrics, lifecycle = VisionMetrics(), Lifecycle()
    state = VisionState(
        model, engine, config, proof, metrics, lifecycle,
        Batcher(engine.runs, engine.sizes, max_wait_s=config.max_wait_ms / 1000, capacity=config.queue,
                metrics=metrics),
        ThreadPoolExecutor(max(2, min(8, os.cpu_count() or 2)), thread_name_prefix="decode"),
    )  # fmt: skip
    return serve(build_app(state), model.artifact, config, proof=proof, keys=keys, metrics=metrics, lifecycle=lifecycle)


def _engine_facts(model: ServedModel, engine: Engine) -> tuple[dict[str, str], str]:
    """Versions of the engine, and how it runs, where that is not how a validation runs it."""
    if model.engine == "tensorrt":
        return installed_versions(("tensorrt-rtx", "tensorrt")), ""
    import onnxruntime

    usual = engine.provider == "CPUExecutionProvider"
    return {"onnxruntime": str(onnxruntime.__version__)}, "" if usual else f"in {engine.provider}"
