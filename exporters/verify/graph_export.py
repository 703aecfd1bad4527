"""Checks for all exports that store the model as a graph: signature, layers, other files, and the graph exported anew.

A graph is determined by the artifact it was made from. So the graph of a vision export is made again from its parent
and compared with the file: inputs, operators, attributes, connections, and every stored number. This finds errors that
cannot be seen in the file alone and may not change the class of a few images: a factor applied twice, a wrong epsilon
or axis. Tracing depends on the versions of torch and onnxscript: if they differ from those in the manifest, differences
of structure are only noted, while differences of stored numbers are still findings.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from exporters.graph.formats import CLASSES_FILE, MODEL_FILE, GraphInput, GraphOutput
from exporters.graph.layers import ExportedLayer, read_layers
from exporters.graph.runtime import import_onnx_package, open_session
from exporters.verify.common import compare_details, compare_encodings, compare_json, compare_layers, lint_findings
from fp8pipe.artifact import MANIFEST_NAME, Artifact, LayerRecord, Manifest, installed_versions, read_manifest
from fp8pipe.artifact.finding import Check, Finding
from fp8pipe.artifact.kinds import Details
from fp8pipe.core.errors import BadArtifactError, one_line
from fp8pipe.models.vision.preprocessing import PREPROCESSING_FILE, Preprocessing, read_model_file
from fp8pipe.models.vision.quantized import QuantizedVit, activation_encoding, load_quantized
from fp8pipe.numerics.kinds import Kind
from fp8pipe.numerics.quantizers import weight_limits

if TYPE_CHECKING:
    import onnx_ir as ir

_TRACERS: Final = ("torch", "onnxscript", "onnx-ir", "timm")


@dataclass(frozen=True, slots=True)
class GraphChecks:
    """What an export target provides for checks of its graphs.

    Attributes:
        lint: runs the target's linter on the graph file.
        readable: whether layers can be read back one by one; False for graphs converted to FP16, where pixels stay
            float32 up to their quantizer.
        remake: makes the graph again from the parent's model and its name for messages; also returns the details.
        records: derives the layer records from the parent's model and the parent's records.
    """

    lint: Callable[[Path], Iterable[Finding]]
    readable: bool
    remake: Callable[[QuantizedVit, str], tuple[ir.Model, Details]]
    records: Callable[[QuantizedVit, Sequence[LayerRecord]], Sequence[LayerRecord]]


def check_vision_graph(
    artifact: Artifact, parent: Path | None, notes: list[str], checks: GraphChecks
) -> Iterator[Finding]:
    """Check an export that stores a vision model as a graph, against `parent` too if it is given."""
    model = yield from check_file(artifact, checks.lint, readable=checks.readable)
    if model is not None:
        yield from _descriptions(artifact, model)
    if model is not None and parent is not None:
        yield from _against(artifact, model, parent, notes, checks)


def check_file(
    artifact: Artifact, lint: Callable[[Path], Iterable[Finding]], *, readable: bool
) -> Generator[Finding, None, ir.Model | None]:
    """Check the graph's file by itself; returns the graph, or None if it cannot be read."""
    onnx_ir = import_onnx_package("onnx_ir")
    path = artifact.root / MODEL_FILE
    try:
        model: ir.Model = onnx_ir.load(path)
    except Exception as error:  # protobuf's errors share no public base class
        yield Finding(Check.REOPEN, MODEL_FILE, f"cannot be read as a graph: {error}"[:300])
        return None
    try:
        yield from lint_findings(lint(path))
        yield from _signature(artifact, model)
        yield from _layers(artifact, read_layers(model)) if readable else _products(artifact, model)
    except BadArtifactError as error:
        yield Finding(Check.REOPEN, MODEL_FILE, f"{error.what}: {error.why}")
        return None
    except (ValueError, TypeError, OSError, KeyError, RuntimeError) as error:
        yield Finding(Check.REOPEN, MODEL_FILE, f"cannot be read as a graph: {error}"[:300])
        return None
    yield from _runs(artifact, path, onnx_ir)
    return model


