"""Builds one engine in a separate process: `python -P build_worker.py JOB`.

A separate process is needed because TensorRT uses the first logger of a process until it exits, and because a crashing
compiler must not end its caller. JOB is a JSON file written by `builder.run_builder`; the result is written to the path
named in it. No other file of the project is imported. TensorRT for RTX compiles on any machine for the given compute
capabilities, and logs the layers. TensorRT 10 and 11 need a GPU: the builder times kernels on it, and the engine
inspector needs it, too.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1
_KEPT = ("INTERNAL_ERROR", "ERROR", "WARNING")
_LISTED = "LayerType: "


def main() -> int:
    """Build what the job describes; returns 0 if an engine was written, 3 if parser or builder refused the graph."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    _end_with(job["parent"])
    trt = importlib.import_module(job["package"])
    logger = _logger(trt)
    found = _build(trt, logger, job)
    listing = [text for _, text in logger.messages if _LISTED in text]
    said = [text for level, text in logger.messages if level in _KEPT and _LISTED not in text]
    answer = {"version": trt.__version__, "listing": listing, "messages": said, **found}
    Path(job["answer"]).write_text(json.dumps(answer), encoding="utf-8")
    return 0 if found["built"] else 3


def _end_with(parent: int) -> None:
    """Ask Linux to kill this process when its parent exits: an orphaned builder would keep running for minutes."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the parent exited before the request
            sys.exit(1)


def _logger(trt: Any) -> Any:
    # A TensorRT logger that collects (severity, text) pairs. Its class is made here, since the module of its base class
    # is known only at run time.
    def begin(self: Any) -> None:
        trt.ILogger.__init__(self)
        self.messages = []

    def log(self: Any, severity: Any, message: str) -> None:
        self.messages.append((severity.name, message))

    return type("Logger", (trt.ILogger,), {"__init__": begin, "log": log})()


def _build(trt: Any, logger: Any, job: dict[str, Any]) -> dict[str, Any]:
    # Parse the graph and build the engine; returns `parsed`, `built`, the parser's errors, and the inspector's JSON.
    builder = trt.Builder(logger)
    bits = sum(1 << int(getattr(trt.NetworkDefinitionCreationFlag, flag)) for flag in job["network_flags"])
    network = builder.create_network(bits)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(job["graph"]):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        return {"parsed": False, "built": False, "errors": [f"{e.node_name()}: {e.desc()}" for e in errors]}
    config, timings = _config(trt, builder, job), job.get("timing_cache")
    if timings:
        # Timings of earlier builds; the builder rejects those of another device or version and starts from scratch.
        kept = Path(timings).read_bytes() if Path(timings).is_file() else b""
        if not config.set_timing_cache(config.create_timing_cache(kept), False) and kept:
            config.set_timing_cache(config.create_timing_cache(b""), False)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        return {"parsed": True, "built": False, "errors": []}
    Path(job["engine"]).write_bytes(memoryview(engine))
    if timings:
        _keep_timings(config, Path(timings))
    inspector = _inspect(trt, logger, engine, job["profiles"]) if job["inspect"] else ""
    return {"parsed": True, "built": True, "errors": [], "inspector": inspector}


def _config(trt: Any, builder: Any, job: dict[str, Any]) -> Any:
    # The builder configuration that the job describes: limits, flags, input shapes and compute capabilities.
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if "optimization_level" in job:
        config.builder_optimization_level = job["optimization_level"]
    if "workspace_bytes" in job:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job["workspace_bytes"])
    for flag in job.get("builder_flags", ()):
        config.set_flag(getattr(trt.BuilderFlag, flag))
    if job["profiles"]:
        profile = builder.create_optimization_profile()
        for name, (low, usual, high) in job["profiles"].items():
            profile.set_shape(name, low, usual, high)
        config.add_optimization_profile(profile)
    if "capabilities" in job:
        config.num_compute_capabilities = len(job["capabilities"])
        for index, capability in enumerate(job["capabilities"]):
            config.set_compute_capability(getattr(trt.ComputeCapability, capability), index)
    return config


def _keep_timings(config: Any, path: Path) -> None:
    timings = config.get_timing_cache()
    if timings is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_bytes(memoryview(timings.serialize()))
    os.replace(partial, path)


def _inspect(trt: Any, logger: Any, serialized: Any, profiles: dict[str, Any]) -> str:
    """The layers of a serialized engine as JSON, from its inspector; empty if it cannot be loaded.

    The inspector reports the types of dynamic tensors only for an execution context with concrete shapes.
    """
    engine = trt.Runtime(logger).deserialize_cuda_engine(serialized)
    if engine is None:
        return ""
    context = engine.create_execution_context()
    for name, (_, usual, _) in profiles.items():
        context.set_input_shape(name, usual)
    inspector = engine.create_engine_inspector()
    inspector.execution_context = context
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


if __name__ == "__main__":
    sys.exit(main())
