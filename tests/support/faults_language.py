"""Faults in language models and their exports."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from artifact_tree import rehash
from fault_case import Fault, code_bits, encoding, json_file, manifest, tensors
from safetensors.torch import save_file
from torch import Tensor

from fp8pipe.artifact.finding import Check

__all__ = ["LANGUAGE_FAULTS"]

ATTENTION = "model.layers.0.self_attn"
Q, K, OUT = (f"{ATTENTION}.{x}_proj" for x in "qko")
SHARD = "model-00002-of-00002.safetensors"
C = Check


def swap(a: str, b: str) -> Callable[[dict[str, Tensor]], None]:
    def change(found: dict[str, Tensor]) -> None:
        found[a], found[b] = found[b], found[a]

    return change


def put(name: str, make: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    """A tensor becomes what `make` makes of it."""

    def change(found: dict[str, Tensor]) -> None:
        found[name] = make(found[name])

    return change


def one(name: str, value: float) -> Callable[[dict[str, Tensor]], None]:
    """The first number of a scale."""

    def change(found: dict[str, Tensor]) -> None:
        found[name].view(-1)[0] = value

    return change


def add(name: str, make: Callable[[dict[str, Tensor]], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def change(found: dict[str, Tensor]) -> None:
        found[name] = make(found)

    return change


def code(name: str, value: int | None = None) -> Callable[[dict[str, Tensor]], None]:
    """One code becomes `value`, or its neighbour on the grid."""

    def change(found: dict[str, Tensor]) -> None:
        bits = code_bits(found[name]).view(-1)
        bits[7] = value if value is not None else int(bits[7]) ^ 1

    return change


def permute_heads(found: dict[str, Tensor]) -> None:
    for name in (f"{Q}.weight", f"{Q}.weight_scale", f"{Q}.bias"):
        rows = found[name].view(torch.uint8) if found[name].dtype == torch.float8_e4m3fn else found[name]
        order = torch.cat([torch.arange(16, 32), torch.arange(0, 16), torch.arange(32, 64)])
        rows.copy_(rows[order].clone())


def rows_of_fused(found: dict[str, Tensor]) -> None:
    for suffix in (".weight", ".weight_scale", ".bias"):
        swap(f"{K}{suffix}", f"{ATTENTION}.v_proj{suffix}")(found)


def file(artifact: str, name: str, change: Callable[[bytes], bytes | None]) -> Callable[[Path], None]:
    """A file's bytes; None deletes it, and what is not there counts as empty."""

    def inject(tree: Path) -> None:
        path = tree / artifact / name
        path.parent.mkdir(exist_ok=True)
        data = change(path.read_bytes() if path.is_file() else b"")
        if data is None:
            path.unlink()
        else:
            path.write_bytes(data)
        rehash(tree / artifact)

    return inject


def stray(tree: Path) -> None:
    save_file({f"{Q}.weight": torch.zeros(64, 64)}, tree / "vllm" / "extra.safetensors")
    rehash(tree / "vllm")


def unlisted(name: str) -> Callable[[Path], None]:
    """Add a file that no manifest lists: engines load whatever is called so."""

    def inject(tree: Path) -> None:
        save_file({f"{Q}.weight": torch.zeros(64, 64)}, tree / "vllm" / name)

    return inject


def linked(tree: Path) -> None:
    """Let the weights' own file lead out of the artifact, to the same bytes."""
    file = next((tree / "vllm").glob("*.safetensors"))
    file.rename(tree / f"outside-{file.name}")
    file.symlink_to(tree / f"outside-{file.name}")


def swapped_index(data: dict) -> None:
    data["weight_map"][f"{Q}.weight"] = SHARD


def config(*path: str, value: object) -> Callable[[dict], None]:
    """Set one key of a nested dictionary."""

    def change(data: dict) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value

    return change


def layers(name: str, **changes: object) -> Callable[[dict], None]:
    def change(data: dict) -> None:
        next(layer for layer in data["layers"] if layer["name"] == name).update(changes)

    return change


def without_layer(name: str) -> Callable[[dict], None]:
    def change(data: dict) -> None:
        data["layers"] = [layer for layer in data["layers"] if layer["name"] != name]

    return change


