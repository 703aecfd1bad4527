"""An optimizer whose state cannot be cut by rows: each parameter's step is done whole, by one process.

8-bit AdamW quantizes its moments in blocks of consecutive values of a parameter, and keeps those of small parameters
in fp32. Shards of rows would begin inside of blocks, or be small, so their steps would have other bits. Here each
parameter has an owner, who has the state of all of it. For a step the owner gets the whole parameter and gradient, and
sends the whole result to the others, who keep their rows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.finetune.distributed.group import Group
from pipeline.finetune.distributed.tensors import assign, full_tensors


class OwnedSteps(torch.optim.Optimizer):
    """An optimizer of sharded parameters, of which every process does the steps of some, with the bits of one process.

    Args:
        build: makes the optimizer of unsharded parameters.
        parameters: sharded, the same in all processes.
        group: the processes.
    """

    def __init__(
        self,
        build: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        parameters: Sequence[nn.Parameter],
        group: Group,
    ) -> None:
        super().__init__(parameters, {})
        self._group = group
        self._owners = _shared_out(parameters, group.size)
        # Without values between steps, so that state is all that they take.
        self._own = {p: _empty(p) for p in parameters if self._owners[p] == group.rank}
        self._inner = build(list(self._own.values())) if self._own else None

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Do the step of every parameter that has a gradient; all processes must take part."""
        moved = [p for p in self._owners if p.grad is not None]
        gradients = full_tensors([p.grad for p in moved if p.grad is not None])
        for p, value, gradient in zip(moved, full_tensors(moved), gradients, strict=True):
            if p in self._own:
                self._own[p].data, self._own[p].grad = value.detach(), gradient
        if self._inner is not None:
            for group in self._inner.param_groups:
                group["lr"] = self.param_groups[0]["lr"]
            self._inner.step()
        for p in moved:
            own = self._own.get(p)
            whole = torch.empty(p.shape, dtype=p.dtype, device=p.device) if own is None else own.data
            dist.broadcast(whole, src=self._owners[p])
            assign(p.detach(), whole)
            if own is not None:
                own.data, own.grad = _empty(p).data, None
        self._show_state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of this process's parameters from the state of all, by number of the parameter."""
        if self._inner is None:
            return
        places = [place for place, p in enumerate(self._owners) if p in self._own]
        state = {n: state_dict["state"][place] for n, place in enumerate(places) if place in state_dict["state"]}
        self._inner.load_state_dict({"state": state, "param_groups": self._inner.state_dict()["param_groups"]})
        self._show_state()

    def _show_state(self) -> None:
        inner = {} if self._inner is None else self._inner.state
        self.state = defaultdict(dict, {p: inner[own] for p, own in self._own.items() if own in inner})


class OwnedState:
    """The optimizer's tensors of all processes, as a checkpoint names them.

    Args:
        mine: those of this process, by name.
        order: names of parameters, in the order of the checkpoint.
        group: the processes.

    Attributes:
        tensors: all of them, in order; those of other processes have a shape and dtype, but no values.
    """

    def __init__(self, mine: dict[str, Tensor], order: Iterable[str], group: Group) -> None:
        self._group = group
        told = group.all_gather_object({path: (tensor.shape, tensor.dtype) for path, tensor in mine.items()})
        self._owners = {path: rank for rank, one in enumerate(told) for path in one}
        place = {name: number for number, name in enumerate(order)}
        paths = sorted(self._owners, key=lambda path: place[path.removeprefix("optimizer/").rpartition("/")[0]])
        self.tensors: dict[str, Tensor] = {}
        for path in paths:
            shape, dtype = told[self._owners[path]][path]
            self.tensors[path] = mine[path] if path in mine else torch.empty(shape, dtype=dtype, device="meta")

    def at_main(self, path: str, tensor: Tensor) -> Tensor:
        """`tensor`, with its values in the main process; others than that and the owner do nothing."""
        owner = self._owners.get(path, 0)
        if owner == 0:
            return tensor
        if self._group.rank == owner:
            dist.send(_bytes(tensor.to(self._group.device).contiguous()), 0)
        elif self._group.rank == 0:
            tensor = torch.empty_like(tensor, device=self._group.device)
            dist.recv(_bytes(tensor), owner)
        return tensor


def _shared_out(parameters: Sequence[nn.Parameter], size: int) -> dict[nn.Parameter, int]:
    """The owner of each parameter, so that all own about as many values."""
    loads, owners = [0] * size, dict.fromkeys(parameters, 0)
    for parameter in sorted(parameters, key=lambda p: -p.numel()):
        owners[parameter] = loads.index(min(loads))
        loads[owners[parameter]] += parameter.numel()
    return owners


def _empty(like: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.empty(0, dtype=like.dtype, device=like.device))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)
