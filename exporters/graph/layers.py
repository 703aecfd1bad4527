"""Reads the quantized layers back from an exported graph.

Every comparison after an export starts from what is read here. It relies only on the file and the names of its nodes,
and finds the codes and scales that each layer multiplies, the quantizer of its input, and the value that is its result.

An NVFP4 operand has two DequantizeLinear nodes, the first for its block scales. A weight consists of FLOAT4E2M1 codes,
FLOAT8E4M3FN block scales and a tensor scale, all stored; for an activation, TRT_FP4DynamicQuantize (domain `trt`)
computes codes and block scales from the value and the tensor scale.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor

from exporters.graph.trace import SUFFIXES, ProductKind
from fp8pipe.core.errors import BadArtifactError
from fp8pipe.numerics.grids import E4M3
from fp8pipe.numerics.kinds import Kind
from fp8pipe.numerics.nvfp4 import BLOCK, BlockCodes, BlockQuantizer, BlockScales
from fp8pipe.numerics.quantizers import INT8_MAX, INT8_MIN, ActivationQuantizer

if TYPE_CHECKING:
    import onnx_ir as ir

_BLOCKED = 2  # number of axes of a block-wise scale tensor


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """A weight as stored, in torch's layout."""

    codes: Tensor  # int8 or float8_e4m3fn, output channels first
    scale: Tensor  # `(out,)` fp32
    dtype: str  # type in the file, for example "INT4"

    def dequantize(self) -> Tensor:
        """The weight `codes * scale` in float64, which is exact."""
        scale = self.scale.double().view(-1, *(1,) * (self.codes.dim() - 1))
        return self.codes.float().double() * scale


@dataclass(frozen=True, slots=True)
class Operand:
    """One operand of a matrix multiplication."""

    source: ir.Value | None = None  # the float value before the quantizer; None for a stored weight
    quantizer: ActivationQuantizer | BlockQuantizer | None = None  # None if the operand stays float
    codes: ir.Value | None = None  # the output of the quantizing node; None if there is none
    weight: StoredWeight | BlockCodes | None = None  # the stored weight; None for an activation
    exact_limits: bool = True  # whether Clip's bounds exactly equal the values of the smallest and largest code

    @property
    def kinds(self) -> frozenset[Kind]:
        """The number type of the multiplied codes (INT, E4M3 or NVFP4) as a set of one; empty for a float operand."""
        if isinstance(self.weight, StoredWeight):
            return frozenset((Kind.INT if self.weight.codes.dtype == torch.int8 else Kind.E4M3,))
        coded = self.weight or self.quantizer
        return frozenset() if coded is None else frozenset((coded.kind,))


@dataclass(frozen=True, slots=True)
class ExportedLayer:
    """One matrix multiplication or convolution of the graph, with its operands, bias and result."""

    kind: ProductKind  # linear, patch, qk or av
    name: str  # the module's name
    node: ir.Node  # the MatMul or Conv node
    operands: tuple[Operand, Operand]  # activation, then weight or second activation
    bias: Tensor | None  # `(out,)` fp32, or None
    output: ir.Value  # the result including the bias; for qk the logits before the mask

    @property
    def label(self) -> str:
        """A short unique name."""
        return f"{self.name}.{self.kind}" if self.kind in (ProductKind.QK, ProductKind.AV) else self.name

    @property
    def integer(self) -> bool:
        """Whether an engine can multiply integers: both operands are integer codes and activations are quantized."""
        left, right = self.operands
        right_int = right.weight.codes.dtype == torch.int8 if right.weight else _is_int(right.quantizer)
        return _is_int(left.quantizer) and right_int and self.kind is not ProductKind.PATCH

    @property
    def blocks(self) -> bool:
        """Whether an operand is NVFP4."""
        return any(Kind.NVFP4 in operand.kinds for operand in self.operands)


