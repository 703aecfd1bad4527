"""The three moments of an FP8 linear layer on a CPU: declare parameters, dequantize after loading, multiply.

Shared by both checkpoint families (`methods`). Parameters are declared exactly as vLLM declares them, so that
its own loaders fill fused layers shard by shard; after loading the codes are replaced by `code * scale` and the
layer becomes an ordinary unquantized one for vLLM's CPU GEMM (oneDNN, or AMX tiles where it chooses them).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.quantization.utils.fp8_utils import (
    create_fp8_input_scale,
    create_fp8_scale_parameter,
    create_fp8_weight_parameter,
    validate_fp8_block_shape,
)
from vllm.model_executor.layers.utils import cpu_unquantized_gemm, dispatch_cpu_unquantized_gemm

from fp8pipe_vllm_cpu.activations import Activations, Granularity, round_trip
from fp8pipe_vllm_cpu.dequantize import UNSET_SCALE, dequantize
from fp8pipe_vllm_cpu.settings import Settings

__all__ = ["Fp8Linear", "LayerShape"]


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Sizes of one layer on this rank, as vLLM passes them to `create_weights`."""

    input_per_partition: int  # input features on this rank
    output_partitions: list[int]  # output features of each fused part on this rank
    input_size: int  # input features over all ranks
    output_size: int  # output features over all ranks


@dataclass(frozen=True, slots=True)
class Fp8Linear:
    """What a checkpoint declares about its FP8 linear layers."""

    scale_type: type  # vLLM's parameter class for the weight scale (it knows how shards are loaded)
    scale_name: str  # the scale's name in the checkpoint; dequantized = code * scale whatever the name says
    block: tuple[int, int] | None  # `(rows, columns)` of block scales, or None
    activations: Activations  # how activations are quantized by the checkpoint
    settings: Settings  # the plugin's settings

    def declare(self, layer: Any, shape: LayerShape, dtype: torch.dtype, loader: Callable[..., Any] | None) -> None:
        """Register `weight`, the scale, and `input_scale` if static, for vLLM's `loader`; `dtype` is the model's."""
        layer.logical_widths = list(shape.output_partitions)
        layer.input_size_per_partition = shape.input_per_partition
        layer.output_size_per_partition = sum(shape.output_partitions)
        layer.orig_dtype = dtype
        block = None if self.block is None else list(self.block)
        layer.weight_block_size = block
        if block is not None:
            sizes = (shape.input_size, shape.output_size, shape.input_per_partition, shape.output_partitions)
            validate_fp8_block_shape(layer, *sizes, block)
        weight = create_fp8_weight_parameter(sum(shape.output_partitions), shape.input_per_partition, loader)
        layer.register_parameter("weight", weight)
        scale = create_fp8_scale_parameter(
            self.scale_type, shape.output_partitions, shape.input_per_partition, block, loader
        )
        layer.register_parameter(self.scale_name, scale)
        if self.activations.granularity is Granularity.STATIC:
            layer.register_parameter("input_scale", create_fp8_input_scale(shape.output_partitions, loader))

    def finish(self, layer: Any) -> None:
        """Replace codes and scale by the dequantized weight and hand it to vLLM's CPU GEMM.

        Raises:
            ValueError: a scale is missing, zero, negative or not finite; the message names the layer.
        """
        try:
            codes, scale = layer.weight.detach(), getattr(layer, self.scale_name).detach()
            weight = dequantize(codes, scale, layer.logical_widths, block=self.block, dtype=layer.orig_dtype)
            input_scale = self._static_scale(layer)
        except ValueError as error:
            raise ValueError(f"{getattr(layer, 'prefix', 'a linear layer')}: {error}") from error
        for name in ("weight", self.scale_name, "input_scale"):
            layer._parameters.pop(name, None)
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        layer.input_scale = input_scale
        if getattr(layer, "_cpu_skip_gemm_dispatch", False):  # vLLM reads this layer's weight itself (MLA)
            layer.cpu_linear = torch.nn.functional.linear
        else:
            dispatch_cpu_unquantized_gemm(layer, remove_weight=not self.settings.keep_weights)

    def multiply(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        """`x @ weight.T + bias`; x `(tokens, in)` -> `(tokens, out)`, in the model's dtype."""
        if self.settings.quantize_activations:
            x = round_trip(x, self.activations, layer.input_scale)
        product: Tensor = cpu_unquantized_gemm(layer, x, layer.weight, bias)
        return product

    def _static_scale(self, layer: Any) -> Tensor | None:
        """The largest input scale of the fused parts (their inputs are one tensor), or None."""
        if self.activations.granularity is not Granularity.STATIC:
            return None
        largest: Tensor = layer.input_scale.detach().float().max()
        if float(largest) == UNSET_SCALE or not bool(torch.isfinite(largest) & (largest > 0)):
            raise ValueError("the checkpoint declares static activations and holds no usable input_scale")
        return largest
