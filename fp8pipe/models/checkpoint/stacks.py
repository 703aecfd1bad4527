"""Presents experts that a checkpoint stores as one stacked tensor as one tensor per expert, and puts them back.

gpt-oss checkpoints hold all experts of a layer in one tensor, `(experts, in, out)`. Training, recording and reading
back work on single linear layers, so every stage sees the slices, under the names that unstacked experts have
(`experts.3.gate_up_proj.weight`). A slice is a contiguous range of bytes of its file: nothing is copied. vLLM reads the
same names. transformers does not, so a state for transformers is stacked again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from fp8pipe.models.checkpoint.tensors import TensorEntry

__all__ = ["STACKED_FAMILIES", "ExpertEntry", "join_entries", "join_stacks", "split_stacks", "stack_name", "stacks_of"]

STACKED_FAMILIES: Final = frozenset({"gpt_oss"})  # model types whose checkpoints hold stacks that can be split

_STACK: Final = re.compile(r"(.+\.experts)\.(gate_up_proj|down_proj)(_bias)?")
_EXPERT: Final = re.compile(r"(.+\.experts)\.(\d+)\.(gate_up_proj|down_proj)\.(weight|bias)")
_AXES: Final = {None: 3, "_bias": 2}


@dataclass(frozen=True, slots=True)
class ExpertEntry(TensorEntry):
    """One expert's part of a stacked tensor.

    Attributes:
        stack: the entry of the stacked tensor.
        number: the expert's index along its first axis.
    """

    stack: TensorEntry
    number: int

    def read(self) -> Tensor:
        """The expert's tensor, `stack.shape[1:]`, on the CPU."""
        return self.stack.read_rows(range(self.number, self.number + 1))[0]

    def read_rows(self, rows: range) -> Tensor:
        """Consecutive rows of the expert's tensor."""
        if type(self.stack) is TensorEntry:
            return TensorEntry.read_rows(self, rows)  # its bytes begin at `start`
        return self.read()[rows.start : rows.stop]


def split_stacks(model_type: object, entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The entries with every stack replaced by one entry per expert.

    Args:
        model_type: of config.json; nothing is split except in `STACKED_FAMILIES`.
        entries: by name in the checkpoint.
    """
    if model_type not in STACKED_FAMILIES:
        return dict(entries)
    found: dict[str, TensorEntry] = {}
    for name, entry in entries.items():
        match = _STACK.fullmatch(name)
        if match is None or len(entry.shape) != _AXES[match[3]]:
            found[name] = entry
            continue
        for number in range(entry.shape[0]):
            single = f"{match[1]}.{number}.{match[2]}.{'weight' if match[3] is None else 'bias'}"
            size = entry.size_bytes // entry.shape[0]
            place = entry.file, entry.start + number * size
            found[single] = ExpertEntry(single, entry.dtype, entry.shape[1:], *place, entry, number)
    return found


def join_entries(entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The entries as their files hold them, with parts of a stack replaced by it; the reverse of `split_stacks`."""
    whole = (entry.stack if isinstance(entry, ExpertEntry) else entry for entry in entries.values())
    return {entry.name: entry for entry in whole}


def stack_name(name: str) -> str | None:
    """The name of the stacked tensor to which one expert's weight or bias belongs; None for other names."""
    match = _EXPERT.fullmatch(name)
    return None if match is None else f"{match[1]}.{match[3]}{'_bias' if match[4] == 'bias' else ''}"


def stacks_of(names: Iterable[str]) -> dict[str, list[str]]:
    """The names of the experts' tensors in order of the expert, by the name of the stack they belong to."""
    found: dict[str, dict[int, str]] = {}
    for name in names:
        if (stack := stack_name(name)) is not None:
            match = _EXPERT.fullmatch(name)
            found.setdefault(stack, {})[int(match[2]) if match else 0] = name
    return {stack: [members[number] for number in sorted(members)] for stack, members in found.items()}


def join_stacks(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with those of single experts stacked again, as transformers loads them; others are unchanged."""
    stacks = stacks_of(tensors)
    single = {name for members in stacks.values() for name in members}
    joined = {stack: torch.stack([tensors[name] for name in members]) for stack, members in stacks.items()}
    return {name: tensor for name, tensor in tensors.items() if name not in single} | joined
