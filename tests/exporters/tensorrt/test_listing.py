"""The builder's listing: its exact form, and products found again in it."""

from __future__ import annotations

import pytest

from exporters.tensorrt.listing import parse_listing, read_precision
from fp8pipe.core.errors import BadArtifactError

US = "\x1f"


def port(shape: str, dtype: str) -> str:
    return (
        f"{{ Name: x_myl0, Dimensions: [{shape}], Strides: [1,1], StrideOrder: [1,0], Datatype: {dtype}, "
        "Format: (Linear) Row major linear format }"
    )


def line(name: str, kind: str, inputs: list, constants: list, outputs: list, nodes: list) -> str:
    sections = [", ".join(port(*p) for p in ports) for ports in (inputs, constants, outputs)]
    shown = [f"[ {text}]" if text else "[]" for text in sections]
    metadata = US.join(f"[ONNX Layer: {node}]" for node in nodes)
    return (
        f"Name: {name}, LayerType: {kind}, Inputs: {shown[0]}, Constants: {shown[1]}, Outputs: {shown[2]}, "
        f"TacticName: __myelin_CASK_STUB, StreamId: 0, Metadata: {metadata}"
    )


GEMM = line(
    "a/MatMul_myl0_4", "gemm", [("-1,384", "Int8"), ("-1,384", "Half")], [("1", "Float"), ("384,1152", "Int8")],
    [("-1,1152", "Half")], ["a/MatMul", "a.input/DequantizeLinear"],
)  # fmt: skip
MHA = line(
    "_gemm_mha_v2_myl0_9", "kgen", [("-1,6,65,64", "FP8")] * 3, [("1", "Float")], [("-1,65,384", "FP8")],
    ["b/qk", "node_softmax", "b/av"],
)  # fmt: skip
FLOAT = line(
    "c/MatMul_myl0_11", "runtime_fusion", [("-1,96", "FP8"), ("1,96,288", "Half")], [], [("1,-1,288", "Half")],
    ["c/MatMul"],
)  # fmt: skip
EMPTY = line("shape_myl0_0", "shape_call", [], [], [], [])
OTHER = line("__myl_Move_myl0_3", "kgen", [("-1,64", "Int8")], [], [("-1,66", "Int8")], ["a/MatMul"])


def test_lines_become_layers():
    layers = parse_listing(["something else", "\n".join([EMPTY, GEMM]), MHA])
    assert [layer.kind for layer in layers] == ["shape_call", "gemm", "kgen"]
    gemm = layers[1]
    assert gemm.name == "a/MatMul_myl0_4"
    assert [(port.shape, port.dtype) for port in gemm.inputs] == [((-1, 384), "Int8"), ((-1, 384), "Half")]
    assert [(port.shape, port.dtype) for port in gemm.constants] == [((1,), "Float"), ((384, 1152), "Int8")]
    assert gemm.nodes == ("a/MatMul", "a.input/DequantizeLinear")
    assert layers[0].nodes == ()


def test_copies_of_shapes_are_read_though_they_have_no_constants():
    copied = (
        "Name: [ShapeHostToDeviceCopy 0], LayerType: ShapeHostToDevice, Inputs: [], Outputs: [ { Name: x, Location: "
        "Device, Dimensions: [], Datatype: Int64, Format: Format not available due to dynamic shapes }], "
        "ParameterType: ShapeH2D, shapeValues0: [-38], TacticValue: 0x0000000000000000, StreamId: 0, Metadata: "
    )
    layers = parse_listing([copied, GEMM])
    assert [layer.kind for layer in layers] == ["ShapeHostToDevice", "gemm"]
    assert (layers[0].constants, layers[0].outputs[0].dtype) == ((), "Int64")


def test_signals_between_streams_are_read_with_their_event():
    signal = (
        "Name: entry^signal^1_myl1_1, LayerType: signal, Inputs: [], Constants: [], Outputs: [], TacticName: , "
        "StreamId: 0, EventId: 151, Metadata: "
    )
    (layer,) = parse_listing([signal])
    assert (layer.kind, layer.inputs, layer.nodes) == ("signal", (), ())


def test_a_line_of_another_form_is_an_error_and_not_left_out():
    with pytest.raises(BadArtifactError, match="in an unknown form"):
        parse_listing([GEMM.replace("TacticName", "Tactic")])


def test_products_are_found_with_what_they_multiply():
    """A residual added in the same kernel, literals and copies are not operands."""
    nodes = ("a/MatMul", "b/qk", "b/av", "c/MatMul", "d/MatMul")
    report = read_precision(nodes, parse_listing([OTHER, GEMM, MHA, FLOAT]))
    assert [product.name for product in report.products] == ["int8", "fp8", "fp8", "fp8xfp16", "unknown"]
    assert [product.fused_attention for product in report.products] == [False, True, True, False, False]
    assert report.counts() == {"int8": 1, "fp8": 2, "fp8xfp16": 1, "unknown": 1}
    assert report.not_in(dict.fromkeys(nodes, "fp8")) == ("a/MatMul", "c/MatMul", "d/MatMul")
    assert report.other_layers == {"kgen": 1}
    assert report.products[0].output == "fp16"
