"""Graphs from another tool's quantizer: the linter's verdict is the builder's."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from lint_cases import products
from onnx import TensorProto, helper, numpy_helper

from exporters.tensorrt.builder import build_rtx
from exporters.tensorrt.lint import lint_file
from fp8pipe.core.errors import GateFailedError

SYMMETRIC = {"ActivationSymmetric": True, "WeightSymmetric": True}
# Options of ONNX Runtime's static quantization; rules that are errors; rules that warn.
SETTINGS = {
    "unsigned": ({"activation_type": "QUInt8"}, {"zero-point", "unsigned", "unsigned-weight"}, set()),
    "asymmetric": ({"activation_type": "QInt8"}, {"zero-point"}, set()),
    "symmetric": ({"activation_type": "QInt8", "extra_options": SYMMETRIC}, set(), set()),
    "per channel": ({"activation_type": "QInt8", "extra_options": SYMMETRIC, "per_channel": True}, set(), set()),
    "float weights": (
        {"activation_type": "QInt8", "op_types_to_quantize": ["MatMul"],
         "extra_options": SYMMETRIC | {"AddQDQPairToWeight": True}},
        set(), {"float-weight"},
    ),
}  # fmt: skip


def write_float(path) -> None:
    """Two products, a bias and a Relu, in FP32."""
    numbers = np.random.default_rng(0)
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a"], name="m1"),
        helper.make_node("Add", ["a", "b1"], ["b"], name="add"),
        helper.make_node("Relu", ["b"], ["c"], name="relu"),
        helper.make_node("MatMul", ["c", "w2"], ["y"], name="m2"),
    ]
    shapes = {"w1": (128, 256), "b1": (256,), "w2": (256, 128)}
    stored = [numpy_helper.from_array(numbers.normal(size=s).astype(np.float32), n) for n, s in shapes.items()]
    edges = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [64, 128]) for name in "xy"]
    graph = helper.make_graph(nodes, "float", edges[:1], edges[1:], stored)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)


def quantize(source, path, changes) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            numbers = np.random.default_rng(1)
            self.left = [{"x": numbers.normal(size=(64, 128)).astype(np.float32)} for _ in range(3)]

        def get_next(self):
            return self.left.pop() if self.left else None

    types = {"activation_type": getattr(QuantType, changes["activation_type"]), "weight_type": QuantType.QInt8}
    quantize_static(source, path, Reader(), quant_format=QuantFormat.QDQ, **(changes | types))


@pytest.mark.parametrize("name", SETTINGS)
def test_the_verdict_is_the_builder_s(name, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    changes, errors, warnings = SETTINGS[name]
    write_float(tmp_path / "float.onnx")
    quantize(tmp_path / "float.onnx", tmp_path / "model.onnx", changes)
    report = lint_file(tmp_path / "model.onnx", ["8.9"])
    assert {finding.rule for finding in report.errors()} == errors
    assert {finding.rule for finding in report.warnings()} == warnings
    if errors:
        with pytest.raises(GateFailedError):
            build_rtx(tmp_path / "model.onnx", tmp_path / "model.engine", ["8.9"], {})
        return
    import onnx_ir as ir

    built = build_rtx(tmp_path / "model.onnx", tmp_path / "model.engine", ["8.9"], {})
    assert products(ir.load(tmp_path / "model.onnx"), built) == {"m1": "int8", "m2": "int8"}
