"""From a planned unit to the tensors it becomes: the codec applied to the source, nothing kept."""

from __future__ import annotations

from torch import Tensor

from exporters.vllm.plan import Action, Unit
from fp8pipe.models.checkpoint.tensors import read_tensor
from fp8pipe.numerics.codec import channel_scale, dequantize_weight, quantize_weight, to_bf16

__all__ = ["produce"]


def produce(unit: Unit) -> dict[str, Tensor]:
    """The unit's output tensors, by name, on the CPU.

    Args:
        unit: a planned unit that passed the linter.

    Returns:
        One tensor an output, with the planned dtype and shape.

    Raises:
        ValueError: a tensor came out with another dtype or shape than planned (a defect of this exporter).
    """
    weight = read_tensor(unit.entry)
    if unit.action is Action.QUANTIZE:
        tensors = list(quantize_weight(weight, transposed=unit.transposed))
    elif unit.action is Action.CODES:
        tensors = [weight, channel_scale(_scale(unit), unit.outputs[1].shape[0])]
    elif unit.action is Action.DEQUANTIZE:
        tensors = [to_bf16(dequantize_weight(weight, _scale(unit), transposed=unit.transposed))]
    elif unit.action is Action.CAST:
        tensors = [to_bf16(weight)]
    else:
        tensors = [weight]
    for tensor, output in zip(tensors, unit.outputs, strict=True):
        if tuple(tensor.shape) != output.shape:
            raise ValueError(f"{output.name}: planned {output.shape}, produced {tuple(tensor.shape)}")
    return {output.name: tensor for output, tensor in zip(unit.outputs, tensors, strict=True)}


def _scale(unit: Unit) -> Tensor:
    if unit.scale is None:
        raise ValueError(f"{unit.entry.name}: FP8 codes without a scale passed the linter")
    return read_tensor(unit.scale)
