"""Checks on quantized vision transformers and on graphs: those for ONNX Runtime, and those for TensorRT.

The graph of a vision export is made again from its parent and compared with the file, operator by operator and number
by number. Tracing depends on versions of torch and onnxscript: where they are others than the manifest names,
differences of structure are only noted, and those of stored numbers are findings still.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from exporters.graph.description import CLASSES_FILE
from exporters.graph.formats import OnnxFormat
from exporters.graph.layers import ExportedLayer, read_layers
from exporters.graph.lint import lint_model
from exporters.graph.packages import import_onnx_package
from exporters.graph.produce import quantize_graph
from exporters.graph.runtime import open_session
from exporters.onnx.export import MODEL_FILE
from exporters.onnx.options import OnnxExportOptions
from exporters.tensorrt.formats import in_format
from exporters.tensorrt.graph import typed_graph
from exporters.tensorrt.half import halve
from exporters.tensorrt.lint import lint_file
from exporters.tensorrt.options import Base, TrtFormat
from exporters.tensorrt.verify_engines import check_engines
from exporters.verify.common import compare_json, compare_layers, lint_discrepancies
from exporters.verify.graphs import compare_graphs, compare_stored
from fp8pipe.artifact import Artifact, LayerRecord, installed_versions
from fp8pipe.artifact.discrepancy import Catcher, Discrepancy
from fp8pipe.core.errors import BadArtifactError
from fp8pipe.models.vision.preprocessing import PREPROCESSING_FILE, Preprocessing, read_model_file
from fp8pipe.models.vision.quantized import QuantizedVit, load_quantized
from fp8pipe.numerics.kinds import Kind, granularity

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["check_graph_export", "check_vit"]

# Rules of the linter that speak of any runtime; the others are about TensorRT's builder.
_ANY_RUNTIME: Final = ("scale-value", "scale-infinite", "nan-code", "scale-shape", "block-size", "codes-undecoded")
_TRACERS: Final = ("torch", "onnxscript", "onnx-ir", "timm")


def check_vit(artifact: Artifact, parent: Path | None, notes: list[str]) -> Iterator[Discrepancy]:
    """An artifact of `quantize-vit`."""
    quantized = load_quantized(artifact.root)
    yield from lint_discrepancies(lint_model(quantized, OnnxFormat.QDQ, runtime=False))
    manifest = artifact.manifest
    if manifest.preprocessing is not None:
        yield from compare_json(
            quantized.preprocessing.model_dump(mode="json"), manifest.preprocessing, PREPROCESSING_FILE
        )
    if manifest.layers:
        yield from compare_layers(manifest.layers, _records(quantized))
    kinds = {weight.kind for weight in quantized.weights.values()}
    kind = next((kind for kind in (Kind.NVFP4, Kind.E4M3) if kind in kinds), Kind.INT)
    stated = manifest.number_format
    if stated is not None and stated.granularity != granularity(kind):
        why = f"the manifest says {stated.granularity}; the files hold {kind} codes, {granularity(kind)}"
        yield Discrepancy(Catcher.MANIFEST, "number_format", why)


def _records(quantized: QuantizedVit) -> list[LayerRecord]:
    sites = quantized.structure.linears
    return [LayerRecord(name=s.name, converted=s.name in quantized.weights, shape=s.shape) for s in sites]


def check_graph_export(artifact: Artifact, parent: Path | None, notes: list[str]) -> Iterator[Discrepancy]:
    """An export whose net is `model.onnx`: of a vision model, or the decoder of a language model."""
    onnx_ir = import_onnx_package("onnx_ir")
    path = artifact.root / MODEL_FILE
    language = "cache" in artifact.manifest.extra
    try:
        model = onnx_ir.load(path)
        yield from _values(artifact, path)
        yield from _signature(artifact, model)
        if language or artifact.manifest.extra.get("base") != Base.FP16:
            layers = read_layers(model)
            yield from _layers(artifact, layers)
        else:  # a halved graph cannot be read back layer by layer: its pixels stay float32 up to their codes
            layers = ()
            yield from _products(artifact, model)
    except BadArtifactError as error:
        yield Discrepancy(Catcher.REOPEN, MODEL_FILE, f"{error.what}: {error.why}")
        return
    except (ValueError, TypeError, OSError, KeyError, RuntimeError) as error:
        yield Discrepancy(Catcher.REOPEN, MODEL_FILE, f"cannot be read as a graph: {error}"[:300])
        return
    yield from _runs(artifact, path, onnx_ir)
    if artifact.kind == "trt-export":
        yield from check_engines(artifact)
    if language:
        from exporters.tensorrt.language.verify import compare_decoder

        yield from () if parent is None else compare_decoder(artifact, model, layers, parent, notes)
        return
    yield from _descriptions(artifact, model)
    if parent is not None:
        yield from _against(artifact, model, parent, notes)


def _values(artifact: Artifact, path: Path) -> Iterator[Discrepancy]:
    """The linter: all of its errors for TensorRT, those that any runtime minds for ONNX Runtime."""
    trt = artifact.kind == "trt-export"
    capabilities = tuple(artifact.manifest.extra.get("engines") or ()) if trt else ()
    report = lint_file(path, capabilities)
    require = bool(artifact.manifest.config.get("require", True))
    errors = report.errors(require=require) if trt else [f for f in report.findings if f.rule in _ANY_RUNTIME]
    yield from lint_discrepancies(errors)


def _signature(artifact: Artifact, model: ir.Model) -> Iterator[Discrepancy]:
    """Inputs, outputs and operators' version, as the manifest says."""
    manifest, extra = artifact.manifest, artifact.manifest.extra
    opset = manifest.runtime.get("opset")
    if opset is not None and model.opset_imports.get("") != opset:
        why = f"opset {model.opset_imports.get('')}; the manifest says {opset}"
        yield Discrepancy(Catcher.MANIFEST, MODEL_FILE, why)
    for what, values in (("input", model.graph.inputs), ("output", model.graph.outputs)):
        stated = extra.get(what)
        names = [str(value.name) for value in values]
        if isinstance(stated, dict) and stated["name"] not in names:
            yield Discrepancy(Catcher.MANIFEST, MODEL_FILE, f"its {what} is {', '.join(names)}; the manifest says "
                              f"{stated['name']}")  # fmt: skip


