"""The interface of training methods, with which FALQON and its baselines run in the same loop, and the baselines.

The baselines are LoRA on bf16 weights and QLoRA on NF4 weights, for a fair comparison with FALQON, which itself needs
neither peft nor bitsandbytes. Both use peft in its usual setup, with fp32 adapter weights and bf16 compute by autocast,
on every linear layer that FALQON would convert. Their result is merged bf16 weights, which an export may quantize.

`export_warnings` is defined here as well, as whether a tuned model can be exported depends on the method.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from exporters.target import foresee
from fp8pipe.artifact import LayerRecord
from fp8pipe.artifact.kinds import FALQON_KIND, LORA_KIND
from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.compat import import_package
from pipeline.falqon.base_files import BaseFiles
from pipeline.falqon.convert import left_out_records, read_convertible
from pipeline.falqon.final_merge import Inputs
from pipeline.falqon.flush import FlushReport
from pipeline.falqon.observed import Losses
from pipeline.finetune.weights import Deployed, Weights

_INSTALL = "pip install 'fp8pipe[train]'"
_SHOWN = 3  # maximum number of kinds of findings that a warning lists


def export_warnings(base: Path, method: str, precision: str | None, trained: Collection[str]) -> list[str]:
    """Warn before training starts if the default export of the tuned model would fail.

    Args:
        base: the model's directory; only file headers are read.
        method: the training method: `falqon`, `lora` or `qlora`.
        precision: `fp8` or `nvfp4`; None if weights are in bf16 after training.
        trained: names in the checkpoint of the linear layers that will be trained.

    Returns:
        One warning with the reasons and the exports that will work; an empty list for most models.

    Raises:
        ConfigurationError: no export of the tuned model would be possible.
    """
    packed = precision == "nvfp4"  # in which only one export writes the weights, and takes the layers it would round
    forms = foresee(base, FALQON_KIND if method == "falqon" and not packed else LORA_KIND, trained)
    forms = {words: found for words, found in forms.items() if words.endswith("--format nvfp4") or not packed}
    usual = next(iter(forms))
    if not forms[usual]:
        return []
    rules = dict.fromkeys(finding.rule for finding in forms[usual])
    firsts = [next(f for f in forms[usual] if f.rule == rule) for rule in list(rules)[:_SHOWN]]
    counts = Counter(finding.rule for finding in forms[usual])
    why = "; ".join(f"{first}{_more(counts[first.rule] - 1)}" for first in firsts)
    remaining = [form for form, findings in forms.items() if not findings]
    if not remaining:
        raise ConfigurationError(
            f"no export of the tuned model would be possible: {base}",
            why=why,
            fix="use --precision fp8" if packed else firsts[0].fix or "use another model",
        )
    works = " or ".join(f"fp8pipe export {form}" for form in remaining)
    return [f"fp8pipe export {usual} will refuse the tuned model: {why}. What will work: {works}"]


def _more(count: int) -> str:
    return f" (and {count} more like it)" if count else ""


class Method(Protocol):
    """A fine-tuning method, implemented by `pipeline.falqon.method.FalqonMethod` and `LoraMethod`.

    Attributes:
        names: module paths of the linear layers that are trained.
        exact_casts: whether all FP8 scales are powers of two, so that decoder layers may be compiled.
    """

    names: tuple[str, ...] = ()
    exact_casts: bool = False

    def prepare(
        self, model: nn.Module, base: BaseFiles | None = None, losses: Losses | None = None
    ) -> list[LayerRecord]:
        """Change `model` in place so that only the method's parameters are trained.

        Args:
            model: the model as loaded.
            base: where results are written that the seed alone does not determine, and read by a resumed run.
            losses: runs a few training batches on the unprepared model and yields the loss of each.

        Returns:
            One record per linear layer, trained or not.
        """

    def parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name; a resumed run must use the same names."""

    def forward_context(self) -> AbstractContextManager[Any]:
        """The context of every forward pass (autocast, or none)."""
        return nullcontext()

    def after_step(self, step: int, measure: bool) -> FlushReport | None:
        """Called after each optimizer step.

        Args:
            step: number of the step, from 0.
            measure: whether to fill in the report.

        Returns:
            A report if the method flushed its update into the weights, otherwise None.
        """
        return None

    def health(self, step: int) -> FlushReport | None:
        """Report how much of the pending update a flush would apply now; None if the method has no flush."""
        return None

    def step_state(self) -> dict[str, Tensor]:
        """The tensors that steps change, apart from the optimizer state; stored in every checkpoint."""

    def load_step_state(self, state: dict[str, Tensor]) -> None:
        """Restore `step_state` in place."""

    def finish(self, model: nn.Module, inputs: Inputs, losses: Losses | None = None) -> dict[str, FlushReport]:
        """Merge the adapter into the weights at the end of training.

        Args:
            model: the trained model, changed in place.
            inputs: returns an iterable over keyword arguments of the model, for methods that calibrate the merge.
            losses: runs the same batches and yields the loss of each, with its autograd graph, for methods that
                calibrate it by gradients.

        Returns:
            A report of the final merge for each layer; empty if the method does not report it.
        """

    def deployed_weights(self) -> Weights:
        """The final weights in the checkpoint's orientation, by module path; call it after `finish`."""

    def adapter(self) -> dict[str, Tensor]:
        """The adapter's tensors, which are saved next to the weights; empty if the adapter is not saved."""
        return {}


