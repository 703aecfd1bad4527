"""Creates ONNX Runtime sessions, with settings under which a graph computes what the model was trained to compute.

Two of its optimizers are disabled. `MatMulAddFusion` turns a two-dimensional MatMul and its bias (a classifier) into a
Gemm with a float bias, for which there is no integer kernel. `QDQPropagationTransformer` moves quantizers across
transposes and into matrix multiplications, which changes the operators that were compared layer by layer. Weight-only
INT4 matrix multiplications keep float activations: by default they would be rounded to 8 bits, which was not trained.

The precision mode keeps sums of 8-bit multiplications exact on x64 processors without VNNI, which add pairs of them in
16 bits. With VNNI sums are exact anyway, and the mode would select kernels that take nearly twice as long.

Official builds from 1.32 on send telemetry to Microsoft, unless an environment variable disables it before they are
loaded. It is disabled here, unless the user enables it (`ORT_DISABLE_TELEMETRY=0`).
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from fp8pipe.core.errors import BadArtifactError, MissingCapabilityError, one_line
from fp8pipe.core.machine import cpu_features

DISABLED_OPTIMIZERS: Final = ("QDQPropagationTransformer", "MatMulAddFusion")
PRECISION_MODE: Final = "session.x64quantprecision"
SESSION_ENTRIES: Final = {"session.qdq_matmulnbits_accuracy_level": "0", PRECISION_MODE: "1"}
_VNNI: Final = frozenset({"avx512_vnni", "avx_vnni"})
_ERRORS_ONLY = 3


def has_vnni(features: Collection[str] | None = None) -> bool:
    """Whether 8-bit multiplications sum exactly without the precision mode; `features` default to this machine's."""
    return not _VNNI.isdisjoint(cpu_features() if features is None else features)


def session_entries(features: Collection[str] | None = None) -> dict[str, str]:
    """The session settings for a CPU with these features, by default this machine's.

    `SESSION_ENTRIES` give correct results on any processor; the precision mode is left out where VNNI makes it
    unnecessary.
    """
    vnni = has_vnni(features)
    return {name: value for name, value in SESSION_ENTRIES.items() if not (vnni and name == PRECISION_MODE)}


def open_session(
    model: Path | bytes, *, write_to: Path | None = None, optimize: bool = True, portable: bool = False,
    threads: int | None = None, providers: Sequence[str] = ("CPUExecutionProvider",),
    entries: Mapping[str, str] | None = None,
) -> Any:  # fmt: skip
    """Create an `onnxruntime.InferenceSession`.

    `model` is a file or its bytes. The optimized graph is written to `write_to`, if given. Without `optimize` the graph
    runs as it is; `portable` uses only fusions that every CPU supports. `threads` is the number of threads per
    operator; None is the runtime's default. The first available one of `providers` is used. `entries` are session
    settings, by default those of `session_entries`.

    Raises:
        BadArtifactError: the runtime refuses the graph.
        MissingCapabilityError: onnxruntime is not installed.
    """
    runtime = import_onnx_package("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    for key, value in (session_entries() if entries is None else entries).items():
        options.add_session_config_entry(key, value)
    if not optimize:
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if portable:
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    if threads is not None:
        options.intra_op_num_threads = threads
    if write_to is not None:
        options.optimized_model_filepath = str(write_to)
    source = model if isinstance(model, bytes) else str(model)
    try:
        return runtime.InferenceSession(
            source, options, disabled_optimizers=list(DISABLED_OPTIMIZERS), providers=list(providers)
        )
    except Exception as error:  # its exceptions share no public base class
        raise BadArtifactError(
            "ONNX Runtime refuses the graph",
            why=one_line(error, 600),
            fix="export it again, with a version of onnxruntime that this project was tested with",
        ) from error


def run(session: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Run a session on numpy arrays by input name; returns all outputs by name, as numpy arrays."""
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(inputs)), strict=True))


def import_onnx_package(name: str) -> ModuleType:
    """Import `onnx`, `onnx_ir`, `onnxscript` or `onnxruntime`.

    Raises:
        MissingCapabilityError: it is not installed.
    """
    if name == "onnxruntime":
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise MissingCapabilityError(
            f"an ONNX export needs the package {name.replace('_', '-')}",
            why=f"no module named {error.name}",
            fix="pip install 'fp8pipe[onnx]'",
        ) from error