def _layers(artifact: Artifact, layers: tuple[ExportedLayer, ...]) -> Iterator[Discrepancy]:
    """Stored weights against the manifest's layers: there, of that shape, of codes within their bits."""
    stored = {layer.name: layer for layer in layers if layer.operands[1].weight is not None}
    for layer in layers:
        for operand in layer.operands:
            if not operand.exact_limits:
                yield Discrepancy(Catcher.REOPEN, layer.label, "a Clip's bound is not the value of a code")
    stated = {record.name: record for record in artifact.manifest.layers}
    for name in sorted(stored.keys() - stated.keys()):
        yield Discrepancy(Catcher.MANIFEST, name, "holds codes; the manifest does not list this layer")
    for name, record in stated.items():
        if record.converted and name not in stored:
            yield Discrepancy(Catcher.MANIFEST, name, "the manifest says it holds codes; the graph has none for it")
        elif name in stored and not record.converted:
            yield Discrepancy(Catcher.MANIFEST, name, "holds codes; the manifest says it is left float")
        elif name in stored:
            yield from _weight(name, stored[name].operands[1].weight, record)


def _products(artifact: Artifact, model: ir.Model) -> Iterator[Discrepancy]:
    """Every layer of the manifest has its product, and no product belongs to a layer that the manifest lacks."""
    suffixes = ("/MatMul", "/Conv")
    found = {str(n.name).removesuffix(s) for n in model.graph for s in suffixes if str(n.name).endswith(s)}
    stated = {layer.name for layer in artifact.manifest.layers}
    for name in sorted(found ^ stated):
        why = "the manifest does not list this layer" if name in found else "the graph has no product of this layer"
        yield Discrepancy(Catcher.MANIFEST, name, why)


def _weight(name: str, weight: Any, record: LayerRecord) -> Iterator[Discrepancy]:
    codes = weight.codes.flatten(1)
    if record.shape is not None and tuple(codes.shape) != record.shape:
        yield Discrepancy(Catcher.MANIFEST, name, f"codes {tuple(codes.shape)}; the manifest says {record.shape}")
    bits, _, kind = record.reason.partition("-bit ")
    if kind == Kind.INT and bits.isdigit():
        half = 2 ** (int(bits) - 1)
        outside = int(((codes < max(-half, -127)) | (codes > half - 1)).sum())
        if outside:
            why = f"{outside} codes are outside {max(-half, -127)}..{half - 1} ({bits} bits)"
            yield Discrepancy(Catcher.REOPEN, name, why)


