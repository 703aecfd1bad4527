"""Each parameter's moments are with one process, and all processes have about as many of them."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from pipeline.finetune.distributed.owners import OwnedSteps

SIZES = (64, 4096, 64, 4096, 64, 64)


def test_every_parameter_has_one_owner_and_no_process_more_values_than_another():
    parameters = [nn.Parameter(torch.zeros(size)) for size in SIZES]
    owned = []
    for rank in (0, 1):
        group = SimpleNamespace(rank=rank, size=2)  # the constructor asks no other process
        found = OwnedSteps(lambda own: torch.optim.SGD(own, lr=1.0), parameters, group)
        owned.append([place for place, parameter in enumerate(parameters) if parameter in found._own])
        assert len(found._inner.param_groups[0]["params"]) == len(owned[-1])
    assert sorted(owned[0] + owned[1]) == list(range(len(SIZES)))
    assert [sum(SIZES[place] for place in each) for each in owned] == [4096 + 2 * 64] * 2
