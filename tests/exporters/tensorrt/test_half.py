"""Half precision: codes and scales keep their values, pixels their codes, and the rest is FP16."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from quantized_families import quantized_family, storable_graph
from vit_families import family, random_pixels

from exporters.graph.runtime import open_session, run
from exporters.tensorrt.graph import typed_graph
from exporters.tensorrt.half import NotHalf, halve
from exporters.tensorrt.target import TrtFormat
from fp8pipe.numerics.kinds import Kind


@pytest.mark.parametrize("kind", [Kind.INT, Kind.E4M3])
@pytest.mark.parametrize("name", ["timm-vit", "hf-swin"])
def test_codes_and_scales_keep_their_values(name, kind):
    model = storable_graph(name, kind)
    before = {n: v.const_value.numpy().copy() for n, v in model.graph.initializers.items()}
    changed = halve(model).changed
    after = {n: v.const_value.numpy() for n, v in model.graph.initializers.items()}
    scales = [name for name in before if name.endswith("scale")]
    assert scales
    for name in scales:
        assert np.array_equal(after[name].astype(np.float32), before[name])
    codes = [name for name, array in before.items() if array.dtype.itemsize == 1]
    assert codes
    for name in codes:
        assert after[name].tobytes() == before[name].tobytes()
    for name in set(changed) - set(scales):
        expected = before[name].astype(np.float16)
        assert np.array_equal(after[name], expected)


def test_the_graph_is_typed_consistently_and_runs():
    """ONNX's own checker infers every type; the runtime gives finite outputs near those of the float32 graph."""
    model = storable_graph("timm-vit")
    pixels = {"pixels": random_pixels(family("timm-vit"), 4).numpy()}
    expected = run(open_session(ir.to_proto(model).SerializeToString()), pixels)["logits"]
    halve(model)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    assert [value.type.tensor_type.elem_type for value in (*proto.graph.input, *proto.graph.output)] == [1, 1]
    found = run(open_session(proto.SerializeToString()), pixels)["logits"]
    assert np.isfinite(found).all()
    # A 4-bit net is chaotic: half precision moves single codes. It remains the same function, roughly.
    cosine = (found * expected).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
    assert cosine.min() > 0.8


def test_pixels_are_quantized_in_float32():
    model = storable_graph("timm-vit")
    halve(model)
    quantize = next(n for n in model.graph if n.op_type == "QuantizeLinear")
    value, moved = quantize.inputs[0], []
    while value.producer() is not None:
        moved.append(value.producer().op_type)
        value = value.producer().inputs[0]
    assert moved == ["Clip", "Reshape", "Transpose", "Reshape"]
    assert value is model.graph.inputs[0]
    assert quantize.inputs[1].dtype == ir.DataType.FLOAT


def test_a_scale_that_would_change_is_refused():
    model = typed_graph(quantized_family("timm-vit"), TrtFormat.INT8, "test").model
    with pytest.raises(NotHalf, match="scale"):
        halve(model)


def test_a_value_beyond_the_range_is_refused_and_a_mask_is_not():
    model = storable_graph("timm-vit")
    bias = next(v for n, v in model.graph.initializers.items() if n.endswith("qkv.bias"))
    array = bias.const_value.numpy().copy()
    array[0] = 1e6
    bias.const_value = ir.tensor(array, name=bias.name)
    with pytest.raises(NotHalf, match="beyond the range of FP16"):
        halve(model)
    array[:] = 0
    array[0] = np.finfo(np.float32).min
    bias.const_value = ir.tensor(array, name=bias.name)
    halve(model)
    assert bias.const_value.numpy()[0] == -np.inf
