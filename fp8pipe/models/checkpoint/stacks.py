"""Presents experts that a checkpoint stores as one stacked tensor as one tensor per expert, and puts them back.

Checkpoints of gpt-oss, Granite-MoE and Llama 4 hold all experts of a layer in one tensor. Training, recording and
reading back work on single linear layers, so every stage sees the parts, under the names that unstacked experts have
(`experts.3.down_proj.weight`), and vLLM reads the same names. transformers does not, so a state for transformers is
stacked again. A part is a contiguous range of bytes of its file, except where a stack is transposed (Llama 4): there
each part is read as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from fp8pipe.models.checkpoint.tensors import TensorEntry

__all__ = [
    "LAYOUTS", "ExpertEntry", "StackLayout", "join_entries", "join_stacks", "split_stacks", "stack_name",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class StackLayout:
    """How the checkpoints of a model family stack experts.

    Attributes:
        transposed: the weight of an expert is stored `(in, out)`.
        whole: gate and up stay one layer, with biases, and parts are left transposed: their features are interleaved.
            Otherwise gate comes before up.
        spelling: names of the stacks after that of the module around the experts, if they differ from those in
            transformers' model.
    """

    transposed: bool
    whole: bool = False
    spelling: tuple[tuple[str, str], ...] = ()

    @property
    def splits(self) -> Mapping[str, tuple[str, ...]]:
        """Names of the layers of an expert by the stack that holds them, in the order of their outputs."""
        return {"gate_up_proj": ("gate_up_proj",) if self.whole else ("gate_proj", "up_proj"),
                "down_proj": ("down_proj",)}  # fmt: skip

    @property
    def transposes(self) -> bool:
        """Whether the parts are transposed on reading, so that they are `(out, in)`."""
        return self.transposed and not self.whole


_GRANITE: Final = StackLayout(
    transposed=False,
    spelling=((".experts.gate_up_proj", ".input_linear.weight"), (".experts.down_proj", ".output_linear.weight")),
)
_LLAMA4: Final = StackLayout(transposed=True)
# By the model type in config.json. Stacks of other families are left as they are.
LAYOUTS: Final[Mapping[object, StackLayout]] = {
    "gpt_oss": StackLayout(transposed=True, whole=True),
    "granitemoe": _GRANITE, "granitemoeshared": _GRANITE, "granitemoehybrid": _GRANITE,
    "llama4": _LLAMA4, "llama4_text": _LLAMA4,
}  # fmt: skip

_STACK: Final = re.compile(r"(.+\.experts)\.(gate_up_proj|down_proj)(_bias)?")
_EXPERT: Final = re.compile(r"(.+\.experts)\.(\d+)\.(gate_up_proj|gate_proj|up_proj|down_proj)\.(weight|bias)")
_AXES: Final = {None: 3, "_bias": 2}


@dataclass(frozen=True, slots=True)
class ExpertEntry(TensorEntry):
    """One expert's part of a stacked tensor.

    Attributes:
        stack: the entry of the stacked tensor.
        number: the expert's index along its first axis.
        first: where the part's outputs begin among those of the expert's tensor.
        transposed: whether the expert's tensor is transposed on reading.
    """

    stack: TensorEntry
    number: int
    first: int = 0
    transposed: bool = False

    @property
    def by_rows(self) -> bool:
        """Whether the part lies in the file as its rows, beginning at `start`."""
        return type(self.stack) is TensorEntry and not self.transposed

    def read(self) -> Tensor:
        """The part, on the CPU."""
        expert = self.stack.read_rows(range(self.number, self.number + 1))[0]
        return (expert.t() if self.transposed else expert)[self.first : self.first + self.shape[0]].contiguous()

    def read_rows(self, rows: range) -> Tensor:
        """Consecutive rows of the part."""
        if self.by_rows:
            return TensorEntry.read_rows(self, rows)
        return self.read()[rows.start : rows.stop]


def split_stacks(model_type: object, entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The entries with every stack replaced by the parts of its experts.

    Args:
        model_type: of config.json; nothing is split except in `LAYOUTS`.
        entries: by name in the checkpoint.
    """
    layout = LAYOUTS.get(model_type)
    if layout is None:
        return dict(entries)
    found: dict[str, TensorEntry] = {}
    for name, entry in entries.items():
        match = _STACK.fullmatch(_as_in_the_model(name, layout))
        if match is None or len(entry.shape) != _AXES[match[3]]:
            found[name] = entry
            continue
        end = "weight" if match[3] is None else "bias"
        found |= {part.name: part for part in _parts(entry, layout, layout.splits[match[2]], match[1], end)}
    return found


def _as_in_the_model(name: str, layout: StackLayout) -> str:
    """The name of a stack in transformers' model; other names are unchanged."""
    for known, stored in layout.spelling:
        if name.endswith(f".block_sparse_moe{stored}"):
            return name.removesuffix(stored) + known
    return name


def _parts(
    entry: TensorEntry, layout: StackLayout, leaves: tuple[str, ...], module: str, end: str
) -> Iterator[ExpertEntry]:
    outputs, *others = reversed(entry.shape[1:]) if layout.transposes else entry.shape[1:]
    shape = (outputs // len(leaves), *others)
    for number in range(entry.shape[0]):
        for place, leaf in enumerate(leaves):
            start = entry.start + (number * len(leaves) + place) * (entry.size_bytes // entry.shape[0] // len(leaves))
            name, first = f"{module}.{number}.{leaf}.{end}", place * shape[0]
            yield ExpertEntry(name, entry.dtype, shape, entry.file, start, entry, number, first, layout.transposes)


def join_entries(entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The entries as their files hold them, with parts of a stack replaced by it; the reverse of `split_stacks`."""
    whole = (entry.stack if isinstance(entry, ExpertEntry) else entry for entry in entries.values())
    return {entry.name: entry for entry in whole}


def stack_name(model_type: object, name: str) -> str | None:
    """The name in transformers' model of the stacked tensor to which one expert's weight or bias belongs.

    Args:
        model_type: of config.json.
        name: of any tensor.

    Returns:
        None for other tensors, and in families whose experts are not stacked or not split.
    """
    layout, match = LAYOUTS.get(model_type), _EXPERT.fullmatch(name)
    if layout is None or match is None:
        return None
    stack = next((stack for stack, leaves in layout.splits.items() if match[3] in leaves), None)
    return stack and f"{match[1]}.{stack}{'_bias' if match[4] == 'bias' else ''}"


def join_stacks(model_type: object, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with those of single experts stacked again, as checkpoints hold them; others are unchanged."""
    layout = LAYOUTS.get(model_type)
    if layout is None:
        return dict(tensors)
    members: dict[str, dict[int, dict[str, Tensor]]] = {}
    joined: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        stack, match = stack_name(model_type, name), _EXPERT.fullmatch(name)
        if stack is None or match is None:
            joined[name] = tensor
        else:
            members.setdefault(stack, {}).setdefault(int(match[2]), {})[match[3]] = tensor
    for stack, experts in members.items():
        leaves = layout.splits[stack.rpartition(".")[2].removesuffix("_bias")]
        whole = (torch.cat([experts[number][leaf] for leaf in leaves]) for number in sorted(experts))
        joined[_as_stored(stack, layout)] = torch.stack([one.t() if layout.transposes else one for one in whole])
    return joined


def _as_stored(stack: str, layout: StackLayout) -> str:
    for known, stored in layout.spelling:
        if stack.endswith(known):
            return stack.removesuffix(known) + stored
    return stack
