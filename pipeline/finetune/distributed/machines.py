"""Decides among which processes the parameters are divided: all of them, or those of each machine (HSDP).

Links between machines are slower than those inside. If the parameters fit into every machine as a whole, each machine
holds a replica, divided among its own processes, and in training nothing crosses between machines but the gradients of
B, which are a small part of the parameters.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Final

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fp8pipe.core import machine
from pipeline.finetune.compiled import decoder_layers
from pipeline.finetune.distributed.group import Group

# Largest share of a machine's memory for a replica with its optimizer state and what is gathered; activations, the test
# of packing and the final merge need the rest.
_REPLICA: Final = 0.5
_STATES: Final = 3  # AdamW's two moments and the gradient, each as large as what is trained
_GATHERED: Final = 2  # decoder layers: one that is used, and the next one


@dataclass(frozen=True, slots=True)
class Layout:
    """How the parameters are divided.

    Attributes:
        mesh: the processes among which the replica of this one is divided, in one dimension.
        replicas: number of replicas.
        across: the processes that hold the same part of each replica, in their order; None if there is one replica.
    """

    mesh: DeviceMesh
    replicas: int = 1
    across: dist.ProcessGroup | None = None


def lay_out(model: nn.Module, group: Group) -> Layout:
    """Decide how the parameters of a model, which all processes have, are divided; see `count_replicas`."""
    whole = _bytes(model)
    layers = [_bytes(layer) for layer in decoder_layers(model)]
    static = whole + _STATES * sum(p.nbytes for p in model.parameters() if p.requires_grad)
    gathered = max(0, whole - sum(layers)) + _GATHERED * max(layers, default=0)  # layers may be within others
    wanted = group.all_gather_object((count_replicas(static, gathered, group.size, group.device), _place(group.rank)))
    replicas = min(count for count, _ in wanted)
    local = group.size // replicas
    if replicas == 1 or any(place != (local, rank % local) for rank, (_, place) in enumerate(wanted)):
        return Layout(group.mesh)
    mesh = init_device_mesh(group.device, (replicas, local), mesh_dim_names=("replicate", "shard"))
    return Layout(mesh["shard"], replicas, mesh["replicate"].get_group())


def count_replicas(static: int, gathered: int, size: int, device: str) -> int:
    """The number of replicas of the parameters: that of machines, or one if a replica is too large for this machine.

    Args:
        static: bytes of a replica with gradients and optimizer state, which the machine's processes divide among them.
        gathered: bytes that each process has whole for a while.
        size: number of all processes.
        device: `cpu` or `cuda`.
    """
    local = local_size(size)
    if size % local:
        return 1
    memory = machine.memory_bytes() if device == "cpu" else sum(gpu.memory_bytes for gpu in machine.gpus()[:local])
    return size // local if static + local * gathered <= _REPLICA * memory else 1


def _bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def local_size(size: int) -> int:
    """The number of processes on this machine, of `size` in all; all of them if the launcher does not say."""
    said = os.environ.get("LOCAL_WORLD_SIZE", "")
    return int(said) if said.isdecimal() and 0 < int(said) <= size else size


def _place(rank: int) -> tuple[int, int]:
    """The number of processes on this machine, and this one's place among them, as the launcher says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 0)), int(os.environ.get("LOCAL_RANK", rank))
