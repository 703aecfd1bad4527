"""Prove what can be proved about a TensorRT export on this machine, and report what could not be proved.

On any machine, the following is checked. The files match the manifest. The graph contains the artifact's numbers, and
its matrix multiplications and the parts between them compute what the artifact's model computes. Every engine matches
the installed builder; otherwise it is rebuilt, with a notice. The engine file shows that every matrix multiplication
runs in the graph's number format. On a GPU, the engine's outputs are also compared with ONNX Runtime's on the same
pixels, and its speed with that of an FP16 engine with the same weights. Without the artifact, the verdict is at best
CONSISTENT.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np

from exporters.graph.formats import MODEL_FILE
from exporters.graph.images import probe_images
from exporters.graph.runtime import import_onnx_package, open_session, run
from exporters.tensorrt.builder import build_enterprise, build_rtx, check_enterprise
from exporters.tensorrt.engine_cache import EngineSource, ReadyEngine, engine_precisions, ready_engine
from exporters.tensorrt.engines import ENGINES
from exporters.tensorrt.half import dequantize_graph
from exporters.tensorrt.listing import PrecisionReport
from exporters.tensorrt.parity import evaluate_graph
from exporters.tensorrt.target import CAPABILITIES, KIND, EnterpriseSettings, TrtDetails, TrtFormat
from fp8pipe.artifact import Artifact, Comparison, Gate, open_artifact
from fp8pipe.artifact.kinds import VIT_KIND
from fp8pipe.artifact.record import remove_record
from fp8pipe.core import machine
from fp8pipe.core.devices import Device, DeviceName, GpuNeed, resolve_device
from fp8pipe.core.errors import MissingCapabilityError
from fp8pipe.core.progress import table, track
from fp8pipe.models.vision.answers import ranks
from fp8pipe.models.vision.preprocessing import PREPROCESSING_FILE, Preprocessing, read_model_file
from fp8pipe.numerics.kinds import Kind
from validation.contents import contents_gate
from validation.parents import artifact_at_hand
from validation.tensorrt.gates import graph_gates, is_waived, precision_gates
from validation.tensorrt.record import EngineReport, Execution, Timing, TrtValidationRecord, conclude
from validation.tensorrt.run import run_engine

_VERSIONS: Final = ("onnx", "onnx-ir", "onnxruntime", "tensorrt-rtx", "tensorrt")
# Largest accepted norm of the difference, relative to the norm of the outputs. A network with quantized activations
# amplifies tiny differences: another summation order changes a code, and later layers amplify the change. For an 8-bit
# ViT, two equally exact summation orders give a relative difference of 0.03 to 0.08; a wrong scale gives 0.5 or more.
RELATIVE_LIMIT: Final = 0.15
_IMAGES: Final = 64
_FEW_IMAGES: Final = 2
Notify = Callable[[str], None]


def validate_tensorrt(
    export: Path, *, against: Path | None = None, device: DeviceName = "auto", notify: Notify | None = None
) -> TrtValidationRecord:
    """Validate a TensorRT export and write `<export>.validation.json` next to it.

    Args:
        export: directory of the export.
        against: the quantized artifact it was made from; found by its digest when None.
        device: `cpu` runs no engine, even if there is a GPU; `cuda` fails on a machine without one.
        notify: called with a message when an engine is rebuilt; by default the message is logged.

    Returns:
        The record: ACCEPT if an engine was run, PROVED-WITHOUT-RUNNING if not, CONSISTENT without the artifact.

    Raises:
        ConfigurationError: `against` is not the parent of the export.
        BadArtifactError: a file other than an engine is damaged, ONNX Runtime rejects the graph, or an engine fails to
            run.
        MissingCapabilityError: a package, the builder or the GPU is missing, or the builder does not support the GPU.
        GateFailedError: a rebuilt engine uses another precision.
        ExportRejectedError: the verdict is REJECT; the record is written, named in the message, and attached.
    """
    where = resolve_device(device, GpuNeed("TensorRT"))
    import_onnx_package("onnxruntime")
    artifact = open_artifact(export, kind=KIND, caches=ENGINES)
    source = artifact_at_hand(artifact, against, kind=VIT_KIND)
    remove_record(artifact.root)  # if anything fails from here on, no old verdict remains
    here = _runnable(artifact) if where.name == "cuda" else None
    capabilities = list(_details(artifact).engines) if here is None else [here]
    with track(3 + len(capabilities), "validate") as progress:
        pixels = _pixels(artifact)
        expected = _expected(artifact, pixels)
        progress.advance(1)
        engines = []
        for capability in capabilities:
            engines.append(ready_engine(artifact.root, capability, on_build=notify))
            progress.advance(1)
        execution = None if here is None else _execute(artifact, engines[0], pixels, expected)
        progress.advance(1)
        held = None if source is None else graph_gates(artifact, source)
        progress.advance(1)
    reference = "ONNX's reference evaluator" if _is_nvfp4(artifact) else "ONNX Runtime"
    read = [engine_precisions(artifact, engine) for engine in engines]
    stated, unchecked = contents_gate(artifact, None if source is None else source.root)
    gates = [*(held or ()), stated, _finite(expected, reference)]
    judged = [(engine, report) for engine, report in zip(engines, read, strict=True) if report is not None]
    gates += [gate for engine, report in judged for gate in precision_gates(artifact, engine, report)]
    gates += [] if execution is None else [_error(execution, reference)]
    return conclude(
        artifact, _details(artifact).format, gates, map(_report_of, engines, read),
        packages=_VERSIONS, execution=execution, compared=held is not None,
        proved=_proved(artifact, held, engines, execution, reference),
        not_proved=[*_not_proved(artifact, held, engines, execution, where), *unchecked],
    )  # fmt: skip


def _report_of(engine: ReadyEngine, read: PrecisionReport | None) -> EngineReport:
    return EngineReport(
        capability=engine.recipe.capability, builder=engine.recipe.builder, version=engine.recipe.version,
        source=engine.source.value, reasons=engine.reasons,
        precisions=read.counts() if read else dict(engine.precisions), read=read is not None,
    )  # fmt: skip


def _details(artifact: Artifact) -> TrtDetails:
    return artifact.manifest.details_of(TrtDetails)


def _runnable(artifact: Artifact) -> str:
    """The compute capability of this GPU.

    Raises:
        MissingCapabilityError: the export's builder does not support it.
    """
    capability = ".".join(map(str, machine.gpus()[0].capability))
    if artifact.manifest.config["builder"] != "enterprise" and capability not in CAPABILITIES:
        raise MissingCapabilityError(
            f"TensorRT for RTX does not run on this GPU (compute capability {capability})",
            why=f"it supports {', '.join(CAPABILITIES)}",
            fix="export with --builder enterprise on this machine, or validate on a supported GPU",
        )
    return capability


def _pixels(artifact: Artifact) -> np.ndarray:
    """Random pixels, (N, 3, H, W) float32, since an export contains no images; few for NVFP4: its reference is slow."""
    preprocessing = read_model_file(Preprocessing, artifact.root / PREPROCESSING_FILE)
    count = max(_FEW_IMAGES, artifact.manifest.config["batch"][0]) if _is_nvfp4(artifact) else _IMAGES
    return probe_images(None, preprocessing, count).pixels.numpy()


def _is_nvfp4(artifact: Artifact) -> bool:
    return TrtFormat(_details(artifact).format).kind is Kind.NVFP4


def _expected(artifact: Artifact, pixels: np.ndarray) -> np.ndarray:
    """Reference outputs of the graph, (N, C), computed by ONNX Runtime without graph optimizations.

    Optimizations are disabled because fused integer kernels saturate on some CPUs. For NVFP4, ONNX's reference
    evaluator is used, since ONNX Runtime does not support four-bit floats.
    """
    if _is_nvfp4(artifact):
        names = _names(artifact)
        return np.asarray(evaluate_graph(artifact.root / MODEL_FILE, {names[0]: pixels})[names[1]])
    session = open_session(artifact.root / MODEL_FILE, optimize=False)
    names = _names(artifact)
    return np.concatenate([run(session, {names[0]: pixels[i : i + 8]})[names[1]] for i in range(0, len(pixels), 8)])


def _names(artifact: Artifact) -> tuple[str, str]:
    details = _details(artifact)
    return details.input.name, details.output.name


def _execute(artifact: Artifact, engine: ReadyEngine, pixels: np.ndarray, expected: np.ndarray) -> Execution:
    low, usual, high = (shape[0] for shape in engine.recipe.profiles[_names(artifact)[0]])
    sizes = sorted({low, usual, high})
    pixels = pixels[: len(pixels) // low * low]
    arguments: dict[str, Any] = {"names": _names(artifact), "time_batches": sizes, "batch": low}
    found = run_engine(engine.path, engine.recipe.builder, pixels, **arguments)
    with tempfile.TemporaryDirectory() as scratch:
        plain = _plain_engine(artifact, engine, Path(scratch))
        times = run_engine(plain, engine.recipe.builder, pixels, **arguments).times_ms
    wanted = expected[: len(pixels)].astype(np.float32)
    error = float(np.linalg.norm(found.outputs - wanted) / np.linalg.norm(wanted))
    meant = _details(artifact).output
    classifies = meant.what == "logits" and ranks(meant.activation, wanted.shape[1])
    return Execution(
        device=found.device, images=len(pixels), relative_error=error,
        same_class=_same_class(found.outputs, wanted) if classifies else None,
        timings=tuple(Timing(batch=n, engine_ms=found.times_ms[n], fp16_ms=times[n]) for n in sizes),
    )  # fmt: skip


def _same_class(outputs: np.ndarray, expected: np.ndarray) -> float:
    """Share of images whose largest output is at the same index; an image with a non-finite output never counts."""
    finite = np.isfinite(outputs).all(1) & np.isfinite(expected).all(1)
    return float(((outputs.argmax(1) == expected.argmax(1)) & finite).mean())


def _plain_engine(artifact: Artifact, engine: ReadyEngine, scratch: Path) -> Path:
    """Build an engine of the same weights without quantizers, with the same builder for the same GPU."""
    import onnx_ir as ir

    graph, path = scratch / "plain.onnx", scratch / "plain.engine"
    model = ir.load(artifact.root / MODEL_FILE)
    dequantize_graph(model)
    ir.save(model, graph)
    if engine.recipe.builder == "enterprise":
        settings = EnterpriseSettings.model_validate(engine.recipe.settings)
        build_enterprise(graph, path, check_enterprise(), engine.recipe.profiles, settings)
    else:
        build_rtx(graph, path, [engine.recipe.capability], engine.recipe.profiles)
    return path


def _finite(expected: np.ndarray, reference: str) -> Gate:
    bad = int((~np.isfinite(expected)).sum())
    detail = f"of {expected.size} outputs of the graph in {reference}, {len(expected)} random images"
    return Gate(name="outputs that are no numbers", value=bad, detail=detail)


def _error(execution: Execution, reference: str) -> Gate:
    value = execution.relative_error
    return Gate(
        name="relative error of the engine", value=value, comparison=Comparison.AT_MOST, threshold=RELATIVE_LIMIT,
        detail=f"against {reference} on {execution.images} random images, {execution.device}",
    )  # fmt: skip


def _proved(
    artifact: Artifact, held: list[Gate] | None, engines: list[ReadyEngine], execution: Execution | None, reference: str
) -> list[str]:
    gates = sum(gate.passed for gate in artifact.manifest.gates)
    said = [
        f"every file except engines has the manifest's digest; its export passed {gates} gates",
        f"{reference} reads and runs the graph",
        *(
            f"{e.recipe.builder} {e.recipe.version} built the engine for {e.recipe.capability} ({_WHERE[e.source]})"
            for e in engines
        ),
    ]
    if held is not None:
        said.append("the graph holds the artifact's numbers, and computes what its model computes, in layers and "
                    "between them")  # fmt: skip
    if execution is not None:
        said.append(f"the engine ran on {execution.device}, and was timed")
    return said


_WHERE: Final = {
    EngineSource.EXPORT: "the export's own", EngineSource.CACHE: "from this machine's cache, not the export's own",
    EngineSource.BUILT: "built for this validation, not the export's own",
}  # fmt: skip


def _not_proved(
    artifact: Artifact, held: list[Gate] | None, engines: list[ReadyEngine], execution: Execution | None, where: Device
) -> list[str]:
    said = [] if held is not None else [
        "that the graph's numbers and operators are the artifact's: it was not found; name it with --against"
    ]  # fmt: skip
    said += [
        f"the export's own engine for {e.recipe.capability}: another was used, because {'; '.join(e.reasons)}"
        for e in engines if e.reasons
    ]  # fmt: skip
    if is_waived(artifact):
        said.append("that every matrix multiplication keeps its precision: the export was made with --no-require")
    if any(e.recipe.builder == "enterprise" for e in engines):
        said.append("precisions: they are as listed by the builder, since TensorRT's engines cannot be read")
    if execution is not None:
        return said
    said += [] if engines else ["that a builder accepts the graph: the export has no engine"]
    return [
        *said,
        f"execution: no engine was loaded or run; device: {where}",
        "timing: no speed was measured",
    ]


def describe(export: Path, record: TrtValidationRecord) -> str:
    """The record as readable text."""
    lines = [f"{record.verdict}  {export} in TensorRT", table([gate.row for gate in record.gates])]
    lines += [f"  proved: {text}" for text in record.proved]
    lines += [f"  not proved: {text}" for text in record.not_proved]
    if record.execution is not None:
        lines += [
            f"  batch {t.batch}: {t.engine_ms:.3f} ms, in FP16 {t.fp16_ms:.3f} ms (x{t.fp16_ms / t.engine_ms:.2f})"
            for t in record.execution.timings
        ]
    return "\n".join(lines)
