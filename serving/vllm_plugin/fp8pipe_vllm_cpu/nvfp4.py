"""Linear layers in NVFP4 on a CPU, where vLLM has no kernel for them: dequantized once, at load.

The format is `nvfp4-pack-quantized` of compressed-tensors, with inputs in the model's dtype (W4A16) or in NVFP4, too
(W4A4). Parameters are declared as in vLLM, so that its loaders fill fused layers part by part. As on GPUs, the largest
divisor of the parts counts for all of them, of weights and of inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import CompressedTensorsScheme
from vllm.model_executor.layers.utils import cpu_unquantized_gemm, dispatch_cpu_unquantized_gemm
from vllm.model_executor.parameter import GroupQuantScaleParameter, ModelWeightParameter, PerTensorScaleParameter

from fp8pipe_vllm_cpu import Settings
from fp8pipe_vllm_cpu.dequantize import (
    NVFP4_BLOCK,
    UNSET_SCALE,
    dequantize_nvfp4,
    largest_divisor,
    round_trip_nvfp4,
)

__all__ = ["CpuNvfp4Scheme"]

logger = init_logger("vllm.fp8pipe_cpu")

_PARAMETERS = ("weight_packed", "weight_scale", "weight_global_scale")
_INPUTS = "input_global_scale"


class CpuNvfp4Scheme(CompressedTensorsScheme):
    """A compressed-tensors scheme for weights in NVFP4.

    Args:
        inputs: whether the checkpoint declares inputs in NVFP4, with a divisor for each layer. They are rounded only
            with FP8PIPE_VLLM_ACTIVATIONS=quant.
    """

    def __init__(self, *, inputs: bool = False) -> None:
        self.inputs = inputs
        self.settings = Settings.from_environment()

    @classmethod
    def get_min_capability(cls) -> int:
        """The GPU compute capability that the scheme requires: 0, since it runs on a CPU."""
        return 0

    def create_weights(
        self, layer: Any, output_partition_sizes: list[int], input_size_per_partition: int, params_dtype: torch.dtype,
        weight_loader: Any, **attributes: Any,
    ) -> None:  # fmt: skip
        """Register codes, block scales and divisors for vLLM's loader to fill.

        Raises:
            ValueError: the number of inputs is no multiple of 16.
        """
        rows, columns = sum(output_partition_sizes), input_size_per_partition
        if columns % NVFP4_BLOCK:
            raise ValueError(f"NVFP4 has blocks of {NVFP4_BLOCK} inputs, which do not divide {columns}")
        layer.logical_widths = list(output_partition_sizes)
        layer.input_size_per_partition, layer.output_size_per_partition = columns, rows
        layer.orig_dtype = params_dtype
        parts = torch.full((len(output_partition_sizes),), UNSET_SCALE, dtype=torch.float32)
        sides = {"input_dim": 1, "output_dim": 0, "weight_loader": weight_loader}
        codes = torch.empty(rows, columns // 2, dtype=torch.uint8)
        layer.register_parameter("weight_packed", ModelWeightParameter(data=codes, **sides))
        # Filled with zeros, which `dequantize_nvfp4` refuses if the checkpoint holds no scales.
        scales = torch.zeros(rows, columns // NVFP4_BLOCK, dtype=torch.float8_e4m3fn)
        layer.register_parameter("weight_scale", GroupQuantScaleParameter(data=scales, **sides))
        for name in ("weight_global_scale", *((_INPUTS,) if self.inputs else ())):
            layer.register_parameter(name, PerTensorScaleParameter(data=parts.clone(), weight_loader=weight_loader))

    def process_weights_after_loading(self, layer: Any) -> None:
        """Replace codes and scales by the dequantized weight and pass it to vLLM's CPU GEMM.

        The divisor of inputs remains, as in vLLM's own scheme: `input_global_scale_inv`, fp32 `()`.

        Raises:
            ValueError: a scale is missing, zero, negative or not finite; the message names the layer.
        """
        packed, scale, divisors = (getattr(layer, name).detach() for name in _PARAMETERS)
        inputs = getattr(layer, _INPUTS).detach() if self.inputs else None
        if any(parts is not None and parts.unique().numel() > 1 for parts in (divisors, inputs)):
            logger.warning_once(
                "NVFP4: fused layers have unequal global scales; one of them is used for all, as on GPUs"
            )
        try:
            weight = dequantize_nvfp4(packed, scale, divisors, layer.orig_dtype)
            layer.input_global_scale_inv = None if inputs is None else largest_divisor(inputs)
        except ValueError as error:
            raise ValueError(f"{getattr(layer, 'prefix', 'a linear layer')}: {error}") from error
        for name in (*_PARAMETERS, _INPUTS):
            layer._parameters.pop(name, None)
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        if getattr(layer, "_cpu_skip_gemm_dispatch", False):  # vLLM reads this layer's weight itself (MLA)
            layer.cpu_linear = torch.nn.functional.linear
        else:
            dispatch_cpu_unquantized_gemm(layer, remove_weight=not self.settings.keep_weights)

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute `x @ weight.T + bias` for x `(tokens, in)`; returns `(tokens, out)` in the model's dtype."""
        if self.settings.quantize_activations and layer.input_global_scale_inv is not None:
            x = round_trip_nvfp4(x, layer.input_global_scale_inv)
        product: Tensor = cpu_unquantized_gemm(layer, x, layer.weight, bias)
        return product