def gate(name: str, **changes: object) -> Callable[[dict], None]:
    def change(data: dict) -> None:
        next(gate for gate in data["gates"] if gate["name"] == name).update(changes)

    return change


def other_parent(tree: Path) -> None:
    """The model was trained again under its name, with one other code; its child stayed."""
    tensors("model", code(f"{Q}.weight"))(tree)


def copied_manifest(tree: Path) -> None:
    for name in ("manifest.json", "manifest.sha256"):
        shutil.copy(tree / "model" / name, tree / "vllm" / name)


W, S = f"{Q}.weight", f"{Q}.weight_scale"
WEIGHTS = "safetensors"
BLOCK = ("quantization_config",)
GROUP = (*BLOCK, "config_groups", "group_0")
EXPORT_FAULTS = (
    Fault("reciprocal-scale", "vllm", WEIGHTS, "a layer's scales are stored as 1/scale", C.LINT, S,
          tensors("vllm", put(S, lambda t: 1 / t))),
    Fault("scale-doubled", "vllm", WEIGHTS, "a layer's scales are twice as large", C.PARITY, W,
          tensors("vllm", put(S, lambda t: t * 2)), "model"),
    Fault("transposed-weight", "vllm", WEIGHTS, "a square weight is stored transposed", C.PARITY, f"{OUT}.weight",
          tensors("vllm", put(f"{OUT}.weight", lambda t: t.view(torch.uint8).T.contiguous().view(t.dtype))), "model"),
    Fault("scales-swapped", "vllm", WEIGHTS, "two layers' scales are swapped", C.PARITY, W,
          tensors("vllm", swap(S, f"{OUT}.weight_scale")), "model"),
    Fault("adapter-a-left", "vllm", WEIGHTS, "the adapter's A is left among the weights", C.LINT, f"{Q}.lora_A.weight",
          tensors("vllm", add(f"{Q}.lora_A.weight", lambda t: torch.ones(4, 64)))),
    Fault("code-off-by-one", "vllm", WEIGHTS, "one E4M3 code is off by one", C.PARITY, W,
          tensors("vllm", code(W)), "model"),
    Fault("nan-code", "vllm", WEIGHTS, "one byte of the codes is 0x7F", C.LINT, W, tensors("vllm", code(W, 0x7F))),
    Fault("negative-nan-code", "vllm", WEIGHTS, "one byte of the codes is 0xFF", C.LINT, W,
          tensors("vllm", code(W, 0xFF))),
    Fault("heads-permuted", "vllm", WEIGHTS, "two query heads are swapped, with their scales and biases",
          C.PARITY, W, tensors("vllm", permute_heads), "model"),
    Fault("fused-order", "vllm", WEIGHTS, "keys and values are swapped", C.PARITY, f"{K}.weight",
          tensors("vllm", rows_of_fused), "model"),
    Fault("scale-negative", "vllm", WEIGHTS, "one scale is below zero", C.LINT, S, tensors("vllm", one(S, -0.01))),
    Fault("scale-zero", "vllm", WEIGHTS, "one scale is zero", C.LINT, S, tensors("vllm", one(S, 0.0))),
    Fault("scale-infinite", "vllm", WEIGHTS, "one scale is infinite", C.LINT, S, tensors("vllm", one(S, float("inf")))),
    Fault("scale-nan", "vllm", WEIGHTS, "one scale is NaN", C.LINT, S, tensors("vllm", one(S, float("nan")))),
    Fault("scale-dtype", "vllm", WEIGHTS, "scales are stored in bf16", C.LINT, S,
          tensors("vllm", put(S, lambda t: t.bfloat16()))),
    Fault("scale-shape", "vllm", WEIGHTS, "scales have shape (rows,), not (rows, 1)", C.LINT, S,
          tensors("vllm", put(S, lambda t: t[:, 0]))),
    Fault("scale-missing", "vllm", WEIGHTS, "a layer's scales are missing", C.LINT, W,
          tensors("vllm", lambda found: found.pop(S))),
    Fault("float-dtype", "vllm", WEIGHTS, "a norm is float32 instead of bf16", C.PARITY, "model.norm.weight",
          tensors("vllm", put("model.norm.weight", lambda t: t.float())), "model"),
    Fault("norm-changed", "vllm", WEIGHTS, "one element of a norm's weight is changed", C.PARITY, "model.norm.weight",
          tensors("vllm", one("model.norm.weight", 0.5)), "model"),
    Fault("tied-copy", "vllm", WEIGHTS, "an output head that differs from the embedding it is tied to", C.LINT,
          "lm_head.weight", tensors("vllm", add("lm_head.weight", lambda t: t["model.embed_tokens.weight"] + 1))),
    Fault("bias-dropped", "vllm", WEIGHTS, "a bias is missing", C.LINT, f"{Q}.bias",
          tensors("vllm", lambda found: found.pop(f"{Q}.bias"))),
    Fault("norm-dropped", "vllm", WEIGHTS, "a norm's weight is missing", C.LINT, "model.norm.weight",
          tensors("vllm", lambda found: found.pop("model.norm.weight"))),
    Fault("truncated-shard", "vllm", SHARD, "its last 1,000 bytes are missing", C.REOPEN, SHARD,
          file("vllm", SHARD, lambda data: data[:-1000])),
    Fault("missing-shard", "vllm", SHARD, "the file is missing", C.REOPEN, SHARD,
          file("vllm", SHARD, lambda _: None)),
    Fault("unlisted-weights", "vllm", "extra.safetensors", "weights that no manifest lists", C.MANIFEST,
          "extra.safetensors", unlisted("extra.safetensors")),
    Fault("unlisted-adapter", "vllm", "adapter_model.safetensors", "an adapter that no manifest lists", C.MANIFEST,
          "adapter_model.safetensors", unlisted("adapter_model.safetensors")),
    Fault("linked-weights", "vllm", "model.safetensors", "a symbolic link to the same bytes elsewhere", C.MANIFEST,
          ".safetensors: it is a link", linked),
    Fault("stray-shard", "vllm", "extra.safetensors", "weights that the index lacks", C.REOPEN, "extra.safetensors",
          stray),
    Fault("another-loader", "vllm", "params.json", "a configuration that selects another loader", C.PARITY,
          "params.json", file("vllm", "params.json", lambda _: b"{}"), "model"),
    Fault("index-wrong", "vllm", "model.safetensors.index.json", "the index names the wrong shard", C.REOPEN,
          "index.json", json_file("vllm", "model.safetensors.index.json", swapped_index)),
    Fault("config-kernel", "vllm", "config.json", "attention is a hub kernel", C.REOPEN, "attn_implementation",
          json_file("vllm", "config.json", config("attn_implementation", value="someone/kernel"))),
    Fault("config-dtype", "model", "config.json", "dtype names a function of torch", C.REOPEN, "dtype",
          json_file("model", "config.json", config("dtype", value="load"))),
    Fault("ignore-too-short", "vllm", "config.json", "the output head is not in the ignore list", C.REOPEN, "lm_head",
          json_file("vllm", "config.json", config(*BLOCK, "ignore", value=[]))),
    Fault("ignore-too-long", "vllm", "config.json", "a quantized layer is in the ignore list", C.REOPEN, Q,
          json_file("vllm", "config.json", config(*BLOCK, "ignore", value=["lm_head", Q]))),
    Fault("strategy-wrong", "vllm", "config.json", "one scale per tensor is declared", C.REOPEN, "strategy",
          json_file("vllm", "config.json", config(*GROUP, "weights", "strategy", value="tensor"))),
    Fault("activations-static", "vllm", "config.json", "static activation scales are declared", C.REOPEN, "dynamic",
          json_file("vllm", "config.json", config(*GROUP, "input_activations", "dynamic", value=False))),
    Fault("block-missing", "vllm", "config.json", "quantization_config is missing", C.REOPEN,
          "quantization_config",
          json_file("vllm", "config.json", lambda data: data.pop("quantization_config") and None)),
    Fault("untied", "vllm", "config.json", "tie_word_embeddings is false, but there is no head", C.LINT,
          "lm_head.weight", json_file("vllm", "config.json", config("tie_word_embeddings", value=False))),
    Fault("rope-theta", "vllm", "config.json", "rope_theta is changed", C.PARITY, "rope_parameters",
          json_file("vllm", "config.json", config("rope_parameters", "rope_theta", value=1e6)), "model"),
    Fault("norm-epsilon", "vllm", "config.json", "the epsilon of the norms is changed", C.PARITY, "rms_norm_eps",
          json_file("vllm", "config.json", config("rms_norm_eps", value=1e-5)), "model"),
    Fault("activation-function", "vllm", "config.json", "the activation function is changed", C.PARITY, "hidden_act",
          json_file("vllm", "config.json", config("hidden_act", value="gelu")), "model"),
    Fault("head-count", "vllm", "config.json", "eight attention heads instead of four", C.LINT, f"{K}.weight",
          json_file("vllm", "config.json", config("num_attention_heads", value=8))),
    Fault("key-heads", "vllm", "config.json", "four key-value heads instead of two", C.LINT, f"{K}.weight",
          json_file("vllm", "config.json", config("num_key_value_heads", value=4))),
    Fault("tokenizer", "vllm", "tokenizer.json", "a token is renamed", C.PARITY, "tokenizer.json",
          file("vllm", "tokenizer.json", lambda data: data.replace(b'"t7":', b'"t7x":')), "model"),
    Fault("tokenizer-missing", "vllm", "tokenizer.json", "the file is missing", C.PARITY, "tokenizer.json",
          file("vllm", "tokenizer.json", lambda _: None), "model"),
    Fault("chat-template", "vllm", "chat_template.jinja", "line endings are changed", C.PARITY, "chat_template.jinja",
          file("vllm", "chat_template.jinja", lambda data: data.replace(b"\r\n", b"\n")), "model"),
    Fault("chat-template-added", "vllm", "additional_chat_templates/", "a template is added", C.PARITY,
          "tool.jinja", file("vllm", "additional_chat_templates/tool.jinja", lambda _: b"{{ x }}"), "model"),
    Fault("end-of-text", "vllm", "generation_config.json", "a changed eos_token_id", C.PARITY, "generation_config.json",
          json_file("vllm", "generation_config.json", config("eos_token_id", value=5)), "model"),
    Fault("layer-not-listed", "vllm", "manifest.json", "a layer is dropped from the manifest", C.MANIFEST, Q,
          manifest("vllm", without_layer(Q))),
    Fault("layer-shape", "vllm", "manifest.json", "a layer's shape is changed", C.MANIFEST, Q,
          manifest("vllm", layers(Q, shape=[64, 32]))),
    Fault("layer-dynamic", "vllm", "manifest.json", "a stored weight's scale is declared dynamic", C.MANIFEST, Q,
          manifest("vllm", encoding(Q, "weight", dynamic=True))),
    Fault("layer-activation", "vllm", "manifest.json", "inputs are declared with one scale per tensor", C.MANIFEST, Q,
          manifest("vllm", encoding(Q, "activation", granularity="per-tensor"))),
    Fault("layer-scale-rule", "vllm", "manifest.json", "a scale is declared as learned", C.MANIFEST, Q,
          manifest("vllm", encoding(Q, "weight", scale_rule="learned")), "model"),
    Fault("trained-dynamic", "model", "manifest.json", "a stored weight's scale is declared dynamic", C.MANIFEST, Q,
          manifest("model", encoding(Q, "weight", dynamic=True))),
    Fault("layer-not-converted", "vllm", "manifest.json", "a quantized layer is declared unquantized", C.MANIFEST, Q,
          manifest("vllm", layers(Q, weight=None))),
    Fault("number-format", "vllm", "manifest.json", "one scale per tensor is declared", C.MANIFEST, "number_format",
          manifest("vllm", config("number_format", "granularity", value="per-tensor"))),
    Fault("payload", "vllm", "manifest.json", "the payload size is changed", C.MANIFEST, "payload_bytes",
          manifest("vllm", config("details", "payload_bytes", value=1))),
    Fault("gate-removed", "vllm", "manifest.json", "a gate is missing", C.MANIFEST, "weights-bit-exact",
          manifest("vllm", lambda data: data["gates"].pop(1) and None), "model"),
    Fault("gate-edited", "vllm", "manifest.json", "a gate with three differences is marked as passed", C.MANIFEST,
          "weights-bit-exact", manifest("vllm", gate("weights-bit-exact", value=3.0))),
    Fault("gate-value", "vllm", "manifest.json", "a gate's value and threshold are changed", C.MANIFEST,
          "payload-bytes", manifest("vllm", gate("payload-bytes", value=5.0, threshold=5.0)), "model"),
    Fault("parent-digest", "vllm", "manifest.json", "the parent's digest is changed", C.PARENT, "model",
          manifest("vllm", lambda data: data["parents"][0].update(digest="0" * 64, content=None)), "model"),
    Fault("parent-replaced", "model", WEIGHTS, "the parent was rewritten after the export", C.PARENT, "model",
          other_parent, "vllm"),
    Fault("manifest-of-another", "vllm", "manifest.json", "manifest and checksum of another artifact", C.HASH,
          "config.json", copied_manifest, "model"),
)  # fmt: skip

