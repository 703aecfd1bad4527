"""Runs a model whose weights are in memory a part at a time, so that its memory does not grow with the model.

No code of the model is replaced. Weights that are not in memory are stand-ins: they have a dtype, a device and a shape,
and any other use of one reads the part that it belongs to, in place of the part before. Each text runs through the
whole model in its own turn (`fp8pipe.core.turns`) and stops where it needs another part; once all texts have stopped,
the next part is read. So the operations on a text and their order are those of the model in memory, every result has
the same bits, and a part is read once for all texts. The order of use is the model's own: whatever reads a weight out
of turn is right, and costs one more read.

A part is as many consecutive modules (layers, embeddings, experts, blocks of a vision tower) as fit into `PART_BYTES`;
what one module owns is never divided, however large. Weights that no text uses are never read. What transformers
computes from several stored tensors stays in memory, and so do stacks of experts that are not given one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fp8pipe.core.machine import return_freed_memory
from fp8pipe.core.turns import Turns
from fp8pipe.models.checkpoint.tensors import DTYPES, TensorHeader
from fp8pipe.models.language.structure import build_model, read_structure
from fp8pipe.models.language.unstacking import unstack_experts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["PART_BYTES", "PartedModel", "StoredWeights"]

PART_BYTES: Final = 1 << 30  # in fp32: one layer of a model of 8 billion parameters, all of a model of 200 million
_PARAMETERS, _BUFFERS = "_parameters", "_buffers"  # where a module keeps its tensors
Change = Callable[[str, str, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """A checkpoint's tensors, read when they are needed.

    Attributes:
        headers: dtype and shape by checkpoint name.
        blocks: yields the values of one tensor in consecutive blocks of rows (first axis), in the stored orientation;
            fp32, or the stored dtype of one that is not floating point.
    """

    headers: Mapping[str, TensorHeader]
    blocks: Callable[[str], Iterable[Tensor]]

    def read(self, name: str, change: Callable[[Tensor], Tensor] = lambda block: block) -> Tensor:
        """A tensor whose blocks were changed one by one, so that no second copy of it is in memory."""
        whole, filled = torch.empty(0), 0
        for block in map(change, self.blocks(name)):
            if not filled:
                whole = torch.empty(self.headers[name].shape, dtype=block.dtype)
            whole.view(-1)[filled : filled + block.numel()] = block.reshape(-1)
            filled += block.numel()
        return whole


class PartedModel:
    """The model defined by config.json, in evaluation mode on the CPU; fp32 until `change`.

    Attributes:
        model: to be called in functions given to `run`; experts are unstacked. Hooks on its modules stay.
        parts: names of the tensors that are read together.

    Args:
        directory: of config.json.
        weights: of its checkpoint.
        part_bytes: size of a part in fp32.

    Raises:
        ConfigurationError: as `build_model`.
    """

    def __init__(self, directory: Path, weights: StoredWeights, part_bytes: int = PART_BYTES) -> None:
        self._weights = weights
        naming = read_structure(directory).naming
        later = {known.name: stored for stored, known in naming.table(weights.headers).items()
                 if known.whole and DTYPES[weights.headers[stored].dtype].is_floating_point
                 and known.name.rpartition(".")[0] not in naming.experts}  # fmt: skip
        parted = set(later.values())
        state = {stored: _Unread.of(header.shape) if stored in parted else weights.read(stored)
                 for stored, header in weights.headers.items()}  # fmt: skip
        self.model: PreTrainedModel = build_model(directory, state, torch.float32)
        unstack_experts(self.model)
        self._places = {place.name: place for place in _unread_places(self.model, later)}
        self.parts = _parts({name: 4 * place.like.numel() for name, place in self._places.items()}, part_bytes)
        self._part_of = {name: number for number, part in enumerate(self.parts) for name in part}
        self._change: Change = lambda module, key, values: values
        self._turns: Turns | None = None
        self._present: int | None = None
        self._put_away(self._places)

    def change(self, change: Change) -> None:
        """Replace the values of every parameter, now or once it is read; called at most once.

        Args:
            change: gets the module's name, the parameter's key in that module, and some of its values (any shape). To
                do it twice must be the same as once, since a tied parameter has two names.
        """
        self._change, self._present = change, None
        for name, module in self.model.named_modules():
            for key, parameter in module.named_parameters(recurse=False):
                if not isinstance(parameter, _Absent) and _joined(name, key) not in self._places:
                    parameter.data = change(name, key, parameter.data)
        self._put_away(self._places)

    def run(self, functions: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
        """Results of functions that call `model`, each as if it was called alone."""
        self._turns = Turns(self._bring)
        try:
            return self._turns.run(functions)
        finally:
            self._turns = None

    def _need(self, name: str) -> Tensor:
        """The values of a weight that is not in memory."""
        part, place = self._part_of[name], self._places[name]
        if self._turns is None:
            self._bring(part)
        else:
            self._turns.need(part)
        return place.held

    def _bring(self, part: int) -> None:
        """Read a part in place of the one that is there."""
        if part == self._present:
            return
        if self._present is not None:
            self._put_away(self.parts[self._present])
            # Caches of the texts lie between what each layer freed, so the heap would grow by far more than they take.
            return_freed_memory()
        self._present = None  # until the part is complete
        for name in self.parts[part]:
            place = self._places[name]
            place.put(self._weights.read(place.stored, partial(self._changed, place)))
        self._present = part

    def _put_away(self, names: Iterable[str]) -> None:
        for name in names:
            place = self._places[name]
            dtype = self._changed(place, torch.empty(0)).dtype
            # NaN: if anything ever read a stand-in's numbers, it would show.
            numbers = torch.full((), torch.nan, dtype=dtype).expand(place.like.shape)
            place.put(_Absent.of(numbers, partial(self._need, name), parameter=place.kind == _PARAMETERS))

    def _changed(self, place: _Place, values: Tensor) -> Tensor:
        return self._change(place.module, place.key, values) if place.kind == _PARAMETERS else values


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a module holds a tensor, and what a checkpoint calls it."""

    module: str
    owner: nn.Module
    kind: str  # _PARAMETERS or _BUFFERS
    key: str
    like: Tensor  # on the meta device
    stored: str

    @property
    def name(self) -> str:
        return _joined(self.module, self.key)

    @property
    def held(self) -> Tensor:
        tensor: Tensor = getattr(self.owner, self.kind)[self.key]
        return tensor

    def put(self, value: Tensor) -> None:
        if self.like.ndim == 2 and self.like.stride(0) < self.like.stride(1) and not isinstance(value, _Absent):
            value = value.t().contiguous().t()  # a GEMM sums in another order if its weight lies transposed in memory
        if self.kind == _PARAMETERS and not isinstance(value, _Absent):
            # Even where no gradient is computed, torch chooses some GEMMs by this flag.
            value = nn.Parameter(value, requires_grad=self.like.requires_grad)
        getattr(self.owner, self.kind)[self.key] = value