def _runs(artifact: Artifact, path: Path, onnx_ir: Any) -> Iterator[Discrepancy]:
    """ONNX's checker takes the file, and ONNX Runtime loads it; it has no kernels for four-bit floats."""
    import onnx

    try:
        onnx.checker.check_model(str(path))
    except Exception as error:  # its exceptions share no public base
        yield Discrepancy(Catcher.REOPEN, MODEL_FILE, f"ONNX's checker: {' '.join(str(error).split())[:300]}")
    stated = artifact.manifest.number_format
    if stated is not None and stated.name == Kind.NVFP4:
        return
    try:
        open_session(path)
    except BadArtifactError as error:
        yield Discrepancy(Catcher.REOPEN, MODEL_FILE, f"{error.what}: {error.why}")


def _descriptions(artifact: Artifact, model: ir.Model) -> Iterator[Discrepancy]:
    """preprocessing.json and classes.json, against the manifest and the graph."""
    described = read_model_file(Preprocessing, artifact.root / PREPROCESSING_FILE)
    found, stated = described.model_dump(mode="json"), artifact.manifest.preprocessing
    yield from compare_json(found, stated, PREPROCESSING_FILE)
    side = [str(size) for size in model.graph.inputs[0].shape or ()][2:]
    if side != [str(size) for size in described.crop]:
        why = f"crop {described.crop}; the graph takes {' x '.join(side)} pixels"
        yield Discrepancy(Catcher.REOPEN, PREPROCESSING_FILE, why)
    classes = artifact.root / CLASSES_FILE
    width = list(model.graph.outputs[0].shape or ())[-1:]
    if classes.is_file() and width:
        names = json.loads(classes.read_text(encoding="utf-8"))
        if str(len(names)) != str(width[0]) and str(width[0]).isdigit():
            yield Discrepancy(Catcher.REOPEN, CLASSES_FILE, f"{len(names)} classes; the graph gives {width[0]} numbers")


def _against(artifact: Artifact, model: ir.Model, parent: Path, notes: list[str]) -> Iterator[Discrepancy]:
    """Everything again from the parent: the graph, and the files beside it."""
    quantized = load_quantized(parent)
    ours, theirs = artifact.root / PREPROCESSING_FILE, quantized.preprocessing.model_dump(mode="json")
    for found in compare_json(json.loads(ours.read_text(encoding="utf-8")), theirs, PREPROCESSING_FILE):
        yield Discrepancy(Catcher.PARITY, found.where, found.why)
    wanted, classes = quantized.architecture.classes, artifact.root / CLASSES_FILE
    found_classes = json.loads(classes.read_text(encoding="utf-8")) if classes.is_file() else None
    if found_classes != (None if wanted is None else list(wanted)):
        yield Discrepancy(Catcher.PARITY, CLASSES_FILE, _first_class(found_classes, wanted))
    yield from compare_layers(artifact.manifest.layers, _records(quantized))
    expected = _made_again(artifact, quantized, str(parent))
    yield from compare_stored(model, expected)
    other = _other_versions(artifact)
    structure = list(compare_graphs(model, expected))
    if other and structure:
        notes.append(
            f"operators differ in {len(structure)} places from a graph made here, where "
            f"{other}; not judged, since tracing depends on it"
        )
    else:
        yield from structure


def _first_class(found: Any, wanted: Any) -> str:
    if found is None or wanted is None:
        return "classes are missing" if found is None else "the parent has no classes"
    pairs = [(i, a, b) for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b]
    if not pairs:
        return f"{len(found)} classes; the parent has {len(wanted)}"
    index, a, b = pairs[0]
    return f"{len(pairs)} classes differ from the parent's; class {index} is {a!r}, expected {b!r}"


def _made_again(artifact: Artifact, quantized: QuantizedVit, source: str) -> ir.Model:
    """The graph as an export of today makes it, through its serialized form, as a file has it."""
    import onnx_ir as ir

    manifest = artifact.manifest
    if artifact.kind == "onnx-export":
        graph = quantize_graph(quantized, OnnxExportOptions.model_validate(manifest.config).format, source).model
    else:
        format = TrtFormat(manifest.extra["format"])
        graph = typed_graph(in_format(quantized, format), format, source).model
        if Base(manifest.extra["base"]) is Base.FP16:
            halve(graph)
    return ir.from_proto(ir.to_proto(graph))


def _other_versions(artifact: Artifact) -> str:
    """Versions of what traces, where they are others than the manifest's; empty where they are the same."""
    here, then = installed_versions(_TRACERS), artifact.manifest.versions
    return ", ".join(f"{n} is {here.get(n)}, not {then[n]}" for n in _TRACERS if n in then and then[n] != here.get(n))
