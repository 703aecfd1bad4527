"""Traces the float graph of a vision transformer, and maps its matrix multiplications to layers.

`torch.onnx.export` traces the prepared model while every attention uses the plain formula (the scale is applied to the
queries before the multiplication), so the graph has two matrix multiplications per attention and one per linear. The
exporter records for every node the modules it came from; with that, and by comparing the weights themselves, each
matrix multiplication is assigned to its layer. A matrix multiplication without a layer, or a layer without a matrix
multiplication, is an error.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from itertools import cycle
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from exporters.graph.runtime import import_onnx_package
from fp8pipe.core.errors import ConfigurationError, one_line
from fp8pipe.models.vision.attention import explicit_attention, intercept_attention
from fp8pipe.models.vision.prepare import vision_outputs
from fp8pipe.models.vision.structure import VitStructure

if TYPE_CHECKING:
    import onnx_ir as ir

INPUT_NAME: Final = "pixels"
OUTPUT_NAME: Final = "logits"
# 21 adds INT4, FP8 scales of every float type, and blocked scales; later ones add nothing that is used here.
OPSET: Final = 21
_SCOPES: Final = "pkg.torch.onnx.name_scopes"
_PRODUCTS: Final = frozenset(("MatMul", "Gemm", "Conv", "Einsum"))


class ProductKind(StrEnum):
    """What a matrix multiplication or convolution multiplies."""

    LINEAR = "linear"
    PATCH = "patch"
    QK = "qk"
    AV = "av"


# The node of a matrix multiplication is named after its module, followed by this suffix.
SUFFIXES: Final = {
    ProductKind.LINEAR: "/MatMul", ProductKind.PATCH: "/Conv", ProductKind.QK: "/qk", ProductKind.AV: "/av",
}  # fmt: skip


@dataclass(slots=True)
class Product:
    """A matrix multiplication or convolution of the graph; a pass that replaces its node also updates this record."""

    kind: ProductKind  # a linear, the patch embedding, or one of an attention's two matrix multiplications
    name: str  # the name of the module
    node: ir.Node  # the MatMul, Gemm or Conv


@dataclass(frozen=True, slots=True)
class FloatGraph:
    """A float graph and its matrix multiplications."""

    model: ir.Model  # opset 21; input `pixels` (batch, 3, H, W) float32, output `logits` (batch, C) float32
    products: tuple[Product, ...]  # in the order of the structure: linears, then attentions (qk, av)

    def in_graph_order(self) -> list[Product]:
        """The products in the order of the nodes, so that a node inserted for several products precedes the first."""
        order = {node: index for index, node in enumerate(self.model.graph)}
        return sorted(self.products, key=lambda product: order[product.node])


class _Exported(nn.Module):
    """The model as a function from pixels to one tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.eval()

    def forward(self, pixels: Tensor) -> Tensor:
        return vision_outputs(self.model, pixels)


def trace_float(model: nn.Module, structure: VitStructure) -> FloatGraph:
    """Trace a prepared model in its float type, with a dynamic batch. The model is not changed.

    Raises:
        ConfigurationError: the model cannot be traced, or a matrix multiplication cannot be assigned to a layer.
        MissingCapabilityError: onnx, onnx-ir or onnxscript is not installed.
    """
    # Two images, because a batch of one would be treated as a constant.
    example = torch.zeros(2, 3, *structure.image_size, dtype=next(model.parameters()).dtype)
    explicit = intercept_attention(model, structure.attention_names, lambda name, *given: explicit_attention(*given))
    with explicit, _folded(model, structure.constants, example):
        graph_model = export_program(
            _Exported(model), (example,), ({0: torch.export.Dim("batch")},), type(model).__name__,
            "use a plain vision transformer, or a version of its library that traces",
            input_names=[INPUT_NAME], output_names=[OUTPUT_NAME],
        )  # fmt: skip
    return FloatGraph(graph_model, tuple(_assign(graph_model, model, structure)))


@contextmanager
def _folded(model: nn.Module, names: Collection[str], pixels: Tensor) -> Iterator[None]:
    """Within this context, the named linears return outputs recorded beforehand, which a trace takes as constants.

    Only for linears whose outputs do not depend on the pixels.
    """
    found: dict[nn.Module, list[Tensor]] = {model.get_submodule(name): [] for name in names}
    with ExitStack() as hooks:
        for layer, outputs in found.items():
            hooks.enter_context(layer.register_forward_hook(lambda *given, outputs=outputs: outputs.append(given[2])))
        if found:
            with torch.no_grad():
                vision_outputs(model, pixels)
    for layer, outputs in found.items():
        layer.forward = _replayed(outputs)
    try:
        yield
    finally:
        for layer in found:
            del layer.forward


def _replayed(outputs: list[Tensor]) -> Callable[[Tensor], Tensor]:
    # A forward function that ignores its input and returns the recorded outputs one after the other, repeatedly.
    again = cycle(outputs)
    return lambda x: next(again)


