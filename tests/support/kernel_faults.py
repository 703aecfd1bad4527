"""Runs probe jobs one after another in one vLLM process, each with a fault in its kernels: starting vLLM is most of the
time of a tiny engine. Started with vLLM's Python: `kernel_faults.py PROBE.py`, a line `JOB.json FAULT` for each job.

Faults are put into the loaded model before it is looked into, and no other process knows of them.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

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


FAULTS = {fault.__name__: fault for fault in (three_layers, bf16_engine)}


def main() -> None:
    spec = importlib.util.spec_from_file_location("probe", sys.argv[1])
    assert spec is not None
    assert spec.loader is not None
    probe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(probe)
    from validation.vllm.readback import Reading

    true_read = Reading.read
    for line in sys.stdin:
        path, name = line.split()
        job = json.loads(Path(path).read_text(encoding="utf-8"))
        fault = FAULTS.get(name, lambda model: None)

        def read(reading: Any, model: Any, fault: Any = fault) -> None:
            fault(model)
            true_read(reading, model)

        Reading.read = read
        try:
            result = probe.plain(probe.run(job))
        except Exception:
            result = {"error": traceback.format_exc()}
        gc.collect()
        from vllm.distributed import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()
        partial = Path(job["result"] + ".partial")
        partial.write_text(json.dumps(result), encoding="utf-8")
        partial.rename(job["result"])


if __name__ == "__main__":
    main()
