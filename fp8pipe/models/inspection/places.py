"""Inspects a path: a Hugging Face directory, an artifact, or a single safetensors, ONNX or GGUF file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from fp8pipe.core.errors import ConfigurationError, Fp8PipeError
from fp8pipe.models.checkpoint.adapters import Adapter, read_adapter
from fp8pipe.models.checkpoint.blame import unusable
from fp8pipe.models.checkpoint.quantized.base import read_base
from fp8pipe.models.checkpoint.quantized.scheme import QUANT_FILE
from fp8pipe.models.checkpoint.tensors import SINGLE_NAME
from fp8pipe.models.checkpoint.weightless import pickled_weights, weightless
from fp8pipe.models.compat import import_package
from fp8pipe.models.inspection.contents import Contents, LayerView
from fp8pipe.models.inspection.safetensors_layers import StoredTensor, count_ends, read_headers, read_layers

_INDEX: Final = "model.safetensors.index.json"
_TOKENIZERS: Final = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_PREPROCESSING: Final = ("preprocessing.json", "preprocessor_config.json", "processor_config.json")
_FIX: Final = "fetch or write it again"
_PACKED_BITS: Final = 4  # assumed width of packed codes if config.json declares none
_ADAPTER: Final = "adapter.safetensors"  # not weights of the model itself


def inspect_contents(path: Path, *, look: bool = True) -> Contents:
    """Inspect a checkpoint.

    Args:
        path: a directory, or a .safetensors, .onnx or .gguf file.
        look: also read codes and scales, for counts and histograms; otherwise only headers are read.

    Raises:
        ConfigurationError: the path does not exist, or contains no weights in a known file format.
        BadArtifactError, ConfigurationError: a file cannot be read; see `unusable`.
        MissingCapabilityError: the package for ONNX or GGUF files is not installed.
    """
    if path.is_dir():
        return _directory(path, look)
    readers = {".onnx": read_onnx, ".gguf": read_gguf}
    if path.is_file() and path.suffix in readers:
        return readers[path.suffix](path, look=look)
    if path.is_file() and path.suffix == ".safetensors":
        return Contents("safetensors", read_layers(read_headers(path), look=look))
    raise ConfigurationError(
        f"{path} cannot be inspected",
        why="there is no such path" if not path.exists() else f"a file of type '{path.suffix}'",
        fix="give an artifact, a checkpoint's directory, or a .safetensors, .onnx or .gguf file",
    )


def _directory(root: Path, look: bool) -> Contents:
    model, ggufs = root / "model.onnx", sorted(root.glob("*.gguf"))
    files = [f for f in sorted(root.glob("*.safetensors")) if f.name != _ADAPTER]
    config = _json(root / "config.json")
    if model.is_file():
        contents = read_onnx(model, look=look)
    elif files:
        method, bits = _method(config)
        tensors: dict[str, StoredTensor] = {}
        for file in files:
            tensors |= read_headers(file)
        contents = Contents(method, read_layers(tensors, bits, block=_block(config), look=look))
        contents.notes += _index_notes(root, tensors)
        if (said := _as_base(root, config)) is not None:
            contents.facts["as_base"] = said
    elif ggufs:
        contents = read_gguf(ggufs[0], look=look)
    elif read_adapter(root) is not None:
        contents = Contents("PEFT adapter", notes=["its weights are pickled, and not read"])
    elif pickled_weights(root):
        raise weightless(root, (SINGLE_NAME, _INDEX))
    else:
        raise ConfigurationError(
            f"{root} holds no weights that can be inspected",
            why="no .safetensors, model.onnx or .gguf file is in it",
            fix="give the directory of a checkpoint, or a file",
        )
    contents.facts |= _facts(root, config)
    if (adapter := read_adapter(root)) is not None:
        _describe(contents, adapter, alone=not (root / "config.json").is_file())
    return contents


def _describe(contents: Contents, adapter: Adapter, *, alone: bool) -> None:
    """Add to `contents` what a PEFT adapter changes, and how to use it.

    Args:
        contents: the inspection result so far; changed in place.
        adapter: the adapter in the inspected directory.
        alone: the directory contains only the adapter, not its base model.
    """
    contents.facts |= {
        "adapter": adapter.kind or "of an unknown kind", "base_model": adapter.base or "not named",
        "rank": list(adapter.ranks), "alpha": adapter.alpha, "targets": list(adapter.targets),
    }  # fmt: skip
    if adapter.modules:
        contents.facts["replaced_whole"] = list(adapter.modules)
    if alone:
        contents.form = "PEFT adapter"
        contents.notes.append(f"an adapter is not a model on its own: {adapter.merge}")
    else:
        contents.notes.append(
            f"a PEFT adapter lies next to the model, so it is unclear which one is meant: {adapter.merge}"
        )


def _method(config: Mapping[str, Any]) -> tuple[str, int]:
    """Description of the quantization method in config.json, and the width of packed codes in bits.

    Malformed entries are described or ignored, not reported as errors.
    """
    declared = config.get("quantization_config") or {}
    if not isinstance(declared, dict):
        return "of an unknown form (quantization_config is no mapping)", _PACKED_BITS
    method = str(declared.get("quant_method", "plain"))
    detail = declared.get("format") or declared.get("quant_algo") or declared.get("fmt")
    groups = declared.get("config_groups")
    weights = [_mapping(group).get("weights") for group in _mapping(groups).values()]
    widths = [declared.get("bits"), *(_mapping(one).get("num_bits") for one in weights)]
    bits = next((x for x in widths if isinstance(x, int) and x > 0), _PACKED_BITS)
    size = declared.get("weight_block_size")
    blocks = f"blocks of {size[0]}x{size[1]}" if isinstance(size, list) and len(size) == 2 else f"blocks of {size!r}"
    shown = [str(x) for x in (detail, blocks if size else None) if x]
    return method + (f" ({', '.join(shown)})" if shown else ""), bits


def _block(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of the blocks with one scale each that config.json declares; None if it declares none."""
    declared = _mapping(config.get("quantization_config"))
    groups = [_mapping(_mapping(group).get("weights")) for group in _mapping(declared.get("config_groups")).values()]
    for size in (declared.get("weight_block_size"), *(group.get("block_structure") for group in groups)):
        if isinstance(size, list) and len(size) == 2 and all(isinstance(x, int) and x > 0 for x in size):
            return size[0], size[1]
    return None


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _as_base(root: Path, config: Mapping[str, Any]) -> str | None:
    """Whether `finetune` and `export` accept a quantized checkpoint as base model, as a message for the user.

    None for an artifact or for a checkpoint that is not quantized.
    """
    declared = any(config.get(key) for key in ("quantization_config", "compression_config"))
    if (root / "manifest.json").is_file() or not (declared or (root / QUANT_FILE).is_file()):
        return None
    try:
        stored = read_base(root).stored
    except Fp8PipeError as error:
        return f"cannot be one: {error.why}"
    return None if stored is None else f"can be one: {stored}"


