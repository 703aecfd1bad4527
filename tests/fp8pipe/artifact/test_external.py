"""Tensors outside of an ONNX file: each way to name another place is refused before anything reads the graph."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from artifact_tree import rehash
from onnx import TensorProto, helper, numpy_helper
from small_artifacts import details_of

from fp8pipe.artifact import ArtifactWriter, open_artifact
from fp8pipe.artifact.external import misplaced
from fp8pipe.core.errors import BadArtifactError

SIZES = {"model.onnx.data": 64}


def outside(**entries):
    """A tensor of 16 numbers that is stored elsewhere."""
    tensor = numpy_helper.from_array(np.zeros(16, np.float32), "weight")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def constant(tensor):
    return helper.make_node("Constant", [], ["c"], value=tensor)


def in_graph(tensor):
    return helper.make_graph([], "g", [], [], [tensor])


def in_node(tensor):
    return helper.make_graph([constant(tensor)], "g", [], [])


def in_branch(tensor):
    branch = helper.make_graph([constant(tensor)], "branch", [], [])
    return helper.make_graph([helper.make_node("If", ["x"], ["y"], then_branch=branch)], "g", [], [])


def in_sparse(tensor):
    graph = helper.make_graph([], "g", [], [])
    graph.sparse_initializer.add(values=tensor)
    return graph


def found(path, graph, functions=()):
    model = helper.make_model(graph, functions=functions)
    path.write_bytes(model.SerializeToString())
    return list(misplaced(path, SIZES))


@pytest.mark.parametrize(
    ("entries", "why"),
    [
        ({"location": "/etc/hostname"}, "'/etc/hostname' is not a file next to the graph"),
        ({"location": "../model.onnx.data"}, "is not a file next to the graph"),
        ({"location": "./model.onnx.data"}, "is not a file next to the graph"),
        ({"location": "other.data"}, "is not a file next to the graph"),
        ({"location": "*/_ORT_MEM_ADDR_/*", "offset": "4096"}, "is not a file next to the graph"),
        ({"offset": "0"}, "is not a file next to the graph"),
        ({"location": "model.onnx.data", "offset": "1", "length": "64"}, "bytes 1 to 65"),
        ({"location": "model.onnx.data", "offset": "-8"}, "not byte counts"),
        ({"location": "model.onnx.data", "length": "0x40"}, "not byte counts"),
    ],
)
@pytest.mark.parametrize("place", [in_graph, in_node, in_branch, in_sparse])
def test_a_tensor_elsewhere_is_refused_wherever_it_stands(tmp_path, entries, why, place):
    (text,) = found(tmp_path / "model.onnx", place(outside(**entries)))
    assert "weight" in text
    assert why in text


def test_a_function_may_not_lead_elsewhere_either(tmp_path):
    inner = helper.make_function("d", "F", [], ["c"], [constant(outside(location="/x"))], [])
    assert found(tmp_path / "model.onnx", helper.make_graph([], "g", [], []), [inner])


def test_an_entry_that_stands_twice_is_refused(tmp_path):
    tensor = outside(location="model.onnx.data")
    tensor.external_data.add(key="location", value="/etc/hostname")
    assert "twice" in found(tmp_path / "model.onnx", in_graph(tensor))[0]


def test_a_listed_file_beside_the_graph_is_right(tmp_path):
    tensor = outside(location="model.onnx.data", offset="0", length="64", checksum="0")
    assert found(tmp_path / "model.onnx", in_graph(tensor)) == []
    assert found(tmp_path / "model.onnx", in_graph(numpy_helper.from_array(np.ones(3), "inside"))) == []


@pytest.mark.parametrize("data", [b"no graph", b"\x3a\x7f\x01", b"\x0b\x0c", b"\xff" * 20])
def test_what_cannot_be_read_is_refused(tmp_path, data):
    (tmp_path / "model.onnx").write_bytes(data)
    assert list(misplaced(tmp_path / "model.onnx", SIZES))


def test_every_field_that_leads_to_a_tensor_is_looked_into():
    """The walk knows fields by number; a later ONNX may have more of them."""
    from fp8pipe.artifact.external import _FIELDS

    names = {
        "ModelProto": "model", "TrainingInfoProto": "training", "FunctionProto": "function", "GraphProto": "graph",
        "NodeProto": "node", "AttributeProto": "attribute", "SparseTensorProto": "sparse", "TensorProto": "tensor",
    }  # fmt: skip
    for proto, name in names.items():
        fields = getattr(onnx, proto, None) or getattr(onnx.onnx_ml_pb2, proto)
        inner = {
            field.number: names[field.message_type.name]
            for field in fields.DESCRIPTOR.fields
            if field.message_type is not None and field.message_type.name in names
        }
        assert inner == _FIELDS.get(name, {}), proto


def test_an_artifact_whose_graph_leads_elsewhere_cannot_be_opened(tmp_path):
    """So that ONNX Runtime and TensorRT, which read a graph by its path, read listed files alone."""
    with ArtifactWriter(tmp_path / "export", kind="onnx-export", stage="export") as writer:
        (writer.root / "model.onnx.data").write_bytes(bytes(64))
        graph = in_graph(outside(location="model.onnx.data"))
        (writer.root / "model.onnx").write_bytes(helper.make_model(graph).SerializeToString())
        root = writer.commit(details=details_of("onnx-export")).root
    open_artifact(root)
    graph = in_graph(outside(location="manifest.json"))
    (root / "model.onnx").write_bytes(helper.make_model(graph).SerializeToString())
    rehash(root)
    for verify in (True, False):
        with pytest.raises(BadArtifactError, match="is not what was written") as caught:
            open_artifact(root, verify=verify)
        assert "model.onnx has the tensor weight in another file: 'manifest.json'" in caught.value.why
