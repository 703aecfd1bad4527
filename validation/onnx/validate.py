"""Prove that ONNX Runtime computes what an exported graph says, and, with the artifact, what was quantized.

Without the artifact the graph is its own reference: its layers are compared with the exact products of the codes in
the file, and the whole net with the same graph run plainly, operator by operator. With it, every number in the file
is compared with the artifact's first, and the reference is the quantized model in torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from exporters.graph.formats import MODEL_FILE, OnnxFormat
from exporters.graph.gates import (
    ClassAgreement,
    KernelReport,
    agreement_gate,
    check_kernels,
    class_gates,
    codes_gate,
    compare_classes,
    kernel_gate,
    outputs_gate,
    own_agreement,
    parity_gates,
)
from exporters.graph.images import ProbeImages, folder_images, probe_images
from exporters.graph.layers import ExportedLayer, read_layers
from exporters.graph.parity import LayerParity, compare_layers, input_name, inputs_of, outputs_of
from exporters.graph.produce import as_exported
from exporters.graph.reopen import reopen_gates
from exporters.graph.runtime import import_onnx_package, open_session, run
from exporters.graph.trace import INPUT_NAME, OUTPUT_NAME
from exporters.onnx.target import KIND, OnnxDetails
from fp8pipe.artifact import Artifact, Gate, installed_versions, open_artifact
from fp8pipe.artifact.gate import failures
from fp8pipe.artifact.kinds import VIT_KIND
from fp8pipe.artifact.record import remove_record
from fp8pipe.core.errors import BadArtifactError, ConfigurationError
from fp8pipe.core.progress import table, track
from fp8pipe.models.vision.exact import ExactVit
from fp8pipe.models.vision.preprocessing import PREPROCESSING_FILE, Preprocessing, read_model_file
from fp8pipe.models.vision.quantized import load_quantized
from validation.record import EngineRecord, concluded, heading

if TYPE_CHECKING:
    import onnx_ir as ir


_LAYER_IMAGES: Final = 4
_BATCH: Final = 64
_VERSIONS: Final = ("torch", "onnx", "onnx-ir", "onnxruntime")


@dataclass(frozen=True, slots=True)
class _Reference:
    """What the engine is compared with.

    Attributes:
        name: "artifact" or "export".
        gates: comparisons of the file itself.
        inputs: of the cut layers, by name; None where the whole net has exact results, and layers are not cut.
        outputs: torch's outputs of the layers, by label; None without torch model.
        expected: outputs of the whole net, (N, C).
        own: share of the images whose class it keeps itself when disturbed; None where that was not asked.
    """

    name: str
    gates: list[Gate]
    inputs: dict[str, Any] | None
    outputs: dict[str, Tensor] | None
    expected: Tensor
    own: float | None = None


def validate_onnx(export: Path, *, against: Path | None = None, images: Path | None = None) -> OnnxValidationRecord:
    """Validate an export to ONNX in ONNX Runtime and write `<export>.validation.json` beside it.

    Args:
        export: the export's directory.
        against: the quantized artifact it was made from; then that is the reference.
        images: an image folder; the whole net is compared on up to 500 of its pictures instead of the calibration
            images, and must choose the artifact's class for 99.5 % of them, or for as many as the artifact itself
            keeps under rounding errors. Needs `against`.

    Returns:
        The record, of verdict ACCEPT.

    Raises:
        ConfigurationError: `against` is not the export's parent, or missing; `images` is no image folder.
        BadArtifactError: the export is damaged, or ONNX Runtime refuses it.
        MissingCapabilityError: a package is missing.
        ExportRejectedError: the verdict is REJECT; the record is written, named in the message, and attached.
    """
    if images is not None and against is None:
        raise ConfigurationError(
            "pictures cannot be compared without the artifact",
            why="it tells how many classes rounding errors alone may change",
            fix="give it with --against",
        )
    onnx_ir = import_onnx_package("onnx_ir")
    artifact = open_artifact(export, kind=KIND)
    source = None if against is None else _parent(artifact, against)
    remove_record(artifact.root)  # from here on a failure leaves no verdict
    model = _load(onnx_ir, artifact.root / MODEL_FILE)
    layers = read_layers(model)
    preprocessing = read_model_file(Preprocessing, artifact.root / PREPROCESSING_FILE)
    if images is None:
        probes = probe_images(None if source is None else source.root, preprocessing)
    else:
        probes = folder_images(images, preprocessing)
    with track(2, "validate") as progress:
        reference = (
            _own(artifact, model, layers, probes)
            if source is None
            else _torch(artifact, source, model, layers, probes, of_pictures=images is not None)
        )
        progress.advance(1)
        record = _compare(artifact, model, layers, probes, reference)
        progress.advance(1)
    return concluded(record, artifact, record.reasons, f"ONNX Runtime does not compute what {artifact.root} holds")


def _parent(export: Artifact, against: Path) -> Artifact:
    source = open_artifact(against, kind=VIT_KIND)
    if source.digest not in {parent.digest for parent in export.manifest.parents}:
        raise ConfigurationError(
            f"{export.root} was not made from {against}",
            why="its manifest names another artifact, or that artifact has changed since",
            fix="give the artifact that was exported",
        )
    return source


def _load(onnx_ir: Any, path: Path) -> ir.Model:
    try:
        model: ir.Model = onnx_ir.load(path)
    except Exception as error:  # protobuf's errors share no public base
        raise BadArtifactError(f"{path} is not an ONNX graph", why=str(error)[:300], fix="export it again") from error
    return model


def _torch(
    export: Artifact,
    source: Artifact,
    model: ir.Model,
    layers: tuple[ExportedLayer, ...],
    images: ProbeImages,
    *,
    of_pictures: bool,
) -> _Reference:
    """The quantized model, rebuilt from the artifact."""
    quantized = load_quantized(source.root)
    format = OnnxFormat(export.manifest.details_of(OnnxDetails).format)
    if format is OnnxFormat.QDQ_EXACT:
        gates = reopen_gates(model, layers, quantized, format)
        gates.append(codes_gate(model, layers, quantized, images.pixels))
        return _Reference("artifact", gates, None, None, _in_batches(ExactVit(quantized), images))
    expected = as_exported(quantized, format)
    taps = expected.taps(images.pixels[:_LAYER_IMAGES])
    with torch.no_grad():
        outputs = _in_batches(expected, images)
    return _Reference(
        "artifact", reopen_gates(model, layers, quantized, format), inputs_of(expected, layers, taps),
        outputs_of(layers, taps), outputs, own_agreement(expected, images.pixels, outputs) if of_pictures else None,
    )  # fmt: skip


def _own(export: Artifact, model: ir.Model, layers: tuple[ExportedLayer, ...], images: ProbeImages) -> _Reference:
    """The graph itself, no operator optimized."""
    if OnnxFormat(export.manifest.details_of(OnnxDetails).format) is OnnxFormat.QDQ_EXACT:
        # Its own reference is itself in another batch and on one thread: the order of sums must not matter.
        single = open_session(export.root / MODEL_FILE, threads=1)
        outputs = [run(single, {INPUT_NAME: x.numpy()})[OUTPUT_NAME] for x in images.pixels.split(1)]
        return _Reference("export", [], None, None, torch.from_numpy(np.concatenate(outputs)))
    session = open_session(export.root / MODEL_FILE, optimize=False)
    whole = _in_batches(lambda x: torch.from_numpy(run(session, {INPUT_NAME: x.numpy()})[OUTPUT_NAME]), images)
    found = run(
        open_session(_with_outputs(model, layers), optimize=False), {INPUT_NAME: images.pixels[:_LAYER_IMAGES].numpy()}
    )
    found[INPUT_NAME] = images.pixels[:_LAYER_IMAGES].numpy()
    inputs = {input_name(source): found[str(source.name)] for source in _sources(layers)}
    return _Reference("export", [], inputs, None, whole)


def _in_batches(model: Callable[[Tensor], Tensor], images: ProbeImages) -> Tensor:
    """Outputs for all images, with the memory of a few."""
    return torch.cat([model(batch) for batch in images.pixels.split(_BATCH)])


def _sources(layers: tuple[ExportedLayer, ...]) -> list[ir.Value]:
    return list(dict.fromkeys(o.source for layer in layers for o in layer.operands if o.source is not None))


def _with_outputs(model: ir.Model, layers: tuple[ExportedLayer, ...]) -> bytes:
    """The graph with the float inputs of all layers as further outputs."""
    import onnx
    import onnx_ir as ir

    proto = ir.to_proto(model)
    present = {value.name for value in (*proto.graph.input, *proto.graph.output)}
    names = [str(source.name) for source in _sources(layers) if source.name not in present]
    proto.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names)
    return bytes(proto.SerializeToString())


def _compare(
    export: Artifact,
    model: ir.Model,
    layers: tuple[ExportedLayer, ...],
    images: ProbeImages,
    reference: _Reference,
) -> OnnxValidationRecord:
    path = export.root / MODEL_FILE
    exact = reference.inputs is None
    parity = [] if reference.inputs is None else compare_layers(model, layers, reference.inputs, reference.outputs)
    kernels = check_kernels(path, layers)
    started = time.perf_counter()
    session = open_session(path)
    load_s = time.perf_counter() - started
    found = _in_batches(lambda x: torch.from_numpy(run(session, {INPUT_NAME: x.numpy()})[OUTPUT_NAME]), images)
    near_tie = export.manifest.details_of(OnnxDetails).near_tie
    classes = compare_classes(reference.expected, found, near_tie, images.source)
    whole = [outputs_gate(reference.expected, found)] if exact else class_gates(classes)
    gates = [*reference.gates, *(parity_gates(parity) if parity else ()), kernel_gate(kernels), *whole]
    gates += [] if reference.own is None else [agreement_gate(classes, reference.own)]
    reasons = failures(gates)
    return OnnxValidationRecord(
        **heading(export),
        engine="onnxruntime",
        versions=installed_versions(_VERSIONS),
        reference="artifact" if reference.name == "artifact" else "export",
        layers=parity,
        kernels=kernels,
        classes=classes,
        gates=gates,
        load_s=round(load_s, 3),
        reasons=reasons,
        verdict="REJECT" if reasons else "ACCEPT",
    )


def describe(export: Path, record: OnnxValidationRecord) -> str:
    """The record for people."""
    title = f"{record.verdict}  {export} in ONNX Runtime {record.versions.get('onnxruntime', '')}"
    return f"{title}, against the {record.reference}\n{table([gate.row for gate in record.gates])}"


class OnnxValidationRecord(EngineRecord):
    """One validation: what was compared with what, and the verdict."""

    versions: dict[str, str] = Field(description="versions of the packages that took part")
    reference: Literal["artifact", "export"] = Field(
        description="what it was compared with: the artifact in torch, or the graph's own codes, every operator plain"
    )
    layers: list[LayerParity] = Field(
        description="every product, fed the same input on both sides; none for exact formats, compared whole"
    )
    kernels: KernelReport = Field(description="which operator runs each product")
    classes: ClassAgreement = Field(description="the whole net")
    gates: list[Gate] = Field(description="the comparisons with their thresholds")
    load_s: float = Field(ge=0, description="time to load the engine, seconds")
    reasons: list[str] = Field(description="why it was rejected; empty when accepted")
    verdict: Literal["ACCEPT", "REJECT"] = Field(description="ACCEPT or REJECT")
