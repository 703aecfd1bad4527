"""Tensors that say they are on another device, with their values, on a machine that has none.

Within `two_devices()`, `far(tensor)` and whatever is made of it or sent to its device take part in no operator with a
tensor of the host, as on a GPU: but for copies, indices, and tensors of one number. The device is called "meta", which
a CPU build of torch knows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["far", "two_devices"]

_aten = torch.ops.aten
_INDEXED = {_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default, _aten._index_put_impl_.default}


class _Far(Tensor):
    """A tensor of the other device; `inner` has its values."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> _Far:
        made: _Far = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device="meta",
        )  # fmt: skip
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of two_devices()")


class _TwoDevices(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = any(isinstance(leaf, _Far) for leaf in given)
        together = [args[0], args[2]] if func in _INDEXED and len(args) > 2 else args[:1] if func in _INDEXED else given
        if func not in {_aten._to_copy.default, _aten.copy_.default} and there:
            here = [leaf for leaf in together if not isinstance(leaf, _Far) and leaf.dim() > 0]
            assert not here, f"{func} takes tensors of both devices: {[tuple(leaf.shape) for leaf in here]} of the host"
        if kwargs.get("device") is not None:
            there = torch.device(kwargs["device"]).type == "meta"
            kwargs["device"] = torch.device("cpu")
        found = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
        if func._schema.is_mutable and isinstance(args[0], _Far):
            return args[0]
        return tree_map(lambda leaf: _Far(leaf) if isinstance(leaf, Tensor) and there else leaf, found)


def far(tensor: Tensor) -> Tensor:
    """The same on the other device; it shares memory with `tensor`."""
    return _Far(tensor)


@contextmanager
def two_devices() -> Iterator[None]:
    """While this lasts there is another device."""
    with _TwoDevices():
        yield


def _inner(leaf: Any) -> Any:
    return leaf.inner if isinstance(leaf, _Far) else leaf
