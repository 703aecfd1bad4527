"""The export of a language model to TensorRT: calibrate scales, write the graph, validate it, and build engines."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import onnx_ir as ir

from exporters.graph.formats import MODEL_FILE, GraphOutput
from exporters.graph.layers import read_layers
from exporters.graph.runtime import import_onnx_package
from exporters.graph.trace import SUFFIXES, ProductKind, stored_bytes
from exporters.tensorrt.builder import Shapes, build_rtx, shapes, trtexec_command
from exporters.tensorrt.engines import describe_engine, engine_file, precision_gate, write_layers
from exporters.tensorrt.language.calibrate import Score, scales_by_layer
from exporters.tensorrt.language.chain import Chain
from exporters.tensorrt.language.graph import LOGITS, DecoderGraph, cache_names
from exporters.tensorrt.language.predict import cache_gates, decoder_session, perplexity_gate, unrounded_session
from exporters.tensorrt.language.prove import check_structure, layered_gates, whole_gate
from exporters.tensorrt.language.reference import Reference
from exporters.tensorrt.language.reopen import layer_gates, number_gates
from exporters.tensorrt.language.source import LanguageModel, check_attention, language_records, open_in_format
from exporters.tensorrt.language.stitch import traced_graph
from exporters.tensorrt.language.target import (
    KIND,
    CacheFacts,
    InputScale,
    LanguageExportOptions,
    PerplexityFacts,
    TrtLanguageDetails,
    product_precision,
)
from exporters.tensorrt.lint import check_file
from exporters.tensorrt.listing import read_precision
from exporters.tensorrt.target import ENGINE_LIMITS, Builder, BuiltEngine
from exporters.text import ExportText, read_text
from fp8pipe.artifact import Artifact, ArtifactWriter, Gate, NumberFormat, at_most, check_place, installed_versions
from fp8pipe.core.progress import track
from fp8pipe.models.checkpoint.sidecars import SERVED_FILES, copy_sidecars
from fp8pipe.numerics.kinds import granularity
from fp8pipe.report.card import CardFacts, commit_export

DATA_FILE: Final = "model.onnx.data"
SCALES_FILE: Final = "activation_scales.json"
# Tensors of more bytes in all are stored in a separate file, one after the other; inside of the graph's own file they
# would have to be in memory at once, and a protobuf message is limited to 2 GB.
_INLINE_BYTES: Final = 64 << 20
_WORKSPACE_MIB: Final = 4096  # workspace in the trtexec command, for a build on another machine
# Largest allowed share of a layer's input values beyond the range of its static scale.
_CLIPPED: Final = 1e-3
_CARD: Final = CardFacts(
    "tensorrt", "TensorRT", ENGINE_LIMITS,
    "Load an engine of `engines/`, or build one: `details.trtexec` in the manifest is the command.",
)  # fmt: skip


def export_language(source: Path, output: Path, options: LanguageExportOptions) -> Artifact:
    """Export an artifact with FP8 or NVFP4 codes to TensorRT.

    Args:
        source: directory of an artifact of kind `falqon`.
        output: directory of the export, which will contain `model.onnx`, `engines/`, `layers.json`, config and
            tokenizer files, a manifest with all gates and, for FP8, `activation_scales.json`.
        options: the options of the export.

    Raises:
        ConfigurationError: the output, the text or the model cannot be used.
        BadArtifactError: the source is unfinished, damaged, or of another kind.
        LintFindingsError: the values or the graph have findings, before an engine is built; nothing is committed.
        MissingCapabilityError: a package is not installed.
        GateFailedError: the written graph differs from the artifact, predicts worse, or runs in another precision;
            nothing is committed.
    """
    check_place(output, force=options.force)
    import_onnx_package("onnxruntime")
    model = open_in_format(source, options)
    check_attention(model)
    text = read_text(model.root, model.artifact, options.calibration_data, options.calibration_records)
    engines = options.capabilities(model.format) if options.builder is Builder.RTX else ()
    with track(4 + len(engines), "export") as progress:
        reference = Reference.of(model)
        counts = {} if model.packed else reference.count(text.calibration)
        scales = scales_by_layer(counts, options.calibration)
        progress.advance(1)
        own = reference.score(text.heldout)
        progress.advance(1)
        graph = traced_graph(model, {k: v.scale for k, v in scales.items()}, options.base, cache=options.cache)
        progress.advance(1)
        with ArtifactWriter(output, kind=KIND, stage="export", force=options.force) as writer:
            _write(writer.root, graph, model, scales)
            gates, served = _prove(writer.root, graph, reference, scales, text, own, options)
            progress.advance(1)
            del reference
            for warning in check_file(writer.root / MODEL_FILE, engines, str(source), require=options.require):
                writer.warn(warning)
            reports: dict[str, dict[str, Any]] = {}
            for capability in engines:
                gate, reports[capability] = _build(writer.root, model, graph.cache, options, capability)
                gates.append(gate)
                progress.advance(1)
            write_layers(writer.root, reports)
            fix = f"inspect {writer.root}; --no-require waives the requirements on perplexity and precision"
            writer.require_gates(gates, "the export does not meet its requirements", fix)
            scores = PerplexityFacts(
                own=own.perplexity, served=served.perplexity, error=served.error_against(own), tokens=own.tokens
            )
            return _commit(writer, model, options, graph, text, reports, scores)


def _write(root: Path, graph: DecoderGraph, model: LanguageModel, scales: Mapping[str, InputScale]) -> None:
    """Write all files of the export, except engines, to `root`."""
    beside = DATA_FILE if stored_bytes(graph.model) > _INLINE_BYTES else None
    ir.save(graph.model, root / MODEL_FILE, external_data=beside)
    if scales:
        shown = {name: scale.model_dump() for name, scale in scales.items()}
        (root / SCALES_FILE).write_text(json.dumps(shown, indent=1) + "\n", encoding="utf-8")
    shutil.copyfile(model.root / "config.json", root / "config.json")
    copy_sidecars(model.root, root, SERVED_FILES)


def _prove(
    root: Path, graph: DecoderGraph, reference: Reference, scales: Mapping[str, InputScale], text: ExportText,
    own: Score, options: LanguageExportOptions,
) -> tuple[list[Gate], Score]:  # fmt: skip
    """Compare the written graph with the artifact: its stored numbers, the outputs of its layers, what it predicts.

    Returns:
        The gates, and the graph's score on held-out text.
    """
    path = root / MODEL_FILE
    gates = number_gates(ir.load(path), reference.source, scales)
    if scales:
        clipped = max(scales.values(), key=lambda scale: scale.clipped)
        detail = f"share of the values seen in calibration, in the layer where it is largest; amax {clipped.amax:g}"
        gates.append(at_most("clipped activations", clipped.clipped, _CLIPPED, detail))
    check_structure(path)
    if graph.joints is None or reference.stream is None:
        proved, served = _prove_whole(path, graph, reference, text, own, options)
        return [*gates, *proved], served
    chain = Chain(ir.load(path), graph.joints, graph.cache)
    gates += layered_gates(path, chain, reference.stream, text.heldout[0], text.heldout, options.base)
    whole = whole_gate(path, chain, text.heldout, options.base)
    gate, served = perplexity_gate(chain, text.heldout, own, required=options.require)
    return [*gates, *([] if whole is None else [whole]), gate], served


def _prove_whole(
    path: Path, graph: DecoderGraph, reference: Reference, text: ExportText, own: Score, options: LanguageExportOptions
) -> tuple[list[Gate], Score]:
    """The gates on layers and predictions for a graph that was traced as a whole, which is run as a whole.

    Returns:
        Gates on layers, perplexity and, with a cache, on decoding token by token; and its score on held-out text.
    """
    written = ir.load(path)
    gates, _ = layer_gates(read_layers(written), written, reference.whole(), text.heldout[0])
    session = decoder_session(path, graph.cache, options.base)
    gate, served = perplexity_gate(session, text.heldout, own, required=options.require)
    gates.append(gate)
    if graph.cache is not None:
        del session  # so that not two large graphs are in memory at once
        gates += cache_gates(unrounded_session(path, graph.cache, options.base), list(text.heldout))
    return gates, served


def _profiles(cache: CacheFacts | None, options: LanguageExportOptions) -> dict[str, Shapes]:
    """Minimum, typical and maximum shape of each input; the minimum length of the cache is 0."""
    past = (0, *options.sequence[1:]) if cache is not None else (0, 0, 0)
    rows = list(zip(options.batch, options.sequence, past, strict=True))
    found = dict.fromkeys(("input_ids", "position_ids"), shapes((batch, new) for batch, new, _ in rows))
    found["attention_mask"] = shapes((batch, new + cached) for batch, new, cached in rows)
    if cache is not None:
        shape = shapes((batch, cache.heads, cached, cache.size) for batch, _, cached in rows)
        found |= dict.fromkeys(cache_names(cache.layers), shape)
    return found


def _build(
    root: Path,
    model: LanguageModel,
    cache: CacheFacts | None,
    options: LanguageExportOptions,
    capability: str,
) -> tuple[Gate, dict[str, Any]]:
    """Build one engine.

    Returns:
        A gate that all linear layers are computed in FP8, or with weights in NVFP4 in the base dtype; and the engine's
        entry for layers.json.
    """
    file, nodes = engine_file(capability), [f"{name}{SUFFIXES[ProductKind.LINEAR]}" for name in model.weights]
    path = root / file
    path.parent.mkdir(exist_ok=True)
    started = time.monotonic()
    built = build_rtx(root / MODEL_FILE, path, [capability], _profiles(cache, options))
    report = read_precision(nodes, built.layers)
    entry = {
        "tensorrt_rtx": built.version,
        "build_s": round(time.monotonic() - started, 1),
        **describe_engine(root, file, report, built),
        "kernels": len({product.layer for product in report.products}),
        "fused_attentions": sum("mha" in layer.name for layer in built.layers),
    }
    precision = product_precision(model.format, options.base)
    wanted, name = dict.fromkeys(nodes, precision), f"linear products not in {precision} for {capability}"
    return precision_gate(report, wanted, name, required=options.require), entry


def _commit(
    writer: ArtifactWriter,
    model: LanguageModel,
    options: LanguageExportOptions,
    graph: DecoderGraph,
    text: ExportText,
    reports: dict[str, dict[str, Any]],
    perplexity: PerplexityFacts,
) -> Artifact:
    shown = ("engine", "engine_bytes", "build_s", "precisions", "kernels", "fused_attentions")
    layers = language_records(model, options.calibration)
    return commit_export(
        writer, _CARD, model.artifact, options, format=model.format.value, layers=layers,
        number_format=NumberFormat(
            name=model.format.kind.value,
            granularity="per-tensor" if model.per_tensor else granularity(model.format.kind),
        ),
        runtime={"engine": "tensorrt", "builder": options.builder.value, "opset": graph.model.graph.opset_imports[""]},
        versions=installed_versions(("onnx", "onnx-ir", "onnxscript", "onnxruntime", "tensorrt-rtx", "transformers")),
        details=TrtLanguageDetails(
            format=model.format.value,
            base=options.base.value,
            output=GraphOutput(name=LOGITS, what="logits"),
            trtexec=trtexec_command(MODEL_FILE, _profiles(graph.cache, options), workspace_mib=_WORKSPACE_MIB),
            cache=graph.cache,
            activations=next((layer.activation for layer in layers if layer.activation is not None), None),
            trained_activations=model.plan.source.trained_activations,
            calibration=text.facts,
            passes={change.name: len(change.changed) for change in graph.changes},
            engines={c: BuiltEngine.model_validate({k: e[k] for k in shown}) for c, e in reports.items()},
            perplexity=perplexity,
            traced=graph.traced,
        ),
    )  # fmt: skip
