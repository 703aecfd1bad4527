"""No gate compares a thing with itself: each fails where one side alone is another, whichever of its sides it is.

The sides are the parent's files, the export's file, and what ONNX Runtime makes of that file. A gate that counts what
must not be in the file has that side alone.
"""

from __future__ import annotations

import json
import shutil

import numpy as np
import onnx_ir as ir
import pytest
from graph_edits import store, stored
from quantized_families import quantized_family, write_vit_artifact
from safetensors.numpy import save_file as save_file_numpy
from safetensors.torch import load_file
from vision_edits import number

import validation.onnx.validate as validate
from exporters.graph import between, parity
from exporters.graph.images import probe_images
from exporters.graph.layers import read_layers
from exporters.onnx.export import export_onnx
from exporters.onnx.target import OnnxExportOptions
from fp8pipe.artifact import Artifact, read_manifest
from fp8pipe.models.vision.quantized import load_quantized

PROJ, NORM, QUERIES = "blocks.0.attn.proj", "blocks.0.norm2.weight", "blocks.0.attn.q"
SIDES = {
    "weight codes differing": {"parent", "file"},
    "weight scales differing": {"parent", "file"},
    "activation quantizers differing": {"parent", "file"},
    "float tensors differing": {"parent", "file"},
    "float copies of quantized weights": {"file"},
    "activation codes differing": {"engine"},  # against numpy's rounding of what the parent gives
    "integer layer error": {"engine"},  # against the exact product of the file's codes
    "float layer error": {"engine"},
    "torch layer error": {"parent", "file"},
    "operators compared nowhere": {"file"},
    "operators between products, evaluated in float64": {"parent", "file"},
    "operators between products, in ONNX Runtime": {"parent", "file", "engine"},
    "difference of outputs": {"parent", "file", "engine"},
    "top-1 agreement": {"parent", "file", "engine"},
    "integer layers run in float": {"engine"},
    "statements that do not hold": {"parent", "file"},
}


def one_more(array):
    changed = array.copy()
    changed.reshape(-1)[3] -= 1 if changed.reshape(-1)[3] > 0 else -1
    return changed


def rolled(array):
    return np.roll(array, 1, -1)


def times(array):
    return array * np.float32(1.5)


def relu(model):
    node = next(node for node in model.graph if node.op_type == "Gelu")
    node.op_type = "Relu"
    node.attributes.clear()


def float_copy(model):
    weight = load_file(model.metadata_props["parent"])[f"{PROJ}.weight"].float().numpy()
    scale = load_file(model.metadata_props["parent"])[f"{PROJ}.weight_scale"].numpy().reshape(-1, 1)
    stored(model, "copy", np.ascontiguousarray((weight * scale).T))


def dangling(model):
    node = ir.node("Identity", [model.graph.inputs[0]], name="extra")
    node.outputs[0].name, node.outputs[0].type = "extra", ir.TensorType(ir.DataType.FLOAT)
    model.graph.append(node)


def norm(model):
    store(next(name for name in model.graph.initializers if name.endswith(NORM)), times)(model)


FILE = [
    store(f"{PROJ}.weight", one_more), store(f"{PROJ}.weight_scale", times), number(f"{QUERIES}/scale", 1.5), norm,
    relu, float_copy, dangling, store("head.weight", rolled),
]  # fmt: skip
PARENT = {
    f"{PROJ}.weight": one_more,
    f"{PROJ}.weight_scale": times,
    NORM: times,
    "head.weight": lambda a: a[::-1].copy(),
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    root = tmp_path_factory.mktemp("sides")
    vit = write_vit_artifact(root / "vit", quantized_family("timm-vit"), images=4).root
    return vit, export_onnx(vit, root / "onnx", OnnxExportOptions()).root


def judged(export, parent):
    """Every gate of a validation, whether it passes; hashes are not looked at."""
    model = ir.load(export / "model.onnx")
    artifact = Artifact(export, read_manifest(export))
    source = Artifact(parent, read_manifest(parent))
    judge = validate._Judge(artifact, model, read_layers(model), source, load_quantized(parent))
    found = judge.on_images(probe_images(parent, judge.parent.preprocessing))
    return {gate.name: gate.passed for gate in judge.record([found]).gates}


def of_file(pair, place):
    """Verdicts with one thing in the graph changed."""
    vit, export = pair
    for index, change in enumerate(FILE):
        copy = shutil.copytree(export, place / f"file-{index}")
        model = ir.load(copy / "model.onnx")
        model.metadata_props["parent"] = str(vit / "model.safetensors")
        change(model)
        ir.save(model, copy / "model.onnx")
        yield judged(copy, vit)


def of_parent(pair, place):
    """Verdicts with one thing in the artifact's files changed."""
    vit, export = pair
    for index, name in enumerate([*PARENT, "quantizers.json"]):
        copy = shutil.copytree(vit, place / f"parent-{index}")
        if name in PARENT:
            tensors = {key: tensor.numpy() for key, tensor in load_file(copy / "model.safetensors").items()}
            tensors[name] = np.ascontiguousarray(PARENT[name](tensors[name]))
            save_file_numpy(tensors, copy / "model.safetensors")
        else:
            data = json.loads((copy / name).read_text())
            data["activations"][QUERIES]["scale"] *= 1.5
            (copy / name).write_text(json.dumps(data))
        yield judged(export, copy)


def of_engine(pair, monkeypatch):
    """Verdicts with other numbers out of one of the engine's sessions, and with kernels that are not integer."""
    vit, export = pair
    for module, change in ((parity, lambda a: a + 1), (between, lambda a: a * 1.01), (validate, rolled)):
        with monkeypatch.context() as patch:
            real = module.run
            patch.setattr(module, "run", lambda *given, real=real, change=change, **named: {
                name: change(array) for name, array in real(*given, **named).items()
            })  # fmt: skip
            yield judged(export, vit)
    with monkeypatch.context() as patch:
        real = validate.check_kernels
        patch.setattr(validate, "check_kernels", lambda *given: real(*given).model_copy(update={"float_layers": ["a"]}))
        yield judged(export, vit)


def test_each_gate_fails_where_one_of_its_sides_alone_is_another(pair, tmp_path, monkeypatch):
    vit, export = pair
    clean = judged(export, vit)
    assert set(clean) == set(SIDES)
    assert all(clean.values())
    found = {
        "file": list(of_file(pair, tmp_path)),
        "parent": list(of_parent(pair, tmp_path)),
        "engine": list(of_engine(pair, monkeypatch)),
    }
    seen = {gate: {side for side, runs in found.items() if any(not run[gate] for run in runs)} for gate in SIDES}
    assert {gate: sides - seen[gate] for gate, sides in SIDES.items() if sides - seen[gate]} == {}