def read_layers(
    model: ir.Model, names: Collection[str] | None = None, *, some: bool = True
) -> tuple[ExportedLayer, ...]:
    """The layers whose nodes were named by this project, in the graph's order; only those of `names`, unless None.

    Without `some`, there may be none.

    Raises:
        BadArtifactError: there are none, or a quantizer has a form that this project does not write.
    """
    layers = []
    for node in model.graph:
        kind = next((kind for kind, suffix in SUFFIXES.items() if (node.name or "").endswith(suffix)), None)
        if kind is not None and node.op_type in ("MatMul", "Conv"):
            name = str(node.name).removesuffix(SUFFIXES[kind])
            layers += [_read(node, kind, name)] if names is None or name in names else []
    if some and not layers:
        raise _bad("no MatMul or Conv is named after a layer")
    return tuple(layers)


def _read(node: ir.Node, kind: ProductKind, name: str) -> ExportedLayer:
    # Read one layer from its MatMul or Conv node; the Add of a linear's bias is recognized by its name.
    operands = (_operand(node.inputs[0], kind), _operand(node.inputs[1], kind))
    output, bias = node.outputs[0], None
    if kind is ProductKind.PATCH and len(node.inputs) > 2:
        bias = _stored(node.inputs[2])
    uses = _wide(output).uses()
    if kind is ProductKind.LINEAR and len(uses) == 1:
        ((add, index),) = uses
        if add.name == f"{name}/Add":
            bias, output = _stored(add.inputs[1 - index]), add.outputs[0]
    return ExportedLayer(kind, name, node, operands, None if bias is None else torch.from_numpy(bias), output)


def _operand(value: ir.Value | None, kind: ProductKind) -> Operand:
    # Read one operand by following its DequantizeLinear to stored codes, or to the quantizer of an activation.
    if value is None:
        raise _bad("a MatMul or Conv lacks an operand")
    dequantize = value.producer()
    if dequantize is None or dequantize.op_type != "DequantizeLinear":
        return Operand(source=value)
    codes, scale = dequantize.inputs[0], dequantize.inputs[1]
    assert codes is not None
    _refuse_zero_point(dequantize)
    if is_block_operand(dequantize):
        if codes.const_value is not None:
            return Operand(weight=read_block_weight(dequantize))
        value, blocks, codes = read_block_quantizer(dequantize)
        return Operand(source=value, quantizer=blocks, codes=codes)
    if codes.const_value is not None:
        return Operand(weight=_weight(dequantize, codes, scale, kind))
    quantize = codes.producer()
    if quantize is None or quantize.op_type != "QuantizeLinear" or not _equal(quantize.inputs[1], scale):
        raise _bad(f"{dequantize.name} does not follow a QuantizeLinear of the same scale")
    _refuse_zero_point(quantize)
    zero = quantize.inputs[2] if len(quantize.inputs) > 2 else None
    dtype = "UINT8" if zero is None or zero.dtype is None else zero.dtype.name  # ONNX's default
    if dtype not in ("INT8", "FLOAT8E4M3FN"):
        raise _bad(f"{quantize.name} has the output type {dtype}")
    source, low, high, exact = _clip(quantize.inputs[0], float(_array(scale)))
    if dtype == "INT8":
        quantizer = ActivationQuantizer(float(_array(scale)), low, high)
    else:  # FP8: a Clip is optional, but its bounds must be the values of the smallest and largest code
        clipped = source is not quantize.inputs[0]
        exact = exact and (not clipped or (low, high) == (-int(E4M3.max), int(E4M3.max)))
        quantizer = ActivationQuantizer(float(_array(scale)), kind=Kind.E4M3)
    return Operand(source=source, quantizer=quantizer, codes=codes, exact_limits=exact)


