"""Linear layers in NVFP4 on a CPU, where vLLM has no kernel for them: dequantized once, at load.

The layouts are compressed-tensors' `nvfp4-pack-quantized` and ModelOpt's, with inputs in the model's dtype (W4A16) or
in NVFP4, too (W4A4). Parameters are declared as in vLLM, so that its loaders fill fused layers part by part. As on
GPUs, the largest stored number of the parts, a divisor or ModelOpt's factor, counts for all of them, of weights and of
inputs.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import CompressedTensorsScheme
from vllm.model_executor.layers.utils import cpu_unquantized_gemm, dispatch_cpu_unquantized_gemm
from vllm.model_executor.parameter import GroupQuantScaleParameter, ModelWeightParameter, PerTensorScaleParameter

from fp8pipe_vllm_cpu import Settings
from fp8pipe_vllm_cpu.dequantize import (
    NVFP4_BLOCK,
    UNSET_SCALE,
    dequantize_nvfp4,
    largest_of_parts,
    round_trip_nvfp4,
)

__all__ = ["CpuModelOptNvfp4Method", "CpuNvfp4Scheme"]

logger = init_logger("vllm.fp8pipe_cpu")


class _Layout(NamedTuple):
    """Names of a layer's parameters in a checkpoint, and whether global scales are stored as divisors."""

    codes: str
    scales: str
    whole: str  # of the global scale
    inputs: str  # of the global scale of inputs
    divides: bool


_COMPRESSED_TENSORS: Final = _Layout("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale", True)
_MODELOPT: Final = _Layout("weight", "weight_scale", "weight_scale_2", "input_scale", False)


class _Nvfp4:
    """Creates, dequantizes and applies the weights of a linear layer in NVFP4 on a CPU.

    The base class of `CpuNvfp4Scheme` and `CpuModelOptNvfp4Method`, which implement vLLM's two interfaces for layers.

    Args:
        layout: how the checkpoint stores weights.
        inputs: whether the checkpoint declares inputs in NVFP4, with a global scale for each layer. They are rounded
            only with FP8PIPE_VLLM_ACTIVATIONS=quant.
    """

    def __init__(self, layout: _Layout, *, inputs: bool) -> None:
        self.layout, self.inputs = layout, inputs
        self.settings = Settings.from_environment()

    def create_weights(
        self, layer: Any, output_partition_sizes: list[int], input_size_per_partition: int, params_dtype: torch.dtype,
        weight_loader: Any = None, **attributes: Any,
    ) -> None:  # fmt: skip
        """Register codes, block scales and global scales for vLLM's loader to fill.

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
        layer.register_parameter(self.layout.codes, ModelWeightParameter(data=codes, **sides))
        # Filled with zeros, which `dequantize_nvfp4` refuses if the checkpoint holds no scales.
        scales = torch.zeros(rows, columns // NVFP4_BLOCK, dtype=torch.float8_e4m3fn)
        layer.register_parameter(self.layout.scales, GroupQuantScaleParameter(data=scales, **sides))
        for name in (self.layout.whole, *((self.layout.inputs,) if self.inputs else ())):
            layer.register_parameter(name, PerTensorScaleParameter(data=parts.clone(), weight_loader=weight_loader))

    def process_weights_after_loading(self, layer: Any) -> None:
        """Replace codes and scales by the dequantized weight and pass it to vLLM's CPU GEMM.

        The divisor of inputs remains, as in vLLM's own methods: `input_global_scale_inv`, fp32 `()`.

        Raises:
            ValueError: a scale is missing, zero, negative or not finite; the message names the layer.
        """
        named = self.layout
        packed, scale, wholes = (getattr(layer, n).detach() for n in (named.codes, named.scales, named.whole))
        inputs = getattr(layer, named.inputs).detach() if self.inputs else None
        if any(parts is not None and parts.unique().numel() > 1 for parts in (wholes, inputs)):
            logger.warning_once(
                "NVFP4: fused layers have unequal global scales; one of them is used for all, as on GPUs"
            )
        try:
            weight = dequantize_nvfp4(packed, scale, wholes, layer.orig_dtype, divides=named.divides)
            largest = None if inputs is None else largest_of_parts(inputs)
        except ValueError as error:
            raise ValueError(f"{getattr(layer, 'prefix', 'a linear layer')}: {error}") from error
        layer.input_global_scale_inv = largest if largest is None or named.divides else 1.0 / largest
        for name in (named.codes, named.scales, named.whole, named.inputs):
            layer._parameters.pop(name, None)
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        if getattr(layer, "_cpu_skip_gemm_dispatch", False):  # vLLM reads this layer's weight itself (MLA)
            layer.cpu_linear = torch.nn.functional.linear
        else:
            dispatch_cpu_unquantized_gemm(layer, remove_weight=not self.settings.keep_weights)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute `x @ weight.T + bias` for x `(tokens, in)`; returns `(tokens, out)` in the model's dtype."""
        if self.settings.quantize_activations and layer.input_global_scale_inv is not None:
            x = round_trip_nvfp4(x, layer.input_global_scale_inv)
        product: Tensor = cpu_unquantized_gemm(layer, x, layer.weight, bias)
        return product


class CpuNvfp4Scheme(_Nvfp4, CompressedTensorsScheme):
    """A compressed-tensors scheme for weights in NVFP4.

    Args:
        inputs: whether the checkpoint declares inputs in NVFP4, too.
    """

    def __init__(self, *, inputs: bool = False) -> None:
        super().__init__(_COMPRESSED_TENSORS, inputs=inputs)

    @classmethod
    def get_min_capability(cls) -> int:
        """The GPU compute capability that the scheme requires: 0, since it runs on a CPU."""
        return 0

    apply_weights = _Nvfp4.apply  # the name of this method in vLLM's compressed-tensors schemes


@register_weight_loader_v2_supported_method
class CpuModelOptNvfp4Method(_Nvfp4, LinearMethodBase):
    """Linear layers of ModelOpt checkpoints in NVFP4 (`NVFP4`, and `W4A16_NVFP4` without inputs).

    Args:
        inputs: whether the checkpoint declares inputs in NVFP4, too.
    """

    def __init__(self, *, inputs: bool) -> None:
        super().__init__(_MODELOPT, inputs=inputs)
