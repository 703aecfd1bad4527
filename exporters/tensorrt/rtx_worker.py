"""Builds one engine with TensorRT for RTX, in a process of its own: `python -P rtx_worker.py JOB`.

The library takes the first logger of a process for good, and a compiler that dies must not take its caller along. JOB
is a JSON file (`BuildJob`); the answer goes to the path it names. Nothing of the project but this file is imported.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1
_ALWAYS_KEPT = ("INTERNAL_ERROR", "ERROR", "WARNING")


def main() -> int:
    """Build what the job says; 0 when an engine was written, 3 when the graph or the builder refused."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    _end_with(job["parent"])
    import tensorrt_rtx as trt

    logger = _logger(trt)
    found = _build(trt, logger, job)
    listing = [text for _, text in logger.messages if "LayerType: " in text]
    said = [text for level, text in logger.messages if level in _ALWAYS_KEPT and "LayerType: " not in text]
    answer = {"version": trt.__version__, "listing": listing, "messages": said, **found}
    Path(job["answer"]).write_text(json.dumps(answer), encoding="utf-8")
    return 0 if found["built"] else 3


def _end_with(parent: int) -> None:
    """Die when the parent does: a builder that nobody waits for goes on for minutes."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # gone before the request
            sys.exit(1)


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[tuple[str, str]] = []

        def log(self, severity: Any, message: str) -> None:
            self.messages.append((severity.name, message))

    return Logger()


def _build(trt: Any, logger: Any, job: dict[str, Any]) -> dict[str, Any]:
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(job["graph"]):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        return {"parsed": False, "built": False, "errors": [f"{e.node_name()}: {e.desc()}" for e in errors]}
    config = builder.create_builder_config()
    config.profiling_verbosity = getattr(trt.ProfilingVerbosity, job["verbosity"])
    profile = builder.create_optimization_profile()
    for name, (low, usual, high) in job["profiles"].items():
        profile.set_shape(name, low, usual, high)
    if job["profiles"]:
        config.add_optimization_profile(profile)
    config.num_compute_capabilities = len(job["capabilities"])
    for index, capability in enumerate(job["capabilities"]):
        config.set_compute_capability(getattr(trt.ComputeCapability, capability), index)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        return {"parsed": True, "built": False, "errors": []}
    Path(job["engine"]).write_bytes(memoryview(engine))
    return {"parsed": True, "built": True, "errors": []}


if __name__ == "__main__":
    sys.exit(main())