def _weight(dequantize: ir.Node, codes: ir.Value, scale: ir.Value | None, kind: ProductKind) -> StoredWeight:
    # Read a stored weight in torch's layout, with one scale per output channel.
    array = _array(codes)
    if codes.dtype is not None and codes.dtype.name == "FLOAT8E4M3FN":
        tensor = torch.from_numpy(np.ascontiguousarray(array).view(np.uint8)).view(torch.float8_e4m3fn)
    else:
        tensor = torch.from_numpy(np.ascontiguousarray(array).astype(np.int8))
    axis, scales = dequantize.attributes.get_int("axis", 1), _array(scale)
    if kind is ProductKind.LINEAR:
        tensor = tensor.T
    if dequantize.attributes.get_int("block_size", 0):  # the scale of a channel, repeated for each of its blocks
        if axis != 0 or kind is not ProductKind.LINEAR or scales.ndim != _BLOCKED or np.any(scales != scales[:1]):
            raise _bad(f"{dequantize.name} has blocks that are not of one scale per channel")
        axis, scales = 1, scales[0]
    if axis != (1 if kind is ProductKind.LINEAR else 0):
        raise _bad(f"{dequantize.name} scales along axis {axis}")
    assert codes.dtype is not None
    return StoredWeight(tensor, torch.from_numpy(scales), codes.dtype.name)


def _clip(value: ir.Value | None, scale: float) -> tuple[ir.Value, int, int, bool]:
    """Look through the Clip before a QuantizeLinear whose input is `value`; there may be none.

    Returns:
        The value before the Clip, the smallest and largest code, and whether the bounds are exactly the codes' values.
    """
    if value is None:
        raise _bad("a QuantizeLinear lacks its input")
    clip = value.producer()
    if clip is None or clip.op_type != "Clip" or not str(clip.name).endswith("/Clip"):
        return value, _lowest(value), INT8_MAX, True
    bounds = [float(_array(v)) if v is not None else None for v in (*clip.inputs[1:], None, None)][:2]
    codes = [None if b is None else round(b / scale) for b in bounds]
    exact = all(b is None or _is_bound(b, c, scale) for b, c in zip(bounds, codes, strict=True))
    source = clip.inputs[0]
    assert source is not None
    low = _lowest(source) if codes[0] is None else codes[0]
    return source, low, INT8_MAX if codes[1] is None else codes[1], exact


def _is_bound(bound: float, code: int | None, scale: float) -> bool:
    """Whether a Clip bound is exactly `code * scale`, in fp32 or rounded once to FP16."""
    exact = np.float32(0 if code is None else code) * np.float32(scale)
    return bool(np.float32(bound) in (exact, np.float32(np.float16(exact))))


def _lowest(value: ir.Value) -> int:
    """The smallest code of a quantizer without a lower Clip bound: that of INT8, or 0 after a Softmax."""
    producer = value.producer()
    if producer is not None and producer.op_type == "Cast" and producer.inputs[0] is not None:
        producer = producer.inputs[0].producer()
    return 0 if producer is not None and producer.op_type == "Softmax" else INT8_MIN


def _wide(output: ir.Value) -> ir.Value:
    """The output of a Cast (to float64, in the exact format) that is the only consumer of `output`; else `output`."""
    readers = [node for node, _ in output.uses()]
    return readers[0].outputs[0] if len(readers) == 1 and readers[0].op_type == "Cast" else output


def _refuse_zero_point(node: ir.Node) -> None:
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    if zero is not None and np.any(_array(zero).astype(np.float32)):
        raise _bad(f"{node.name} has a zero point other than 0")


def _equal(a: ir.Value | None, b: ir.Value | None) -> bool:
    """Whether two values are the same, or hold the same numbers: a scale may be stored in two types."""
    return a is b or np.array_equal(_array(a), _array(b))


def _array(value: ir.Value | None, node: ir.Node | None = None) -> Any:
    # A stored tensor as a numpy array; `node` is named in the error if the tensor is not stored.
    if value is None or value.const_value is None:
        what = "a scale, a bound or a code" if node is None else f"a scale or a code of {node.name}"
        raise _bad(f"{what} is not stored in the file")
    return np.array(value.const_value.numpy())


def _stored(value: ir.Value | None) -> Any:
    return None if value is None or value.const_value is None else np.array(value.const_value.numpy())


def _is_int(quantizer: ActivationQuantizer | BlockQuantizer | None) -> bool:
    return quantizer is not None and quantizer.kind is Kind.INT


def _bad(why: str) -> BadArtifactError:
    return BadArtifactError("the ONNX graph is not one that this project wrote", why=why, fix="export it again")


