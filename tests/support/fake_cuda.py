"""CUDA tensors without a GPU: shapes, dtypes, layouts and devices, no values; and a count of what a device would do.

Inside `fake_cuda()` torch's fake tensors take `device="cuda"` on a CPU build, so the branches for CUDA run with every
check that the operators' meta functions make: of `torch._scaled_mm` the layouts, widths, and shapes and dtypes of
scales; of each operator that its tensors share a device. Autograd runs too. What it cannot show is a kernel that is
missing for a compute capability, a value, or a time.

    with fake_cuda() as counter:
        step()                       # tensors made with device="cuda"
    counter.kernels, counter.traffic, counter.syncs, counter.peak
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fp8pipe.numerics import cuda

PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "_scaled_mm"}
_aten = torch.ops.aten
_SCALARS = {_aten._local_scalar_dense.default}
_EQUAL = _aten.equal.default
_SIZES = {_aten.nonzero.default, _aten.masked_select.default}  # the size of the result is a value on the device
_PIN = _aten._pin_memory.default  # fake tensors do not know it
_METADATA = {
    *(_aten.empty.memory_format, _aten.empty_strided.default, _aten.empty_like.default, _aten.new_empty.default),
    *(_aten.new_empty_strided.default, _aten._unsafe_view.default, _aten._reshape_alias.default, _aten.alias.default),
    *(_aten.detach.default, _aten.lift_fresh.default),
}


class CudaCounter(TorchDispatchMode):
    """Counts what the operators on CUDA tensors would do, one kernel an operator.

    So it is a bound from below that compares one version of the code with another: sorts and products take several
    kernels, and a broadcast operand is read once. Copies from the host are not counted as waiting for the device, but
    by themselves: only those out of pinned memory, told not to block, do not hold the host up.

    Attributes:
        kernels: operators that write memory, by name.
        traffic: bytes that they read and write.
        between: of these bytes, those of operators that are no products of matrices.
        syncs: where the host waits for the device, by name: values read, sizes that depend on values, copies back.
        uploads: copies from the host that it waits for.
        peak: most bytes that tensors held at once, of those made while it counted.
        found: how many elements `nonzero` finds.
        integer: the integer, and truth the boolean, that a tensor's value is; a number is 1.
    """

    def __init__(self, *, found: int = 16, integer: int = 16, truth: bool = False) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.syncs: Counter[str] = Counter()
        self.uploads = 0
        self.traffic, self.between, self.peak, self._held = 0, 0, 0, 0
        self.found, self.integer, self.truth = found, integer, truth

    def clear(self) -> None:
        """Count anew; what is held stays held."""
        self.kernels.clear()
        self.syncs.clear()
        self.traffic, self.between, self.peak, self.uploads = 0, 0, self._held, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # asks for a device, a stride
            return func(*args, **kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = any(tensor.is_cuda for tensor in given)
        if func in _SCALARS:
            self._wait(func, on_device)
            return self._value(given[0].dtype)
        if func is _EQUAL:
            self._wait(func, on_device)
            return self.truth
        if func in _SIZES:
            self._wait(func, on_device)
            if on_device:
                self._launch(func, given, [])
            return given[0].new_empty((self.found, given[0].dim()), dtype=torch.int64)
        if func is _PIN:
            pinned = given[0].clone()
            pinned.untyped_storage()._pinned = True
            return pinned
        result = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        # Told not to block, a copy to the host goes to pinned memory, and the host waits for it when it reads an event.
        if on_device and not all(tensor.is_cuda for tensor in made) and not kwargs.get("non_blocking"):
            self._wait(func, True)
        if given and not on_device and any(tensor.is_cuda for tensor in made):
            pinned = all(getattr(tensor.untyped_storage(), "_pinned", False) for tensor in given)
            self.uploads += not (pinned and kwargs.get("non_blocking"))
        if on_device or any(tensor.is_cuda for tensor in made):
            self._hold(given, made)
            if func not in _METADATA and not func.is_view:
                self._launch(func, given, made)
        return result

    def _value(self, dtype: torch.dtype) -> Any:
        if dtype == torch.bool:
            return self.truth
        return 1.0 if dtype.is_floating_point else self.integer

    def _wait(self, func: Any, on_device: bool) -> None:
        if on_device:
            self.syncs[func.overloadpacket.__name__] += 1

    def _launch(self, func: Any, given: list[Tensor], made: list[Tensor]) -> None:
        name = func.overloadpacket.__name__
        self.kernels[name] += 1
        moved = sum(map(_touched, {id(tensor): tensor for tensor in [*given, *made]}.values()))
        if func._schema.is_mutable and "out" not in func._overloadname:  # read, and written
            moved += sum(_touched(tensor) for tensor in made if any(tensor is one for one in given))
        self.traffic += moved
        if name not in PRODUCTS:
            self.between += moved

    def _hold(self, given: list[Tensor], made: list[Tensor]) -> None:
        known = {id(tensor.untyped_storage()) for tensor in given}
        for storage in {id(t.untyped_storage()): t.untyped_storage() for t in made if t.is_cuda}.values():
            if id(storage) not in known and not getattr(storage, "_counted", False):
                storage._counted = True
                self._held += storage.nbytes()
                weakref.finalize(storage, self._release, storage.nbytes())
        self.peak = max(self.peak, self._held)

    def _release(self, size: int) -> None:
        self._held -= size


def _touched(tensor: Tensor) -> int:
    """Bytes of a tensor's elements on the device, what is repeated counted once."""
    if not tensor.is_cuda:
        return 0
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else min(size, 1)
    return count * tensor.element_size()


