"""A checkpoint's tensors in memory, as what a model reads a part at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from fp8pipe.models.checkpoint.tensors import DTYPES, TensorHeader
from fp8pipe.models.language.parts import StoredWeights

__all__ = ["held_weights"]

_ROWS = 7  # divides hardly any shape, so that last blocks are shorter
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def held_weights(state: Mapping[str, Tensor], read: list[str] | None = None) -> StoredWeights:
    """In blocks of a few rows; `read` gets the name of every tensor that is read."""

    def blocks(name: str) -> Iterator[Tensor]:
        if read is not None:
            read.append(name)
        value = state[name].float() if state[name].is_floating_point() else state[name]
        yield from value.split(_ROWS) if value.ndim else [value]

    headers = {name: TensorHeader(name, _NAMES[value.dtype], tuple(value.shape)) for name, value in state.items()}
    return StoredWeights(headers, blocks)
