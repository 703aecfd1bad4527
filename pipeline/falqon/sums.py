"""Sums of gradient sketches, kept in a temporary file so that they occupy neither device memory nor process memory.

The sums of all layers together take an eighth of the model's size. The operating system caches the file in free memory.
The file is created in the directory of `tempfile` (`TMPDIR`), has no name, and is deleted when it is closed.
"""

from __future__ import annotations

import errno
import tempfile
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from fp8pipe.core.errors import OutOfMemoryError


class Sums:
    """Stores fp32 tensors by name in an unnamed temporary file; a context manager that closes and deletes the file.

    Args:
        device: the device on which `at` returns tensors.

    Raises:
        OutOfMemoryError: raised by `add` if the disk of the file is full.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Unbuffered: tensors are large, and a write error is raised by the write that caused it.
        self._file: Any = tempfile.TemporaryFile(prefix="fp8pipe-", buffering=0)  # noqa: SIM115
        self._places: dict[str, tuple[int, torch.Size]] = {}
        self._end = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def add(self, name: str, part: Tensor) -> None:
        """Add `part` to the stored tensor called `name`, or store it under that name if there is none yet.

        Args:
            name: name of the sum.
            part: any float dtype, on any device; always of the same shape for one name.
        """
        part = part.to("cpu").float()
        if name not in self._places:
            self._places[name] = self._end, part.shape
            self._end += part.nbytes
        else:
            part = self._read(name) + part
        self._write(name, part.contiguous())

    def at(self, name: str) -> Tensor:
        """The tensor called `name`, fp32, on the device given to the constructor."""
        return self._read(name).to(self._device)

    def _read(self, name: str) -> Tensor:
        start, shape = self._places[name]
        found = torch.empty(shape)
        self._file.seek(start)
        self._file.readinto(_bytes(found))
        return found

    def _write(self, name: str, value: Tensor) -> None:
        try:
            self._file.seek(self._places[name][0])
            left = _bytes(value)
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise OutOfMemoryError(
                f"the disk of {tempfile.gettempdir()} is full",
                why=f"the gradient initialisation keeps its sums there: {error}",
                fix="set TMPDIR to a directory on another disk, or use --initialisation randomized-svd",
            ) from error


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.numpy().data.cast("B")