MODEL_FAULTS = (
    Fault("b-not-flushed", "model", "adapter.safetensors", "B holds updates that were not merged", C.LINT,
          f"{Q}.lora_B", tensors("model", one(f"{Q}.lora_B", 0.5), "adapter.safetensors")),
    Fault("adapter-pending", "model", "manifest.json", "the adapter is declared as not yet merged", C.LINT,
          "adapter.safetensors", manifest("model", config("details", "adapter", value="pending"))),
    Fault("model-nan-code", "model", WEIGHTS, "one byte of the codes is 0x7F", C.LINT, W,
          tensors("model", code(W, 0x7F))),
    Fault("model-scale-reciprocal", "model", WEIGHTS, "a scale is stored as 1/scale", C.LINT, S,
          tensors("model", put(S, lambda t: 1 / t))),
    Fault("model-layer", "model", "manifest.json", "a quantized layer is dropped from the manifest", C.MANIFEST, Q,
          manifest("model", without_layer(Q))),
    Fault("model-orientation", "model", "manifest.json", "a weight is declared as stored (in, out)", C.MANIFEST, W,
          manifest("model", config("details", "transposed", value=[W]))),
    Fault("model-format", "model", "manifest.json", "codes are declared as INT8", C.MANIFEST, "number_format",
          manifest("model", config("number_format", "name", value="int8"))),
    Fault("model-no-format", "model", "manifest.json", "codes are declared in no format", C.MANIFEST, "number_format",
          manifest("model", config("number_format", value=None))),
)  # fmt: skip

