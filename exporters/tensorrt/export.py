"""The whole export of a vision model: graph, proof, engines, and what the builder says about them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from exporters.graph.description import require_gates, write_description
from exporters.graph.findings import Finding
from exporters.graph.formats import OnnxFormat
from exporters.graph.gates import float_gate
from exporters.graph.images import ProbeImages, probe_images
from exporters.graph.layers import ExportedLayer, read_layers
from exporters.graph.lint import lint_model, refuse
from exporters.graph.packages import import_onnx_package
from exporters.graph.parity import FLOAT_TOLERANCE, INTEGER_TOLERANCE
from exporters.graph.produce import QuantizedGraph
from exporters.graph.reopen import reopen_gates
from exporters.graph.trace import INPUT_NAME, OUTPUT_NAME, ProductKind
from exporters.tensorrt.block_parity import block_gates, block_parity
from exporters.tensorrt.enterprise import EnterpriseMachine, build_enterprise, check_enterprise
from exporters.tensorrt.formats import choose_format, in_format
from exporters.tensorrt.graph import typed_graph
from exporters.tensorrt.half import NotHalf, compare_halved, halve, stored_arrays
from exporters.tensorrt.lint import check_file
from exporters.tensorrt.options import Base, Builder, TrtExportOptions, TrtFormat
from exporters.tensorrt.pack import pack_engine
from exporters.tensorrt.parity import parity_gates, typed_parity
from exporters.tensorrt.precision import PrecisionReport, artifact_precisions, read_precision
from exporters.tensorrt.recipe import EngineRecipe
from exporters.tensorrt.rtx import SETTINGS, Shapes, build_rtx
from exporters.tensorrt.size import ideal_bytes, measure_engine, size_gate, stored_gate
from exporters.tensorrt.targets import with_targets
from exporters.tensorrt.trtexec import trtexec_command
from fp8pipe.artifact import (
    Artifact,
    ArtifactWriter,
    Gate,
    LayerRecord,
    NumberFormat,
    check_place,
    installed_versions,
    open_artifact,
    sha256_file,
)
from fp8pipe.core.progress import track
from fp8pipe.models.vision.quantized import QuantizedVit, load_quantized
from fp8pipe.numerics.kinds import granularity
from fp8pipe.report.card import CARD_FILE, write_card

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["ENGINES", "EXPORT_KIND", "LAYERS_FILE", "MODEL_FILE", "engine_file", "export_tensorrt"]

EXPORT_KIND: Final = "trt-export"
SOURCE_KIND: Final = "vit"
MODEL_FILE: Final = "model.onnx"
ENGINES: Final = "engines"
LAYERS_FILE: Final = "layers.json"
_LAYER_IMAGES: Final = 4
_FLOATS: Final = ("fp16", "fp32", "bf16")
# What the manifest keeps of an engine's entry in layers.json.
_IN_MANIFEST: Final = (
    "engine", "engine_bytes", "stored_bytes", "size", "precisions", "fused_attentions", "recipe",
)  # fmt: skip


def export_tensorrt(source: Path, output: Path, options: TrtExportOptions) -> Artifact:
    """Write a graph for TensorRT from a quantized vision model, prove it, and compile engines.

    Args:
        source: directory of an artifact of kind `vit`.
        output: directory to create: `model.onnx`, `preprocessing.json`, `classes.json` (classifiers), `engines/`,
            `layers.json` (every product's precision in every engine), a manifest.
        options: base type, builder, GPUs, batch.

    Returns:
        The committed export, kind `trt-export`, with every gate in its manifest.

    Raises:
        ConfigurationError: unusable output, a compute capability without the format, or a model that cannot be traced.
        BadArtifactError: an unfinished, damaged or other artifact.
        LintFindingsError: findings on values or on the graph, before a builder is called; not committed.
        MissingCapabilityError: a package is missing.
        GateFailedError: the written graph differs from the artifact, the builder refuses it, or it multiplies in
            another precision than the artifact's; not committed.
    """
    check_place(output, force=options.force)
    import_onnx_package("onnxruntime")
    machine = check_enterprise() if options.builder is Builder.ENTERPRISE else None
    artifact = open_artifact(source, kind=SOURCE_KIND)
    stored = load_quantized(artifact.root)
    refuse(lint_model(stored, OnnxFormat.QDQ, runtime=False), str(source))
    format = choose_format(stored, options.format, str(source))
    options = with_targets(options, format)
    engines = options.compute_capabilities if options.builder is Builder.RTX else ()
    engines = engines if machine is None else (machine.capability,)
    quantized = in_format(stored, format)
    images = probe_images(artifact.root, quantized.preprocessing)
    with track(2 + len(engines), "export") as progress:
        graph = typed_graph(quantized, format, str(source))
        progress.advance(1)
        with ArtifactWriter(output, kind=EXPORT_KIND, stage="export", force=options.force) as writer:
            layers = read_layers(graph.model)
            gates = _write(writer.root, graph, layers, quantized, images, options, str(source))
            ideal = ideal_bytes(graph.model)
            for warning in check_file(writer.root / MODEL_FILE, engines, str(source), require=options.require):
                writer.warn(warning)
            progress.advance(1)
            reports: dict[str, dict[str, Any]] = {}
            for capability in engines:
                report, entry = _build(writer.root, layers, quantized, options, capability, machine)
                reports[capability] = entry
                gates.append(_precision_gate(report, layers, format, capability, required=options.require))
                size = measure_engine(writer.root / entry["engine"], ideal)
                entry["size"] = size.model_dump()
                if options.pack:
                    packed = pack_engine(writer.root / entry["engine"])
                    entry["engine"] = packed.relative_to(writer.root).as_posix()
                entry["stored_bytes"] = (writer.root / entry["engine"]).stat().st_size
                held = options.require and not format.weight_only
                gates.append(size_gate(size, capability, required=held))
                gates.append(stored_gate(size, entry["stored_bytes"], capability, required=held and options.pack))
                progress.advance(1)
            if reports:
                (writer.root / LAYERS_FILE).write_text(json.dumps(reports, indent=1) + "\n", encoding="utf-8")
            for gate in gates:
                writer.gate(gate)
            fix = f"look into {writer.root}; precision alone may be waived with --no-require"
            require_gates(gates, "the export does not hold what was asked", fix)
            if images.source.startswith("random"):
                writer.warn(f"compared on {images.source}")
            return _commit(writer, artifact, quantized, options, format, graph, reports, artifact_precisions(layers))


def engine_file(capability: str, builder: Builder = Builder.RTX) -> str:
    """Where an engine is built in an export: `engines/rtx-8.9.engine`; `.xz` is added when it is packed."""
    return f"{ENGINES}/{'rtx' if builder is Builder.RTX else 'trt'}-{capability}.engine"


def _write(
    root: Path,
    graph: QuantizedGraph,
    layers: Sequence[ExportedLayer],
    quantized: QuantizedVit,
    images: ProbeImages,
    options: TrtExportOptions,
    source: str,
) -> list[Gate]:
    """The files but engines; gates on the graph before and after it is halved."""
    import onnx_ir as ir

    gates = reopen_gates(graph.model, layers, quantized, OnnxFormat.QDQ)
    gates.append(float_gate(graph.float_bytes, quantized, images.pixels))
    pixels = images.pixels[:_LAYER_IMAGES]
    convolves = any(layer.kind is ProductKind.PATCH for layer in layers)
    report = typed_parity(graph.model, layers, quantized, pixels)
    gates += parity_gates(report, FLOAT_TOLERANCE if convolves else INTEGER_TOLERANCE)
    gates += block_gates(block_parity(graph.model, layers, quantized, pixels))
    before = stored_arrays(graph.model)
    if options.base is Base.FP16:
        _halve(graph.model, source)
    ir.save(graph.model, root / MODEL_FILE)
    gates += compare_halved(before, ir.load(root / MODEL_FILE))
    write_description(root, quantized)
    return gates


def _halve(model: ir.Model, source: str) -> None:
    try:
        halve(model)
    except NotHalf as error:
        fix = "quantize the model again with this version, or export with --base fp32"
        refuse([Finding("not-half", str(error).partition(":")[0], str(error).partition(": ")[2], fix)], source)


def _build(
    root: Path,
    layers: Sequence[ExportedLayer],
    quantized: QuantizedVit,
    options: TrtExportOptions,
    capability: str,
    machine: EnterpriseMachine | None,
) -> tuple[PrecisionReport, dict[str, Any]]:
    """One engine, what it multiplies in, and its entry for layers.json."""
    profiles = _profiles(quantized, options)
    name = engine_file(capability, options.builder)
    graph, path = root / MODEL_FILE, root / name
    path.parent.mkdir(exist_ok=True)
    if machine is None:
        built, settings = build_rtx(graph, path, [capability], profiles), dict(SETTINGS)
    else:
        built = build_enterprise(graph, path, machine, profiles, options.enterprise)
        settings = options.enterprise.model_dump()
    recipe = EngineRecipe(
        builder="rtx" if machine is None else "enterprise", version=built.version, capability=capability,
        graph_sha256=sha256_file(graph), profiles=profiles, settings=settings,
    )  # fmt: skip
    report = read_precision([str(layer.node.name) for layer in layers], built.layers)
    entry = {
        "recipe": recipe.model_dump(mode="json"),
        "engine": name,
        "engine_bytes": path.stat().st_size,
        "precisions": report.counts(),
        "fused_attentions": sum(product.fused_attention for product in report.products) // 2,
        "products": [product.model_dump() for product in report.products],
        "other_layers": report.other_layers,
        "builder_warnings": list(built.warnings),
        "layers": [layer.model_dump() for layer in built.layers],
    }
    return report, entry


def _profiles(quantized: QuantizedVit, options: TrtExportOptions) -> dict[str, Shapes]:
    size = quantized.architecture.image_size
    low, usual, high = ((count, 3, *size) for count in options.batch)
    return {INPUT_NAME: (low, usual, high)}


def _precision_gate(
    report: PrecisionReport, layers: Sequence[ExportedLayer], format: TrtFormat, capability: str, *, required: bool
) -> Gate:
    shown = ", ".join(f"{count} in {name}" for name, count in sorted(report.counts().items()))
    if format.weight_only:  # the builder is free to dequantize: codes and memory stay small, nothing is rounded anew
        value = sum(product.name in _FLOATS for product in report.products)
        return Gate(name=f"products in float for {capability}", value=value, threshold=value, passed=True, detail=shown)
    wanted = artifact_precisions(layers)
    other = report.not_in(wanted)
    if len(kinds := Counter(wanted.values())) > 1:
        shown += f"; in the artifact {', '.join(f'{count} in {name}' for name, count in sorted(kinds.items()))}"
    return Gate(
        name=f"products not in {format} for {capability}", value=len(other), threshold=0 if required else len(other),
        passed=not other or not required, detail=shown + (f"; the first: {other[0]}" if other else ""),
    )  # fmt: skip


def _commit(
    writer: ArtifactWriter,
    artifact: Artifact,
    quantized: QuantizedVit,
    options: TrtExportOptions,
    format: TrtFormat,
    graph: QuantizedGraph,
    reports: dict[str, dict[str, Any]],
    products: dict[str, str],
) -> Artifact:
    versions = installed_versions(("onnx", "onnx-ir", "onnxscript", "onnxruntime", "tensorrt-rtx", "timm"))
    layers = [
        LayerRecord(name=s.name, converted=s.name in quantized.weights, reason=options.base.value, shape=s.shape)
        for s in quantized.structure.linears
    ]
    parent = artifact.as_parent()
    write_card(writer, source=artifact.root, parent=parent, format=format.value, layers=layers)
    return writer.commit(
        config=options.model_dump(mode="json", exclude={"force"}),
        seed=None,
        parents=[parent],
        number_format=NumberFormat(name=format.kind.value, granularity=granularity(format.kind)),
        preprocessing=quantized.preprocessing.model_dump(mode="json"),
        runtime={"engine": "tensorrt", "builder": options.builder.value, "opset": graph.model.opset_imports[""]},
        layers=layers,
        volatile=[CARD_FILE],
        versions=versions,
        extra={
            "format": format.value,
            "base": options.base.value,
            "input": {"name": INPUT_NAME, "shape": ["batch", 3, *quantized.architecture.image_size], "type": "float32"},
            "output": {"name": OUTPUT_NAME, "what": "logits" if quantized.architecture.classes else "features"},
            "trtexec": trtexec_command(
                MODEL_FILE, _profiles(quantized, options), workspace_mib=options.enterprise.workspace_mib,
                version_compatible=options.enterprise.version_compatible,
            ),
            "products": products,
            "passes": {change.name: len(change.changed) for change in graph.changes},
            "engines": {c: {k: e[k] for k in _IN_MANIFEST} for c, e in reports.items()},
        },
    )  # fmt: skip
