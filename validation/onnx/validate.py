"""Prove that an exported graph is equivalent to the quantized model, and that ONNX Runtime computes it correctly.

The reference is the quantized artifact. It is given by the user, or found by its digest at the path in the manifest or
next to the export. Every number in the graph is compared with the artifact. Each matrix multiplication, and each part
of the graph between two of them, is run on inputs taken from the artifact's model, and its outputs are compared. In
addition, classes and outputs of the whole network are compared, on the calibration images and optionally on a folder of
images. Without the artifact, the graph is its own reference, and the verdict is at best CONSISTENT: the engine computes
what the file specifies, but whether the file matches the artifact is unknown.
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

from exporters.graph.between import between_gates, file_pieces, parent_pieces, run_to
from exporters.graph.classes import ClassAgreement, class_gates, compare_classes, own_agreement
from exporters.graph.formats import MODEL_FILE, OnnxFormat
from exporters.graph.gates import KernelReport, check_kernels, codes_gate, kernel_gate, outputs_gate, parity_gates
from exporters.graph.images import ProbeImages, folder_images, probe_images
from exporters.graph.layers import ExportedLayer, read_layers
from exporters.graph.parity import LayerParity, compare_layers, input_name, inputs_of, outputs_of, sources_of
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
from fp8pipe.models.vision.answers import Activation
from fp8pipe.models.vision.exact import ExactVit
from fp8pipe.models.vision.preprocessing import PREPROCESSING_FILE, Preprocessing, read_model_file
from fp8pipe.models.vision.quantized import QuantizedVit, load_quantized
from validation.contents import contents_gate
from validation.parents import artifact_at_hand
from validation.record import EngineRecord, concluded, heading

if TYPE_CHECKING:
    import onnx_ir as ir

_LAYER_IMAGES: Final = 4
_BATCH: Final = 64
_VERSIONS: Final = ("torch", "onnx", "onnx-ir", "onnxruntime")
# Required share of equal classes without the artifact, whose model would show how many classes rounding errors change.
_UNKNOWN: Final = 0.9
_NO_SOURCE: Final = (
    "that the numbers and operators are the artifact's: it was not found, so the file was compared with itself; "
    "name the artifact with --against"
)


def validate_onnx(export: Path, *, against: Path | None = None, images: Path | None = None) -> OnnxValidationRecord:
    """Validate an ONNX export in ONNX Runtime and write `<export>.validation.json` next to it.

    Args:
        export: directory of the export.
        against: the quantized artifact it was made from; found by its digest when None.
        images: an image folder; all comparisons are repeated on up to 500 of its images. Requires the artifact.

    Returns:
        The record, with the verdict ACCEPT, or CONSISTENT if the artifact was not found.

    Raises:
        ConfigurationError: `against` is not the parent of the export; `images` is not an image folder, or is given
            although the artifact was not found.
        BadArtifactError: the export is damaged, or ONNX Runtime rejects it.
        MissingCapabilityError: a package is missing.
        ExportRejectedError: the verdict is REJECT; the record is written, named in the message, and attached.
    """
    onnx_ir = import_onnx_package("onnx_ir")
    artifact = open_artifact(export, kind=KIND)
    source = artifact_at_hand(artifact, against, kind=VIT_KIND)
    if images is not None and source is None:
        raise ConfigurationError(
            "images cannot be compared without the artifact",
            why="its model shows how many classes rounding errors alone may change, and it was not found",
            fix="name the artifact with --against",
        )
    remove_record(artifact.root)  # if anything fails from here on, no old verdict remains
    model = _load(onnx_ir, artifact.root / MODEL_FILE)
    preprocessing = read_model_file(Preprocessing, artifact.root / PREPROCESSING_FILE)
    probes = [probe_images(None if source is None else source.root, preprocessing)]
    probes += [] if images is None else [folder_images(images, preprocessing)]
    judge = _Judge(artifact, model, read_layers(model), source, None if source is None else load_quantized(source.root))
    with track(1 + len(probes), "validate") as progress:
        found = []
        for each in probes:
            found.append(judge.on_images(each))
            progress.advance(1)
        record = judge.record(found)
        progress.advance(1)
    return concluded(record, artifact, record.reasons, f"ONNX Runtime does not compute what {artifact.root} holds")


def _load(onnx_ir: Any, path: Path) -> ir.Model:
    try:
        model: ir.Model = onnx_ir.load(path)
    except Exception as error:  # protobuf's exceptions have no common public base class
        raise BadArtifactError(f"{path} is not an ONNX graph", why=str(error)[:300], fix="export it again") from error
    return model


@dataclass(frozen=True, slots=True)
class _OnImages:
    """Results on one set of images: per layer, for the whole network, and the gates."""

    layers: list[LayerParity]
    classes: ClassAgreement
    gates: list[Gate]


@dataclass(frozen=True, slots=True)
class _Judge:
    """The comparisons of one validation.

    Attributes:
        export: the export under validation.
        model: its graph, as read from the file.
        layers: the matrix multiplications of the graph.
        source: the artifact that it was made from; None if not found.
        parent: the model of that artifact.
    """

    export: Artifact
    model: ir.Model
    layers: tuple[ExportedLayer, ...]
    source: Artifact | None
    parent: QuantizedVit | None

    @property
    def path(self) -> Path:
        return self.export.root / MODEL_FILE

    @property
    def format(self) -> OnnxFormat:
        return OnnxFormat(self.export.manifest.details_of(OnnxDetails).format)

    @property
    def activation(self) -> Activation:
        """The activation to apply to the outputs, according to the artifact or, if there is none, to the export."""
        if self.parent is not None:
            return self.parent.architecture.activation
        return self.export.manifest.details_of(OnnxDetails).output.activation

    def on_images(self, images: ProbeImages) -> _OnImages:
        """Make all comparisons on a set of images; those of single layers and of the parts between them use only 4."""
        few = images.pixels[:_LAYER_IMAGES]
        if self.format is OnnxFormat.QDQ_EXACT:
            return self._exact(images)
        if self.parent is None:
            inputs, outputs = self._own(few), None
            pieces = file_pieces(self.model, self.layers, few)
            expected, own = self._outputs(images, optimize=False), _UNKNOWN
        else:
            reference = as_exported(self.parent, self.format)
            taps, pieces = reference.taps(few), parent_pieces(self.model, self.layers, reference, few)
            inputs, outputs = inputs_of(reference, self.layers, taps), outputs_of(self.layers, taps)
            with torch.no_grad():
                expected = _in_batches(reference, images)
            own = own_agreement(reference, images.pixels, expected)
        parity = compare_layers(self.model, self.layers, inputs, outputs)
        classes = compare_classes(expected, self._outputs(images), own, images.source, self.activation)
        gates = [*parity_gates(parity), *between_gates(self.model, self.layers, pieces), *class_gates(classes)]
        return _OnImages(parity, classes, gates)

    def _exact(self, images: ProbeImages) -> _OnImages:
        """The comparison for exact formats: activation codes and outputs of the network must be bit-identical."""
        found, gates = self._outputs(images), []
        if self.parent is None:
            # The reference is the graph itself with batch size 1 and one thread: summation order must not matter.
            single = open_session(self.path, threads=1)
            outputs = [run(single, {INPUT_NAME: x.numpy()})[OUTPUT_NAME] for x in images.pixels.split(1)]
            expected = torch.from_numpy(np.concatenate(outputs))
        else:
            gates.append(codes_gate(self.model, self.layers, self.parent, images.pixels))
            expected = _in_batches(ExactVit(self.parent), images)
        classes = compare_classes(expected, found, 1.0, images.source, self.activation)
        return _OnImages([], classes, [*gates, outputs_gate(expected, found)])

    def _outputs(self, images: ProbeImages, *, optimize: bool = True) -> Tensor:
        """Outputs of ONNX Runtime, `(N, C)`, with graph optimizations as in serving, or with all of them disabled."""
        session = open_session(self.path, optimize=optimize)
        return _in_batches(lambda x: torch.from_numpy(run(session, {INPUT_NAME: x.numpy()})[OUTPUT_NAME]), images)

    def _own(self, pixels: Tensor) -> dict[str, Any]:
        """Inputs of the layers as the graph itself computes them, with graph optimizations disabled."""
        sources = sources_of(self.layers)
        found = run_to(self.model, [str(source.name) for source in sources], pixels.numpy())
        return {input_name(source): found[str(source.name)] for source in sources}

    def record(self, found: list[_OnImages]) -> OnnxValidationRecord:
        """Create the record, with the verdict on the results for all images and on the metadata.

        Args:
            found: the results on the probe images, and then on the image folder, if there is one.
        """
        stated, unchecked = contents_gate(self.export, None if self.source is None else self.source.root)
        kernels, started = check_kernels(self.path, self.layers), time.perf_counter()
        open_session(self.path)
        load_s = time.perf_counter() - started
        gates = [] if self.parent is None else reopen_gates(self.model, self.layers, self.parent, self.format)
        gates += [*found[0].gates, kernel_gate(kernels), stated]
        gates += [
            gate.model_copy(update={"name": f"{gate.name}, pictures"}) for each in found[1:] for gate in each.gates
        ]
        reasons = failures(gates)
        accepted: Literal["ACCEPT", "CONSISTENT"] = "CONSISTENT" if self.parent is None else "ACCEPT"
        return OnnxValidationRecord(
            **heading(self.export), engine="onnxruntime", versions=installed_versions(_VERSIONS),
            reference="export" if self.parent is None else "artifact", layers=found[0].layers, kernels=kernels,
            classes=found[0].classes, pictures=found[1].classes if found[1:] else None, gates=gates,
            load_s=round(load_s, 3), reasons=reasons, verdict="REJECT" if reasons else accepted,
            not_proved=[*([_NO_SOURCE] if self.parent is None else []), *unchecked,
                        *(each.classes.lowered for each in found if each.classes.lowered)],
        )  # fmt: skip


def _in_batches(model: Callable[[Tensor], Tensor], images: ProbeImages) -> Tensor:
    """Outputs for all images, computed in batches to limit memory."""
    return torch.cat([model(batch) for batch in images.pixels.split(_BATCH)])


def describe(export: Path, record: OnnxValidationRecord) -> str:
    """The record as readable text."""
    title = f"{record.verdict}  {export} in ONNX Runtime {record.versions.get('onnxruntime', '')}"
    lines = [f"{title}, against the {record.reference}", table([gate.row for gate in record.gates])]
    return "\n".join([*lines, *(f"  not proved: {text}" for text in record.not_proved)])


class OnnxValidationRecord(EngineRecord):
    """The record of one validation: what was compared, and the verdict."""

    # Version 3 added the verdict CONSISTENT, `not_proved`, and images from a folder.
    schema_version: int = Field(default=3, description="version of this schema")
    versions: dict[str, str] = Field(description="versions of the packages involved")
    reference: Literal["artifact", "export"] = Field(
        description="what it was compared with: the artifact in torch, or the graph's own codes, evaluated node by node"
    )
    layers: list[LayerParity] = Field(
        description="every layer, given the same input on both sides; none for exact formats, compared as a whole"
    )
    kernels: KernelReport = Field(description="the operator that runs each layer")
    classes: ClassAgreement = Field(description="the whole model, on the probe images")
    pictures: ClassAgreement | None = Field(description="the whole model on the images given; none without")
    gates: list[Gate] = Field(description="the comparisons with their thresholds")
    load_s: float = Field(ge=0, description="time to load the engine, seconds")
    reasons: list[str] = Field(description="why it was rejected; empty when accepted")
    not_proved: list[str] = Field(description="what the verdict does not cover, and why")
    verdict: Literal["ACCEPT", "CONSISTENT", "REJECT"] = Field(
        description="CONSISTENT: the engine computes what the file says; the artifact was not found"
    )
