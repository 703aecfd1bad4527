"""A vision export as a Ray Serve application: `import_path: serving.vision.ray_serve:app` (see deploy/ray_serve.yaml).

Each replica is the vision service itself: it hashes its node's copy of the export before loading it, requires the
accepted validation, and answers with the same routes, limits, API keys and identity headers. Ray provides what
`fp8pipe serve` does around that: the port, replicas and their number, and updates without a lost request.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pydantic import Field, model_validator

from fp8pipe.core.config import build_config
from serving.config import VisionConfig
from serving.http.service import identified, read_keys
from serving.http.telemetry import access_log
from serving.vision.server import build_app, open_state

if TYPE_CHECKING:
    from ray.serve import Application

__all__ = ["RayServeConfig", "app"]

# Settings of the listening socket and of a process's end, which are Ray's here.
_RAYS: Final = ("host", "port", "linger_s", "header_timeout_s", "keep_alive_s", "max_connections")


class RayServeConfig(VisionConfig):
    """The application's `args`: those of `fp8pipe serve EXPORT`, except what Ray does itself."""

    export: Path = Field(description="Directory of the export, on every node")

    @model_validator(mode="after")
    def _not_rays(self) -> RayServeConfig:
        given = [name for name in _RAYS if name in self.model_fields_set]
        if given:
            raise ValueError(f"{', '.join(given)} cannot be given: Ray Serve listens, and ends replicas")
        return self


def app(args: Mapping[str, Any]) -> Application:
    """Ray's application for the settings in `args`, see `RayServeConfig`; a change of `args` replaces all replicas.

    Raises:
        ConfigurationError: unknown or invalid settings. What `open_state` raises, a replica raises.
    """
    config = build_config(RayServeConfig, args)
    from ray import serve

    def replica() -> Any:
        return build_replica(config)

    # Ray's default of five requests at once would leave nothing to batch.
    return serve.deployment(name="vision", max_ongoing_requests=config.queue)(serve.ingress(replica)()).bind()


def build_replica(config: RayServeConfig) -> Any:
    """Load the export in this process, and return the service's ASGI app, with all middleware."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO)
    keys, lasting = read_keys(config), contextlib.ExitStack()
    atexit.register(lasting.close)  # writes the last lines of the access log
    lines = lasting.enter_context(access_log(config.access_log))
    state = open_state(config.export, config)
    return identified(
        build_app(state), state.model.artifact, config, proof=state.proof, keys=keys, lines=lines,
        metrics=state.metrics, lifecycle=state.lifecycle,
    )  # fmt: skip
