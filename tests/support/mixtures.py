"""Small mixture-of-experts models as FALQON models, for tests that compare how their experts run."""

from __future__ import annotations

import torch
from language_models import ARCHITECTURES, build

from fp8pipe.models.language.experts import UnstackedExperts
from fp8pipe.models.language.unstacking import unstack_experts
from pipeline.falqon.method import FalqonMethod
from pipeline.falqon.rules import Initialisation, update_rule
from pipeline.finetune.loss import answer_loss

RANK = 8
IDS = torch.arange(3, 43).reshape(2, 20)


def mixture(family: str = "mixtral", **settings: object) -> torch.nn.Module:
    """A tiny model of four experts a layer, unstacked."""
    one = ARCHITECTURES[family]
    model = build(type(one)(one.kind, one.config, {**one.settings, **settings}))
    unstack_experts(model)
    return model


def method_of(rule: str) -> FalqonMethod:
    """FALQON with this rule and `RANK`."""
    chosen = Initialisation.RANDOMIZED_SVD
    return FalqonMethod(update_rule(rule), rank=RANK, rows=None, initialisation=chosen, seed=0)


def never_to(model: torch.nn.Module, expert: int) -> None:
    """Lets no token go to one expert of each layer."""
    for module in model.modules():
        if isinstance(module, UnstackedExperts):
            module.register_forward_pre_hook(
                lambda _, args: (args[0], torch.where(args[1] == expert, (expert + 1) % 4, args[1]), args[2])
            )


def loss_of(model: torch.nn.Module) -> torch.Tensor:
    """The loss of `IDS`, all of which are answers."""
    return answer_loss(model, {"input_ids": IDS}, IDS, float(IDS.numel()))


def first_experts(model: torch.nn.Module) -> UnstackedExperts:
    """The experts of the first layer."""
    return next(module for module in model.modules() if isinstance(module, UnstackedExperts))
