"""The whole export of a vision model: graph, proof, engines, and what the builder says about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from exporters.graph.between import between_gates, parent_pieces
from exporters.graph.description import graph_details, require_gates, write_description
from exporters.graph.formats import OnnxFormat
from exporters.graph.gates import float_gate
from exporters.graph.images import ProbeImages, probe_images
from exporters.graph.layers import ExportedLayer, read_layers
from exporters.graph.lint import lint_model, refuse
from exporters.graph.packages import import_onnx_package
from exporters.graph.plan import vision_plan
from exporters.graph.produce import QuantizedGraph
from exporters.graph.reopen import reopen_gates
from exporters.graph.trace import INPUT_NAME
from exporters.onnx.export import plan_export
from exporters.onnx.options import OnnxExportOptions
from exporters.tensorrt.builder import Shapes
from exporters.tensorrt.engines import (
    MODEL_FILE,
    describe_engine,
    engine_file,
    precision_gate,
    shown_counts,
    write_layers,
)
from exporters.tensorrt.enterprise import EnterpriseMachine, build_enterprise, check_enterprise, trtexec_command
from exporters.tensorrt.formats import choose_format, in_format, plan_targets, with_targets
from exporters.tensorrt.graph import typed_graph
from exporters.tensorrt.half import compare_halved, halve, refuse_not_half, stored_arrays
from exporters.tensorrt.lint import check_file
from exporters.tensorrt.options import Base, Builder, TrtExportOptions, TrtFormat
from exporters.tensorrt.parity import product_gates
from exporters.tensorrt.precision import PrecisionReport, artifact_precisions, read_precision
from exporters.tensorrt.recipe import EngineRecipe, pack_engine
from exporters.tensorrt.rtx import SETTINGS, build_rtx
from exporters.tensorrt.size import expected_sizes, ideal_bytes, measure_engine, size_gate, stored_gate
from exporters.tensorrt.target import ENGINE_LIMITS, KIND, BuiltEngine, TrtDetails
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
from fp8pipe.artifact.kinds import VIT_KIND
from fp8pipe.core.plan import Plan
from fp8pipe.core.progress import track
from fp8pipe.models.vision.encodings import layer_records
from fp8pipe.models.vision.quantized import QuantizedVit, load_quantized
from fp8pipe.numerics.kinds import granularity
from fp8pipe.report.card import CARD_FILE, CardFacts, write_card

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["export_tensorrt"]

_LAYER_IMAGES: Final = 4
_FLOATS: Final = ("fp16", "fp32", "bf16")
_BLOCK_LINEARS: Final = 4  # qkv, projection and the two of the MLP
_CARD: Final = CardFacts("tensorrt", "TensorRT", ENGINE_LIMITS)
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
    artifact = open_artifact(source, kind=VIT_KIND)
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
        with ArtifactWriter(output, kind=KIND, stage="export", force=options.force) as writer:
            made = _Made(writer.root, graph, read_layers(graph.model), quantized, format, options, machine)
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
            fix = f"look into {writer.root}; precision alone may be waived with --no-require"
            require_gates(writer, gates, "the export does not hold what was asked", fix)
            if images.source.startswith("random"):
                writer.warn(f"compared on {images.source}")
            return _commit(writer, artifact, quantized, options, format, graph, reports, made.precisions)


def plan_tensorrt(source: Path, output: Path, options: TrtExportOptions) -> tuple[dict[str, Any], Plan]:
    """The dry run: the artifact is read and linted, nothing of it is traced, and no builder is called."""
    graph = plan_export(source, OnnxExportOptions(force=options.force), runtime=False)
    places = {Builder.RTX: list(plan_targets(source, options)[1]), Builder.ENTERPRISE: ["the GPU of this machine"]}
    engines = places.get(options.builder, [])
    blocks = (len(graph.weights) + len(graph.float_layers)) // _BLOCK_LINEARS
    sizes = expected_sizes(graph.need_bytes, blocks, len(engines), pack=options.pack, halves=graph.halves)
    document, plan = vision_plan(
        graph, source, output, format=options.base.value, force=options.force, engines=engines,
        base=options.base.value, sizes=sizes,
    )  # fmt: skip
    return {**document, "engines": engines}, plan


def after_export(artifact: Artifact) -> list[str]:
    """What to say after an export."""
    command = artifact.manifest.details_of(TrtDetails).trtexec
    return ["  to build TensorRT's engine on another machine:", f"    {command}"]


@dataclass(frozen=True, slots=True)
class _Made:
    """One export on its way.

    Attributes:
        root: where it is written.
        graph: float32, until it is written.
        layers: of the graph.
        quantized: the model of the format.
        format: how products are stored and multiplied.
        options: with the format's own compute capabilities.
        machine: that builds with TensorRT; None for other builders.
    """

    root: Path
    graph: QuantizedGraph
    layers: Sequence[ExportedLayer]
    quantized: QuantizedVit
    format: TrtFormat
    options: TrtExportOptions
    machine: EnterpriseMachine | None

    @property
    def precisions(self) -> dict[str, str]:
        """The artifact's own precision, by product."""
        return artifact_precisions(self.layers)

    def write(self, images: ProbeImages, source: str) -> list[Gate]:
        """The files but engines; gates on the graph before and after it is halved."""
        import onnx_ir as ir

        model, layers, quantized = self.graph.model, self.layers, self.quantized
        gates = reopen_gates(model, layers, quantized, OnnxFormat.QDQ)
        gates.append(float_gate(self.graph.float_bytes, quantized, images.pixels))
        pixels = images.pixels[:_LAYER_IMAGES]
        gates += product_gates(model, layers, quantized, pixels)
        gates += between_gates(model, layers, parent_pieces(model, layers, quantized, pixels), engine=False)
        before = stored_arrays(model)
        if self.options.base is Base.FP16:
            _halve(model, source)
        ir.save(model, self.root / MODEL_FILE)
        gates += compare_halved(before, ir.load(self.root / MODEL_FILE))
        write_description(self.root, quantized)
        return gates

    def engine(self, capability: str) -> tuple[dict[str, Any], list[Gate]]:
        """Build one engine and store it: its entry for layers.json, and gates on its precision and its size."""
        report, entry = self._build(capability)
        size = measure_engine(self.root / entry["engine"], ideal_bytes(self.graph.model))
        entry["size"] = size.model_dump()
        if self.options.pack:
            entry["engine"] = pack_engine(self.root / entry["engine"]).relative_to(self.root).as_posix()
        entry["stored_bytes"] = (self.root / entry["engine"]).stat().st_size
        held = self.options.require and not self.format.weight_only
        return entry, [
            self._precision_gate(report, capability),
            size_gate(size, capability, required=held),
            stored_gate(size, entry["stored_bytes"], capability, required=held and self.options.pack),
        ]

    def _build(self, capability: str) -> tuple[PrecisionReport, dict[str, Any]]:
        profiles, machine = _profiles(self.quantized, self.options), self.machine
        name = engine_file(capability, self.options.builder)
        graph, path = self.root / MODEL_FILE, self.root / name
        path.parent.mkdir(exist_ok=True)
        if machine is None:
            built, settings = build_rtx(graph, path, [capability], profiles), dict(SETTINGS)
        else:
            built = build_enterprise(graph, path, machine, profiles, self.options.enterprise)
            settings = self.options.enterprise.model_dump()
        recipe = EngineRecipe(
            builder="rtx" if machine is None else "enterprise", version=built.version, capability=capability,
            graph_sha256=sha256_file(graph), profiles=profiles, settings=settings,
        )  # fmt: skip
        report = read_precision([str(layer.node.name) for layer in self.layers], built.layers)
        entry = {
            "recipe": recipe.model_dump(mode="json"),
            **describe_engine(self.root, name, report, built),
            "fused_attentions": sum(product.fused_attention for product in report.products) // 2,
        }
        return report, entry

    def _precision_gate(self, report: PrecisionReport, capability: str) -> Gate:
        if not self.format.weight_only:
            name = f"products not in {self.format} for {capability}"
            return precision_gate(report, self.precisions, name, required=self.options.require)
        # The builder is free to dequantize: codes and memory stay small, nothing is rounded anew.
        value, detail = sum(product.name in _FLOATS for product in report.products), shown_counts(report.counts())
        return Gate(name=f"products in float for {capability}", value=value, threshold=value, detail=detail)


def _halve(model: ir.Model, source: str) -> None:
    with refuse_not_half(source, "quantize the model again with this version, or export with --base fp32"):
        halve(model)


def _profiles(quantized: QuantizedVit, options: TrtExportOptions) -> dict[str, Shapes]:
    size = quantized.architecture.image_size
    low, usual, high = ((count, 3, *size) for count in options.batch)
    return {INPUT_NAME: (low, usual, high)}


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
    layers = layer_records(quantized, artifact.manifest.layers, activations=not format.weight_only)
    parent = artifact.as_parent()
    write_card(writer, _CARD, source=artifact.root, parent=parent, format=format.value, layers=layers)
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
        details=TrtDetails(
            **graph_details(graph, quantized, format.value).model_dump(),
            base=options.base.value,
            trtexec=trtexec_command(
                MODEL_FILE, _profiles(quantized, options), workspace_mib=options.enterprise.workspace_mib,
                version_compatible=options.enterprise.version_compatible,
            ),
            products=products,
            engines={c: BuiltEngine.model_validate({k: e[k] for k in _IN_MANIFEST}) for c, e in reports.items()},
        ),
    )  # fmt: skip
