"""Exports a vision model to ONNX: lint, trace and rewrite, write, read back, compare in ONNX Runtime, commit."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import onnx_ir as ir
import torch
from torch import Tensor

from exporters.graph.between import between_gates, parent_pieces
from exporters.graph.classes import class_gates, compare_classes, own_agreement
from exporters.graph.formats import MODEL_FILE, OnnxFormat, fits_int4
from exporters.graph.gates import (
    check_kernels,
    codes_gate,
    float_gate,
    kernel_gate,
    outputs_gate,
    parity_gates,
)
from exporters.graph.images import ProbeImages, probe_images
from exporters.graph.layers import read_layers
from exporters.graph.lint import lint_model
from exporters.graph.parity import compare_layers, inputs_of, outputs_of
from exporters.graph.plan import GraphPlan, export_peak, vision_plan
from exporters.graph.produce import QuantizedGraph, as_exported, graph_details, quantize_graph, write_description
from exporters.graph.reopen import reopen_gates
from exporters.graph.runtime import DISABLED_OPTIMIZERS, SESSION_ENTRIES, import_onnx_package, open_session, run
from exporters.graph.trace import INPUT_NAME, OPSET, OUTPUT_NAME
from exporters.onnx.needs import least_onnxruntime, needs
from exporters.onnx.target import KIND, OnnxDetails, OnnxExportOptions
from fp8pipe.artifact import (
    Artifact,
    ArtifactWriter,
    Gate,
    NumberFormat,
    check_place,
    installed_versions,
    open_artifact,
)
from fp8pipe.artifact.finding import refuse
from fp8pipe.artifact.kinds import VIT_KIND
from fp8pipe.core.errors import ConfigurationError
from fp8pipe.core.plan import Plan
from fp8pipe.core.progress import track
from fp8pipe.models.vision.exact import ExactVit
from fp8pipe.models.vision.quantized import QuantizedVit, layer_records, load_quantized
from fp8pipe.numerics.kinds import Kind
from fp8pipe.report.card import CardFacts, commit_export

logger = logging.getLogger(__name__)

_LAYER_IMAGES: Final = 4
_HALF: Final = 4  # codes of at most this many bits could be stored two per byte

_CARD: Final = CardFacts("onnx", "ONNX Runtime", (
    "A quantized network amplifies rounding errors: single layers agree with torch up to rounding, "
    "outputs of the whole model only loosely.",
    "Other runtimes than ONNX Runtime were not tried.",
))  # fmt: skip


def plan_export(source: Path, options: OnnxExportOptions, *, runtime: bool = True) -> GraphPlan:
    """Read and lint the artifact, and return what an export would hold. Writes nothing.

    `runtime` says whether ONNX Runtime will run the export.

    Raises:
        BadArtifactError: the artifact does not exist or is damaged.
        LintFindingsError: it cannot be exported in this format.
    """
    artifact = open_artifact(source, kind=VIT_KIND)
    quantized = load_quantized(artifact.root)
    refuse(lint_model(quantized, options.format, runtime=runtime), str(source))
    return replace(_plan(quantized, options.format), peak_bytes=export_peak(quantized))


def plan_onnx(source: Path, output: Path, options: OnnxExportOptions) -> tuple[dict[str, Any], Plan]:
    """The dry run, as a JSON document and as a plan: the artifact is read and linted, but its model is not traced."""
    plan = plan_export(source, options)
    return vision_plan(plan, source, output, format=options.format.value, force=options.force)


def export_onnx(source: Path, output: Path, options: OnnxExportOptions) -> Artifact:
    """Write an ONNX graph of a quantized vision model, and check that ONNX Runtime computes the same.

    `source` is an artifact of kind `vit`; `output` receives `model.onnx`, `preprocessing.json`, `classes.json`
    (classifiers only) and a manifest with all gates.

    Raises:
        ConfigurationError: unusable output, or a model that cannot be traced.
        BadArtifactError: an unfinished or damaged artifact, or one of another kind.
        LintFindingsError: the linter's findings; nothing was written.
        GateFailedError: the written graph differs from the artifact, or does not run in integers; nothing is committed.
        MissingCapabilityError: a package is missing.
        OutOfMemoryError: the disk is full.
    """
    source, output = Path(source), Path(output)
    if output.resolve() == source.resolve():
        raise ConfigurationError(
            f"the output {output} is the source itself",
            why="the export would overwrite it",
            fix="name another directory",
        )
    check_place(output, force=options.force)
    import_onnx_package("onnxruntime")
    artifact = open_artifact(source, kind=VIT_KIND)
    quantized = load_quantized(artifact.root)
    refuse(lint_model(quantized, options.format), str(source))
    images = probe_images(artifact.root, quantized.preprocessing)
    with track(3, "export") as progress:
        graph = quantize_graph(quantized, options.format, str(source))
        progress.advance(1)
        with ArtifactWriter(output, kind=KIND, stage="export", force=options.force) as writer:
            ir.save(graph.model, writer.root / MODEL_FILE)
            write_description(writer.root, quantized)
            progress.advance(1)
            gates = _gates(writer.root / MODEL_FILE, graph, quantized, options.format, images)
            progress.advance(1)
            fix = f"report it with versions of torch, onnxscript and onnxruntime; what was written is in {writer.root}"
            writer.require_gates(gates, "the written graph differs from its artifact", fix)
            _warn(writer, quantized, options.format, images)
            stated = graph_details(graph, quantized, options.format.value).model_dump()
            return _commit(writer, artifact, quantized, options, OnnxDetails(**stated), graph.model)


def _gates(
    path: Path, graph: QuantizedGraph, quantized: QuantizedVit, format: OnnxFormat, images: ProbeImages
) -> list[Gate]:
    """Compare the written file with the artifact and, in ONNX Runtime, with torch; `graph` is what was written."""
    model = ir.load(path)
    layers = read_layers(model)
    gates = reopen_gates(model, layers, quantized, format)
    if format is OnnxFormat.QDQ_EXACT:
        gates += [kernel_gate(check_kernels(path, layers)), codes_gate(model, layers, quantized, images.pixels)]
        found = _outputs(path, images)
        return [*gates, outputs_gate(ExactVit(quantized)(images.pixels), found)]
    gates.append(float_gate(graph.float_bytes, quantized, images.pixels))
    expected_model = as_exported(quantized, format)
    taps = expected_model.taps(images.pixels[:_LAYER_IMAGES])
    inputs = inputs_of(expected_model, layers, taps)
    gates += parity_gates(compare_layers(model, layers, inputs, outputs_of(layers, taps)))
    pieces = parent_pieces(model, layers, expected_model, images.pixels[:_LAYER_IMAGES])
    gates += [*between_gates(model, layers, pieces), kernel_gate(check_kernels(path, layers))]
    found = _outputs(path, images)
    with torch.no_grad():
        expected = expected_model(images.pixels)
    own = own_agreement(expected_model, images.pixels, expected)
    return gates + class_gates(compare_classes(expected, found, own, images.source, quantized.architecture.activation))


def _outputs(path: Path, images: ProbeImages) -> Tensor:
    """ONNX Runtime's outputs `(N, C)` for all images."""
    return torch.from_numpy(run(open_session(path), {INPUT_NAME: images.pixels.numpy()})[OUTPUT_NAME])


