"""Second moments of layer inputs for the final merge, from batches that the processes share.

Moments are sums over batches, and sums depend on their order. So each batch's inputs, rather than its moments, go to
all processes, which add their products in the order of one process. For the usual number of tokens of a batch that is
less traffic, too, and all processes then round with the same moments.
"""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.falqon.final_merge import Inputs, add_moment, observed_inputs
from pipeline.falqon.layer import FalqonLinear
from pipeline.finetune.distributed.group import Group

_Seen = list[tuple[str, Tensor]]


def shared_moments(
    model: nn.Module, layers: dict[str, FalqonLinear], inputs: Inputs, group: Group
) -> dict[str, Tensor]:
    """`pipeline.falqon.final_merge.second_moments` of a sharded model; batch i is run by process i mod W."""
    moments: dict[str, Tensor] = {}
    batches = iter(inputs())
    while held := list(islice(batches, group.size)):  # not all of them: pixel values take much memory
        # Processes without a batch take part in the forward pass, for which parameters are gathered.
        batch = held[group.rank if group.rank < len(held) else 0]
        seen: _Seen = []
        with observed_inputs(layers, lambda name, x, seen=seen: seen.append((name, x.detach()))):  # type: ignore[misc]
            model(**batch, use_cache=False)
        for rank in range(len(held)):
            for name, x in _from(rank, seen, group):
                add_moment(moments, name, x)
    return moments


def _from(rank: int, seen: _Seen, group: Group) -> _Seen:
    """The inputs that the process `rank` has seen, in the order in which it has."""
    told: list[Any] = [[(name, x.shape, x.dtype) for name, x in seen] if rank == group.rank else None]
    dist.broadcast_object_list(told, src=rank)
    device = torch.device(group.device)
    found = seen if rank == group.rank else [(name, torch.empty(s, dtype=d, device=device)) for name, s, d in told[0]]
    for _, x in found:
        dist.broadcast(x.contiguous() if rank == group.rank else x, src=rank)
    return found
