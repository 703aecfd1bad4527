"""FP8 mixture-of-experts layers: dequantized at load like linear layers, and run by vLLM's unquantized CPU kernel.

vLLM stores the experts of a layer as two stacked tensors, `w13` (gate above up) and `w2` (down), with one scale per row
of each expert. Its loader fills them from the checkpoint, one expert at a time. Afterwards each expert is dequantized
exactly like a linear layer (`dequantize`), and the stacks are passed to vLLM's kernel.

With `FP8PIPE_VLLM_ACTIVATIONS=quant`, activation quantization is emulated too. None of vLLM's CPU kernels can quantize
the activations between the two GEMMs of an expert, so the experts then run one after another in torch. That is slow,
but this setting is meant for checks and not for serving. Of vLLM's activations it knows `silu` and gpt-oss's
`swigluoai`, whose gate and up have interleaved rows in `w13`; other layers are refused while the model is loaded.
"""

from __future__ import annotations

from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
from torch import Tensor
from vllm.model_executor.layers.fused_moe import (
    FusedMoEConfig,
    FusedMoeWeightScaleSupported,
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.utils import set_weight_attrs

from fp8pipe_vllm_cpu import Settings
from fp8pipe_vllm_cpu.dequantize import UNSET_SCALE, Activations, dequantize, round_trip

__all__ = ["CpuFp8MoEMethod", "takes_over"]

_STACKS = ("w13", "w2")
_EMULATED = (MoEActivation.SILU, MoEActivation.SWIGLUOAI)
_ALPHA, _LIMIT = 1.702, 7.0  # of swigluoai; vLLM's CPU kernel knows no other values


def takes_over(weights: QuantizationArgs | None, inputs: QuantizationArgs | None) -> bool:
    """Whether this plugin handles experts of this scheme: FP8 weights with per-channel scales."""
    known = weights is not None and weights.num_bits == 8 and weights.type == "float" and bool(weights.symmetric)
    return known and weights is not None and not weights.dynamic and weights.strategy == QuantizationStrategy.CHANNEL


class CpuFp8MoEMethod(UnquantizedFusedMoEMethod):
    """Experts of a compressed-tensors checkpoint with FP8 weights and per-channel scales.

    Args:
        moe: vLLM's configuration of the layer.
        activations: how the checkpoint quantizes activations.

    Raises:
        ValueError: activations are to be quantized, and these experts are not emulated: the model does not load.
    """

    def __init__(self, moe: FusedMoEConfig, activations: Activations) -> None:
        self.activations = activations
        self.settings = Settings.from_environment()
        if self.settings.quantize_activations and moe.activation not in _EMULATED:
            known = " and ".join(activation.value for activation in _EMULATED)
            raise ValueError(
                f"FP8PIPE_VLLM_ACTIVATIONS=quant emulates only experts with the activations {known}, not with "
                f"{moe.activation.value}. Set it to none, which does not quantize activations"
            )
        super().__init__(moe)

    def create_weights(
        self, layer: Any, num_experts: int, hidden_size: int, intermediate_size_per_partition: int,
        params_dtype: torch.dtype, **attributes: Any,
    ) -> None:  # fmt: skip
        """Register codes and scales of both stacks for vLLM's loader, and biases if the layer has them."""
        inner = intermediate_size_per_partition
        shapes = {"w13": (2 * inner if self.moe.is_act_and_mul else inner, hidden_size), "w2": (hidden_size, inner)}
        layer.orig_dtype = params_dtype
        for stack, (rows, columns) in shapes.items():
            codes = torch.empty(num_experts, rows, columns, dtype=torch.float8_e4m3fn)
            scale = torch.full((num_experts, rows, 1), UNSET_SCALE, dtype=torch.float32)
            tensors = [("weight", codes, {}), ("weight_scale", scale, {"quant_method": _CHANNEL})]
            if self.moe.has_bias:
                tensors.append(("bias", torch.zeros(num_experts, rows, dtype=params_dtype), {}))
            for leaf, tensor, more in tensors:
                parameter = torch.nn.Parameter(tensor, requires_grad=False)
                layer.register_parameter(f"{stack}_{leaf}", parameter)
                set_weight_attrs(parameter, attributes | more)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Replace codes and scales by the dequantized stacks and pass them to vLLM's kernel.

        Raises:
            ValueError: a scale is missing, zero, negative or not finite; the message names layer and expert.
        """
        for stack in _STACKS:
            codes, scales = layer._parameters.pop(f"{stack}_weight"), layer._parameters.pop(f"{stack}_weight_scale")
            stacked = torch.empty(codes.shape, dtype=layer.orig_dtype)
            for number in range(codes.shape[0]):
                try:
                    widths = [codes.shape[1]]
                    stacked[number] = dequantize(codes[number], scales[number], widths, dtype=layer.orig_dtype)
                except ValueError as error:
                    name = getattr(layer, "layer_name", "a layer")
                    raise ValueError(f"{name}: {stack} of expert {number}: {error}") from error
            layer.register_parameter(f"{stack}_weight", torch.nn.Parameter(stacked, requires_grad=False))
        if not self.settings.quantize_activations:
            super().process_weights_after_loading(layer)

    def apply(
        self, layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Any:  # fmt: skip
        """Compute the weighted sum of each token's k experts.

        Args:
            layer: the layer with the dequantized stacks.
            x: `(tokens, hidden)`, in the model's dtype.
            topk_weights: routing weights, `(tokens, k)`.
            topk_ids: indices of the experts, `(tokens, k)`.
            shared_experts: vLLM's shared experts, passed on to its kernel.
            shared_experts_input: their input, passed on to the kernel.

        Returns:
            The result of vLLM's kernel; with emulated activation quantization, `(tokens, hidden)` in the dtype of x.
        """
        if not self.settings.quantize_activations:
            return super().apply(layer, x, topk_weights, topk_ids, shared_experts, shared_experts_input)
        return self._rounded(layer, x, topk_weights, topk_ids)

    def _rounded(self, layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        biases = [getattr(layer, f"{stack}_bias", None) for stack in _STACKS]
        summed = torch.zeros(x.shape)
        for number in topk_ids.unique().tolist():
            token, place = torch.where(topk_ids == number)
            weight = topk_weights[token, place, None]
            # As vLLM's kernels do, Llama 4's inputs are weighted in the model's dtype before they are quantized.
            given = x[token] * weight.to(x.dtype) if layer.apply_router_weight_on_input else x[token]
            inputs = round_trip(given, self.activations)
            w13, w2 = (None if bias is None else bias[number] for bias in biases)
            joined = torch.nn.functional.linear(inputs, layer.w13_weight[number], w13)
            inner = round_trip(_gated(joined, layer.activation), self.activations)
            product = torch.nn.functional.linear(inner, layer.w2_weight[number], w2)
            weighted = product.float() if layer.apply_router_weight_on_input else product.float() * weight.float()
            summed.index_add_(0, token, weighted)
        return summed.to(x.dtype)


def _gated(joined: Tensor, activation: MoEActivation) -> Tensor:
    """The gated activation of gate and up, which lie one after the other or, for `swigluoai`, interleaved."""
    if activation == MoEActivation.SILU:
        gate, up = joined.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up
    gate, up = joined[..., ::2].clamp(max=_LIMIT), joined[..., 1::2].clamp(-_LIMIT, _LIMIT)
    return gate * torch.sigmoid(_ALPHA * gate) * (up + 1)


_CHANNEL = FusedMoeWeightScaleSupported.CHANNEL.value
