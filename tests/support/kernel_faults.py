"""The probe of a validation, whose engine has the fault in its kernels that the variable KERNEL_FAULT names.

Takes the place of `probe.py`. Faults are put into the loaded model before it is looked into, and no other process knows
of them.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import torch

PROBE = Path(__file__).resolve().parents[2] / "validation" / "vllm" / "probe.py"
DOUBLED, UNROUNDED = "model.layers.1.mlp.down_proj", "model.layers.0.mlp.down_proj"
DEQUANTIZED = "model.layers.0.self_attn.o_proj"


def three_layers(model: Any) -> None:
    """One layer has each of three faults."""
    model.get_submodule(DOUBLED).weight_scale.data[3] *= 2  # a kernel that is right, and another weight
    kernel = model.get_submodule(UNROUNDED).scheme.fp8_linear
    kernel.apply_weights = lambda layer, x, bias=None: (x.float() @ _weight(layer)).to(x.dtype)
    _dequantize([model.get_submodule(DEQUANTIZED)])


def bf16_engine(model: Any) -> None:
    """A bf16 engine in place of an FP8 one."""
    _dequantize([layer for layer in model.modules() if getattr(layer, "scheme", None) is not None])


def _dequantize(layers: list[Any]) -> None:
    """The same weights, dequantized and rounded once, in layers without a kernel for codes."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    for layer in layers:
        weight = _weight(layer).t().to(layer.params_dtype).contiguous()
        layer.quant_method, layer.scheme = UnquantizedLinearMethod(), None
        del layer.weight_scale
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        layer.quant_method.process_weights_after_loading(layer)


def _weight(layer: Any) -> torch.Tensor:
    """fp32 `(in, out)`."""
    weight: torch.Tensor = layer.weight.float() * layer.weight_scale.t()
    return weight


def none(model: Any) -> None:
    """A right engine."""


FAULTS = {fault.__name__: fault for fault in (none, three_layers, bf16_engine)}


def main() -> None:
    spec = importlib.util.spec_from_file_location("probe", PROBE)
    assert spec is not None
    assert spec.loader is not None
    probe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(probe)
    from validation.vllm.readback import Reading

    true_read, fault = Reading.read, FAULTS[os.environ["KERNEL_FAULT"]]

    def read(reading: Any, model: Any) -> None:
        fault(model)
        true_read(reading, model)

    Reading.read = read
    probe.main(sys.argv[1])


if __name__ == "__main__":
    main()
