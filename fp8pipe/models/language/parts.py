"""A model whose weights are in memory a part at a time, so that its size does not matter.

Nothing of a model's own code is replaced or imitated. Each text runs through the whole model (`fp8pipe.core.turns`) and
waits where it comes to a module whose weights are elsewhere; once all texts wait, the next part takes the place of the
one before. So the operations on a text, and their order, are those of the model in memory, and so is every bit of a
result. A part is read once for all texts, and a model that is small enough is one part.

Parts are the input embedding, runs of decoder layers, and the output head. The rest of the decoder (norms, positions)
stays; what lies outside it is not read. transformers itself loads every part, as it does a whole model: what is
elsewhere is handed to it on the meta device.

A weight that is elsewhere is NaN, on the CPU and of the right shape: code may ask for its device or dtype, and whatever
reads its numbers shows. (On the meta device a lookup in a table succeeds, and returns what was in memory.)
"""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from fp8pipe.core.plan import refuse_impossible
from fp8pipe.core.turns import Turns
from fp8pipe.models.language.structure import ModelStructure, build_model, read_structure

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)
# Layers are read together up to this size: a small model is one part, and of a large one a part is a layer or two.
PART_BYTES: Final = 1 << 30
_ITEM: Final = 4  # bytes of a number in fp32
# Where a module keeps its tensors.
_PARAMETERS, _BUFFERS = "_parameters", "_buffers"
Change = Callable[[str, str, Tensor], Tensor]


@dataclass(frozen=True)
class StoredWeights:
    """A checkpoint's tensors, read when they are asked for.

    Attributes:
        shapes: by checkpoint name, in the orientation stored.
        read: gives one by name, fp32.
    """

    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]


