"""Adding stored tensors to a graph."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

__all__ = ["add_initializer", "as_array"]


def add_initializer(graph: ir.Graph, name: str, array: Any) -> ir.Value:
    """A stored tensor of that name, from a numpy array (ml_dtypes for the small types); the existing one if there.

    Raises:
        ValueError: the name is taken by another tensor.
    """
    tensor = ir.tensor(array, name=name)
    existing = graph.initializers.get(name)
    if existing is not None:
        stored = existing.const_value
        if (
            stored is None
            or stored.dtype != tensor.dtype
            or stored.shape != tensor.shape
            or stored.tobytes() != tensor.tobytes()
        ):
            raise ValueError(f"the graph has another tensor named {name}")
        return existing
    value = ir.Value(
        name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tuple(array.shape)), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def as_array(codes: Tensor) -> Any:
    """Codes as numpy holds them: int8, or ml_dtypes' float8_e4m3fn; contiguous."""
    import ml_dtypes

    if codes.dtype == torch.float8_e4m3fn:
        return codes.detach().cpu().contiguous().view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
    return codes.detach().cpu().contiguous().numpy()
