"""Replacements for three entries in vLLM's table of quantization methods, one for each checkpoint family.

"compressed-tensors": the scheme is chosen per layer. FP8 linear layers are handled here, and so are FP8 experts with
per-channel scales (`experts`) and linear layers in NVFP4 (`nvfp4`); all others are left to vLLM.
"fp8": linear layers are handled here; mixture-of-experts and attention are left to vLLM.
"modelopt_fp4": linear layers in NVFP4 are handled here (`nvfp4`); which layers those are is left to vLLM.

`_get_scheme_from_parts` is private to vLLM; because it is overridden, the plugin checks vLLM's version.
"""

from __future__ import annotations

from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy, QuantizationType
from torch import Tensor
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts
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
from vllm.model_executor.layers.quantization.modelopt import ModelOptLinearMethod, ModelOptNvFp4Config
from vllm.model_executor.layers.quantization.utils.fp8_utils import (
    create_fp8_input_scale,
    create_fp8_scale_parameter,
    create_fp8_weight_parameter,
    validate_fp8_block_shape,
)
from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped
from vllm.model_executor.layers.utils import cpu_unquantized_gemm, dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod
from vllm.model_executor.parameter import BlockQuantScaleParameter, PerTensorScaleParameter

from fp8pipe_vllm_cpu import Settings
from fp8pipe_vllm_cpu.dequantize import UNSET_SCALE, Activations, Granularity, dequantize, round_trip
from fp8pipe_vllm_cpu.experts import CpuFp8MoEMethod, takes_over
from fp8pipe_vllm_cpu.nvfp4 import CpuModelOptNvfp4Method, CpuNvfp4Scheme

logger = init_logger("vllm.fp8pipe_cpu")


def install() -> None:
    """Replace the entries in vLLM's table. Idempotent."""
    register_quantization_config("compressed-tensors")(CpuCompressedTensorsConfig)
    register_quantization_config("fp8")(CpuFp8Config)
    register_quantization_config("modelopt_fp4")(CpuModelOptNvFp4Config)


class _Dequantized:
    """Creates, dequantizes and applies the weights of an FP8 linear layer on a CPU.

    The base class of `CpuFp8Scheme` and `CpuFp8LinearMethod`, which implement vLLM's two interfaces for layers.

    Parameters are declared exactly as in vLLM, so that its loaders fill fused layers shard by shard. After loading,
    the codes are replaced by `code * scale`, and the layer becomes an ordinary unquantized one for vLLM's CPU GEMM
    (oneDNN, or AMX if vLLM selects it).

    Args:
        scale_type: vLLM's parameter class for the weight scale (it knows how shards are loaded).
        scale_name: the scale's name in the checkpoint; dequantized = code * scale even if it is called "inv".
        block: `[rows, columns]` for block scales, or None.
        activations: how the checkpoint quantizes activations.
    """

    def __init__(self, scale_type: type, scale_name: str, block: list[int] | None, activations: Activations) -> None:
        self.scale_type, self.scale_name, self.block, self.activations = scale_type, scale_name, block, activations
        self.settings = Settings.from_environment()

    def create_weights(
        self, layer: Any, input_size_per_partition: int, output_partition_sizes: list[int], input_size: int,
        output_size: int, params_dtype: torch.dtype, **attributes: Any,
    ) -> None:  # fmt: skip
        """Register `weight`, its scale and, for static activation scales, `input_scale`, for vLLM's loader to fill.

        Sizes are numbers of features; those with `partition` in their names are for this tensor-parallel rank.
        """
        loader, rows = attributes.get("weight_loader"), sum(output_partition_sizes)
        layer.logical_widths = list(output_partition_sizes)
        layer.input_size_per_partition, layer.output_size_per_partition = input_size_per_partition, rows
        layer.orig_dtype = params_dtype
        layer.weight_block_size = self.block
        if self.block is not None:
            sizes = (input_size, output_size, input_size_per_partition, output_partition_sizes)
            validate_fp8_block_shape(layer, *sizes, self.block)
        layer.register_parameter("weight", create_fp8_weight_parameter(rows, input_size_per_partition, loader))
        scale = create_fp8_scale_parameter(
            self.scale_type, output_partition_sizes, input_size_per_partition, self.block, loader
        )
        layer.register_parameter(self.scale_name, scale)
        if self.activations.granularity is Granularity.STATIC:
            layer.register_parameter("input_scale", create_fp8_input_scale(output_partition_sizes, loader))

    def process_weights_after_loading(self, layer: Any) -> None:
        """Replace codes and scale by the dequantized weight and pass it to vLLM's CPU GEMM.

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

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute `x @ weight.T + bias` for x `(tokens, in)`; returns `(tokens, out)` in the model's dtype."""
        if self.settings.quantize_activations:
            x = round_trip(x, self.activations, layer.input_scale)
        product: Tensor = cpu_unquantized_gemm(layer, x, layer.weight, bias)
        return product

    def _static_scale(self, layer: Any) -> Tensor | None:
        """The largest input scale of the fused parts, which share one input; None if scales are dynamic.

        Raises:
            ValueError: a static scale is missing, zero, negative or not finite.
        """
        if self.activations.granularity is not Granularity.STATIC:
            return None
        largest: Tensor = layer.input_scale.detach().float().max()
        if float(largest) == UNSET_SCALE or not bool(torch.isfinite(largest) & (largest > 0)):
            raise ValueError("the checkpoint declares static activation scales but has no usable input_scale")
        return largest


