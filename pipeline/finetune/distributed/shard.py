"""Shard a converted model over the processes with FSDP2, and sum gradients in the order of one process.

Each decoder layer is gathered when it is needed, and freed afterwards; what is outside of them (embeddings, output
head) is gathered as one. Floating-point sums depend on their order. In one process, the gradients of micro-batches are
added one after the other, so here they are added in the same order: every process sends its gradients of each shard to
the owner of that shard, who adds them by the number of their micro-batch. That takes no more traffic than the usual
reduce-scatter, and the result is that of one process bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    """The sums of one optimizer step: which processes contribute to them next, and what has been added so far."""

    def __init__(self) -> None:
        self.contributors: Sequence[int] = ()
        self.sums: dict[object, Tensor] = {}

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
            input_tensor: `(W * n,)`, this process's gradients of the shards of all W processes.
            group: the W processes.
            op: not used: it is a sum.
            async_op: not used: the result is complete in the current stream.
        """
        received = torch.empty_like(input_tensor)
        dist.all_to_all_single(received, input_tensor, group=group)
        parts = received.view(dist.get_world_size(group), -1)
        total = self._state.sums.get(self)
        for rank in self._state.contributors:
            total = parts[rank] if total is None else total.add_(parts[rank])
        if total is None:
            output_tensor.zero_()
        else:
            output_tensor.copy_(total)
            self._state.sums[self] = output_tensor


def shard(model: nn.Module, mesh: DeviceMesh) -> OrderedSums:
    """Shard the parameters of a converted model, in place; buffers (scales and biases) stay whole.

    Args:
        model: the same in all processes.
        mesh: the processes, in one dimension.

    Returns:
        The state of the sums of gradients, to be kept up to date in each step. Before each backward pass but the first
        of a step, gradients must be set to None, as the sums include those before.

    Raises:
        MissingCapabilityError: the model has experts, and this version of torch cannot reduce the gradients of experts
            that only some processes have used.
    """
    sums = OrderedSums()
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
            if experts:
                module.set_reduce_scatter_unused_params(True, recurse=False)
    return sums
