"""The two checkpoint families, as replacements in vLLM's table of quantization methods.

"compressed-tensors": the scheme is chosen per layer; FP8 ones are taken over, all others pass on to vLLM.
"fp8": linear layers are taken over; mixture-of-experts and attention pass on to vLLM.

`_get_scheme_from_parts` is private to vLLM; overriding it is what the version check is for.
"""

from __future__ import annotations

from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy, QuantizationType
from torch import Tensor
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import CompressedTensorsScheme
from vllm.model_executor.layers.quantization.compressed_tensors.utils import STRATEGY_TO_PARAMETER_TYPE
from vllm.model_executor.layers.quantization.fp8 import Fp8Config
from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped
from vllm.model_executor.parameter import BlockQuantScaleParameter, PerTensorScaleParameter

from fp8pipe_vllm_cpu.activations import Activations, Granularity
from fp8pipe_vllm_cpu.linear import Fp8Linear, LayerShape
from fp8pipe_vllm_cpu.settings import Settings

__all__ = ["CpuCompressedTensorsConfig", "CpuFp8Config", "CpuFp8LinearMethod", "CpuFp8Scheme", "install"]

logger = init_logger("vllm.fp8pipe_cpu")


def install() -> None:
    """Put both families in vLLM's table, over its own. Idempotent."""
    register_quantization_config("compressed-tensors")(CpuCompressedTensorsConfig)
    register_quantization_config("fp8")(CpuFp8Config)


class _Dequantized:
    """What both of vLLM's interfaces for a layer share; `linear` does the work."""

    linear: Fp8Linear

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        """Declare the layer's parameters (vLLM's interface)."""
        shape = LayerShape(input_size_per_partition, output_partition_sizes, input_size, output_size)
        self.linear.declare(layer, shape, params_dtype, attributes.get("weight_loader"))

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Dequantize."""
        self.linear.finish(layer)

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply; x `(tokens, in)` -> `(tokens, out)`."""
        return self.linear.multiply(layer, x, bias)


class CpuFp8Scheme(_Dequantized, CompressedTensorsScheme):
    """One compressed-tensors FP8 scheme (W8A8 or W8A16; tensor, channel or block weights)."""

    def __init__(self, weights: QuantizationArgs, activations: QuantizationArgs | None) -> None:
        block = weights.block_structure if weights.strategy == QuantizationStrategy.BLOCK else None
        self.linear = Fp8Linear(
            scale_type=STRATEGY_TO_PARAMETER_TYPE[weights.strategy],
            scale_name="weight_scale",
            block=None if block is None else (int(block[0]), int(block[1])),
            activations=_declared_activations(activations),
            settings=Settings.from_environment(),
        )

    @classmethod
    def get_min_capability(cls) -> int:
        """No device capability is needed: the GEMM is an ordinary one."""
        return 0

    apply_weights = _Dequantized.apply  # the interface's own name


class CpuCompressedTensorsConfig(CompressedTensorsConfig):
    """vLLM's compressed-tensors configuration with the FP8 schemes replaced."""

    def _get_scheme_from_parts(
        self,
        weight_quant: QuantizationArgs,
        input_quant: QuantizationArgs | None,
        output_quant: QuantizationArgs | None = None,
        format: str | None = None,
        layer_name: str | None = None,
    ) -> CompressedTensorsScheme:
        weights, inputs = weight_quant, input_quant
        # Static weights with one of the three scale shapes, so neither MXFP8 nor groups.
        known = weights is not None and not weights.dynamic and weights.strategy in STRATEGY_TO_PARAMETER_TYPE
        if known and _is_fp8(weights) and (inputs is None or _is_fp8(inputs)) and output_quant is None:
            _announce("compressed-tensors")
            return CpuFp8Scheme(weight_quant, input_quant)
        return super()._get_scheme_from_parts(weight_quant, input_quant, output_quant, format, layer_name)


@register_weight_loader_v2_supported_method
class CpuFp8LinearMethod(_Dequantized, LinearMethodBase):
    """Linear layers of `quant_method: fp8` checkpoints (per-tensor or block weights)."""

    def __init__(self, config: Fp8Config) -> None:
        size = config.weight_block_size
        block = None if size is None else (int(size[0]), int(size[1]))
        self.linear = Fp8Linear(
            scale_type=PerTensorScaleParameter if block is None else BlockQuantScaleParameter,
            # "inv" is the format's word for a scale that multiplies codes, like the other one.
            scale_name="weight_scale" if block is None else "weight_scale_inv",
            block=block,
            activations=_native_activations(config.activation_scheme, block),
            settings=Settings.from_environment(),
        )


class CpuFp8Config(Fp8Config):
    """vLLM's `fp8` configuration with the linear layers replaced."""

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """fp32 besides vLLM's own two: dequantized layers run in any dtype, and parity is checked in fp32."""
        return [*super().get_supported_act_dtypes(), torch.float32]

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """The method of one layer (vLLM's interface)."""
        if not isinstance(layer, LinearBase):
            return super().get_quant_method(layer, prefix)
        if is_layer_skipped(
            prefix=prefix, ignored_layers=self.ignored_layers, fused_mapping=self.packed_modules_mapping,
            match_mode=self.ignored_layers_match_mode,
        ):  # fmt: skip
            return UnquantizedLinearMethod()
        _announce("fp8")
        return CpuFp8LinearMethod(self)


def _is_fp8(args: QuantizationArgs) -> bool:
    return args.type == QuantizationType.FLOAT and args.num_bits == 8 and bool(args.symmetric)


def _declared_activations(args: QuantizationArgs | None) -> Activations:
    if args is None:
        return Activations(Granularity.NONE)
    if not args.dynamic:
        return Activations(Granularity.STATIC)
    if args.strategy == QuantizationStrategy.GROUP:
        return Activations(Granularity.GROUP, int(args.group_size or 0))
    return Activations(Granularity.TENSOR if args.strategy == QuantizationStrategy.TENSOR else Granularity.TOKEN)


def _native_activations(scheme: str, block: tuple[int, int] | None) -> Activations:
    """`fp8` checkpoints say static or dynamic; dynamic is per token, or per group of a block's columns."""
    if block is not None:
        return Activations(Granularity.GROUP, block[1])
    return Activations(Granularity.STATIC if scheme == "static" else Granularity.TOKEN)


def _announce(family: str) -> None:
    emulated = Settings.from_environment().quantize_activations
    logger.info_once(
        "%s: FP8 weights are dequantized exactly at load; activations are %s",
        family,
        "quantized as the checkpoint declares (emulated)" if emulated else "not quantized",
    )