class CpuFp8Scheme(_Dequantized, CompressedTensorsScheme):
    """A compressed-tensors FP8 scheme (W8A8 or W8A16, with per-tensor, per-channel or block scales)."""

    def __init__(self, weights: QuantizationArgs, activations: QuantizationArgs | None) -> None:
        block = weights.block_structure if weights.strategy == QuantizationStrategy.BLOCK else None
        super().__init__(
            STRATEGY_TO_PARAMETER_TYPE[weights.strategy], "weight_scale", None if block is None else list(block),
            _declared_activations(activations),
        )  # fmt: skip

    @classmethod
    def get_min_capability(cls) -> int:
        """The GPU compute capability that the scheme requires: 0, since it runs on a CPU."""
        return 0

    apply_weights = _Dequantized.apply  # the name of this method in vLLM's compressed-tensors schemes


class CpuCompressedTensorsConfig(CompressedTensorsConfig):
    """vLLM's compressed-tensors configuration with the FP8 schemes replaced."""

    def _get_scheme_from_parts(
        self, weight_quant: QuantizationArgs, input_quant: QuantizationArgs | None,
        output_quant: QuantizationArgs | None = None, format: str | None = None, layer_name: str | None = None,
    ) -> CompressedTensorsScheme:  # fmt: skip
        weights, inputs = weight_quant, input_quant
        # Static weights with per-tensor, per-channel or block scales; MXFP8 and group scales are left to vLLM.
        known = weights is not None and not weights.dynamic and weights.strategy in STRATEGY_TO_PARAMETER_TYPE
        if known and _is_fp8(weights) and (inputs is None or _is_fp8(inputs)) and output_quant is None:
            _announce("compressed-tensors")
            return CpuFp8Scheme(weight_quant, input_quant)
        alike = inputs is None or (self._is_nvfp4_format(inputs) and inputs.dynamic == "local")
        if self._is_nvfp4_format(weights) and alike and output_quant is None:
            _announce("compressed-tensors", "NVFP4")
            return CpuNvfp4Scheme(inputs=inputs is not None)
        return super()._get_scheme_from_parts(weight_quant, input_quant, output_quant, format, layer_name)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """The quantization method of a layer (vLLM's interface); FP8 experts are handled here too."""
        if isinstance(layer, RoutedExperts):
            self._add_fused_moe_to_target_scheme_map()
            names = (layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name)
            schemes = [self.get_scheme_dict(layer, f"{prefix}.0.{name}") for name in names]
            scheme = schemes[0]
            if scheme is not None and all(other == scheme for other in schemes):
                weights, inputs = scheme.get("weights"), scheme.get("input_activations")
                if takes_over(weights, inputs):
                    _announce("compressed-tensors")
                    return CpuFp8MoEMethod(layer.moe_config, _declared_activations(inputs))
        return super().get_quant_method(layer, prefix)


@register_weight_loader_v2_supported_method
class CpuFp8LinearMethod(_Dequantized, LinearMethodBase):
    """Linear layers of `quant_method: fp8` checkpoints (per-tensor or block scales)."""

    def __init__(self, config: Fp8Config) -> None:
        block = config.weight_block_size
        # Activation scales are static, or dynamic with one scale per token; for weights with block scales, dynamic with
        # one scale per group of as many columns as a block has.
        activations = Activations(Granularity.STATIC if config.activation_scheme == "static" else Granularity.TOKEN)
        if block is None:
            super().__init__(PerTensorScaleParameter, "weight_scale", None, activations)
        else:
            # Despite "inv" in its name, this scale multiplies the codes, as `weight_scale` does.
            activations = Activations(Granularity.GROUP, int(block[1]))
            super().__init__(BlockQuantScaleParameter, "weight_scale_inv", list(block), activations)


class CpuFp8Config(Fp8Config):
    """vLLM's `fp8` configuration with the linear layers replaced."""

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """vLLM's dtypes plus fp32: dequantized layers run in any dtype, and parity is checked in fp32."""
        return [*super().get_supported_act_dtypes(), torch.float32]

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """The quantization method of a layer (vLLM's interface)."""
        if not isinstance(layer, LinearBase):
            return super().get_quant_method(layer, prefix)
        if is_layer_skipped(
            prefix=prefix, ignored_layers=self.ignored_layers, fused_mapping=self.packed_modules_mapping,
            match_mode=self.ignored_layers_match_mode,
        ):  # fmt: skip
            return UnquantizedLinearMethod()
        _announce("fp8")
        return CpuFp8LinearMethod(self)


class CpuModelOptNvFp4Config(ModelOptNvFp4Config):
    """vLLM's `modelopt_fp4` configuration with the linear layers replaced."""

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """vLLM's dtypes plus fp32: dequantized layers run in any dtype, and parity is checked in fp32."""
        return [*super().get_supported_act_dtypes(), torch.float32]

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """The quantization method of a layer (vLLM's interface)."""
        method = super().get_quant_method(layer, prefix)
        if isinstance(method, UnquantizedLinearMethod) and isinstance(layer, ParallelLMHead):
            return UnquantizedEmbeddingMethod()  # as without quantization; the other packs the weight and drops it
        if not isinstance(method, ModelOptLinearMethod):
            return method
        _announce("modelopt", "NVFP4")
        return CpuModelOptNvfp4Method(inputs=method.spec.activation is not None)


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


def _announce(family: str, form: str = "FP8") -> None:
    emulated = Settings.from_environment().quantize_activations
    said = "quantized as the checkpoint declares (emulated)" if emulated else "not quantized"
    logger.info_once("%s: %s weights are dequantized exactly at load; activations are %s", family, form, said)
