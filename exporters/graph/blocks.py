"""NVFP4 operands of a graph, read back from the graph itself: two DequantizeLinear, the first for the block scales.

weight:     codes FLOAT4E2M1, block scales FLOAT8E4M3FN, tensor scale; all stored
activation: TRT_FP4DynamicQuantize (domain `trt`) of the value and the tensor scale gives codes and block scales
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from fp8pipe.core.errors import BadArtifactError
from fp8pipe.numerics.nvfp4 import BLOCK, BlockCodes, BlockQuantizer, BlockScales

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["DOMAIN", "DYNAMIC_QUANTIZE", "is_block_operand", "read_block_quantizer", "read_block_weight"]

DOMAIN: Final = "trt"
DYNAMIC_QUANTIZE: Final = "TRT_FP4DynamicQuantize"


def is_block_operand(dequantize: ir.Node) -> bool:
    """Whether a DequantizeLinear ends an NVFP4 operand: its codes are four-bit floats."""
    codes = dequantize.inputs[0]
    if codes is None:
        return False
    producer = codes.producer()
    made = producer is not None and producer.op_type == DYNAMIC_QUANTIZE
    return made or (codes.dtype is not None and codes.dtype.name == "FLOAT4E2M1")


def read_block_weight(dequantize: ir.Node) -> BlockCodes:
    """A stored weight, in torch's layout (out, in).

    Raises:
        BadArtifactError: it is not in blocks of 16 inputs with two scales.
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
    """A dynamically quantized activation: what it is made from, its quantizer, its codes.

    Raises:
        BadArtifactError: it is not in blocks of 16 along the last axis, or its scales are not those of its codes.
    """
    codes, inner = dequantize.inputs[0], _inner(dequantize)
    _check_form(dequantize, axis=-1)
    dynamic = None if codes is None else codes.producer()
    scale = None if inner.inputs[0] is None else inner.inputs[0].producer()
    if codes is None or dynamic is None or dynamic is not scale or dynamic.inputs[1] is not inner.inputs[1]:
        raise _bad(f"{dequantize.name} does not follow one {DYNAMIC_QUANTIZE} of the same tensor scale")
    if inner.inputs[0] is not dynamic.outputs[1] or codes is not dynamic.outputs[0] or dynamic.domain != DOMAIN:
        raise _bad(f"{dequantize.name} takes codes for scales")
    _check_form(dynamic, axis=-1)
    source = dynamic.inputs[0]
    if source is None:
        raise _bad(f"{dynamic.name} lacks its input")
    try:
        return source, BlockQuantizer(float(_array(dynamic.inputs[1], dynamic))), codes
    except ValueError as error:
        raise _bad(f"{dynamic.name}: {error}") from error


def _inner(dequantize: ir.Node) -> ir.Node:
    """The DequantizeLinear that makes the block scales."""
    scale = dequantize.inputs[1]
    inner = None if scale is None else scale.producer()
    if inner is None or inner.op_type != "DequantizeLinear":
        raise _bad(f"{dequantize.name} has no block scales of two levels")
    return inner


def _check_form(node: ir.Node, axis: int) -> None:
    attributes = node.attributes
    if attributes.get_int("block_size", 0) != BLOCK or attributes.get_int("axis", 1) != axis:
        raise _bad(f"{node.name} has no blocks of {BLOCK} along axis {axis}")


def _array(value: ir.Value | None, node: ir.Node) -> Any:
    if value is None or value.const_value is None:
        raise _bad(f"a scale or a code of {node.name} is not stored in the file")
    return np.array(value.const_value.numpy())


def _bad(why: str) -> BadArtifactError:
    return BadArtifactError("the ONNX graph is not one that this project wrote", why=why, fix="export it again")