def _signature(artifact: Artifact, model: ir.Model) -> Iterator[Finding]:
    """Compare inputs, outputs and opset version with the manifest."""
    manifest = artifact.manifest
    opset, found = manifest.runtime.get("opset"), model.opset_imports.get("")
    if opset not in (None, found):
        yield Finding(Check.MANIFEST, MODEL_FILE, f"opset {found}; the manifest says {opset}")
    for what, values in (("input", model.graph.inputs), ("output", model.graph.outputs)):
        stated, named = getattr(manifest.details, what, None), {str(value.name): value for value in values}
        if isinstance(stated, GraphInput | GraphOutput) and stated.name not in named:
            why = f"its {what} is {', '.join(named)}; the manifest says {stated.name}"
            yield Finding(Check.MANIFEST, MODEL_FILE, why)
        elif isinstance(stated, GraphInput):
            value = named[stated.name]
            sizes = [size if isinstance(size, int) else str(size) for size in value.shape or ()]
            facts = {"name": stated.name, "shape": sizes, "type": str(value.dtype and value.dtype.numpy())}
            yield from compare_json(stated.model_dump(mode="json"), facts, MANIFEST_NAME, "details.input")
    asked, said = manifest.config.get("format"), getattr(manifest.details, "format", None)
    if asked not in (None, said):
        yield Finding(Check.MANIFEST, MANIFEST_NAME, f"details.format is {said}; the options say {asked}")


def _layers(artifact: Artifact, layers: tuple[ExportedLayer, ...]) -> Iterator[Finding]:
    """Compare stored weights with the manifest's layers: present, of the right shape, with codes within their bits."""
    stored = {layer.name: layer for layer in layers if layer.operands[1].weight is not None}
    for layer in layers:
        for operand in layer.operands:
            if not operand.exact_limits:
                yield Finding(Check.REOPEN, layer.label, "the bound of a Clip does not correspond to a code")
    stated = {record.name: record for record in artifact.manifest.layers}
    for name in sorted(stored.keys() - stated.keys()):
        yield Finding(Check.MANIFEST, name, "holds codes; the manifest does not list this layer")
    for name, record in stated.items():
        if record.converted and name not in stored:
            yield Finding(Check.MANIFEST, name, "the manifest says that it holds codes; the graph has none for it")
        elif name in stored and not record.converted:
            yield Finding(Check.MANIFEST, name, "holds codes; the manifest says that it stays float")
        elif name in stored:
            yield from _weight(name, stored[name].operands[1].weight, record)
            yield from _encodings(artifact.manifest, stored[name], record)


def _encodings(manifest: Manifest, layer: ExportedLayer, record: LayerRecord) -> Iterator[Finding]:
    """Compare codes and quantizers of the graph with the record; the graph does not show how scales were computed."""
    said, weight = record.activation, record.weight
    found = activation_encoding(layer.operands[0].quantizer, None if said is None else said.scale_rule)
    yield from compare_encodings(manifest, layer.name, "activation", said, found)
    if weight is not None:
        (kind,) = layer.operands[1].kinds
        bits = {Kind.E4M3: 8, Kind.NVFP4: 4}.get(kind, weight.bits)
        stored = weight.model_copy(update={"format": kind.value, "bits": bits, "dynamic": False})
        yield from compare_encodings(manifest, layer.name, "weight", weight, stored)


def _products(artifact: Artifact, model: ir.Model) -> Iterator[Finding]:
    """Check that manifest and graph have the same layers, and that the layers' codes are within their bit width."""
    found = {str(n.name).rpartition("/")[0] for n in model.graph if str(n.name).endswith(("/MatMul", "/Conv"))}
    stated = {layer.name for layer in artifact.manifest.layers}
    for name in sorted(found ^ stated):
        why = "the manifest does not list this layer" if name in found else "the graph has no node of this layer"
        yield Finding(Check.MANIFEST, name, why)
    for record in artifact.manifest.layers:
        if (value := model.graph.initializers.get(f"{record.name}.weight")) and value.const_value is not None:
            yield from _range(value.const_value.numpy(), record)


def _weight(name: str, weight: Any, record: LayerRecord) -> Iterator[Finding]:
    codes = weight.codes.flatten(1)
    if record.shape is not None and tuple(codes.shape) != record.shape:
        yield Finding(Check.MANIFEST, name, f"codes {tuple(codes.shape)}; the manifest says {record.shape}")
    yield from _range(codes, record)


def _range(codes: Any, record: LayerRecord) -> Iterator[Finding]:
    """Check integer codes, an array or a tensor, against the bit width in the manifest."""
    weight = record.weight
    if weight is None or weight.format != Kind.INT.value or weight.bits is None:
        return
    low, high = weight_limits(weight.bits)
    if outside := int(((codes < low) | (codes > high)).sum()):
        yield Finding(Check.REOPEN, record.name, f"{outside} codes are outside {low}..{high} ({weight.bits} bits)")