def export_program(
    module: nn.Module,
    arguments: tuple[Any, ...],
    dynamic: tuple[Any, ...],
    name: str,
    fix: str,
    *,
    input_names: list[str] | None = None,
    output_names: list[str] | None = None,
) -> ir.Model:
    """Export a module with `torch.onnx.export`, opset 21.

    `arguments` are an example of the module's inputs, and `dynamic` lists their dynamic dimensions (`dynamic_shapes` of
    `torch.onnx.export`). `name` and `fix` appear in error messages. The exporter chooses names for inputs and outputs
    that are None.

    Raises:
        ConfigurationError: it cannot be traced.
        MissingCapabilityError: onnx, onnx-ir or onnxscript is not installed.
    """
    for package in ("onnx", "onnx_ir", "onnxscript"):
        import_onnx_package(package)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter warns about its own use of deprecated functions
            program: Any = torch.onnx.export(
                module, arguments, dynamo=True, opset_version=OPSET, verbose=False, dynamic_shapes=dynamic,
                input_names=input_names, output_names=output_names,
            )  # fmt: skip
    except torch.onnx.OnnxExporterError as error:
        raise ConfigurationError(
            f"{name} cannot be traced into an ONNX graph",
            why=one_line(error.__cause__ or error, 600),
            fix=fix,
        ) from error
    graph: ir.Model = program.model
    return graph


def _assign(graph_model: ir.Model, model: nn.Module, structure: VitStructure) -> Iterable[Product]:
    # Assign every matrix multiplication and convolution of the graph to its layer, or raise a ConfigurationError if one
    # of them belongs to no layer, or a layer lacks one.
    by_module: dict[str, list[ir.Node]] = defaultdict(list)
    known = {*structure.linear_names, *structure.attention_names}
    stray = []
    for node in graph_model.graph:
        if node.op_type in _PRODUCTS:
            found = owner(node, known)
            by_module[found].append(node)
            stray += [] if found else [node.name]
    if stray:
        raise _unassigned(model, f"{', '.join(map(str, stray))} belong to no known layer")
    for site in structure.linears:
        (node,) = _exactly(1, site.name, [n for n in by_module[site.name] if _constant(n)], model)
        weight = model.get_submodule(site.name).get_parameter("weight")
        if not holds_weight(node, weight):
            raise _unassigned(model, f"{node.name} does not multiply by the weight of {site.name}")
        yield Product(ProductKind(site.kind), site.name, node)
    for attention in structure.attentions:
        nodes = [n for n in by_module[attention.name] if not _constant(n)]
        qk, av = _exactly(2, attention.name, nodes, model)
        if not _feeds(qk, av):
            raise _unassigned(
                model,
                f"the second matmul of {attention.name} does not read the result of the first, as in an attention",
            )
        yield Product(ProductKind.QK, attention.name, qk)
        yield Product(ProductKind.AV, attention.name, av)
    assigned = len(structure.linears) + 2 * len(structure.attentions)
    if assigned != sum(map(len, by_module.values())):
        raise _unassigned(model, f"the graph has {sum(map(len, by_module.values()))} matmuls, the structure {assigned}")


def owner(node: ir.Node, known: set[str]) -> str:
    """The innermost module of `known` in which the node was traced; empty if there is none."""
    import ast

    scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    # "model." is the attribute of `_Exported` that holds the model.
    names = [str(scope).removeprefix("model.") for scope in scopes]
    return next((name for name in reversed(names) if name in known), "")


def _constant(node: ir.Node) -> bool:
    """Whether the second operand is a stored tensor, that is, a weight."""
    operand = node.inputs[1]
    return operand is not None and operand.const_value is not None


def holds_weight(node: ir.Node, weight: Tensor) -> bool:
    """Whether a node's stored operand equals this weight, bit for bit, in the layout that its operator needs."""
    stored = torch.from_numpy(stored_array(node.inputs[1]).copy())
    transposed = node.op_type == "MatMul" or (not node.attributes.get_int("transB", 0) and node.op_type == "Gemm")
    return torch.equal(stored, weight.detach().T if transposed else weight.detach())


def stored_bytes(model: ir.Model) -> int:
    """Bytes of all stored tensors of a graph; two INT4 or FP4 codes per byte."""
    tensors = (value.const_value for value in model.graph.initializers.values())
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def stored_array(value: ir.Value | None) -> Any:
    """A stored tensor, which must exist, as a numpy array."""
    tensor = None if value is None else value.const_value
    assert tensor is not None
    return tensor.numpy()


def _feeds(first: ir.Node, second: ir.Node) -> bool:
    """Whether `first` is upstream of the first operand of `second`."""
    seen: set[int] = set()
    waiting = [second.inputs[0]]
    while waiting:
        value = waiting.pop()
        producer = None if value is None else value.producer()
        if producer is first:
            return True
        if producer is not None and id(producer) not in seen:
            seen.add(id(producer))
            waiting += producer.inputs
    return False


def _exactly(count: int, name: str, nodes: list[ir.Node], model: nn.Module) -> list[ir.Node]:
    # Return the nodes of a module if there are `count` of them; raise otherwise.
    if len(nodes) != count:
        raise _unassigned(model, f"{name} has {len(nodes)} matmul(s) in the graph, expected {count}")
    return nodes


def _unassigned(model: nn.Module, why: str) -> ConfigurationError:
    return ConfigurationError(
        f"the traced graph of {type(model).__name__} does not match its structure",
        why=why,
        fix="use versions of torch, onnxscript and the model's library that this project was tested with",
    )
