"""Shard a converted model over the processes with FSDP2, and sum gradients in the order of one process.

Each decoder layer is gathered when it is needed, and freed afterwards; what is outside of them (embeddings, output
head) is gathered as one. Floating-point sums depend on their order. In one process, the gradients of micro-batches are
added one after the other, so here they are added in the same order: every process sends its gradients of each shard to
the owner of that shard, who adds them by the number of their micro-batch. That takes no more traffic than the usual
reduce-scatter, and the result is that of one process bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from fp8pipe.core.errors import MissingCapabilityError
from fp8pipe.models.language.experts import UnstackedExperts
from pipeline.finetune.compiled import decoder_layers


class OrderedSums:
    """The sums of one optimizer step: which processes contribute to them next, and what has been added so far.

    Args:
        across: the processes that hold the same part of each replica of the parameters; None if there is one replica.
    """

    def __init__(self, across: dist.ProcessGroup | None = None) -> None:
        self.contributors: Sequence[int] = ()
        self.sums: dict[object, Tensor] = {}
        self._across = across
        self._replica = 0 if across is None else dist.get_rank(across)
        self._replicas = 1 if across is None else dist.get_world_size(across)

    def add(self, module: object, parts: Sequence[Tensor], total: Tensor) -> None:
        """Add the gradients of this process's shard of a module to the sum of the step, which becomes `total`.

        With several replicas, the sum goes from one to the next, each of which adds the gradients of its processes, and
        from the last one to all others: the order of ranks, with the traffic of an all-reduce.

        Args:
            module: what the shard belongs to.
            parts: `(n,)` each, the gradients of the processes of this replica, by rank.
            total: `(n,)`, overwritten.
        """
        first = self._replica * len(parts)
        found = self.sums.get(module)
        begun = found is not None or any(rank < first for rank in self.contributors)
        if self._replica and begun:
            found = torch.empty_like(total)
            dist.recv(found, group=self._across, group_src=self._replica - 1)
        for rank in self.contributors:
            if first <= rank < first + len(parts):
                part = parts[rank - first]
                found = part if found is None else found.add_(part)
        if found is None:
            total.zero_()
        else:
            total.copy_(found)
            self.sums[module] = total
        if self._across is None:
            return
        if self._replica + 1 < self._replicas and found is not None:
            dist.send(total, group=self._across, group_dst=self._replica + 1)
        dist.broadcast(total, group=self._across, group_src=self._replicas - 1)
        self.sums[module] = total

    def restart(self) -> None:
        """Begin the next optimizer step."""
        self.sums.clear()


class _OrderedReduceScatter:
    """The gradient reduction of one FSDP module (torch's interface `ReduceScatter`)."""

    def __init__(self, state: OrderedSums) -> None:
        self._state = state

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> None:
        """Add the gradients of this process's shard to the sum of the step, which becomes `output_tensor`.

        Args:
            output_tensor: `(n,)`, overwritten.
            input_tensor: `(W * n,)`, this process's gradients of the shards of all W processes of this replica.
            group: these processes.
            op: not used: it is a sum.
            async_op: not used: the result is complete in the current stream.
        """
        received = torch.empty_like(input_tensor)
        dist.all_to_all_single(received, input_tensor, group=group)
        self._state.add(self, received.chunk(dist.get_world_size(group)), output_tensor)


def _alone(sums: OrderedSums, module: object, gradients: Tensor) -> None:
    """The sums of a replica of one process, in place."""
    sums.add(module, [gradients.clone()], gradients)


def shard(model: nn.Module, mesh: DeviceMesh, across: dist.ProcessGroup | None = None) -> OrderedSums:
    """Shard the parameters of a converted model, in place; buffers (scales and biases) stay whole.

    Args:
        model: the same in all processes.
        mesh: the processes among which the parameters are divided, in one dimension.
        across: the processes that hold the same part of each replica of the parameters; None if there is one replica.

    Returns:
        The state of the sums of gradients, to be kept up to date in each step. Before each backward pass but the first
        of a step, gradients must be set to None, as the sums include those before.

    Raises:
        MissingCapabilityError: the model has experts, and this version of torch cannot reduce the gradients of experts
            that only some processes have used.
    """
    sums = OrderedSums(across)
    experts = any(isinstance(module, UnstackedExperts) for module in model.modules())
    if experts and not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
        raise MissingCapabilityError(
            f"torch {torch.__version__} cannot train experts on several devices",
            why="processes whose tokens reach different experts would wait for each other forever",
            fix="install torch 2.13 or newer, or train on one device",
        )
    for layer in reversed(decoder_layers(model)):  # layers within others first
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            module.set_custom_reduce_scatter(_OrderedReduceScatter(sums))  # type: ignore[arg-type]
            if mesh.size() == 1:  # torch then reduces nothing
                module.set_all_reduce_hook(partial(_alone, sums, module))
            if experts:
                module.set_reduce_scatter_unused_params(True, recurse=False)
    return sums