def _runs(artifact: Artifact, path: Path, onnx_ir: Any) -> Iterator[Finding]:
    """Check that ONNX's checker accepts the file and ONNX Runtime loads it (NVFP4 excepted, which has no kernels)."""
    import onnx

    try:
        onnx.checker.check_model(str(path))
    except Exception as error:  # its exceptions share no public base class
        yield Finding(Check.REOPEN, MODEL_FILE, f"ONNX's checker: {one_line(error)}")
    stated = artifact.manifest.number_format
    if stated is not None and stated.name == Kind.NVFP4:
        return
    try:
        open_session(path)
    except BadArtifactError as error:
        yield Finding(Check.REOPEN, MODEL_FILE, f"{error.what}: {error.why}")


def _descriptions(artifact: Artifact, model: ir.Model) -> Iterator[Finding]:
    """Compare preprocessing.json and classes.json with the manifest and the graph."""
    described = read_model_file(Preprocessing, artifact.root / PREPROCESSING_FILE)
    found, stated = described.model_dump(mode="json"), artifact.manifest.preprocessing
    yield from compare_json(found, stated, PREPROCESSING_FILE)
    side = [str(size) for size in model.graph.inputs[0].shape or ()][2:]
    if side != [str(size) for size in described.crop]:
        why = f"crop {described.crop}; the graph takes {' x '.join(side)} pixels"
        yield Finding(Check.REOPEN, PREPROCESSING_FILE, why)
    classes = artifact.root / CLASSES_FILE
    width = list(model.graph.outputs[0].shape or ())[-1:]
    if classes.is_file() and width:
        names = _read_json(classes)
        if str(len(names)) != str(width[0]) and str(width[0]).isdigit():
            yield Finding(Check.REOPEN, CLASSES_FILE, f"{len(names)} classes; the graph has {width[0]} outputs")


def _against(
    artifact: Artifact, model: ir.Model, parent: Path, notes: list[str], checks: GraphChecks
) -> Iterator[Finding]:
    """Make the graph and the files beside it again from the parent, and compare."""
    import onnx_ir as ir

    quantized, source = load_quantized(parent), read_manifest(parent)
    ours, theirs = artifact.root / PREPROCESSING_FILE, quantized.preprocessing.model_dump(mode="json")
    for found in compare_json(_read_json(ours), theirs, PREPROCESSING_FILE):
        yield Finding(Check.PARITY, found.where, found.why)
    wanted, classes = quantized.architecture.classes, artifact.root / CLASSES_FILE
    found_classes = _read_json(classes) if classes.is_file() else None
    if found_classes != (None if wanted is None else list(wanted)):
        yield Finding(Check.PARITY, CLASSES_FILE, _first_class(found_classes, wanted))
    yield from compare_layers(artifact.manifest, checks.records(quantized, source.layers))
    made, details = checks.remake(quantized, str(parent))
    expected = ir.from_proto(ir.to_proto(made))
    yield from compare_stored(model, expected)
    other = other_versions(artifact, _TRACERS)
    structure = [*compare_graphs(model, expected), *compare_details(artifact, details)]
    if other and structure:
        notes.append(
            f"operators differ in {len(structure)} places from a graph traced here, where "
            f"{other}; not judged, since tracing depends on it"
        )
    else:
        yield from structure


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadArtifactError(f"{path.name} is not JSON", why=str(error)) from error


def _first_class(found: Any, wanted: Any) -> str:
    if found is None or wanted is None:
        return "classes are missing" if found is None else "the parent has no classes"
    pairs = [(i, a, b) for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b]
    if not pairs:
        return f"{len(found)} classes; the parent has {len(wanted)}"
    index, a, b = pairs[0]
    return f"{len(pairs)} classes differ from the parent's; class {index} is {a!r}, expected {b!r}"


def other_versions(artifact: Artifact, names: Sequence[str]) -> str:
    """Versions of the packages used for tracing, if they differ from the manifest's; empty if they are the same."""
    here, then = installed_versions(names), artifact.manifest.versions
    return ", ".join(f"{n} is {here.get(n)}, not {then[n]}" for n in names if n in then and then[n] != here.get(n))