def _warn(writer: ArtifactWriter, quantized: QuantizedVit, format: OnnxFormat, images: ProbeImages) -> None:
    # Record in the manifest what users of the export should know.
    if images.source.startswith("random"):
        writer.warn(f"compared on {images.source}")
    if not format.quantizes_activations and quantized.activations:
        writer.warn("the activations of this export are float: its outputs are not those of the artifact")
    if format is OnnxFormat.QDQ and any(w.kind is Kind.E4M3 for w in quantized.weights.values()):
        writer.warn(
            "ONNX Runtime on CPUs computes FP8 layers in float: "
            "the results are correct, but it is slower than the float model"
        )
    plan = _plan(quantized, format)
    if plan.float_layers:
        writer.warn(f"{len(plan.float_layers)} linear layer(s) stay float; the first: {plan.float_layers[0]}")


def _plan(quantized: QuantizedVit, format: OnnxFormat) -> GraphPlan:
    # Determine what an export holds, and the size of its stored tensors, without tracing the model.
    int4 = format is OnnxFormat.INT4_WEIGHT_ONLY
    halves = {n for n, w in quantized.weights.items() if w.kind is Kind.NVFP4 or (int4 and fits_int4(w))}
    codes = sum((w.codes.numel() + 1) // 2 if n in halves else w.codes.numel() for n, w in quantized.weights.items())
    quantized_names = {f"{name}.weight" for name in quantized.weights}
    floats = sum(4 * t.numel() for name, t in quantized.model.state_dict().items() if name not in quantized_names)
    scales = sum(4 * w.scale.numel() for w in quantized.weights.values())
    activations = () if int4 else tuple(quantized.activations)
    kinds = sorted({f"{w.bits}-bit {w.kind}" for w in quantized.weights.values()})
    return GraphPlan(
        weights=tuple(quantized.weights),
        activations=activations,
        float_layers=tuple(n for n in quantized.structure.linear_names if n not in quantized.weights),
        need_bytes=codes + floats + scales,
        precision=f"{', '.join(kinds)} weights, {'quantized' if activations else 'float'} activations",
        halves=not halves and any(w.bits <= _HALF for w in quantized.weights.values()),
    )


def _commit(
    writer: ArtifactWriter, artifact: Artifact, quantized: QuantizedVit, options: OnnxExportOptions,
    stated: OnnxDetails, model: ir.Model,
) -> Artifact:  # fmt: skip
    # Write the model card and the manifest, and commit the export.
    versions = installed_versions(("onnx", "onnx-ir", "onnxscript", "onnxruntime", "timm"))
    asked = needs(model, versions["onnxruntime"])
    least = least_onnxruntime(asked)
    why = ", ".join(name for name, version in asked.items() if version == least)
    card = replace(_CARD, limits=(f"Needs ONNX Runtime {least} or newer, for {why}.", *_CARD.limits))
    float_kind = all(w.kind is Kind.E4M3 for w in quantized.weights.values())
    return commit_export(
        writer, card, artifact, options, format=options.format.value,
        layers=layer_records(quantized, artifact.manifest.layers, activations=options.format.quantizes_activations),
        number_format=NumberFormat(name=(Kind.E4M3 if float_kind else Kind.INT).value, granularity="per-channel"),
        preprocessing=quantized.preprocessing.model_dump(mode="json"),
        runtime={
            "engine": "onnxruntime",
            "onnxruntime": versions["onnxruntime"],
            "least_onnxruntime": least,
            "needs": asked,
            "opset": OPSET,
            "disabled_optimizers": list(DISABLED_OPTIMIZERS),
            "session_entries": dict(SESSION_ENTRIES),
        },
        versions=versions,
        details=stated,
    )  # fmt: skip
