"""Faults in exports to vLLM with weights and inputs in NVFP4."""

from __future__ import annotations

from collections.abc import Callable

import torch
from fault_case import Fault, encoding, json_file, manifest, tensors
from faults_language import put, swap
from torch import Tensor

from fp8pipe.artifact.finding import Check

__all__ = ["NVFP4_FAULTS"]

LAYER, K = "model.layers.0.mlp.down_proj", "model.layers.0.self_attn.k_proj"
GATE, UP = "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"
W, X = f"{LAYER}.weight", f"{LAYER}.input_global_scale"
WEIGHTS = "safetensors"
C = Check


def byte(name: str, change: Callable[[int], int]) -> Callable[[dict[str, Tensor]], None]:
    """One byte of codes or block scales."""

    def edit(found: dict[str, Tensor]) -> None:
        held = found[name].view(torch.uint8)
        held[3, 5] = change(int(held[3, 5]))

    return edit


def of_inputs(data: dict) -> None:
    data["quantization_config"]["config_groups"]["group_0"]["input_activations"]["dynamic"] = True


def doubled(scale: Tensor) -> Tensor:
    return 2 * scale


NVFP4_FAULTS = (
    Fault("nvfp4-code-changed", "four-bits", WEIGHTS, "one E2M1 code has the other sign", C.PARITY, W,
          tensors("four-bits", byte(f"{W}_packed", lambda code: code ^ 0x80)), "wide"),
    Fault("nvfp4-block-scale", "four-bits", WEIGHTS, "one block scale is the next E4M3 number", C.PARITY, W,
          tensors("four-bits", byte(f"{W}_scale", lambda code: code - 1)), "wide"),
    Fault("nvfp4-block-scale-nan", "four-bits", WEIGHTS, "one block scale is NaN", C.LINT, f"{W}_scale",
          tensors("four-bits", byte(f"{W}_scale", lambda code: 0x7F))),
    Fault("nvfp4-block-scale-subnormal", "four-bits", WEIGHTS, "one block scale is below 2^-6", C.LINT, f"{W}_scale",
          tensors("four-bits", byte(f"{W}_scale", lambda code: 0x07))),
    Fault("nvfp4-global-scale-reciprocal", "four-bits", WEIGHTS, "a global scale is stored instead of its reciprocal",
          C.LINT, f"{W}_global_scale", tensors("four-bits", put(f"{W}_global_scale", lambda scale: 1 / scale))),
    Fault("nvfp4-global-scales-doubled", "four-bits", WEIGHTS, "a layer's divisor is twice as large", C.PARITY,
          f"{W}_global_scale", tensors("four-bits", put(f"{W}_global_scale", doubled)), "wide"),
    Fault("nvfp4-fused-scale", "four-bits", WEIGHTS, "one divisor of q, k and v is twice as large", C.LINT,
          f"{K}.weight_global_scale", tensors("four-bits", put(f"{K}.weight_global_scale", doubled))),
    Fault("nvfp4-scales-swapped", "four-bits", WEIGHTS, "the block scales of gate and up are swapped", C.PARITY,
          f"{GATE}.weight", tensors("four-bits", swap(f"{GATE}.weight_scale", f"{UP}.weight_scale")), "wide"),
    Fault("input-scale-doubled", "four-bits", WEIGHTS, "the scale of a layer's inputs is twice as large", C.REOPEN, X,
          tensors("four-bits", put(X, doubled))),
    Fault("input-scale-fused", "four-bits", WEIGHTS, "that of one of q, k and v is twice as large", C.LINT,
          f"{K}.input_global_scale", tensors("four-bits", put(f"{K}.input_global_scale", doubled))),
    Fault("input-scale-missing", "four-bits", WEIGHTS, "that of one layer is missing", C.LINT, X,
          tensors("four-bits", lambda found: found.pop(X))),
    Fault("input-scale-infinite", "four-bits", WEIGHTS, "that of one layer is infinite", C.LINT, X,
          tensors("four-bits", put(X, lambda scale: scale / 0))),
    Fault("inputs-dynamic", "four-bits", "config.json", "inputs are declared without a stored scale", C.REOPEN,
          "input_activations.dynamic", json_file("four-bits", "config.json", of_inputs)),
    Fault("inputs-in-fp8", "four-bits", "manifest.json", "the inputs of a layer are said to be in FP8", C.MANIFEST,
          LAYER, manifest("four-bits", encoding(LAYER, "activation", format="e4m3", bits=8))),
)  # fmt: skip
