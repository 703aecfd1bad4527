"""Faults in quantized vision transformers, in their graphs, in engines, and in records."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from artifact_tree import rehash
from fault_case import Fault, encoding, graph, json_file, manifest, record, signed, tensors
from graph_edits import behind, drop, opset, replace, set_attributes, store

from fp8pipe.artifact.finding import Check

__all__ = ["VISION_FAULTS"]

C = Check
QKV, PROJ = "blocks.0.attn.qkv", "blocks.0.attn.proj"
PRE = "preprocessing.json"
LAST = "model.layers.1.mlp.down_proj"


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


GRAPH = "model.onnx"
GRAPH_FAULTS = (
    Fault("int8-code-off-by-one", "onnx", GRAPH, "one INT8 code is its neighbour", C.PARITY, f"{PROJ}.weight",
          graph("onnx", store(f"{PROJ}.weight", off_by_one)), "vit"),
    Fault("int8-code-outside", "onnx", GRAPH, "one INT8 code is -128, which no weight may be", C.REOPEN, PROJ,
          graph("onnx", store(f"{PROJ}.weight", first(-128)))),
    Fault("bits-wrong", "onnx", "manifest.json", "codes of 8 bits are said to have 4", C.REOPEN, PROJ,
          manifest("onnx", layer_bits)),
    Fault("weight-dynamic", "onnx", "manifest.json", "a stored weight's scale is said to be dynamic", C.MANIFEST, PROJ,
          manifest("onnx", encoding(PROJ, "weight", dynamic=True))),
    Fault("activation-bits-wrong", "onnx", "manifest.json", "8 bits of an activation are said to be 5", C.MANIFEST,
          PROJ, manifest("onnx", encoding(PROJ, "activation", bits=5))),
    Fault("scale-rule-wrong", "onnx", "manifest.json", "a scale is said to be learned", C.MANIFEST, PROJ,
          manifest("onnx", encoding(PROJ, "weight", scale_rule="learned")), "vit"),
    Fault("input-shape-wrong", "onnx", "manifest.json", "pixels are said to have another shape", C.MANIFEST,
          "details.input.shape", manifest("onnx", lambda data: data["details"]["input"]["shape"].reverse())),
    Fault("input-type-wrong", "onnx", "manifest.json", "pixels are said to be half floats", C.MANIFEST,
          "details.input.type", manifest("onnx", lambda data: data["details"]["input"].update(type="float16"))),
    Fault("output-kind-wrong", "onnx", "manifest.json", "logits are said to be features", C.MANIFEST,
          "details.output.what", manifest("onnx", lambda data: data["details"]["output"].update(what="features")),
          "vit"),
    Fault("passes-wrong", "onnx", "manifest.json", "a pass is said to have changed nothing", C.MANIFEST,
          "details.passes", manifest("onnx", lambda data: data["details"].update(passes={})), "vit"),
    Fault("format-wrong", "onnx", "manifest.json", "another format than was asked for", C.MANIFEST,
          "details.format", manifest("onnx", lambda data: data["details"].update(format="qdq-exact"))),
    Fault("onnx-transposed", "onnx", GRAPH, "a square weight is stored transposed", C.PARITY, f"{PROJ}.weight",
          graph("onnx", store(f"{PROJ}.weight", np.transpose)), "vit"),
    Fault("onnx-scales-swapped", "onnx", GRAPH, "two rows' scales are swapped", C.PARITY, f"{PROJ}.weight_scale",
          graph("onnx", store(f"{PROJ}.weight_scale", lambda a: a[[1, 0, *range(2, len(a))]])), "vit"),
    Fault("onnx-scale-nan", "onnx", GRAPH, "one scale is NaN", C.LINT, f"{PROJ}.weight",
          graph("onnx", store(f"{PROJ}.weight_scale", first(float("nan"))))),
    Fault("onnx-scale-zero", "onnx", GRAPH, "one scale is zero", C.LINT, f"{PROJ}.weight",
          graph("onnx", store(f"{PROJ}.weight_scale", first(0.0)))),
    Fault("onnx-heads", "onnx", GRAPH, "two heads of the queries changed places", C.PARITY, f"{QKV}.weight",
          graph("onnx", each(f"{QKV}.weight", change=swap_heads)), "vit"),
    Fault("onnx-fused-order", "onnx", GRAPH, "queries and keys changed places, scales and biases with them", C.PARITY,
          f"{QKV}.weight",
          graph("onnx", each(f"{QKV}.weight", f"{QKV}.weight_scale", f"{QKV}.bias", change=swap_parts)), "vit"),
    Fault("zero-point", "onnx", GRAPH, "codes of an activation are shifted by one", C.REOPEN, f"{QKV}.input",
          graph("onnx", replace(f"{QKV}.input/QuantizeLinear", 2, np.int8(1)))),
    Fault("zero-point-weight", "onnx", GRAPH, "a weight's zero point is one", C.REOPEN, f"{PROJ}.weight",
          graph("onnx", store(f"{PROJ}.weight_zero_point", lambda a: np.ones_like(a)))),
    Fault("scale-mismatch", "onnx", GRAPH, "codes are decoded with another scale than they were made with", C.REOPEN,
          f"{QKV}.input", graph("onnx", replace(f"{QKV}.input/DequantizeLinear", 1, np.float32(0.5)))),
    Fault("activation-scale", "onnx", GRAPH, "an activation's scale is twice as large", C.PARITY, f"{QKV}.input/scale",
          graph("onnx", number(f"{QKV}.input/scale", 2)), "vit"),
    Fault("activation-scale-axes", "onnx", GRAPH, "an activation's scale has an axis", C.REOPEN, GRAPH,
          graph("onnx", store(f"{QKV}.input/scale", lambda a: a.reshape(1)))),
    Fault("axis", "onnx", GRAPH, "scales lie along the other axis of a square weight", C.REOPEN, PROJ,
          graph("onnx", set_attributes(f"{PROJ}.weight/DequantizeLinear", axis=0))),
    Fault("opset", "onnx", GRAPH, "opset 19 instead of 21", C.MANIFEST, "model.onnx", graph("onnx", opset(19))),
    Fault("clip-between-codes", "onnx", GRAPH, "a bound is half a code too low", C.REOPEN, QKV,
          graph("onnx", number(f"{QKV}.input/low", 0.996))),
    Fault("clip-removed", "onnx", GRAPH, "a range is not clipped", C.PARITY, f"{QKV}.input",
          graph("onnx", drop(f"{QKV}.input/Clip")), "vit"),
    Fault("softmax-scale-twice", "onnx", GRAPH, "queries are scaled by 1/sqrt(d) twice", C.PARITY,
          "blocks.0.attn.q/Clip", graph("onnx", behind("node_mul_36", "Mul", np.float32(0.35))), "vit"),
    Fault("softmax-scale", "onnx", GRAPH, "the factor of the queries is another", C.PARITY, "val_35",
          graph("onnx", number("val_35", 0.5)), "vit"),
    Fault("softmax-axis", "onnx", GRAPH, "softmax runs over another axis", C.PARITY, "node_softmax",
          graph("onnx", set_attributes("node_softmax", axis=-2)), "vit"),
    Fault("layer-norm-epsilon", "onnx", GRAPH, "another epsilon of a norm", C.PARITY, "node_layer_norm",
          graph("onnx", set_attributes("node_layer_norm", epsilon=1e-3)), "vit"),
    Fault("gelu", "onnx", GRAPH, "GELU is approximated by tanh", C.PARITY, "node_gelu",
          graph("onnx", set_attributes("node_gelu", approximate="tanh")), "vit"),
    Fault("onnx-bias-dropped", "onnx", GRAPH, "a bias is not added", C.PARITY, f"{PROJ}/Add",
          graph("onnx", drop(f"{PROJ}/Add")), "vit"),
    Fault("residual-dropped", "onnx", GRAPH, "a residual connection is missing", C.PARITY, "node_add_107",
          graph("onnx", drop("node_add_107")), "vit"),
    Fault("position-embedding", "onnx", GRAPH, "one number of the position embedding is another", C.PARITY, "pos_embed",
          graph("onnx", store("pos_embed", first(0.5))), "vit"),
    Fault("output-renamed", "onnx", GRAPH, "the output has another name", C.MANIFEST, "model.onnx",
          graph("onnx", rename_output)),
    Fault("external-data-beyond", "onnx", "model.onnx.data", "a tensor's offset lies behind the file's end",
          C.MANIFEST, "model.onnx", external(1 << 24)),
    *(
        Fault(f"external-data-{name}", "onnx", GRAPH, f"a tensor is read from {where}", C.MANIFEST, "model.onnx",
              external(0, place))
        for name, where, place in (
            ("absolute", "a path of the machine", "/etc/hostname"),
            ("parent", "a directory above", "../vit/model.safetensors"),
            ("unlisted", "the manifest, which is not listed", "manifest.json"),
            ("memory", "an address in memory", "*/_ORT_MEM_ADDR_/*"),
        )
    ),
    Fault("external-data-offset", "onnx", "model.onnx.data", "a tensor's offset is 16 bytes too large", C.PARITY,
          f"{PROJ}.weight", external(16), "vit"),
    Fault("onnx-layer-not-listed", "onnx", "manifest.json", "a layer is dropped from the manifest", C.MANIFEST, PROJ,
          manifest("onnx", without_layer(PROJ))),
)  # fmt: skip

DESCRIPTION_FAULTS = (
    Fault("moments-swapped", "onnx", PRE, "mean and std changed places", C.MANIFEST, PRE,
          json_file("onnx", PRE, swap_moments)),
    Fault("moments-swapped-twice", "onnx", PRE, "the same, in the manifest too", C.PARITY, PRE,
          json_file("onnx", PRE, swap_moments, lambda data: swap_moments(data["preprocessing"])), "vit"),
    Fault("moments-reversed", "onnx", PRE, "mean and std are those of BGR, in the manifest too", C.PARITY, PRE,
          json_file("onnx", PRE, reverse_moments, lambda data: reverse_moments(data["preprocessing"])), "vit"),
    Fault("bgr", "onnx", PRE, "channels are said to be BGR", C.REOPEN, PRE,
          json_file("onnx", PRE, lambda data: data.update(channels="bgr"))),
    Fault("crop", "onnx", PRE, "the crop is one pixel lower, in the manifest too", C.REOPEN, PRE,
          described(crop=[31, 48])),
    Fault("resize", "onnx", PRE, "pictures are made larger before the crop, in the manifest too", C.PARITY, PRE,
          described(resize=[36, 54]), "vit"),
    Fault("interpolation", "onnx", PRE, "bilinear instead of bicubic, in the manifest too", C.PARITY, PRE,
          described(interpolation="bilinear"), "vit"),
    Fault("classes-permuted", "onnx", "classes.json", "two classes changed places", C.PARITY, "classes.json",
          json_file("onnx", "classes.json", lambda names: [names[1], names[0], *names[2:]]), "vit"),
    Fault("class-dropped", "onnx", "classes.json", "a class is missing", C.REOPEN, "classes.json",
          json_file("onnx", "classes.json", lambda names: names[:-1])),
)  # fmt: skip

ENGINE_FAULTS = (
    Fault("stale-engine", "trt", "manifest.json", "the engine is of another graph", C.MANIFEST, "rtx-8.9.engine",
          stale),
    Fault("graph-behind-engine", "trt", GRAPH, "the graph changed after its engine was built", C.MANIFEST,
          "rtx-8.9.engine", graph("trt", store(f"{PROJ}.weight", off_by_one))),
    Fault("trt-code", "trt", GRAPH, "one INT8 code is its neighbour", C.PARITY, f"{PROJ}.weight",
          graph("trt", store(f"{PROJ}.weight", off_by_one)), "vit"),
    Fault("trt-half-bias", "trt", GRAPH, "a bias is doubled", C.PARITY, f"{PROJ}.bias",
          graph("trt", store(f"{PROJ}.bias", lambda a: a * 2 + 1)), "vit"),
    Fault("trt-scale-negative", "trt", GRAPH, "one scale is below zero", C.LINT, f"{PROJ}.weight",
          graph("trt", store(f"{PROJ}.weight_scale", first(-0.01)))),
    Fault("precisions-edited", "trt", "layers.json", "products are said to run in another precision", C.MANIFEST,
          "layers.json", json_file("trt", "layers.json", precisions)),
    Fault("engine-unlisted", "trt", "engines/", "an engine that no recipe describes", C.MANIFEST, "rtx-12.0.engine",
          unlisted_engine),
)  # fmt: skip

DECODER_FAULTS = (
    Fault("decoder-code", "decoder", GRAPH, "one E4M3 code is its neighbour", C.PARITY, f"{LAST}.weight",
          graph("decoder", store(f"{LAST}.weight", flip_code)), "model"),
    Fault("decoder-input-scale", "decoder", GRAPH, "a static activation scale is half of it", C.PARITY,
          f"{LAST}.input/scale", graph("decoder", number(f"{LAST}.input/scale", 0.5)), "model"),
    Fault("decoder-rotary", "decoder", GRAPH, "frequencies of the rotary embedding are others", C.PARITY,
          "model.rotary_emb.inv_freq", graph("decoder", number("model.rotary_emb.inv_freq", 0.9)), "model"),
    Fault("decoder-template", "decoder", "chat_template.jinja", "a template of another model", C.PARITY,
          "chat_template.jinja", template, "model"),
)  # fmt: skip

MODEL_FAULTS = (
    Fault("vit-code-range", "vit", "model.safetensors", "one code is -128", C.LINT, PROJ,
          tensors("vit", lambda found: found[f"{PROJ}.weight"].view(-1).__setitem__(0, -128))),
    Fault("vit-scale-negative", "vit", "model.safetensors", "one scale is below zero", C.REOPEN, f"{PROJ}.weight_scale",
          tensors("vit", lambda found: found[f"{PROJ}.weight_scale"].__setitem__(0, -1.0))),
    Fault("vit-activation-scale", "vit", "quantizers.json", "an activation's scale is zero", C.REOPEN,
          "quantizers.json",
          json_file("vit", "quantizers.json", lambda data: data["activations"][f"{QKV}.input"].update(scale=0.0))),
    Fault("vit-direction", "vit", "quantizers.json", "scales are said to be divided by", C.REOPEN, "scale_direction",
          json_file("vit", "quantizers.json", lambda data: data.update(scale_direction="dequantized = code / scale"))),
    *(
        Fault(f"vit-{name}", "vit", "architecture.json", what, C.REOPEN, key,
              json_file("vit", "architecture.json", lambda data, name=model, arguments={key: value}: data.update(
                  library="transformers", name=name, arguments=arguments)))
        for name, what, model, key, value in (
            ("kernel", "attention is a kernel of the hub", "ViTModel", "attn_implementation", "someone/kernel"),
            ("code", "the model is code beside its weights", "ViTModel", "auto_map", {"AutoModel": "model.Model"}),
            ("pickle", "another library loads a pickle", "TimmWrapperModel", "model_args", {"checkpoint_path": "w.pt"}),
        )
    ),
    Fault("vit-bits", "vit", "quantizers.json", "codes of 8 bits are said to have 4", C.LINT, PROJ,
          json_file("vit", "quantizers.json", lambda data: data["weights"][PROJ].update(bits=4))),
)  # fmt: skip

RECORD_FAULTS = (
    Fault("record-of-another", "onnx.validation.json", "onnx.validation.json", "the record is of another export",
          C.RECORD, "onnx.validation.json",
          record("onnx.validation.json", lambda data: data.update(manifest_digest="0" * 64)), "onnx"),
    Fault("verdict-edited", "onnx.validation.json", "onnx.validation.json", "ACCEPT, although a reason says why not",
          C.RECORD, "onnx.validation.json", record("onnx.validation.json", rejected), "onnx"),
    Fault("record-gate-edited", "onnx.validation.json", "onnx.validation.json", "a gate that counted four has passed",
          C.RECORD, "onnx.validation.json", record("onnx.validation.json", failed_gate), "onnx"),
    Fault("signed-record-edited", "onnx.validation.json", "onnx.validation.json",
          "the record was edited and checksummed again after it was signed", C.SIGNATURE, "onnx.validation.json.sig",
          signed("onnx", record("onnx.validation.json", lambda data: data.update(tool_version="0"))), "onnx"),
    Fault("record-after-signing", "onnx.validation.json", "onnx.validation.json.sig",
          "the record was written after the artifact was signed", C.SIGNATURE, "onnx.validation.json.sig",
          signed("onnx", lambda tree: (tree / "onnx.validation.json.sig").unlink()), "onnx"),
    Fault("run-content", "run.json", "run.json", "a stage wrote another content", C.RECORD, "run.json",
          record("run.json", run_content), "onnx"),
    Fault("verdict-turned", "run.json", "onnx.validation.json", "the run judged another verdict than stands there",
          C.RECORD, "onnx.validation.json", turned, "onnx"),
    Fault("manifest-edited", "onnx", "manifest.json", "the manifest was edited, its checksum was not", C.CHECKSUM,
          "manifest.json", unchecked),
    Fault("checksum-missing", "onnx", "manifest.sha256", "the checksum is not there", C.CHECKSUM, "manifest.json",
          lambda tree: (tree / "onnx" / "manifest.sha256").unlink()),
    Fault("checksum-spaced", "onnx", "manifest.sha256", "one more line end, which sha256sum accepts", C.CHECKSUM,
          "manifest.json",
          lambda tree: (tree / "onnx" / "manifest.sha256").open("a").write("\n") and None),
    Fault("file-missing", "onnx", PRE, "a file of the manifest is not there", C.HASH, PRE,
          lambda tree: (tree / "onnx" / PRE).unlink()),
)  # fmt: skip

VISION_FAULTS = (*GRAPH_FAULTS, *DESCRIPTION_FAULTS, *ENGINE_FAULTS, *DECODER_FAULTS, *MODEL_FAULTS, *RECORD_FAULTS)