if TYPE_CHECKING:
    import onnx_ir as ir

DOMAIN: Final = "trt"
DYNAMIC_QUANTIZE: Final = "TRT_FP4DynamicQuantize"


def is_block_operand(dequantize: ir.Node) -> bool:
    """Whether a DequantizeLinear belongs to an NVFP4 operand: its codes are four-bit floats, stored or computed."""
    codes = dequantize.inputs[0]
    if codes is None:
        return False
    producer = codes.producer()
    made = producer is not None and producer.op_type == DYNAMIC_QUANTIZE
    return made or (codes.dtype is not None and codes.dtype.name == "FLOAT4E2M1")


def read_block_weight(dequantize: ir.Node) -> BlockCodes:
    """Read a stored NVFP4 weight, in torch's layout (out, in).

    Raises:
        BadArtifactError: it is not stored in blocks of 16 inputs with block scales and a tensor scale.
    """
    codes, inner = dequantize.inputs[0], _inner(dequantize)
    _check_form(dequantize, axis=0)
    array = _array(codes, dequantize)
    block, tensor = _array(inner.inputs[0], inner), _array(inner.inputs[1], inner)
    if array.dtype.name != "float4_e2m1fn" or block.dtype.name != "float8_e4m3fn" or tensor.size != 1:
        raise _bad(f"{dequantize.name} has {array.dtype} codes and {block.dtype} scales")
    if block.shape != (array.shape[0] // BLOCK, array.shape[1]):
        raise _bad(f"{dequantize.name} has block scales of shape {block.shape}")
    scales = torch.from_numpy(np.ascontiguousarray(block.T).view(np.uint8)).view(torch.float8_e4m3fn)
    try:
        found = BlockScales(scales, float(tensor))
    except ValueError as error:
        raise _bad(f"{dequantize.name}: {error}") from error
    return BlockCodes(torch.from_numpy(np.ascontiguousarray(array.T).view(np.uint8)), found)


def read_block_quantizer(dequantize: ir.Node) -> tuple[ir.Value, BlockQuantizer, ir.Value]:
    """Read a dynamically quantized NVFP4 activation: its float value, its quantizer, and its codes.

    Raises:
        BadArtifactError: it is not in blocks of 16 along the last axis, or its scales and codes are not the outputs of
            the same quantizing node.
    """
    codes, inner = dequantize.inputs[0], _inner(dequantize)
    _check_form(dequantize, axis=-1)
    dynamic = None if codes is None else codes.producer()
    scale = None if inner.inputs[0] is None else inner.inputs[0].producer()
    if codes is None or dynamic is None or dynamic is not scale or dynamic.inputs[1] is not inner.inputs[1]:
        raise _bad(f"{dequantize.name} does not follow one {DYNAMIC_QUANTIZE} of the same tensor scale")
    if inner.inputs[0] is not dynamic.outputs[1] or codes is not dynamic.outputs[0] or dynamic.domain != DOMAIN:
        raise _bad(f"{dequantize.name} reads codes and scales from the wrong outputs of {dynamic.name}")
    _check_form(dynamic, axis=-1)
    source = dynamic.inputs[0]
    if source is None:
        raise _bad(f"{dynamic.name} lacks its input")
    try:
        return source, BlockQuantizer(float(_array(dynamic.inputs[1], dynamic))), codes
    except ValueError as error:
        raise _bad(f"{dynamic.name}: {error}") from error


def _inner(dequantize: ir.Node) -> ir.Node:
    """The DequantizeLinear that produces the block scales."""
    scale = dequantize.inputs[1]
    inner = None if scale is None else scale.producer()
    if inner is None or inner.op_type != "DequantizeLinear":
        raise _bad(f"{dequantize.name} has no block scales of two levels")
    return inner


def _check_form(node: ir.Node, axis: int) -> None:
    # Refuse a node unless its blocks are of 16 numbers along this axis.
    attributes = node.attributes
    if attributes.get_int("block_size", 0) != BLOCK or attributes.get_int("axis", 1) != axis:
        raise _bad(f"{node.name} has no blocks of {BLOCK} along axis {axis}")
