"""The least ONNX Runtime follows from what a graph holds."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from exporters.onnx.needs import least_onnxruntime, needs


def graph(kind: int, opset: int = 21, version: int = 10, domain: str = "") -> ir.Model:
    stored = helper.make_tensor("w", kind, [4], [0, 1, 0, 1])
    node = helper.make_node("Identity", ["w"], ["y"])
    made = helper.make_graph([node], "g", [], [helper.make_tensor_value_info("y", kind, [4])], initializer=[stored])
    opsets = [helper.make_opsetid("", opset), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return ir.from_proto(helper.make_model(made, opset_imports=opsets, ir_version=version))


@pytest.mark.parametrize(
    ("model", "least", "why"),
    [
        (graph(TensorProto.INT8), "1.18", {"opset 21", "IR 10"}),
        (graph(TensorProto.INT8, opset=17, version=9), "1.15", {"IR 9"}),
        (graph(TensorProto.INT4), "1.19", {"INT4"}),
        (graph(TensorProto.FLOAT8E4M3FN), "1.32", {"FLOAT8E4M3FN"}),
        # What no table knows: the version that ran it.
        (graph(TensorProto.INT8, opset=99), "1.40.1", {"opset 99"}),
        (graph(TensorProto.FLOAT8E5M2), "1.40.1", {"FLOAT8E5M2"}),
        (graph(TensorProto.INT8, domain="com.microsoft"), "1.40.1", {"com.microsoft"}),
    ],
)
def test_the_newest_release_that_a_part_needs(model: ir.Model, least: str, why: set[str]):
    found = needs(model, "1.40.1")
    assert least_onnxruntime(found) == least
    assert {name for name, version in found.items() if version == least} == why
