"""Determines how an engine's loader arranges a checkpoint, by loading tensors whose values encode their own position.

vLLM's model classes fuse layers, permute rows, transpose and pad, and few of them declare it. So before the real
weights, the loader is run several times on marker tensors, which have the names, shapes and dtypes of the checkpoint.
The value of each element is one digit of its position: of the number of its tensor, its row, or its column. The values
that arrive in the engine's tensors then identify the origin of each element. Digits are in base 256, since every dtype
can represent 256 values exactly (FP8 with its 256 codes). The real weights are loaded last and in the normal way, so
the engine serves exactly what its loader produces from them.

Runs inside vLLM's Python: only torch is imported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Head", "Layout", "Origin", "Piece", "learn"]

_BASE = 256
_POISON = 0xA5  # written to elements without a marker, to detect whether the loader overwrites them

Load = Callable[[Iterable[tuple[str, Tensor]]], object]


@dataclass(frozen=True, slots=True)
class Head:
    """Name, shape and dtype of a checkpoint tensor, viewed as a matrix; a vector is a matrix with one column."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def columns(self) -> int:
        """Length of the last axis; 1 for a vector."""
        return self.shape[-1] if len(self.shape) > 1 else 1

    @property
    def rows(self) -> int:
        """Number of elements divided by the number of columns."""
        return math.prod(self.shape) // max(1, self.columns)


@dataclass(slots=True)
class Piece:
    """The elements of an engine tensor (viewed as a matrix) that come from one checkpoint tensor.

    Attributes:
        head: the checkpoint tensor.
        axis: meaning of the indices `at`: 0 for rows, 1 for columns, None for elements of the flattened tensor.
        at: int64, ascending indices of the elements in the engine tensor.
        rows, columns: int64, position of each element in the checkpoint tensor; an axis along which the value is
            constant has length 1.
        changed: whether some marker became an invalid value, which means that the loader computes new values instead
            of only rearranging them.
    """

    head: Head
    axis: int | None
    at: Tensor
    rows: Tensor = field(default_factory=lambda: torch.zeros(1, 1, dtype=torch.int64))
    columns: Tensor = field(default_factory=lambda: torch.zeros(1, 1, dtype=torch.int64))
    changed: bool = False

    def of(self, matrix: Tensor) -> Tensor:
        """Select the piece's elements from a matrix; one that is constant along `axis` (length 1) is returned as is."""
        if self.axis is None:
            return matrix.reshape(-1, 1)[self.at]
        if matrix.shape[self.axis] == 1:
            return matrix
        first, count = int(self.at[0]), self.at.numel()
        if int(self.at[-1]) - first == count - 1:  # `at` is ascending, so the range is contiguous: no copy is needed
            return matrix.narrow(self.axis, first, count)
        return matrix.index_select(self.axis, self.at)


@dataclass(slots=True)
class Origin:
    """Where the elements of an engine tensor come from.

    Attributes:
        shape: shape of the engine tensor during loading.
        pieces: the elements that come from the checkpoint, one piece per checkpoint tensor.
        unmarked: bool matrix, true for all other elements; an axis along which it is constant has length 1.
        unwritten: number of unmarked elements that the loader does not write at all.
        filled: whether the loader writes zeros to the remaining unmarked elements.
    """

    shape: tuple[int, ...]
    pieces: list[Piece]
    unmarked: Tensor
    unwritten: int = 0
    filled: bool = True

    def rest(self, value: Tensor) -> Tensor:
        """The elements of `value` that do not come from the checkpoint, as a vector."""
        if not bool(self.unmarked.any()):
            return value.new_zeros(0)
        return _matrix(value)[self.unmarked.expand(_matrix_shape(self.shape))]


@dataclass(slots=True)
class Layout:
    """The checkpoint tensors by name, and the origins of the engine tensors by name."""

    heads: dict[str, Head]
    origins: dict[str, Origin]