class PartedModel:
    """The model that config.json names, fp32, in evaluation mode on the CPU.

    Attributes:
        model: to be called in functions given to `run`; hooks on its modules stay.
        parts: names of the modules that are read together, in order; none where the model is whole.

    Args:
        directory: of config.json.
        weights: of its checkpoint.
        part_bytes: fp32 bytes of a part; a layer, an embedding or a head that has more is one by itself.
    """

    def __init__(self, directory: Path, weights: StoredWeights, part_bytes: int = PART_BYTES) -> None:
        self._directory, self._weights = directory, weights
        self._structure = read_structure(directory)
        table = self._structure.naming.table(weights.shapes)
        self._names = {stored: known.name for stored, known in table.items()}
        self.parts = _parts(self._structure, part_bytes)
        self.model = self._build(self._stays() if self.parts else None)
        self._changes: list[Change] = []
        self._places = [self._meta_below(part) for part in self.parts]
        parted = {(place.module, place.key) for place in chain(*self._places)}
        # What is in no part is never read.
        self._outside = [p for p in self._meta_below([""]) if (p.module, p.key) not in parted]
        self._put_away(chain(*self._places, self._outside))
        self._present: int | None = None
        self._turns: Turns | None = None
        for index, part in enumerate(self.parts):
            for name in part:
                self.model.get_submodule(name).register_forward_pre_hook(partial(self._reached, index))

    def change(self, change: Change) -> None:
        """Replace the numbers of every parameter, those that come later, too.

        Args:
            change: given the module's name, the parameter's key there, and numbers of any shape. Doing it twice must
                be doing it once: a tied parameter has two names.
        """
        self._changes.append(change)
        self._leave()
        absent = {(place.module, place.key) for place in chain(*self._places, self._outside)}
        for name, module in self.model.named_modules():
            for key, parameter in module.named_parameters(recurse=False):
                if (name, key) not in absent:
                    parameter.data = change(name, key, parameter.data)
        self._put_away(chain(*self._places, self._outside))

    def run(self, functions: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
        """Results of functions that call `model`, each as if it was called alone.

        A model whose code reads a weight elsewhere than in the module that owns it cannot be parted; it is read whole.

        Raises:
            OutOfMemoryError: such a model is larger than memory and swap.
        """
        if self.parts:
            self._turns = Turns(self._bring)
            try:
                results = self._turns.run(functions)
            except (RuntimeError, AttributeError, TypeError, ValueError) as error:
                self._read_whole(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
            else:
                if not any(bool(result.isnan().any()) for result in results):
                    return results
                self._read_whole("it computes NaN, as where a weight is read that is elsewhere")
            finally:
                self._turns = None
        return [function() for function in functions]

    def _reached(self, part: int, module: nn.Module, given: Any) -> None:
        if self.parts:
            self._bring(part) if self._turns is None else self._turns.need(part)

    def _bring(self, part: int) -> None:
        """Put a part in the place of the one that is there."""
        if part == self._present:
            return
        self._leave()
        below = {name for name in self._structure.tensors if _is_below(name, self.parts[part])}
        self._fill(self._places[part], self._tied(below))
        self._present = part

    def _leave(self) -> None:
        """Drop the part that is there."""
        if self._present is not None:
            self._put_away(self._places[self._present])
        self._present = None

    def _read_whole(self, why: str) -> None:
        name = self._structure.architecture
        least = _ITEM * sum(math.prod(shape) for shape in self._weights.shapes.values())
        refuse_impossible(least, f"a {name}, which cannot be read a part at a time ({why}),")
        logger.warning("%s is read whole, since a part at a time it does not run: %s", name, why)
        self._leave()
        self._fill([*chain(*self._places), *self._outside], None)
        self.parts, self._places, self._outside = (), [], []

    def _fill(self, places: Iterable[_Place], tensors: Collection[str] | None) -> None:
        with _quiet():
            source = self._build(tensors)
        for place in places:
            value = getattr(source.get_submodule(place.module), place.kind)[place.key]
            if place.kind == _PARAMETERS:
                for change in self._changes:
                    value.data = change(place.module, place.key, value.data)
            place.put(value)

    def _put_away(self, places: Iterable[_Place]) -> None:
        for place in places:
            dtype = place.meta.dtype
            number = torch.full((1,), torch.nan if dtype.is_floating_point else 0, dtype=dtype)
            if place.kind == _PARAMETERS:
                for change in self._changes:
                    number = change(place.module, place.key, number)
            nothing = number.expand(place.meta.numel()).view(place.meta.shape)
            place.put(nn.Parameter(nothing, requires_grad=False) if place.kind == _PARAMETERS else nothing)

    def _build(self, tensors: Collection[str] | None) -> PreTrainedModel:
        """The model with these tensors, by its own names, or with all; the others are on the meta device."""
        state = {}
        for stored, shape in self._weights.shapes.items():
            here = tensors is None or self._names[stored] in tensors
            state[stored] = self._weights.read(stored) if here else _elsewhere(shape)
        return build_model(self._directory, state, torch.float32)

    def _stays(self) -> set[str]:
        """Tensors of the decoder that belong to no part."""
        structure, parted = self._structure, [name for part in self.parts for name in part]
        return self._tied({n for n in structure.tensors if structure.in_decoder(n) and not _is_below(n, parted)})

    def _tied(self, tensors: set[str]) -> set[str]:
        """These, and those that share their storage: a checkpoint has one of them."""
        for pair in self._structure.tied.items():
            tensors |= set(pair) if tensors & set(pair) else set()
        return tensors

    def _meta_below(self, modules: Iterable[str]) -> list[_Place]:
        """Where tensors of these modules go that are elsewhere."""
        found = []
        for top in modules:
            for name, module in self.model.get_submodule(top).named_modules(prefix=top, remove_duplicate=False):
                for kind in (_PARAMETERS, _BUFFERS):
                    held = getattr(module, kind).items()
                    found += [_Place(name, module, kind, key, v) for key, v in held if v is not None and v.is_meta]
        return found


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a module holds a tensor."""

    module: str
    owner: nn.Module
    kind: str  # _PARAMETERS or _BUFFERS
    key: str
    meta: Tensor  # of its shape

    def put(self, value: Tensor) -> None:
        getattr(self.owner, self.kind)[self.key] = value


class _Elsewhere(Tensor):
    """A tensor on the meta device that stays there when a loader moves it."""

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.as_subclass(Tensor)


def _elsewhere(shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, device="meta").as_subclass(_Elsewhere)


def _parts(structure: ModelStructure, part_bytes: int) -> tuple[tuple[str, ...], ...]:
    """Modules that are read together; none where all of them are small enough to be one part."""
    parts: list[list[str]] = []
    room = 0
    for unit in _units(structure):
        size = _bytes(structure, unit)
        if not parts or size > room:
            parts.append([])
            room = part_bytes
        parts[-1].append(unit)
        room -= size
    return tuple(map(tuple, parts)) if len(parts) > 1 else ()


def _units(structure: ModelStructure) -> list[str]:
    """The input embedding, the decoder's layers, the output head."""
    layers: dict[str, list[int]] = {}
    for name in structure.modules:
        above, _, last = name.rpartition(".")
        if last.isdigit() and structure.in_decoder(name):
            layers.setdefault(above, []).append(int(last))
    outermost = [above for above in layers if not any(above.startswith(f"{other}.") for other in layers)]
    most = max(sorted(outermost), key=partial(_bytes, structure), default=None)
    between = [] if most is None else [f"{most}.{index}" for index in sorted(layers[most])]
    return [name for name in (structure.embedding, *between, structure.output_head) if name is not None]


def _bytes(structure: ModelStructure, module: str) -> int:
    """Of a module's tensors in fp32."""
    return _ITEM * sum(math.prod(shape) for name, shape in structure.tensors.items() if _is_below(name, (module,)))


def _is_below(name: str, modules: Iterable[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


@contextmanager
def _quiet() -> Iterator[None]:
    """What transformers has to say of a checkpoint it says of what stays, and not again of each part."""
    theirs: Any = importlib.import_module("transformers.utils.logging")
    level, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()
