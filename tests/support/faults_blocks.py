"""Faults in exports to vLLM with one scale per block."""

from __future__ import annotations

import torch
from fault_case import Fault, encoding, json_file, manifest, tensors
from faults_language import code, one, put, swap
from torch import Tensor

from fp8pipe.artifact.finding import Check

__all__ = ["BLOCK_FAULTS"]

LAYER = "model.layers.0.mlp.down_proj"
W, S = f"{LAYER}.weight", f"{LAYER}.weight_scale"
GATE, UP = "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"
WEIGHTS = "safetensors"
C = Check


def doubled(found: dict[str, Tensor]) -> None:
    found[S][1, 2] *= 2


def of_weights(key: str, value: object) -> object:
    def change(data: dict) -> None:
        data["quantization_config"]["config_groups"]["group_0"]["weights"][key] = value

    return change


BLOCK_FAULTS = (
    Fault("block-scale-doubled", "blocks", WEIGHTS, "the scale of one block is twice as large", C.PARITY, W,
          tensors("blocks", doubled), "wide"),
    Fault("block-code-off-by-one", "blocks", WEIGHTS, "one E4M3 code is off by one", C.PARITY, W,
          tensors("blocks", code(W)), "wide"),
    Fault("block-scales-swapped", "blocks", WEIGHTS, "the block scales of gate and up are swapped", C.PARITY,
          f"{GATE}.weight", tensors("blocks", swap(f"{GATE}.weight_scale", f"{UP}.weight_scale")), "wide"),
    Fault("block-scale-zero", "blocks", WEIGHTS, "the scale of one block is zero", C.LINT, S,
          tensors("blocks", one(S, 0.0))),
    Fault("block-scale-nan", "blocks", WEIGHTS, "the scale of one block is NaN", C.LINT, S,
          tensors("blocks", one(S, float("nan")))),
    Fault("block-scales-transposed", "blocks", WEIGHTS, "the block scales are stored transposed", C.LINT, S,
          tensors("blocks", put(S, lambda scale: scale.t().contiguous()))),
    Fault("block-scales-by-row", "blocks", WEIGHTS, "a layer has one scale per row instead", C.LINT, W,
          tensors("blocks", put(S, lambda scale: torch.full((256, 1), float(scale[0, 0]))))),
    Fault("block-size", "blocks", "config.json", "blocks are declared as 64 x 64", C.REOPEN, "block_structure",
          json_file("blocks", "config.json", of_weights("block_structure", [64, 64]))),
    Fault("block-granularity", "blocks", "manifest.json", "a layer is said to have one scale per row", C.MANIFEST,
          LAYER, manifest("blocks", encoding(LAYER, "weight", granularity="per-channel"))),
)  # fmt: skip