def learn(tensors: Mapping[str, Tensor], heads: Sequence[Head], load: Load) -> Layout:
    """Load marker tensors until the origin of every element of the engine's tensors is known.

    Args:
        tensors: the engine's tensors by name; their values are overwritten, except elements that the loader does not
            write.
        heads: the checkpoint tensors, in loading order.
        load: the engine's loader, called with (name, tensor) pairs.

    Returns:
        The origin of every element. The engine's tensors now contain markers: the real weights must be loaded next.
    """
    marks = _Marks(heads, load)
    marks.load_numbers(0)
    first = {name: _digits(tensor) for name, tensor in tensors.items()}
    marks.load_numbers(0, opposite=True)
    origins, numbers, saved = {}, {}, {}
    for name, tensor in tensors.items():
        numbers[name], marked = _marked(first.pop(name), _digits(tensor))
        origins[name] = Origin(tuple(tensor.shape), [], _shrunk(~marked))
        saved[name] = _poison(tensor, origins[name])
    for place in range(1, _places(len(heads))):
        marks.load_numbers(place)
        for name, tensor in tensors.items():
            numbers[name] = _shrunk(numbers[name] + _digits(tensor)[0].to(torch.int32) * _BASE**place)
    for name, origin in origins.items():
        origin.pieces = list(_pieces(numbers.pop(name), origin, heads))
    for along in ("rows", "columns"):
        for place in range(_places(max((getattr(head, along) for head in heads), default=1) - 1)):
            marks.load_counts(along, place)
            for name, tensor in tensors.items():
                _note(origins[name], _digits(tensor), along, place)
    for name, tensor in tensors.items():
        _restore(tensor, origins[name], saved[name])
        for piece in origins[name].pieces:
            within = int(piece.rows.max()) < piece.head.rows and int(piece.columns.max()) < piece.head.columns
            piece.changed |= not within
    return Layout({head.name: head for head in heads}, origins)


def _places(largest: int) -> int:
    """Number of base-256 digits of `largest`."""
    return max(1, math.ceil(largest.bit_length() / 8))


