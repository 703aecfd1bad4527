"""The final merge in several processes: each layer is rounded by one of them, which sends its codes to the others.

Rounding a layer is one long computation, of which every step needs the one before, and blocks of its rows would be
multiplied in other shapes, hence perhaps with other bits. So whole layers are dealt, and the result is that of one
process whatever the number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pipeline.falqon.final_merge import Inputs, Merged, is_unseen, merge_layer
from pipeline.falqon.flush import FlushReport
from pipeline.falqon.layer import FalqonLinear
from pipeline.falqon.rules import FinalMerge
from pipeline.finetune.distributed.group import Group
from pipeline.finetune.distributed.moments import shared_moments
from pipeline.finetune.distributed.tensors import assign, full_tensors, reshard


def shared_merge(
    model: nn.Module, layers: dict[str, FalqonLinear], how: FinalMerge, inputs: Inputs, group: Group
) -> Merged:
    """`pipeline.falqon.final_merge.merge_group` of a sharded model; each layer is rounded by one process of `group`."""
    owners = deal({name: layer_cost(layer, how) for name, layer in layers.items()}, group.size)
    moments = shared_moments(model, layers, inputs, group, owners) if how is FinalMerge.COMPENSATED else {}
    reshard(model)  # a forward pass without a backward pass leaves the root's own parameters whole
    unseen: list[str] = []
    reports: dict[str, FlushReport] = {}
    with owned_layers(layers, owners, group) as mine:
        for name, layer in mine.items():
            if is_unseen(layer, how, moments.get(name)):
                unseen.append(name)
            reports[name] = merge_layer(layer, moments.pop(name, None))
    for theirs, missed in group.all_gather_object((reports, unseen)):
        reports |= theirs
        unseen += [name for name in missed if name not in unseen]
    return {name: reports[name] for name in layers}, [name for name in layers if name in unseen]


def layer_cost(layer: FalqonLinear, how: FinalMerge) -> float:
    """The time that the merge of a layer takes, relative to that of others."""
    rows, width = layer.out_features, layer.in_features
    return width**2 * (width + rows) if how is FinalMerge.COMPENSATED else width * rows


def deal(costs: Mapping[str, float], size: int) -> dict[str, int]:
    """Deal work to `size` processes: the largest first, each to the process that has least; returns ranks by name."""
    loads = [0.0] * size
    owners = {}
    for name in sorted(costs, key=lambda name: -costs[name]):  # stable
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += costs[name]
    return owners


@contextmanager
def owned_layers(
    layers: Mapping[str, FalqonLinear], owners: Mapping[str, int], group: Group
) -> Iterator[dict[str, FalqonLinear]]:
    """A context in which this process has all codes and all of B of its own layers, as ordinary parameters.

    At its end every process gets its rows of all codes as their owners have left them, and B is zero.

    Args:
        layers: sharded, by name.
        owners: the rank of each layer's process.
        group: the processes.

    Yields:
        This process's layers.
    """
    mine = {name: layer for name, layer in layers.items() if owners[name] == group.rank}
    shards: dict[str, dict[str, Any]] = {
        name: {key: layer._parameters[key] for key in ("code_bytes", "lora_B")} for name, layer in layers.items()
    }
    places = [(name, key) for name, each in shards.items() for key in each]
    with torch.no_grad():
        for (name, key), whole in zip(places, full_tensors([shards[name][key] for name, key in places]), strict=True):
            if name in mine:  # not a view, which would keep what was gathered with it
                mine[name]._parameters[key] = nn.Parameter(whole.clone(), requires_grad=shards[name][key].requires_grad)
        yield mine
        for name, layer in layers.items():
            codes = layer.code_bytes if name in mine else torch.empty(
                shards[name]["code_bytes"].shape, dtype=torch.uint8, device=group.device
            )  # fmt: skip
            dist.broadcast(codes, src=owners[name])
            layer._parameters.update(shards[name])
            assign(layer.code_bytes, codes)
            assign(layer.lora_B, torch.zeros(layer.lora_B.shape))
