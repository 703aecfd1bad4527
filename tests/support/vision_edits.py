"""What is done to graphs, descriptions and records of vision exports, by the faults of `faults_vision.py`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from artifact_tree import rehash
from fault_case import json_file, manifest, record
from graph_edits import store

QKV, PROJ = "blocks.0.attn.qkv", "blocks.0.attn.proj"
PRE = "preprocessing.json"


def off_by_one(array: Any) -> Any:
    changed = array.copy()
    changed.reshape(-1)[3] -= 1 if changed.reshape(-1)[3] > 0 else -1
    return changed


def first(value: float) -> Callable[[Any], Any]:
    def change(array: Any) -> Any:
        changed = array.copy()
        changed.reshape(-1)[0] = value
        return changed

    return change


def number(name: str, factor: float) -> Callable[[ir.Model], None]:
    """A stored number, times `factor`; it keeps its form."""

    def edit(model: ir.Model) -> None:
        value = model.graph.initializers[name]
        array = value.const_value.numpy()
        value.const_value = ir.tensor(np.array(array * factor, dtype=array.dtype), name=name)

    return edit


def flip_code(array: Any) -> Any:
    changed = array.copy()
    changed.view(np.uint8).reshape(-1)[3] ^= 1
    return changed


def template(tree: Path) -> None:
    (tree / "decoder" / "chat_template.jinja").write_text("{{ messages }}")
    rehash(tree / "decoder")


def swap_heads(array: Any) -> Any:
    """The first two heads of the queries: columns of a weight that is stored (in, out)."""
    size = array.shape[1] // 12
    changed = array.copy()
    changed[:, :size], changed[:, size : 2 * size] = array[:, size : 2 * size], array[:, :size]
    return changed


def swap_parts(array: Any) -> Any:
    """Queries and keys change places."""
    q, k, v = np.split(array, 3, axis=-1)
    return np.concatenate([k, q, v], axis=-1)


def each(*names: str, change: Callable[[Any], Any]) -> Callable[[ir.Model], None]:
    def edit(model: ir.Model) -> None:
        for name in names:
            store(name, change)(model)

    return edit


def rename_output(model: ir.Model) -> None:
    model.graph.outputs[0].name = "scores"


def described(**changes: Any) -> Callable[[Path], None]:
    """preprocessing.json and the manifest, both, so that they agree."""
    return json_file("onnx", PRE, lambda data: data.update(changes), lambda data: data["preprocessing"].update(changes))


def swap_moments(data: dict) -> None:
    data["mean"], data["std"] = data["std"], data["mean"]


def reverse_moments(data: dict) -> None:
    data["mean"], data["std"] = data["mean"][::-1], data["std"][::-1]


def external(offset: int, location: str = "model.onnx.data") -> Callable[[Path], None]:
    """Weights move into a file of their own, and one tensor is looked for `offset` bytes too far, or elsewhere."""

    def inject(tree: Path) -> None:
        path = tree / "onnx" / "model.onnx"
        ir.save(ir.load(path), path, external_data="model.onnx.data", size_threshold_bytes=0)
        proto = onnx.load(path, load_external_data=False)
        tensor = next(t for t in proto.graph.initializer if t.name == f"{PROJ}.weight")
        entry = next(e for e in tensor.external_data if e.key == "offset")
        entry.value = str(int(entry.value) + offset)
        next(e for e in tensor.external_data if e.key == "location").value = location
        path.write_bytes(proto.SerializeToString())
        rehash(tree / "onnx")

    return inject


def without_layer(name: str) -> Callable[[dict], None]:
    def change(data: dict) -> None:
        data["layers"] = [layer for layer in data["layers"] if layer["name"] != name]

    return change


def layer_bits(data: dict) -> None:
    next(layer for layer in data["layers"] if layer["name"] == PROJ)["weight"]["bits"] = 4


def stale(tree: Path) -> None:
    """The engine was built from another graph than the one beside it."""
    manifest("trt", lambda data: data["details"]["engines"]["8.9"]["recipe"].update(graph_sha256="ab" * 32))(tree)
    path = tree / "trt" / "layers.json"
    layers = json.loads(path.read_text())
    layers["8.9"]["recipe"]["graph_sha256"] = "ab" * 32
    path.write_text(json.dumps(layers))
    rehash(tree / "trt")


def precisions(data: dict) -> None:
    data["8.9"]["precisions"] = {"fp16": 3}


def run_content(data: dict) -> None:
    next(stage for stage in data["stages"] if stage["name"] == "onnx")["content"] = "0" * 64


def rejected(data: dict) -> None:
    data["reasons"] = ["weights differ"]


def failed_gate(data: dict) -> None:
    data["gates"][0].update(value=4.0, passed=True)


def turned(tree: Path) -> None:
    """A record that has a checksum, agrees with itself, and is not the one that the run judged."""
    record("onnx.validation.json", lambda data: data.update(verdict="REJECT"))(tree)


def unchecked(tree: Path) -> None:
    path = tree / "onnx" / "manifest.json"
    path.write_text(path.read_text().replace('"stage": "export"', '"stage": "exported"'))


def unlisted_engine(tree: Path) -> None:
    (tree / "trt" / "engines" / "rtx-12.0.engine").write_bytes(b"another engine")
    rehash(tree / "trt")
