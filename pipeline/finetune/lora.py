"""The methods FALQON is compared with, on the same loop and data: LoRA on bf16 weights, and QLoRA on NF4.

Both use peft with its usual recipe: fp32 adapter weights, bf16 compute by autocast, every linear layer that FALQON
would convert. They end as merged bf16 weights, which an export may then quantize. Baselines for honest
comparison, never a dependency of the product's own path.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from fp8pipe.artifact import LayerRecord
from fp8pipe.models.compat import import_package
from pipeline.falqon.convert import left_out_records, read_convertible
from pipeline.falqon.final_merge import Inputs
from pipeline.falqon.flush import FlushReport
from pipeline.falqon.gradient import Losses
from pipeline.finetune.weights import Deployed, Weights

_INSTALL = "pip install 'fp8pipe[train]'"


class LoraMethod:
    """LoRA (`quantized=False`) or QLoRA by peft.

    Args:
        rank: of the adapter.
        alpha: the update is scaled by `alpha / rank`.
        seed: of A's random initialisation.
        quantized: hold the base weights as NF4 (bitsandbytes, double quantization, bf16 compute).
    """

    def __init__(self, *, rank: int, alpha: float, seed: int, quantized: bool) -> None:
        self.rank, self.alpha, self.seed, self.quantized = rank, alpha, seed, quantized
        self.names: tuple[str, ...] = ()
        self._transposed: dict[str, bool] = {}
        self._peft: Any = None

    def prepare(
        self, model: nn.Module, stored: dict[str, Tensor] | None = None, losses: Losses | None = None
    ) -> list[LayerRecord]:
        """Insert the adapters in place; the seed fixes A, so neither `stored` nor `losses` is needed."""
        structure = read_convertible(model, self.rank)
        records = left_out_records(structure)
        peft = import_package("peft", "the lora and qlora baselines need peft", _INSTALL)
        self.names = structure.trainable
        self._transposed = {name: structure.transposed(name) for name in self.names}
        if self.quantized:
            for name in self.names:
                _to_nf4(model, name, structure.weight(model, name))
        torch.manual_seed(self.seed)
        config = peft.LoraConfig(
            r=self.rank, lora_alpha=self.alpha, target_modules=list(self.names), lora_dropout=0.0,
            fan_in_fan_out=any(self._transposed.values()) and not self.quantized,
        )  # fmt: skip
        self._peft = peft.get_peft_model(model, config)
        how = "NF4 with adapter" if self.quantized else "bf16 with adapter"
        records += [LayerRecord(name=n, reason=how, shape=structure.shape(n)) for n in self.names]
        return records

    def parameters(self) -> dict[str, nn.Parameter]:
        """A and B of every layer."""
        return {name: p for name, p in self._peft.named_parameters() if p.requires_grad}

    def forward_context(self) -> AbstractContextManager[Any]:
        """bf16 autocast: fp32 adapters, bf16 products."""
        return torch.autocast(next(iter(self.parameters().values())).device.type, dtype=torch.bfloat16)

    def after_step(self, step: int, measure: bool) -> FlushReport | None:
        """Nothing is flushed."""
        return None

    def health(self, step: int) -> FlushReport | None:
        """Nothing is rounded before the export."""
        return None

    def base_state(self) -> dict[str, Tensor]:
        """Nothing: the seed fixes it."""
        return {}

    def step_state(self) -> dict[str, Tensor]:
        """The adapters."""
        return {name: p.detach() for name, p in self.parameters().items()}

    def load_step_state(self, state: dict[str, Tensor]) -> None:
        """Restore the adapters in place."""
        for name, parameter in self.parameters().items():
            parameter.data.copy_(state[name])

    def finish(self, model: nn.Module, inputs: Inputs) -> dict[str, FlushReport]:
        """Merge the adapters into bf16 weights; NF4 weights are dequantized first, as they were trained."""
        for name in self.names:
            _merge(model, name)
        return {}

    def deployed_weights(self) -> Weights:
        """The merged bf16 weights, in the checkpoint's orientation, by linear layer."""
        weights: Weights = {}
        for name in self.names:
            weight = self._peft.base_model.model.get_submodule(name).weight.detach()
            stored = weight.t().contiguous() if self.quantized and self._transposed[name] else weight
            weights[name] = Deployed(stored.to(torch.bfloat16), None, self._transposed[name])
        return weights

    def adapter(self) -> dict[str, Tensor]:
        """Nothing: it has been merged."""
        return {}


def _to_nf4(model: nn.Module, name: str, weight: Tensor) -> None:
    bitsandbytes = import_package("bitsandbytes", "the qlora baseline needs bitsandbytes", _INSTALL)
    old = model.get_submodule(name)
    bias = getattr(old, "bias", None)
    new = bitsandbytes.nn.Linear4bit(
        weight.shape[1], weight.shape[0], bias=bias is not None, compute_dtype=torch.bfloat16,
        compress_statistics=True, quant_type="nf4",
    )  # fmt: skip
    # In evaluation mode bitsandbytes repacks NF4 for CPU inference, a layout that the merge could not read.
    new.support_avx512bf16_for_cpu = False
    new.weight = bitsandbytes.nn.Params4bit(
        weight.contiguous(), requires_grad=False, quant_type="nf4", compress_statistics=True
    )
    if bias is not None:
        new.bias = nn.Parameter(bias.detach(), requires_grad=False)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new.to(weight.device))  # .to() quantizes


@torch.no_grad()
def _merge(model: nn.Module, name: str) -> None:
    """Replace the adapted layer by a plain one holding `W + B A alpha / rank`, added in fp32."""
    layer: Any = model.get_submodule(name)
    base = layer.get_base_layer()
    weight = base.weight
    if getattr(weight, "quant_state", None) is not None:
        import bitsandbytes

        weight = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    merged = (weight.float() + layer.get_delta_weight("default").float()).to(torch.bfloat16)
    if isinstance(base, nn.Linear) and merged.shape != base.weight.shape:  # NF4 is packed: a plain layer instead
        bias = base.bias
        base = nn.Linear(merged.shape[1], merged.shape[0], bias=False, device="meta")
        base.bias = bias
    base.weight = nn.Parameter(merged, requires_grad=False)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, base)
