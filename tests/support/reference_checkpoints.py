"""Checkpoints in FP8 as the libraries that define the formats write them, and what these libraries read from them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import BLOCK, write_plain
from torch import Tensor

from fp8pipe.models.compat import import_transformers

__all__ = ["MODELOPT", "edit_config", "read_back", "write_compressed_tensors", "write_modelopt", "write_native"]

# ModelOpt's algorithms: shape of the scales of a weight (rows, columns), and what shares one.
MODELOPT: dict[str, Callable[[int, int], tuple[int, ...]]] = {
    "FP8": lambda rows, columns: (),
    "FP8_PER_CHANNEL_PER_TOKEN": lambda rows, columns: (rows,),
    "FP8_PB_WO": lambda rows, columns: (-(-rows // BLOCK), 1, -(-columns // BLOCK), 1),
}


_PROJECTIONS = ("_proj.weight", "_proj_with_mqa.weight")


def edit_config(root: Path, **changes: Any) -> None:
    """Set keys of config.json; None removes one."""
    path = root / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}), encoding="utf-8")


def write_compressed_tensors(root: Path, model: Any, strategy: str, dtype: torch.dtype = torch.bfloat16) -> Path:
    """`model` (changed in place) as compressed-tensors compresses and saves it; scales in `dtype`, the model's."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        QuantizationStatus,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.utils import calculate_qparams

    shared = {"block_structure": [BLOCK, BLOCK]} if strategy == "block" else {}
    weights = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy=strategy, **shared)
    inputs = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy="token", dynamic=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)
    model.to(dtype)
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"]))
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is None:
            continue
        low, high = _extremes(module.weight.data.float(), strategy)
        module.weight_scale.data = calculate_qparams(low, high, weights)[0].to(dtype)
        module.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(root)
    compressor.update_config(root)
    return root


def _extremes(weight: Tensor, strategy: str) -> tuple[Tensor, Tensor]:
    if strategy == "tensor":
        return weight.min().view(1), weight.max().view(1)
    if strategy == "channel":
        return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    rows, columns = (-(-side // BLOCK) * BLOCK - side for side in weight.shape)
    tiles = torch.nn.functional.pad(weight, (0, columns, 0, rows)).unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
    return tiles.amin((1, 3)), tiles.amax((1, 3))


def write_native(root: Path, model: Any, scale_format: str = "float") -> Path:
    """`model` with its projections in blocks, as transformers quantizes them (`quant_method: fp8`)."""
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    settings = import_transformers().FineGrainedFP8Config(
        modules_to_not_convert=["lm_head"], **({"scale_fmt": scale_format} if scale_format != "float" else {})
    )
    quantize = Fp8Quantize(SimpleNamespace(quantization_config=settings))
    write_plain(root, model)
    stored: dict[str, Tensor] = {}
    for name, value in load_file(root / "model.safetensors").items():
        stored |= quantize.convert({name: value}) if name.endswith(_PROJECTIONS) else {name: value}
    save_file(stored, root / "model.safetensors", metadata={"format": "pt"})
    edit_config(root, quantization_config=settings.to_dict())
    return root


def read_back(
    root: Path, config: Any, dtype: torch.dtype = torch.bfloat16, *, every: bool = False
) -> dict[str, Tensor]:
    """What transformers loads of a checkpoint when it is asked to dequantize; `config` is the format's class.

    Weights and biases, or `every` tensor of the model.
    """
    model = import_transformers().AutoModelForCausalLM.from_pretrained(
        root, quantization_config=config(dequantize=True), dtype=dtype
    )
    state = model.state_dict()
    return {name: tensor for name, tensor in state.items() if every or name.endswith((".weight", ".bias"))}


def write_modelopt(root: Path, model: Any, algorithm: str, *, beside: bool = True) -> dict[str, np.ndarray]:
    """`model` in ModelOpt's layout, and the values by its definition, in numpy: code * scale, as bfloat16.

    `beside`: declared in hf_quant_config.json alone, as its early versions do, not in config.json.
    """
    write_plain(root, model)
    stored: dict[str, Tensor] = {}
    values: dict[str, np.ndarray] = {}
    for name, value in load_file(root / "model.safetensors").items():
        stored[name] = value
        values[name] = value.float().numpy().astype(ml_dtypes.bfloat16)
        if not name.endswith("_proj.weight"):
            continue
        weight = value.float().numpy()
        shape = MODELOPT[algorithm](*weight.shape)
        scale = np.asarray(0.0003 + np.random.default_rng(len(name)).random(shape) * 0.0004, np.float32)
        spread = scale.reshape(-1, 1) if scale.ndim == 1 else scale
        if scale.ndim == 4:
            spread = np.kron(scale[:, 0, :, 0], np.ones((BLOCK, BLOCK), np.float32))
            spread = spread[: weight.shape[0], : weight.shape[1]]
        codes = np.clip(weight / spread, -448, 448).astype(ml_dtypes.float8_e4m3fn)
        values[name] = (codes.astype(np.float32) * spread).astype(ml_dtypes.bfloat16)
        stored[name] = torch.from_numpy(codes.view(np.uint8)).view(torch.float8_e4m3fn)
        stored[name + "_scale"] = torch.from_numpy(scale)
        stored[name.removesuffix("weight") + "input_scale"] = torch.tensor(0.1)
    save_file(stored, root / "model.safetensors", metadata={"format": "pt"})
    quantization = {"quant_algo": algorithm, "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}
    if beside:
        text = json.dumps({"producer": {"name": "modelopt"}, "quantization": quantization})
        (root / "hf_quant_config.json").write_text(text, encoding="utf-8")
    else:
        edit_config(root, quantization_config={"quant_method": "modelopt", **quantization})
    return values
