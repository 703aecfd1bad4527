"""Does ONNX Runtime multiply integers where it could? Read from the graph that it runs, after its optimizations.

A quantized graph that falls back to float is right and slow, silently. So the optimized graph is written out, and for
every layer with integer codes on both sides the operator that makes its result is looked up.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from pydantic import Field

from exporters.graph.layers import ExportedLayer
from exporters.graph.packages import import_onnx_package
from exporters.graph.runtime import open_session
from fp8pipe.core.config import FrozenConfig

__all__ = ["KernelReport", "check_kernels"]

_INTEGER: Final = frozenset(("MatMulIntegerToFloat", "QLinearMatMul", "QGemm"))


class KernelReport(FrozenConfig):
    """Which operator runs each layer."""

    operators: dict[str, str] = Field(description="the operator of every layer in the optimized graph")
    integer: int = Field(ge=0, description="layers that run on integers")
    float_layers: list[str] = Field(description="layers with integer codes on both sides that run in float")


def check_kernels(model: Path, layers: Sequence[ExportedLayer]) -> KernelReport:
    """Optimize a graph file as in service, and look the layers up that `read_layers` found in it."""
    onnx_ir = import_onnx_package("onnx_ir")
    with tempfile.TemporaryDirectory(prefix="fp8pipe-graph-") as folder:
        optimized = Path(folder) / "optimized.onnx"
        open_session(model, write_to=optimized)
        made_by = {value.name: node.op_type for node in onnx_ir.load(optimized).graph for value in node.outputs}
    operators = {}
    for layer in layers:
        # The product may have swallowed the bias, or not: either name may be the product's result.
        operators[layer.label] = made_by.get(layer.node.outputs[0].name) or made_by.get(layer.output.name, "fused away")
    integer = [label for label, operator in operators.items() if operator in _INTEGER]
    wanted = [layer.label for layer in layers if layer.integer]
    return KernelReport(
        operators=operators, integer=len(integer), float_layers=[label for label in wanted if label not in integer]
    )
