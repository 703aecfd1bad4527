"""How an engine's loader lays a checkpoint out, learned from marks that pass through it.

vLLM's classes fuse layers, permute rows, transpose and pad, and few declare it. So before the true weights the loader
gets, several times, tensors of the checkpoint's names, shapes and dtypes whose values name their own place, a digit of
it each time: which tensor, which row, which column. What the engine's tensors hold then says where each of their
elements comes from. Digits are base 256: every dtype holds so many numbers exactly, FP8 as its 256 codes. The true
weights come last, so what is served is what the loader makes of them.

Runs inside vLLM's Python: torch alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Head", "Layout", "Origin", "Piece", "learn"]

_BASE = 256
_POISON = 0xA5  # of elements without a mark, to see whether the loader writes them

Load = Callable[[Iterable[tuple[str, Tensor]]], object]


@dataclass(frozen=True, slots=True)
class Head:
    """A tensor of the checkpoint, without its values; seen as rows of its last axis, a vector as rows of one."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def columns(self) -> int:
        """Length of the last axis, 1 of a vector."""
        return self.shape[-1] if len(self.shape) > 1 else 1

    @property
    def rows(self) -> int:
        """Elements over columns."""
        return math.prod(self.shape) // max(1, self.columns)


@dataclass(slots=True)
class Piece:
    """Elements of an engine's tensor, seen as a matrix, that come from one tensor of the checkpoint.

    Attributes:
        head: of which tensor.
        axis: along which axis `at` lists places: 0 rows, 1 columns, None single elements of the whole.
        at: int64, those places.
        rows, columns: int64, of each element, its place in the checkpoint's tensor; an axis along which it stays the
            same has length 1.
        changed: whether some mark came out as no mark: the loader computes, and does not only rearrange.
    """

    head: Head
    axis: int | None
    at: Tensor
    rows: Tensor = field(default_factory=lambda: torch.zeros(1, 1, dtype=torch.int64))
    columns: Tensor = field(default_factory=lambda: torch.zeros(1, 1, dtype=torch.int64))
    changed: bool = False

    def of(self, matrix: Tensor) -> Tensor:
        """Its elements: a matrix; of one that stays the same along `axis`, one row or column for all."""
        if self.axis is None:
            return matrix.reshape(-1, 1)[self.at]
        if matrix.shape[self.axis] == 1:
            return matrix
        first, count = int(self.at[0]), self.at.numel()
        if int(self.at[-1]) - first == count - 1:  # `at` ascends: these are neighbours, and need no copy
            return matrix.narrow(self.axis, first, count)
        return matrix.index_select(self.axis, self.at)


@dataclass(slots=True)
class Origin:
    """Where an engine's tensor comes from.

    Attributes:
        shape: as the loader saw it.
        pieces: what comes from the checkpoint.
        unmarked: bool, elements that do not, as a matrix; an axis along which it stays the same has length 1.
        unwritten: how many of those the loader does not write at all.
        filled: whether it writes all others of them as zero.
    """

    shape: tuple[int, ...]
    pieces: list[Piece]
    unmarked: Tensor
    unwritten: int = 0
    filled: bool = True

    def rest(self, value: Tensor) -> Tensor:
        """What does not come from the checkpoint, of a value of this shape."""
        if not bool(self.unmarked.any()):
            return value.new_zeros(0)
        return _matrix(value)[self.unmarked.expand(_matrix_shape(self.shape))]


@dataclass(slots=True)
class Layout:
    """Heads of the checkpoint by name, and origins of the engine's tensors by name."""

    heads: dict[str, Head]
    origins: dict[str, Origin]


