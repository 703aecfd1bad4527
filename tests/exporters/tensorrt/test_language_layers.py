"""Graphs made of single layers against graphs traced as a whole, and models run layer by layer against whole ones."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from exporters.tensorrt.language.chain import Chain
from exporters.tensorrt.language.graph import decoder_graph
from exporters.tensorrt.language.predict import DecoderSession
from exporters.tensorrt.language.prove import layered_gates, whole_gate
from exporters.tensorrt.language.reference import Reference
from exporters.tensorrt.language.source import open_language
from exporters.tensorrt.language.stitch import layered_graph
from exporters.tensorrt.language.stream import LayerStream, NotLayered, check_chain
from exporters.tensorrt.language.template import parameters_of
from exporters.tensorrt.target import Base
from fp8pipe.models.language.text import Encoded

SCALES = 2.0**-4
IDS = torch.randint(0, 96, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def layered(language_artifact, tmp_path_factory):
    """`layered(family, cache)` -> the artifact, and its graph made of layers, in memory and as a file."""
    known = {}

    def build(family: str, *, cache: bool):
        if (family, cache) not in known:
            model = open_language(language_artifact(family))
            graph = layered_graph(model, dict.fromkeys(model.weights, SCALES), Base.FP16, cache=cache)
            path = tmp_path_factory.mktemp(family) / "model.onnx"
            ir.save(graph.model, path, external_data="model.onnx.data")
            known[family, cache] = model, graph, path
        return known[family, cache]

    return build


def contents(path):
    """Stored tensors as bytes, by type and shape; names are those of the tracer."""
    values = ir.load(path).graph.initializers.values()
    return sorted((str(v.dtype), str(v.shape), v.const_value.tobytes()) for v in values)


# The second layer of SmolLM3 has no rotary embedding; Qwen2 has biases and a tied head.
@pytest.mark.parametrize(("family", "cache"), [("smollm3", True), ("qwen2", False)])
def test_a_graph_made_of_layers_is_the_graph_traced_as_a_whole(layered, family, cache, tmp_path):
    model, graph, path = layered(family, cache=cache)
    whole = decoder_graph(model, dict.fromkeys(model.weights, SCALES), Base.FP16, cache=cache)
    ir.save(whole.model, tmp_path / "whole.onnx")
    # Every tensor but constants, bit for bit; of these, a second kind of layer may hold its own.
    ours, theirs = contents(path), contents(tmp_path / "whole.onnx")
    assert [x for x in ours if "FLOAT" in x[0] and len(x[2]) > 8] == [
        x for x in theirs if "FLOAT" in x[0] and len(x[2]) > 8
    ]
    names = {n for n, v in ir.load(tmp_path / "whole.onnx").graph.initializers.items() if n.startswith("model.")}
    assert names <= ir.load(path).graph.initializers.keys()
    # Both run in one engine on the same operators in the same order, so not even a last bit may differ.
    found, expected = (DecoderSession(p, graph.cache, Base.FP16).logits(IDS) for p in (path, tmp_path / "whole.onnx"))
    assert np.array_equal(found, expected)
    assert {c.name: len(c.changed) for c in graph.changes if c.name != "strip_metadata"} == {
        c.name: len(c.changed) for c in whole.changes if c.name != "strip_metadata"
    }


@pytest.mark.parametrize("family", ["llama", "qwen2", "smollm3"])
def test_a_model_run_layer_by_layer_is_the_whole_model(language_artifact, family):
    model = open_language(language_artifact(family))
    reference = Reference.of(model)
    assert reference.stream is not None
    layer = reference.stream.layers[0]
    assert all(p.untyped_storage().nbytes() == p.element_size() for p in layer.parameters())
    whole = model.torch_model(torch.float32)
    texts = [IDS, IDS[:1, :4]]
    for ids, found in zip(texts, reference.stream.run(texts), strict=True):
        with torch.no_grad():
            assert torch.equal(found, whole(input_ids=ids, use_cache=False).logits)
    text = [Encoded(row.tolist(), row.tolist()) for row in IDS]
    ours = reference.count(text)
    theirs = Reference(model, whole, None).count(text)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name].counts, theirs[name].counts) for name in ours)


class Summing(nn.Module):
    """Its second layer reads what both earlier values sum up to, or gets the first one's output as an argument."""

    def __init__(self, *, argument: bool) -> None:
        super().__init__()
        self.embed, self.argument = nn.Embedding(8, 4), argument
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, input_ids, use_cache):
        x = self.embed(input_ids)
        y = self.layers[0](x)
        return self.layers[1](y, y.mean()) if self.argument else self.layers[1](x + y)


@pytest.mark.parametrize(("argument", "why"), [(False, "something else"), (True, "depends on earlier layers")])
def test_layers_that_are_no_chain_do_not_run_one_by_one(argument, why):
    with pytest.raises(NotLayered, match=why):
        check_chain(LayerStream(None, Summing(argument=argument), "layers"))


def test_a_tensor_computed_from_parameters_is_not_copied_to_other_layers():
    """Gemma's tracer stores `1 + weight`; the next layer would need another sum."""
    constants = {0.25: ("layers.0.norm.weight", (4,))}

    def graph(number: float) -> ir.Model:
        stored = ir.Value(name="w", shape=ir.Shape((4,)), const_value=ir.tensor(np.full(4, number, np.float32)))
        stored.dtype = ir.DataType.FLOAT
        x = ir.Value(name="x", shape=ir.Shape((4,)), type=ir.TensorType(ir.DataType.FLOAT))
        node = ir.node("Mul", [x, stored])
        made = ir.Graph([x], node.outputs, nodes=[node], initializers=[stored], opset_imports={"": 21})
        return ir.Model(made, ir_version=10)

    (parameter,) = parameters_of(graph(0.25), constants).values()
    assert parameter.name == "layers.0.norm.weight"
    with pytest.raises(NotLayered):
        parameters_of(graph(1.25), constants)


def test_another_operator_in_one_layer_is_found_there(layered, tmp_path):
    """Products and codes are as they were, so that only the comparison of whole layers can see it."""
    model, graph, path = layered("smollm3", cache=True)
    stream = Reference.of(model).stream
    text = [Encoded(row.tolist(), row.tolist()) for row in IDS]

    def gates(place):
        chain = Chain(ir.load(place), graph.joints, graph.cache)
        return {gate.name: gate for gate in layered_gates(place, chain, stream, text[0], text, Base.FP16)}, chain

    found, chain = gates(path)
    assert all(gate.passed for gate in found.values()), found
    assert found["decoder layer error"].value < 1e-5
    whole = whole_gate(path, chain, text, Base.FP16)
    assert whole.passed
    changed = ir.load(path)
    node = next(n for n in changed.graph if n.op_type == "Sigmoid" and str(n.name).startswith("model.layers.1"))
    node.op_type = "Tanh"
    ir.save(changed, tmp_path / "changed.onnx", external_data="changed.onnx.data")
    found, chain = gates(tmp_path / "changed.onnx")
    assert [name for name, gate in found.items() if not gate.passed] == ["decoder layer error"]
    assert "model.layers.1" in found["decoder layer error"].detail
