"""Second moments of layer inputs for the final merge, from batches that the processes share.

Moments are sums over batches, and sums depend on their order. So each batch's inputs, rather than its moments, are sent
to the process that will round the layer, which adds their products in the order of one process. For the usual number of
tokens of a batch that is less traffic, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.falqon.final_merge import Inputs, add_moment, observed_inputs
from pipeline.falqon.layer import FalqonLinear
from pipeline.finetune.distributed.group import Group

_ALIGN = 64  # bytes: where a matrix begins may decide how its products are computed
TOGETHER = 8  # layers whose inputs are sent together: while they are, they are in memory twice
_Seen = list[tuple[str, Tensor]]


def shared_moments(
    model: nn.Module, layers: dict[str, FalqonLinear], inputs: Inputs, group: Group, owners: Mapping[str, int]
) -> dict[str, Tensor]:
    """`pipeline.falqon.final_merge.second_moments` of a sharded model; batch i is run by process i mod W.

    Args:
        model: see there.
        layers: see there.
        inputs: see there.
        group: the processes.
        owners: the rank that needs the moments of each layer.

    Returns:
        The moments of this process's layers.
    """
    moments: dict[str, Tensor] = {}
    batches = iter(inputs())
    while held := list(islice(batches, group.size)):  # not all of them: pixel values take much memory
        # Processes without a batch take part in the forward pass, for which parameters are gathered.
        batch = held[group.rank if group.rank < len(held) else 0]
        seen: _Seen = []
        with observed_inputs(layers, lambda name, x, seen=seen: seen.append((name, x.detach()))):  # type: ignore[misc]
            model(**batch, use_cache=False)
        if group.rank >= len(held):
            seen.clear()
        found: dict[str, list[Tensor]] = {}
        for name, x in seen:
            found.setdefault(name, []).append(x)
        seen.clear()
        for start in range(0, len(layers), TOGETHER):
            names = list(layers)[start : start + TOGETHER]
            part = [(name, x) for name in names for x in found.pop(name, [])]
            for name, x in _for_this_process(part, owners, group):
                add_moment(moments, name, x)
    return moments


def _for_this_process(seen: _Seen, owners: Mapping[str, int], group: Group) -> Iterator[tuple[str, Tensor]]:
    """The inputs of this process's layers that all processes have seen, by rank, and in the order in which each has.

    Args:
        seen: what this process has seen; emptied.
        owners: the rank of each layer's process.
        group: the processes.
    """
    seen.sort(key=lambda one: owners[one[0]])  # stable
    told = group.all_gather_object([(name, tuple(x.shape), x.dtype, _padded(x)) for name, x in seen])  # by sender
    counts = [[0] * group.size for _ in told]  # bytes from each process to each
    for sender, inputs in enumerate(told):
        for name, _, _, size in inputs:
            counts[sender][owners[name]] += size
    sent = torch.zeros(sum(counts[group.rank]), dtype=torch.uint8, device=group.device)
    start = 0
    for _, x in seen:
        sent[start : start + x.nbytes] = x.contiguous().reshape(-1).view(torch.uint8)
        start += _padded(x)
    seen.clear()
    received = sent.new_empty(sum(row[group.rank] for row in counts))
    dist.all_to_all_single(received, sent, [row[group.rank] for row in counts], counts[group.rank])
    start = 0
    for inputs in told:
        for name, shape, dtype, size in inputs:
            if owners[name] == group.rank:
                used = torch.Size(shape).numel() * dtype.itemsize
                yield name, received[start : start + used].view(dtype).view(shape)
                start += size


def _padded(x: Tensor) -> int:
    return -(-x.nbytes // _ALIGN) * _ALIGN