class _Unread(Tensor):
    """A tensor on the meta device that stays there when transformers moves it."""

    @classmethod
    def of(cls, shape: tuple[int, ...]) -> _Unread:
        return torch.empty(shape, device="meta").as_subclass(cls)

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.as_subclass(Tensor)


_TENSOR: Any = Tensor  # untyped: its attributes are descriptors
# What a stand-in knows; everything else needs the weight.
_KNOWN: Final = frozenset(
    [getattr(_TENSOR, name).__get__ for name in ("dtype", "device", "shape", "ndim")]
    + [getattr(_TENSOR, name) for name in ("size", "dim", "numel", "is_floating_point", "is_complex")]
    + [torch.is_floating_point, torch.is_complex]
)


class _Absent(Tensor):
    """Stands in for a weight that is not in memory; reads it if its numbers are used."""

    fetch: Callable[[], Tensor]
    _is_param: bool  # by which torch knows a parameter

    @classmethod
    def of(cls, numbers: Tensor, fetch: Callable[[], Tensor], *, parameter: bool) -> _Absent:
        made = numbers.as_subclass(cls)
        made.fetch, made._is_param = fetch, parameter
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _KNOWN:
            return _TENSOR.__torch_function__.__func__(cls, func, types, args, kwargs or {})
        args, kwargs = tree_map(_read, (args, kwargs or {}))
        return func(*args, **kwargs)


def _read(value: Any) -> Any:
    return value.fetch() if isinstance(value, _Absent) else value


def _unread_places(model: nn.Module, later: Mapping[str, str]) -> list[_Place]:
    """Where the tensors belong that were not read; those of a tied weight share one tensor of the checkpoint."""
    found = [
        (name, module, kind, key, tensor)
        for name, module in model.named_modules()
        for kind in (_PARAMETERS, _BUFFERS)
        for key, tensor in getattr(module, kind).items()
        if tensor is not None and tensor.is_meta
    ]
    stored = {id(t): later[_joined(name, key)] for name, _, _, key, t in found if _joined(name, key) in later}
    return [
        _Place(name, module, kind, key, tensor, later.get(_joined(name, key), stored[id(tensor)]))
        for name, module, kind, key, tensor in found
    ]


def _parts(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Consecutive modules of no more than `most` bytes together; one that is larger is divided."""
    parts: list[list[str]] = []
    room = 0
    for unit in _units(list(sizes), sizes, most, 1):
        size = sum(sizes[name] for name in unit)
        if not parts or size > room:
            parts.append([])
            room = most
        parts[-1] += unit
        room -= size
    return parts


def _units(names: list[str], sizes: Mapping[str, int], most: int, depth: int) -> Iterator[list[str]]:
    """The tensors by module, the outermost modules that are small enough; what one module owns stays together."""
    for _, same in groupby(names, lambda name: name.split(".")[:-1][:depth]):
        below = list(same)
        if len({name.rpartition(".")[0] for name in below}) == 1 or sum(sizes[name] for name in below) <= most:
            yield below
        else:
            yield from _units(below, sizes, most, depth + 1)


def _joined(module: str, key: str) -> str:
    return f"{module}.{key}" if module else key