ENGINE_FAULTS = (
    Fault("input-scale", "modelopt", WEIGHTS, "a static activation scale is halved", C.PARITY, f"{Q}.input_scale",
          tensors("modelopt", put(f"{Q}.input_scale", lambda t: t / 2)), "even"),
    Fault("modelopt-scale", "modelopt", WEIGHTS, "a scale is stored as 1/scale", C.PARITY, S,
          tensors("modelopt", put(S, lambda t: 1 / t)), "even"),
    Fault("modelopt-negative", "modelopt", WEIGHTS, "an activation scale is below zero", C.LINT, f"{Q}.input_scale",
          tensors("modelopt", put(f"{Q}.input_scale", lambda t: -t))),
    Fault("algorithm", "modelopt", "hf_quant_config.json", "quant_algo is changed", C.MANIFEST, "hf_quant_config.json",
          json_file("modelopt", "hf_quant_config.json", config("quantization", "quant_algo", value="W4A8_AWQ"))),
    Fault("excluded", "modelopt", "config.json", "the output head is not in the ignore list", C.MANIFEST, "lm_head",
          json_file("modelopt", "config.json", config("quantization_config", "ignore", value=[]))),
)  # fmt: skip

LANGUAGE_FAULTS = (*EXPORT_FAULTS, *MODEL_FAULTS, *ENGINE_FAULTS)
