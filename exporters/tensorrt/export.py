"""Exports a vision model to TensorRT: writes the graph, compares it with the artifact, builds and checks engines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import onnx_ir as ir

from exporters.graph.between import between_gates, parent_pieces
from exporters.graph.formats import MODEL_FILE, OnnxFormat
from exporters.graph.gates import float_gate
from exporters.graph.images import ProbeImages, probe_images
from exporters.graph.layers import ExportedLayer, read_layers
from exporters.graph.lint import lint_model
from exporters.graph.plan import vision_plan
from exporters.graph.produce import QuantizedGraph, graph_details, write_description
from exporters.graph.reopen import reopen_gates
from exporters.graph.runtime import import_onnx_package
from exporters.graph.trace import INPUT_NAME, stored_bytes
from exporters.onnx.export import plan_export
from exporters.onnx.target import OnnxExportOptions
from exporters.tensorrt.builder import (
    SETTINGS,
    EnterpriseMachine,
    Shapes,
    build_enterprise,
    build_rtx,
    check_enterprise,
    shapes,
    trtexec_command,
)
from exporters.tensorrt.engines import (
    describe_engine,
    engine_file,
    expected_sizes,
    measure_engine,
    precision_gate,
    shown_counts,
    size_gate,
    stored_gate,
    write_layers,
)
from exporters.tensorrt.graph import choose_format, in_format, typed_graph, with_targets
from exporters.tensorrt.half import compare_halved, halve, refuse_not_half, stored_arrays
from exporters.tensorrt.lint import check_file
from exporters.tensorrt.listing import PrecisionReport, artifact_precisions, read_precision
from exporters.tensorrt.parity import product_gates
from exporters.tensorrt.recipe import EngineRecipe, pack_engine
from exporters.tensorrt.target import (
    ENGINE_LIMITS,
    KIND,
    Base,
    Builder,
    BuiltEngine,
    TrtDetails,
    TrtExportOptions,
    TrtFormat,
)
from fp8pipe.artifact import (
    Artifact,
    ArtifactWriter,
    Gate,
    NumberFormat,
    check_place,
    installed_versions,
    open_artifact,
    sha256_file,
)
from fp8pipe.artifact.finding import refuse
from fp8pipe.artifact.kinds import VIT_KIND
from fp8pipe.core.plan import Plan
from fp8pipe.core.progress import track
from fp8pipe.models.vision.quantized import QuantizedVit, layer_records, load_quantized
from fp8pipe.numerics.kinds import granularity
from fp8pipe.report.card import CardFacts, commit_export

_LAYER_IMAGES: Final = 4
_FLOATS: Final = ("fp16", "fp32", "bf16")
_BLOCK_LINEARS: Final = 4  # qkv, projection and the two linears of the MLP
_CARD: Final = CardFacts("tensorrt", "TensorRT", ENGINE_LIMITS)
# Fields of an engine's entry in layers.json that are also recorded in the manifest.
_IN_MANIFEST: Final = (
    "engine", "engine_bytes", "stored_bytes", "size", "precisions", "fused_attentions", "recipe",
)  # fmt: skip


def export_tensorrt(source: Path, output: Path, options: TrtExportOptions) -> Artifact:
    """Write a graph for TensorRT from a quantized vision model, validate it, and compile engines.

    `source` is an artifact of kind `vit`; `output` receives `model.onnx`, `preprocessing.json`, `classes.json`
    (classifiers only), `engines/`, `layers.json` (the precision of every matrix multiplication in every engine) and a
    manifest with all gates.

    Raises:
        ConfigurationError: unusable output, a compute capability without the format, or a model that cannot be traced.
        BadArtifactError: an unfinished or damaged artifact, or one of another kind.
        LintFindingsError: findings on values or on the graph, before a builder is called; nothing is committed.
        MissingCapabilityError: a package is missing.
        GateFailedError: the written graph differs from the artifact, the builder refuses it, or it uses another
            precision than the artifact's; nothing is committed.
    """
    check_place(output, force=options.force)
    import_onnx_package("onnxruntime")
    machine = check_enterprise() if options.builder is Builder.ENTERPRISE else None
    artifact = open_artifact(source, kind=VIT_KIND)
    stored = load_quantized(artifact.root)
    refuse(lint_model(stored, OnnxFormat.QDQ, runtime=False), str(source))
    format = choose_format(stored, options.format, str(source))
    options = with_targets(options, format)
    places = {Builder.RTX: options.compute_capabilities, Builder.ENTERPRISE: (machine.capability,) if machine else ()}
    engines = places.get(options.builder, ())
    quantized = in_format(stored, format)
    images = probe_images(artifact.root, quantized.preprocessing)
    with track(2 + len(engines), "export") as progress:
        graph = typed_graph(quantized, format, str(source))
        progress.advance(1)
        with ArtifactWriter(output, kind=KIND, stage="export", force=options.force) as writer:
            made = _Made(writer, graph, read_layers(graph.model), quantized, format, options, machine)
            gates = made.write(images, str(source))
            for warning in check_file(writer.root / MODEL_FILE, engines, str(source), require=options.require):
                writer.warn(warning)
            progress.advance(1)
            reports: dict[str, dict[str, Any]] = {}
            for capability in engines:
                reports[capability], held = made.engine(capability)
                gates += held
                progress.advance(1)
            write_layers(writer.root, reports)
            fix = f"inspect {writer.root}; --no-require waives only the requirement on precision"
            writer.require_gates(gates, "the export does not meet its requirements", fix)
            if images.source.startswith("random"):
                writer.warn(f"compared on {images.source}")
            return made.commit(artifact, reports)


def plan_tensorrt(source: Path, output: Path, options: TrtExportOptions) -> tuple[dict[str, Any], Plan]:
    """The dry run: the artifact is read and linted, but nothing is traced and no builder is called."""
    graph = plan_export(source, OnnxExportOptions(force=options.force), runtime=False)
    format = choose_format(load_quantized(open_artifact(source, kind=VIT_KIND).root), options.format, str(source))
    capabilities = list(with_targets(options, format).compute_capabilities)
    places = {Builder.RTX: capabilities, Builder.ENTERPRISE: ["the GPU of this machine"]}
    engines = places.get(options.builder, [])
    blocks = (len(graph.weights) + len(graph.float_layers)) // _BLOCK_LINEARS
    sizes = expected_sizes(graph.need_bytes, blocks, len(engines), pack=options.pack, halves=graph.halves)
    document, plan = vision_plan(
        graph, source, output, format=options.base.value, force=options.force, engines=engines,
        base=options.base.value, sizes=sizes,
    )  # fmt: skip
    return {**document, "engines": engines}, plan


def after_export(artifact: Artifact) -> list[str]:
    """Lines to print after an export."""
    command = artifact.manifest.details_of(TrtDetails).trtexec
    return ["  to build TensorRT's engine on another machine:", f"    {command}"]


@dataclass(frozen=True, slots=True)
class _Made:
    """An export in progress."""

    writer: ArtifactWriter
    graph: QuantizedGraph  # in float32 until it is written
    layers: Sequence[ExportedLayer]  # layers of the graph
    quantized: QuantizedVit  # the model as computed in the chosen format
    format: TrtFormat  # how weights and activations are stored and multiplied
    options: TrtExportOptions  # with the format's default compute capabilities filled in
    machine: EnterpriseMachine | None  # the machine that builds with TensorRT; None for other builders

    @property
    def profiles(self) -> dict[str, Shapes]:
        """The input shapes that engines are built for."""
        size = self.quantized.architecture.image_size
        return {INPUT_NAME: shapes((count, 3, *size) for count in self.options.batch)}

    def write(self, images: ProbeImages, source: str) -> list[Gate]:
        """Write all files except engines; returns gates on the graph before and after its conversion to FP16."""
        model, layers, quantized, path = self.graph.model, self.layers, self.quantized, self.writer.root / MODEL_FILE
        gates = reopen_gates(model, layers, quantized, OnnxFormat.QDQ)
        gates.append(float_gate(self.graph.float_bytes, quantized, images.pixels))
        pixels = images.pixels[:_LAYER_IMAGES]
        gates += product_gates(model, layers, quantized, pixels)
        gates += between_gates(model, layers, parent_pieces(model, layers, quantized, pixels), engine=False)
        before = stored_arrays(model)
        if self.options.base is Base.FP16:
            with refuse_not_half(source, "quantize the model again with this version, or export with --base fp32"):
                halve(model)
        ir.save(model, path)
        gates += compare_halved(before, ir.load(path))
        write_description(self.writer.root, quantized)
        return gates

    def engine(self, capability: str) -> tuple[dict[str, Any], list[Gate]]:
        """Build one engine and store it; returns its entry for layers.json, and gates on its precision and size."""
        root, options, machine = self.writer.root, self.options, self.machine
        graph, name = root / MODEL_FILE, engine_file(capability, options.builder)
        path, settings = root / name, dict(SETTINGS) if machine is None else options.enterprise.model_dump()
        path.parent.mkdir(exist_ok=True)
        if machine is None:
            built = build_rtx(graph, path, [capability], self.profiles)
        else:
            built = build_enterprise(graph, path, machine, self.profiles, options.enterprise)
        recipe = EngineRecipe(
            builder="rtx" if machine is None else "enterprise", version=built.version, capability=capability,
            graph_sha256=sha256_file(graph), profiles=self.profiles, settings=settings,
        )  # fmt: skip
        report = read_precision([str(layer.node.name) for layer in self.layers], built.layers)
        size = measure_engine(path, stored_bytes(self.graph.model))
        entry = {
            "recipe": recipe.model_dump(mode="json"),
            **describe_engine(root, name, report, built),
            "fused_attentions": sum(product.fused_attention for product in report.products) // 2,
            "size": size.model_dump(),
        }
        if options.pack:
            path = pack_engine(path)
            entry["engine"] = path.relative_to(root).as_posix()
        entry["stored_bytes"] = path.stat().st_size
        held = options.require and not self.format.weight_only
        return entry, [
            self._precision_gate(report, capability),
            size_gate(size, capability, required=held),
            stored_gate(size, entry["stored_bytes"], capability, required=held and options.pack),
        ]

    def _precision_gate(self, report: PrecisionReport, capability: str) -> Gate:
        if not self.format.weight_only:
            wanted, name = artifact_precisions(self.layers), f"products not in {self.format} for {capability}"
            return precision_gate(report, wanted, name, required=self.options.require)
        # The builder may dequantize weights: they are still stored as codes, and nothing is rounded again.
        value, detail = sum(product.name in _FLOATS for product in report.products), shown_counts(report.counts())
        return Gate(name=f"products in float for {capability}", value=value, threshold=value, detail=detail)

    def commit(self, artifact: Artifact, reports: dict[str, dict[str, Any]]) -> Artifact:
        """Write the manifest and commit the export."""
        format, options, quantized = self.format, self.options, self.quantized
        trtexec = trtexec_command(
            MODEL_FILE, self.profiles, workspace_mib=options.enterprise.workspace_mib,
            version_compatible=options.enterprise.version_compatible,
        )  # fmt: skip
        opset = self.graph.model.opset_imports[""]
        return commit_export(
            self.writer, _CARD, artifact, options, format=format.value,
            layers=layer_records(quantized, artifact.manifest.layers, activations=not format.weight_only),
            number_format=NumberFormat(name=format.kind.value, granularity=granularity(format.kind)),
            preprocessing=quantized.preprocessing.model_dump(mode="json"),
            runtime={"engine": "tensorrt", "builder": options.builder.value, "opset": opset},
            versions=installed_versions(("onnx", "onnx-ir", "onnxscript", "onnxruntime", "tensorrt-rtx", "timm")),
            details=TrtDetails(
                **graph_details(self.graph, quantized, format.value).model_dump(),
                base=options.base.value,
                trtexec=trtexec,
                products=artifact_precisions(self.layers),
                engines={c: BuiltEngine.model_validate({k: e[k] for k in _IN_MANIFEST}) for c, e in reports.items()},
            ),
        )  # fmt: skip