def _facts(root: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if config:
        named = config.get("architectures")
        found["architecture"] = ", ".join(map(str, named)) or None if isinstance(named, list) else named
        found["tokenizer"] = next((name for name in _TOKENIZERS if (root / name).is_file()), None)
        in_settings = "chat_template" in _json(root / "tokenizer_config.json")
        found["chat_template"] = in_settings or (root / "chat_template.jinja").is_file()
    if (name := next((name for name in _PREPROCESSING if (root / name).is_file()), None)) is not None:
        found["preprocessing"] = _json(root / name)
    return found


def _index_notes(root: Path, tensors: Mapping[str, StoredTensor]) -> list[str]:
    index = _json(root / _INDEX).get("weight_map")
    if not isinstance(index, dict):
        return []
    wrong = [n for n, f in index.items() if n not in tensors or tensors[n].file.name != f]
    wrong += [name for name in tensors if name not in index]
    return [f"{_INDEX} disagrees with its files in {len(wrong)} tensors, the first: {wrong[0]}"] if wrong else []


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise unusable(path, f"{path} is not readable JSON", why=str(error), fix=_FIX) from error
    return data if isinstance(data, dict) else {}


_ONNX_FORMATS: Final = {
    "INT8": "int8", "UINT8": "uint8", "INT4": "int4", "UINT4": "uint4", "FLOAT8E4M3FN": "fp8-e4m3",
    "FLOAT8E5M2": "fp8-e5m2", "FLOAT4E2M1": "nvfp4", "FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16",
}  # fmt: skip
# For each GGUF block format: size of a block in bytes, and offset of the fp16 scale within the block.
_GGUF_SCALES: Final = {
    "Q8_0": (34, 0), "Q4_0": (18, 0), "Q4_1": (20, 0), "Q5_0": (22, 0), "Q5_1": (24, 0), "Q2_K": (84, 80),
    "Q3_K": (110, 108), "Q4_K": (144, 0), "Q5_K": (176, 0), "Q6_K": (210, 208),
}  # fmt: skip


def read_onnx(path: Path, *, look: bool = True) -> Contents:
    """Inspect an ONNX graph: stored weights with their DequantizeLinear scales, inputs, outputs and operator counts.

    Args:
        path: the ONNX file.
        look: also read codes and scales.

    Raises:
        BadArtifactError, ConfigurationError: the file cannot be read as ONNX; see `unusable`.
        MissingCapabilityError: onnx-ir is not installed.
    """
    ir = import_package("onnx_ir", "onnx_ir is not installed", "pip install 'fp8pipe[onnx]'")
    try:
        model = ir.load(path)
    except Exception as error:  # protobuf's own error type is not public
        raise unusable(path, f"{path} cannot be read as an ONNX graph", why=str(error)[:300], fix=_FIX) from error
    contents = Contents(f"ONNX, opset {model.opset_imports.get('')}, IR {model.ir_version}")
    decoders = {n.inputs[0]: n for n in model.graph if n.op_type == "DequantizeLinear" and n.inputs[0] is not None}
    rest = 0
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            continue
        if len(value.const_value.shape) >= 2:
            contents.layers.append(_onnx_layer(str(name), value, decoders.get(value), look))
        else:
            rest += value.const_value.nbytes
    contents.layers.append(LayerView("other stored tensors", "small", None, rest))
    operators = Counter(node.op_type for node in model.graph)
    contents.facts = {
        "inputs": [f"{v.name} {v.dtype.name if v.dtype else '?'} {v.shape}" for v in model.graph.inputs],
        "outputs": [f"{v.name} {v.dtype.name if v.dtype else '?'} {v.shape}" for v in model.graph.outputs],
        "operators": dict(operators.most_common()),
        "activation_quantizers": operators["QuantizeLinear"],
    }
    return contents


def _onnx_layer(name: str, value: Any, decoder: Any, look: bool) -> LayerView:
    codes = value.const_value
    format = _ONNX_FORMATS.get(value.dtype.name, value.dtype.name.lower())
    shape = tuple(int(side) for side in codes.shape)
    if decoder is None:
        return LayerView(name, format, shape, codes.nbytes)
    scale = decoder.inputs[1]
    stored = None if scale is None or scale.const_value is None else scale.const_value
    view = LayerView(name, format, shape, codes.nbytes + (0 if stored is None else stored.nbytes))
    if stored is None:
        view.granularity = "computed scales"
        return view
    count = int(np.prod([int(side) for side in stored.shape], dtype=np.int64))
    channels = shape[decoder.attributes.get_int("axis", 1)] if len(stored.shape) == 1 else 0
    view.granularity = "per-tensor" if count == 1 else "per-channel" if count == channels else "per-block"
    if look:
        view.scales.add(np.asarray(stored.numpy(), dtype=np.float64))
        view.add_codes(*_onnx_codes(codes.numpy(), format))
    return view


def _onnx_codes(array: np.ndarray, format: str) -> tuple[int, int, int]:
    if format in ("int4", "uint4"):  # numpy stores one 4-bit value per byte
        low, high = (-8, 7) if format == "int4" else (0, 15)
        values = array.astype(np.int16)
        return values.size, int(((values <= low) | (values >= high)).sum()), 0
    if format == "nvfp4":
        return array.size, int((np.abs(array.astype(np.float32)) >= 6).sum()), 0
    if format == "uint8":
        return array.size, int(np.isin(array, (0, 255)).sum()), 0
    return count_ends(np.ascontiguousarray(array).view(np.uint8).reshape(-1), format)


def read_gguf(path: Path, *, look: bool = True) -> Contents:
    """Inspect a GGUF file; tensors are memory-mapped and read one at a time.

    Args:
        path: the GGUF file.
        look: also read the scales of the block formats; codes are never counted.

    Raises:
        BadArtifactError, ConfigurationError: the file cannot be read as GGUF; see `unusable`.
        MissingCapabilityError: gguf is not installed.
    """
    gguf = import_package("gguf", "gguf is not installed", "pip install 'fp8pipe[samples]'")
    try:
        reader = gguf.GGUFReader(str(path))
    except Exception as error:  # the reader raises whatever numpy raises
        raise unusable(path, f"{path} cannot be read as GGUF", why=str(error)[:300], fix=_FIX) from error
    contents = Contents("GGUF")
    for tensor in reader.tensors:
        kind = tensor.tensor_type.name
        shape = tuple(int(side) for side in tensor.shape[::-1])
        view = LayerView(tensor.name.removesuffix(".weight"), kind.lower(), shape, int(tensor.n_bytes))
        if kind in _GGUF_SCALES:
            view.granularity = "per-block"
        if look and kind in _GGUF_SCALES:
            width, place = _GGUF_SCALES[kind]
            rows = tensor.data.reshape(-1).view(np.uint8).reshape(-1, width)
            view.scales.add(np.abs(np.ascontiguousarray(rows[:, place : place + 2]).view("<f2")))
        contents.layers.append(view)
    fields = reader.fields
    contents.facts = {
        "architecture": _text(fields.get("general.architecture")),
        "name": _text(fields.get("general.name")),
        "tokenizer": "tokenizer.ggml.tokens" in fields,
        "chat_template": "tokenizer.chat_template" in fields,
    }
    return contents


def _text(field: Any) -> str | None:
    return None if field is None else bytes(field.parts[field.data[0]]).decode("utf-8", "replace")