def compare_graphs(found: ir.Model, expected: ir.Model) -> Iterator[Finding]:
    """Compare the graph of a file with `expected`, a newly exported one, in everything except stored numbers."""
    for domain in sorted(found.opset_imports.keys() | expected.opset_imports.keys()):
        pair = found.opset_imports.get(domain), expected.opset_imports.get(domain)
        if pair[0] != pair[1]:
            yield _parity(f"opset {domain or 'ai.onnx'}", f"version {pair[0]}; expected {pair[1]}")
    for what, ours, theirs in (
        ("input", found.graph.inputs, expected.graph.inputs), ("output", found.graph.outputs, expected.graph.outputs),
    ):  # fmt: skip
        names = [[(str(v.name), str(v.dtype), str(v.shape)) for v in values] for values in (ours, theirs)]
        for mine, wanted in zip(*names, strict=False):
            if mine != wanted:
                yield _parity(f"graph {what} {wanted[0]}", f"it is {mine}; expected {wanted}")
        if len(names[0]) != len(names[1]):
            yield _parity(f"graph {what}s", f"{len(names[0])} of them; expected {len(names[1])}")
    yield from _compare_nodes(list(found.graph), list(expected.graph))


def _compare_nodes(found: list[ir.Node], expected: list[ir.Node]) -> Iterator[Finding]:
    """Compare the nodes of two graphs, matched by the name of their first output, which is unique."""
    ours, theirs = ({str(n.outputs[0].name): n for n in nodes} for nodes in (found, expected))
    for name in theirs:
        if name not in ours:
            yield _parity(_label(theirs[name]), f"this {theirs[name].op_type} is missing")
    for name, node in ours.items():
        other = theirs.get(name)
        if other is None:
            yield _parity(_label(node), f"no export has this {node.op_type}")
            continue
        for what, mine, wanted in (
            ("operator", (node.domain, node.op_type), (other.domain, other.op_type)),
            ("name", node.name or "", other.name or ""),
            ("inputs", _names(node.inputs), _names(other.inputs)),
            ("outputs", _names(node.outputs), _names(other.outputs)),
        ):
            if mine != wanted:
                yield _parity(_label(other), f"{what}: {mine}; expected {wanted}")
        for key in sorted(node.attributes.keys() | other.attributes.keys()):
            pair = tuple(_attribute(n.attributes.get(key)) for n in (node, other))
            if pair[0] != pair[1]:
                yield _parity(_label(other), f"attribute {key}: {pair[0]}; expected {pair[1]}")


def compare_stored(found: ir.Model, expected: ir.Model) -> Iterator[Finding]:
    """Compare every stored tensor, matched by name: type, shape and bytes."""
    ours, theirs = found.graph.initializers, expected.graph.initializers
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in ours:
            yield _parity(name, "this stored tensor is missing")
        elif name not in theirs:
            yield _parity(name, "no export stores such a tensor")
        else:
            yield from _compare_tensors(name, ours[name].const_value, theirs[name].const_value)


def _compare_tensors(name: str, found: Any, expected: Any) -> Iterator[Finding]:
    kinds = tuple((str(t.dtype), tuple(t.shape)) for t in (found, expected))
    if kinds[0] != kinds[1]:
        yield _parity(name, f"it is {kinds[0]}; expected {kinds[1]}")
        return
    mine, wanted = found.numpy(), expected.numpy()
    if mine.tobytes() != wanted.tobytes():
        width = mine.dtype.itemsize
        bits = [np.frombuffer(array.tobytes(), np.uint8).reshape(-1, width) for array in (mine, wanted)]
        differing = np.flatnonzero((bits[0] != bits[1]).any(1))
        first = int(differing[0])
        pair = tuple(str(array.reshape(-1)[first]) for array in (mine, wanted))
        why = f"{len(differing)} of {mine.size} elements differ; element {first} is {pair[0]}, expected {pair[1]}"
        yield _parity(name, why)


def _names(values: Any) -> list[str]:
    return ["" if value is None else str(value.name) for value in values]


def _attribute(attribute: Any) -> Any:
    if attribute is None:
        return None
    value = attribute.value
    if hasattr(value, "numpy"):
        return str(value.dtype), tuple(value.shape), value.numpy().tolist()
    return list(value) if isinstance(value, list | tuple) else value


def _label(node: ir.Node) -> str:
    return str(node.name or f"{node.op_type} -> {node.outputs[0].name}")


def _parity(where: str, why: str) -> Finding:
    return Finding(Check.PARITY, where, why if len(why) <= 400 else why[:397] + "...")
