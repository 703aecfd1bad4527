"""ONNX Runtime sessions, in one place: the settings under which the graph runs as it was trained.

Two of its optimizers are off. `MatMulAddFusion` turns a product of two axes and its bias (a classifier) into Gemm
with a float bias, for which there is no integer kernel. `QDQPropagationTransformer` moves quantizers across
transposes and into products: other operators than those that were compared layer by layer. Weight-only INT4
products keep float activations: by default they would be rounded to 8 bits, which nobody trained.

The precision mode keeps sums of 8-bit products exact on x64 processors without VNNI, which add pairs of them in 16
bits. With VNNI sums are exact anyway, and the mode would choose kernels that take nearly twice the time.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from exporters.graph.description import INPUT_NAME
from exporters.graph.packages import import_onnx_package
from fp8pipe.core.errors import BadArtifactError
from fp8pipe.core.machine import cpu_features

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = [
    "DISABLED_OPTIMIZERS", "PRECISION_MODE", "SESSION_ENTRIES", "has_vnni", "open_session", "run", "run_to",
    "session_entries",
]  # fmt: skip

DISABLED_OPTIMIZERS: Final = ("QDQPropagationTransformer", "MatMulAddFusion")
PRECISION_MODE: Final = "session.x64quantprecision"
SESSION_ENTRIES: Final = {"session.qdq_matmulnbits_accuracy_level": "0", PRECISION_MODE: "1"}
_VNNI: Final = frozenset({"avx512_vnni", "avx_vnni"})
_ERRORS_ONLY = 3


def has_vnni(features: Collection[str] | None = None) -> bool:
    """Whether sums of 8-bit products are exact without the precision mode; features of this machine when None."""
    return not _VNNI.isdisjoint(cpu_features() if features is None else features)


def session_entries(features: Collection[str] | None = None) -> dict[str, str]:
    """`SESSION_ENTRIES`, which are right on any processor, less what one with these features has no use for."""
    vnni = has_vnni(features)
    return {name: value for name, value in SESSION_ENTRIES.items() if not (vnni and name == PRECISION_MODE)}


def open_session(
    model: Path | bytes, *, write_to: Path | None = None, optimize: bool = True, portable: bool = False,
    threads: int | None = None, providers: Sequence[str] = ("CPUExecutionProvider",),
    entries: Mapping[str, str] | None = None,
) -> Any:  # fmt: skip
    """An `onnxruntime.InferenceSession`.

    Args:
        model: a file, or its bytes.
        write_to: where to write the optimized graph; not written when None.
        optimize: False runs every operator as it stands.
        portable: only fusions that every CPU has, no layouts of this one's.
        threads: threads within an operator; the runtime's own choice when None.
        providers: where it computes, the first that can; the CPU is what exports are compared on.
        entries: session entries; those of `session_entries` when None.

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
    except Exception as error:  # its exceptions share no public base
        raise BadArtifactError(
            "ONNX Runtime refuses the graph",
            why=" ".join(str(error).split())[:600],
            fix="export it again, with a version of onnxruntime that this project was tested with",
        ) from error


def run(session: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """All outputs by name, as numpy arrays."""
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(inputs)), strict=True))


def run_to(model: ir.Model, names: Sequence[str], pixels: Any) -> dict[str, Any]:
    """Values of a graph by name for a numpy array of pixels, no operator optimized."""
    import onnx
    import onnx_ir as ir

    proto: Any = ir.to_proto(model)
    present = {value.name for value in (*proto.graph.input, *proto.graph.output)}
    wanted = [name for name in dict.fromkeys(names) if name not in present]
    proto.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in wanted)
    found = run(open_session(proto.SerializeToString(), optimize=False), {INPUT_NAME: pixels}) | {INPUT_NAME: pixels}
    return {name: found[name] for name in names}
