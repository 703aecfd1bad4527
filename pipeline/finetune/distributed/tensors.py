"""Tensors of which every process holds some rows: made whole, and changed through the whole.

FSDP shards parameters along their first dimension: of R rows and W processes, process i holds rows `i * c` to
`(i + 1) * c` with `c = ceil(R / W)`, so that the last processes may hold fewer or none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from fp8pipe.numerics.grids import E4M3
from pipeline.falqon.layer import FalqonLinear

_BATCH_BYTES: Final = 1 << 26  # of whole tensors that are gathered together
_ALIGN: Final = 16  # bytes, so that every tensor's dtype fits
# torch 2.13 renames it.
_all_gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor


def full_tensors(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """Each tensor as a whole, in order, on its device; many small ones are gathered together.

    All processes must go through the whole iterator, with the same tensors.

    Args:
        tensors: sharded along their first dimension, or not sharded and returned as they are.
    """
    batch: list[Tensor] = []
    used = 0
    for tensor in tensors:
        if batch and used + tensor.nbytes > _BATCH_BYTES:
            yield from _gathered(batch)
            batch, used = [], 0
        batch.append(tensor)
        used += tensor.nbytes
    yield from _gathered(batch)


def _gathered(batch: Sequence[Tensor]) -> Iterator[Tensor]:
    sharded = [tensor for tensor in batch if isinstance(tensor, DTensor)]
    parts = [_padded_bytes(tensor) for tensor in sharded]
    found: Iterator[tuple[DTensor, Tensor]] = iter(())
    if parts:
        mine = torch.cat(parts)
        mesh = sharded[0].device_mesh
        gathered = mine.new_empty(mesh.size() * len(mine))
        _all_gather(gathered, mine, group=mesh.get_group())
        columns = gathered.view(mesh.size(), -1).split([len(part) for part in parts], 1)
        found = zip(sharded, columns, strict=True)
    for tensor in batch:
        if isinstance(tensor, DTensor):
            origin, rows = next(found)
            size = _share(origin) * origin.shape[1:].numel() * origin.element_size()
            flat = rows[:, :size].reshape(-1)[: origin.numel() * origin.element_size()]
            yield flat.view(origin.dtype).view(origin.shape)
        else:
            yield tensor


def _share(tensor: DTensor) -> int:
    """The number of rows that each process holds but the last ones."""
    return -(-tensor.shape[0] // tensor.device_mesh.size())


def _padded_bytes(tensor: DTensor) -> Tensor:
    """This process's rows as bytes, as many as those of process 0, and a multiple of `_ALIGN`."""
    local = tensor.to_local().detach().contiguous().reshape(-1).view(torch.uint8)
    row = tensor.shape[1:].numel() * tensor.element_size()
    padded = local.new_zeros(-(-_share(tensor) * row // _ALIGN) * _ALIGN)
    padded[: len(local)] = local
    return padded


def sharded_like(whole: Tensor, like: Tensor) -> Tensor:
    """`whole`, which all processes have, sharded as `like` is, on its device; as it is if `like` is not sharded."""
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, [Shard(0)], src_data_rank=None)


def assign(tensor: Tensor, whole: Tensor) -> None:
    """Give `tensor`, sharded or not, the values of `whole`, which all processes have."""
    if isinstance(tensor, DTensor):
        tensor.to_local().copy_(sharded_like(whole, tensor).to_local())  # type: ignore[attr-defined]
    else:
        tensor.copy_(whole)


def refresh_adapter(layer: FalqonLinear, whole: Tensor) -> None:
    """`FalqonLinear.refresh` of a layer of which this process holds some rows, given all of A.

    Args:
        layer: its codes and its A may be sharded; in place, this process's rows of both are changed.
        whole: A `(rank, in)`, as all processes have it.
    """
    limit = E4M3.max * layer.scale
    a: Any = layer._parameters["lora_A"]
    (a.to_local() if isinstance(a, DTensor) else a).detach().clamp_(-limit, limit)
    codes = E4M3.cast(whole.detach().clamp(-limit, limit) / layer.scale).view(torch.uint8)
    stored: Any = layer._parameters["code_bytes"]
    rows, start = stored.detach(), 0
    if isinstance(stored, DTensor):
        rows = rows.to_local()
        start = stored.device_mesh.get_local_rank() * _share(stored)
    first = max(layer.out_features - start, 0)  # A's rows come last
    if first < len(rows):
        rows[first:].copy_(codes[start + first - layer.out_features :][: len(rows) - first])


@contextmanager
def unsharded_layer(layer: FalqonLinear) -> Iterator[None]:
    """A context in which a sharded layer has all of its codes, B and A as ordinary parameters.

    At its end every process keeps its rows of what they are then, so all processes must make the same changes.
    """
    shards: dict[str, Any] = {name: layer._parameters[name] for name in ("code_bytes", *layer.trained)}
    with held_whole([(layer, name) for name in shards]):
        yield
        for name, shard in shards.items():
            assign(shard, layer._parameters[name].detach())  # type: ignore[union-attr]


@contextmanager
def held_whole(places: Sequence[tuple[nn.Module, str]]) -> Iterator[None]:
    """A context in which these sharded parameters, each of a module, are ordinary ones; at its end they are as before.

    All processes must enter it with the same parameters.
    """
    shards: list[Any] = [module._parameters[name] for module, name in places]
    with torch.no_grad():
        for (module, name), shard, whole in zip(places, shards, full_tensors(shards), strict=True):
            module._parameters[name] = nn.Parameter(whole, requires_grad=shard.requires_grad)
        yield
        for (module, name), shard in zip(places, shards, strict=True):
            module._parameters[name] = shard


def reshard(model: nn.Module) -> None:
    """Free what a forward pass without a backward pass has left whole: the root's own parameters."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