class LoraMethod(Method):
    """LoRA (`quantized=False`) or QLoRA, with peft.

    Args:
        rank: rank of the adapter.
        alpha: the update is scaled by `alpha / rank`.
        seed: seed of A's random initialisation.
        quantized: keep the base weights in NF4 (bitsandbytes, double quantization, bf16 compute).
    """

    place: torch.device | None = None  # where weights are quantized, if not where they are
    waits: torch.device | None = None  # where packed weights are until they are used, if not where they are quantized

    def __init__(self, *, rank: int, alpha: float, seed: int, quantized: bool) -> None:
        self.rank, self.alpha, self.seed, self.quantized = rank, alpha, seed, quantized
        self._transposed: dict[str, bool] = {}
        self._dtype = torch.bfloat16
        self._peft: Any = None

    def prepare(
        self, model: nn.Module, base: BaseFiles | None = None, losses: Losses | None = None
    ) -> list[LayerRecord]:
        """Insert the adapters in place; `base` and `losses` are not used, as A follows from the seed."""
        structure = read_convertible(model, self.rank)
        records = left_out_records(structure)
        peft = import_package("peft", "the lora and qlora baselines need peft", _INSTALL)
        self.names = structure.trainable
        self._transposed = {name: structure.transposed(name) for name in self.names}
        self._dtype = structure.weight(model, self.names[0]).dtype
        if self.quantized:
            for name in self.names:
                _to_nf4(model, name, structure.weight(model, name), self.place, self.waits)
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
        """bf16 autocast, in which GEMMs run in bf16 although adapter weights are stored in fp32; none without them."""
        adapters = [*self.parameters().values()]
        return torch.autocast(adapters[0].device.type, dtype=torch.bfloat16) if adapters else nullcontext()

    def step_state(self) -> dict[str, Tensor]:
        """A and B of every layer."""
        return {name: p.detach() for name, p in self.parameters().items()}

    def load_step_state(self, state: dict[str, Tensor]) -> None:
        """Restore the adapters in place."""
        for name, parameter in self.parameters().items():
            parameter.data.copy_(state[name])

    def finish(self, model: nn.Module, inputs: Inputs, losses: Losses | None = None) -> dict[str, FlushReport]:
        """Merge the adapters into bf16 weights; NF4 weights are dequantized first, as in the forward pass.

        Until they are written, their values are kept in the dtype of the run, with which the model computes.
        """
        for name in self.names:
            _merge(model, name, self._dtype)
        return {}

    def deployed_weights(self) -> Weights:
        """The merged bf16 weights, in the checkpoint's orientation, by module path."""
        model = self._peft.base_model.model
        return {name: self.deployed(name, model.get_submodule(name).weight.detach()) for name in self.names}

    def deployed(self, name: str, merged: Tensor) -> Deployed:
        """The merged bf16 weight of one layer, in the checkpoint's orientation."""
        stored = merged.t().contiguous() if self.quantized and self._transposed[name] else merged
        return Deployed(stored.to(torch.bfloat16), None, self._transposed[name])


def _to_nf4(
    model: nn.Module, name: str, weight: Tensor, place: torch.device | None, waits: torch.device | None
) -> None:
    bitsandbytes = import_package("bitsandbytes", "the qlora baseline needs bitsandbytes", _INSTALL)
    old = model.get_submodule(name)
    bias = getattr(old, "bias", None)
    new = bitsandbytes.nn.Linear4bit(
        weight.shape[1], weight.shape[0], bias=bias is not None, compute_dtype=torch.bfloat16,
        compress_statistics=True, quant_type="nf4",
    )  # fmt: skip
    # In evaluation mode bitsandbytes repacks NF4 weights for CPU inference, into a layout that the merge cannot read.
    new.support_avx512bf16_for_cpu = False
    new.weight = bitsandbytes.nn.Params4bit(
        weight.contiguous(), requires_grad=False, quant_type="nf4", compress_statistics=True
    )
    if bias is not None:
        new.bias = nn.Parameter(bias.detach(), requires_grad=False)
    new = new.to(place or weight.device)  # quantizes
    new.quant_state = new.weight.quant_state  # which a parameter loses where FSDP shards it
    if waits is not None:  # the block scales stay in the place
        new.weight = bitsandbytes.nn.Params4bit(
            new.weight.data.as_subclass(Tensor).to(waits), requires_grad=False, quant_state=new.quant_state,
            blocksize=new.weight.blocksize, compress_statistics=True, quant_type="nf4", module=new, bnb_quantized=True,
        )  # fmt: skip
    replace_layer(model, name, new)


@torch.no_grad()
def _merge(model: nn.Module, name: str, dtype: torch.dtype) -> None:
    """Replace a layer with an adapter by a plain one with the merged weight."""
    layer: Any = model.get_submodule(name)
    base = layer.get_base_layer()
    merged = merged_weight(layer).to(dtype)
    if isinstance(base, nn.Linear) and merged.shape != base.weight.shape:  # packed NF4: use a plain layer instead
        bias = base.bias
        base = nn.Linear(merged.shape[1], merged.shape[0], bias=False, device="meta")
        base.bias = bias
    base.weight = nn.Parameter(merged, requires_grad=False)
    replace_layer(model, name, base)


def merged_weight(layer: Any) -> Tensor:
    """bf16 `W + B A alpha / rank` of a layer of peft, added in fp32, in the orientation of the layer that it wraps."""
    base = layer.get_base_layer()
    weight, state = base.weight, getattr(base, "quant_state", None)
    if state is not None:
        import bitsandbytes

        weight = bitsandbytes.functional.dequantize_4bit(weight.data, state)
    merged: Tensor = (weight.float() + layer.get_delta_weight("default").float()).to(torch.bfloat16)
    return merged


def replace_layer(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` in the place of the module called `name`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)