@dataclass(frozen=True)
class _Marks:
    """Loads marker tensors for one digit, which is constant over a whole tensor or along an axis."""

    heads: Sequence[Head]
    load: Load

    def load_numbers(self, place: int, *, opposite: bool = False) -> None:
        """Load one digit of each tensor's number into all its elements; with `opposite`, load 255 - digit.

        Numbers start at 1, because 0 is the value of padding.
        """
        digits = [number // _BASE**place % _BASE for number in range(1, len(self.heads) + 1)]
        digits = [_BASE - 1 - digit for digit in digits] if opposite else digits
        self.load(
            (head.name, _as_dtype(torch.full(head.shape, digit, dtype=torch.uint8), head.dtype))
            for head, digit in zip(self.heads, digits, strict=True)
        )

    def load_counts(self, along: str, place: int) -> None:
        """Load one digit of each element's row index (`along` is "rows") or column index ("columns")."""
        self.load((head.name, self._counted(head, along, place)) for head in self.heads)

    @staticmethod
    def _counted(head: Head, along: str, place: int) -> Tensor:
        count = torch.arange(getattr(head, along)) // _BASE**place % _BASE
        count = _as_dtype(count.to(torch.uint8), head.dtype)
        count = count[:, None] if along == "rows" else count[None, :]
        return count.expand(head.rows, head.columns).reshape(head.shape).contiguous()


def _as_dtype(digits: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert digits to a dtype: as raw bytes for one-byte dtypes, as numbers for wider ones."""
    return digits.view(dtype) if dtype.itemsize == 1 and dtype is not torch.bool else digits.to(dtype)


def _matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    columns = shape[-1] if len(shape) > 1 else 1
    return math.prod(shape) // columns, columns


def _matrix(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(_matrix_shape(tensor.shape))


def _digits(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Read the digits in an engine tensor: a uint8 matrix, and a bool matrix of which digits are valid.

    An axis along which a matrix is constant has length 1. Both are on the CPU; constant axes are reduced before the
    transfer, so little is copied from a GPU.
    """
    matrix = _matrix(tensor)
    if matrix.dtype.itemsize == 1:
        return _shrunk(matrix.view(torch.uint8)).clone().cpu(), torch.ones(1, 1, dtype=torch.bool)
    matrix = _shrunk(matrix).cpu()
    digits = matrix.clamp(0, _BASE - 1).nan_to_num(0).to(torch.uint8)
    return digits, _shrunk(digits.to(matrix.dtype) == matrix)


def _shrunk(matrix: Tensor) -> Tensor:
    """Reduce each axis along which the matrix is constant to length 1."""
    for axis in (0, 1):
        if torch.equal(matrix, matrix.narrow(axis, 0, 1).expand_as(matrix)):
            matrix = matrix.narrow(axis, 0, 1)
    return matrix


def _marked(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The lowest digit of each element's tensor number, int32, and whether the element comes from a marker tensor.

    It does if the digit and the `opposite` digit that was loaded second sum to 255.
    """
    opposite = first[0].to(torch.int32) + second[0].to(torch.int32) == _BASE - 1
    return first[0].to(torch.int32), opposite & first[1] & second[1]


def _poison(tensor: Tensor, origin: Origin) -> tuple[Tensor, Tensor] | None:
    """Overwrite the elements without a marker; returns their indices and previous values."""
    if not bool(origin.unmarked.any()):
        return None
    at = origin.unmarked.expand(_matrix_shape(tensor.shape)).reshape(-1).nonzero()[:, 0].to(tensor.device)
    flat = tensor.detach().view(-1)
    before = flat[at].clone()
    flat[at] = _as_dtype(torch.full(at.shape, _POISON, dtype=torch.uint8), tensor.dtype).to(tensor.device)
    return at, before


def _restore(tensor: Tensor, origin: Origin, saved: tuple[Tensor, Tensor] | None) -> None:
    """Restore the elements that the loader did not write, and record their number."""
    if saved is None:
        return
    at, before = saved
    flat = tensor.detach().view(-1)
    now = flat[at]
    digits = now.view(torch.uint8) if now.dtype.itemsize == 1 else now
    unwritten = digits == _POISON
    flat[at[unwritten]] = before[unwritten]
    origin.unwritten = int(unwritten.sum())
    origin.filled = not bool(digits[~unwritten].any())


def _pieces(numbers: Tensor, origin: Origin, heads: Sequence[Head]) -> Iterator[Piece]:
    """Yield a piece for each checkpoint tensor that occurs in `numbers`.

    `numbers` are the tensor numbers of the elements, valid where `origin.unmarked` is false.
    """
    numbers = torch.where(origin.unmarked, 0, numbers)
    rows, columns = _matrix_shape(origin.shape)
    axis = 0 if numbers.shape[1] == 1 else 1 if numbers.shape[0] == 1 else None
    length = rows * columns if axis is None else (rows, columns)[axis]
    along = numbers.expand(rows, columns).reshape(-1) if axis is None else numbers.reshape(-1).expand(length)
    for number in along.unique().tolist():
        if 0 < number <= len(heads):
            yield Piece(heads[number - 1], axis, (along == number).nonzero()[:, 0])
        elif number:  # not the number of any checkpoint tensor
            origin.filled = False


def _note(origin: Origin, digits: tuple[Tensor, Tensor], along: str, place: int) -> None:
    """Add the digit at `place` to the row or column indices (`along`) of all pieces of an engine tensor."""
    for piece in origin.pieces:
        values, valid = digits
        if piece.axis is None:
            values, valid = (matrix.expand(_matrix_shape(origin.shape)) for matrix in digits)
        found = _shrunk(piece.of(values)).to(torch.int64) * _BASE**place
        setattr(piece, along, _shrunk(getattr(piece, along) + found))
        piece.changed |= not bool(piece.of(valid).all())