@contextmanager
def fake_cuda(capability: tuple[int, int] = (9, 0), *, counted: bool = True, **values: Any) -> Iterator[CudaCounter]:
    """Fake tensors, on "cuda" where they are made there, and their counter.

    Args:
        capability: the GPU's compute capability.
        counted: torch.compile does not trace where something counts.
        values: the counter's arguments.
    """
    switch = _switch()
    counter = CudaCounter(**values)
    answer = torch.compiler.assume_constant_result(lambda index: capability)
    with ExitStack() as stack:
        switch(1)
        stack.callback(switch, 0)
        # Autograd would start a thread for the device only before its first pass in this process.
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        for place, name, value in (
            # A module moves its parameters by swapping them, unless a weak reference, here the cache's, sees it.
            (weakref, "getweakrefs", []),
            # Autocast asks them.
            (torch.cuda.amp.common, "amp_definitely_not_available", False),
            (torch.cuda, "is_bf16_supported", True),
        ):
            stack.enter_context(mock.patch.object(place, name, return_value=value))
        stack.enter_context(mock.patch.object(cuda, "capability", answer))
        # A copied model's tensors stay in the mode that made them.
        stack.enter_context(mock.patch.object(FakeTensorMode, "__deepcopy__", lambda mode, memo: mode, create=True))
        stack.enter_context(FakeTensorMode())
        if counted:
            stack.enter_context(counter)
        yield counter


@cache
def _switch() -> Any:
    """The function of `fake_cuda.cpp` that puts guard and hooks in place and takes them away."""
    if torch.version.cuda is not None:
        pytest.skip("this build of torch has CUDA's own guard: fake tensors on CUDA need a CPU build")
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("fake tensors on CUDA need a C++ compiler: install g++")
    root, source = Path(torch.__file__).parent, Path(__file__).with_suffix(".cpp")
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "fake_cuda.so"
        command = [compiler, "-O0", "-std=c++20", "-shared", "-fPIC", f"-I{root / 'include'}", str(source)]
        command += ["-o", str(built), f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu"]
        subprocess.run(command, check=True, capture_output=True, text=True)
        function = ctypes.CDLL(str(built)).fake_cuda
    function.argtypes, function.restype = (ctypes.c_int,), None
    return function