def learn(tensors: Mapping[str, Tensor], heads: Sequence[Head], load: Load) -> Layout:
    """Load marks until each element of the engine's tensors has told where it comes from.

    Args:
        tensors: the engine's own, by name; what they hold is lost, but for elements that the loader does not write.
        heads: of the checkpoint, in the order in which it is loaded.
        load: the engine's loader.
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
    """Digits of a number."""
    return max(1, math.ceil(largest.bit_length() / 8))


@dataclass(frozen=True)
class _Marks:
    """Loads marks: one digit, the same for a whole tensor or along an axis."""

    heads: Sequence[Head]
    load: Load

    def load_numbers(self, place: int, *, opposite: bool = False) -> None:
        """Of each tensor's number, from 1: loaders pad with 0. The opposite of x is 255 - x, which x never equals."""
        digits = [number // _BASE**place % _BASE for number in range(1, len(self.heads) + 1)]
        digits = [_BASE - 1 - digit for digit in digits] if opposite else digits
        self.load(
            (head.name, _as_dtype(torch.full(head.shape, digit, dtype=torch.uint8), head.dtype))
            for head, digit in zip(self.heads, digits, strict=True)
        )

    def load_counts(self, along: str, place: int) -> None:
        """Of each element's row, or column."""
        self.load((head.name, self._counted(head, along, place)) for head in self.heads)

    @staticmethod
    def _counted(head: Head, along: str, place: int) -> Tensor:
        count = torch.arange(getattr(head, along)) // _BASE**place % _BASE
        count = _as_dtype(count.to(torch.uint8), head.dtype)
        count = count[:, None] if along == "rows" else count[None, :]
        return count.expand(head.rows, head.columns).reshape(head.shape).contiguous()


def _as_dtype(digits: Tensor, dtype: torch.dtype) -> Tensor:
    """As codes of what has one byte, as numbers of what has more."""
    return digits.view(dtype) if dtype.itemsize == 1 and dtype is not torch.bool else digits.to(dtype)


def _matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    columns = shape[-1] if len(shape) > 1 else 1
    return math.prod(shape) // columns, columns


def _matrix(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(_matrix_shape(tensor.shape))


def _digits(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 digits of a matrix, and whether each is one; axes along which they stay the same have length 1.

    On the CPU, wherever the engine's tensor is: what stays the same is little to fetch.
    """
    matrix = _matrix(tensor)
    if matrix.dtype.itemsize == 1:
        return _shrunk(matrix.view(torch.uint8)).clone().cpu(), torch.ones(1, 1, dtype=torch.bool)
    matrix = _shrunk(matrix).cpu()
    digits = matrix.clamp(0, _BASE - 1).nan_to_num(0).to(torch.uint8)
    return digits, _shrunk(digits.to(matrix.dtype) == matrix)


def _shrunk(matrix: Tensor) -> Tensor:
    """Without the axes along which it stays the same: they have length 1."""
    for axis in (0, 1):
        if torch.equal(matrix, matrix.narrow(axis, 0, 1).expand_as(matrix)):
            matrix = matrix.narrow(axis, 0, 1)
    return matrix


def _marked(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The lowest digit of each element's tensor, int32, and whether it has one."""
    opposite = first[0].to(torch.int32) + second[0].to(torch.int32) == _BASE - 1
    return first[0].to(torch.int32), opposite & first[1] & second[1]


def _poison(tensor: Tensor, origin: Origin) -> tuple[Tensor, Tensor] | None:
    """Overwrite what has no mark; where that is and what was there."""
    if not bool(origin.unmarked.any()):
        return None
    at = origin.unmarked.expand(_matrix_shape(tensor.shape)).reshape(-1).nonzero()[:, 0].to(tensor.device)
    flat = tensor.detach().view(-1)
    before = flat[at].clone()
    flat[at] = _as_dtype(torch.full(at.shape, _POISON, dtype=torch.uint8), tensor.dtype).to(tensor.device)
    return at, before


def _restore(tensor: Tensor, origin: Origin, saved: tuple[Tensor, Tensor] | None) -> None:
    """Put back what the loader did not write, and note how much that is."""
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
    """One for each tensor of the checkpoint that is in it; `numbers` as far as `unmarked` is false."""
    numbers = torch.where(origin.unmarked, 0, numbers)
    rows, columns = _matrix_shape(origin.shape)
    axis = 0 if numbers.shape[1] == 1 else 1 if numbers.shape[0] == 1 else None
    length = rows * columns if axis is None else (rows, columns)[axis]
    along = numbers.expand(rows, columns).reshape(-1) if axis is None else numbers.reshape(-1).expand(length)
    for number in along.unique().tolist():
        if 0 < number <= len(heads):
            yield Piece(heads[number - 1], axis, (along == number).nonzero()[:, 0])
        elif number:  # no tensor of the checkpoint has this number
            origin.filled = False


def _note(origin: Origin, digits: tuple[Tensor, Tensor], along: str, place: int) -> None:
    """Add a digit to all pieces' rows or columns."""
    for piece in origin.pieces:
        values, valid = digits
        if piece.axis is None:
            values, valid = (matrix.expand(_matrix_shape(origin.shape)) for matrix in digits)
        found = _shrunk(piece.of(values)).to(torch.int64) * _BASE**place
        setattr(piece, along, _shrunk(getattr(piece, along) + found))
        piece.changed |= not bool(piece.of(valid).all())
