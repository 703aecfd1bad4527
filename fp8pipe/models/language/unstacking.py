"""Unstacks the experts of a transformers model in place: each becomes a module of linear layers (`experts`).

Experts are unstacked if the family's checkpoints store them one by one, or in stacks that `checkpoint.stacks` splits:
then every tensor of the checkpoint is one of the model. gpt-oss interleaves the columns of gate and up, so that they
stay one layer, which holds its weight transposed as the checkpoint does.

transformers runs every expert of Llama 4 on every token, with inputs of zeros where the router chose another one. The
gradients of such rows are zeros, which move an optimizer's moments and decay weights, so here an expert of Llama 4 runs
on the tokens that were routed to it, as those of all other families do. No other result changes.

Families that store stacks of other kinds keep them, and those are not quantized.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fp8pipe.models.checkpoint.stacks import LAYOUTS
from fp8pipe.models.compat import import_transformers
from fp8pipe.models.language.experts import PROJECTIONS, Expert, StackedExpert, UnstackedExperts, joins_experts

__all__ = ["unstack_experts"]


def unstack_experts(model: nn.Module) -> tuple[str, ...]:
    """Unstack, in place, all experts that the family's checkpoints store one by one or in stacks of a known layout.

    No weight is copied.

    Args:
        model: a transformers model, real or on the meta device.

    Returns:
        Names of the modules whose experts were unstacked; empty for a module that is not a transformers model.
    """
    if not isinstance(model, import_transformers().PreTrainedModel):
        return ()
    stored_singly = _stored_singly(model)
    layout = LAYOUTS.get(getattr(model.config, "model_type", None))
    found: dict[str, Callable[[Any], None]] = {}
    for name, module in model.named_modules():
        if isinstance(module, UnstackedExperts):
            continue
        if (stored_singly(name) or layout is not None) and _is_plain(module):
            found[name] = _unstack
        elif layout is not None and _is_stack(module):
            found[name] = _unstack_transposed
        elif layout is not None and _is_llama4(parent := model.get_submodule(name.rpartition(".")[0]), module):
            found[name] = partial(_unstack_llama4, parent)
    for name, unstack in found.items():
        unstack(model.get_submodule(name))
    return tuple(found)


def _is_plain(module: Any) -> bool:
    """Whether a module holds stacked gated experts without biases, with weights of shape `(experts, out, in)`."""
    own = dict(module.named_parameters(recurse=False))
    if own.keys() != PROJECTIONS.keys() or any(parameter.dim() != 3 for parameter in own.values()):
        return False
    told = [getattr(module, flag, None) for flag in ("has_gate", "is_concatenated", "is_transposed", "has_bias")]
    joined, down = own["gate_up_proj"].shape, own["down_proj"].shape
    fits = joined[0] == down[0] == getattr(module, "num_experts", None) and joined[1:] == (2 * down[2], down[1])
    return told == [True, True, False, False] and not getattr(module, "has_post_expert_norm", False) and fits


def _is_stack(module: Any) -> bool:
    """Whether a module is a stack of gated experts with biases, with each weight stored as `(in, out)`."""
    own = dict(module.named_parameters(recurse=False))
    if own.keys() != {name for leaf in PROJECTIONS for name in (leaf, f"{leaf}_bias")}:
        return False
    told = [getattr(module, flag, None) for flag in ("has_gate", "is_transposed", "has_bias")]
    joined, down, count = own["gate_up_proj"].shape, own["down_proj"].shape, getattr(module, "num_experts", None)
    fits = joined == (count, down[2], 2 * down[1]) and own["gate_up_proj_bias"].shape == (count, joined[2])
    return told == [True] * 3 and not getattr(module, "has_post_expert_norm", False) and fits


def _is_llama4(parent: Any, module: Any) -> bool:
    """Whether a module holds the experts of a Llama 4 layer, `parent`; each weight is stored as `(in, out)`."""
    names = [one.__name__ for kind in (parent, module) for one in type(kind).__mro__]
    return "Llama4TextMoe" in names and "Llama4TextExperts" in names


def _stored_singly(model: Any) -> Callable[[str], bool]:
    """A predicate on module names: whether checkpoints of this model family store the module's experts separately.

    It follows the rules by which transformers converts these checkpoints.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    rules = [rule for rule in get_model_conversion_mapping(model) if hasattr(rule, "operations")]
    targets = {leaf: [target for rule in rules if joins_experts(rule) for target in rule.target_patterns
                      if target.endswith(leaf)] for leaf in PROJECTIONS}  # fmt: skip

    def stored(name: str) -> bool:
        return all(any(f".{name}.{leaf}".endswith(t.lstrip("^")) for t in found) for leaf, found in targets.items())

    return stored


def _unstack(module: Any, kind: type[UnstackedExperts] = UnstackedExperts, *, transposed: bool = False) -> None:
    """Unstack weights of shape `(experts, out, in)`, or `(experts, in, out)` if `transposed`."""
    stacks = {leaf: getattr(module, leaf).detach() for leaf in PROJECTIONS}
    for leaf in PROJECTIONS:
        delattr(module, leaf)
    _change_class(module, kind)
    for number in range(module.num_experts):
        joined, down = (stack[number].t() if transposed else stack[number] for stack in stacks.values())
        gate, up = joined.chunk(2)
        module.add_module(str(number), Expert({"gate_proj": gate, "up_proj": up, "down_proj": down}))


def _unstack_transposed(module: Any) -> None:
    stacks = {leaf: (getattr(module, leaf).detach(), getattr(module, f"{leaf}_bias").detach()) for leaf in PROJECTIONS}
    for leaf in PROJECTIONS:
        delattr(module, leaf)
        delattr(module, f"{leaf}_bias")
    _change_class(module, UnstackedExperts)
    for number in range(module.num_experts):
        parts = {leaf: (weight[number], bias[number]) for leaf, (weight, bias) in stacks.items()}
        module.add_module(str(number), StackedExpert(parts))


class _Llama4Experts(UnstackedExperts):
    """Experts of Llama 4, whose module in transformers has no gate of its own."""

    act_fn: Callable[[Tensor], Tensor]
    weighs_inputs = True

    def _apply_gate(self, joined: Tensor) -> Tensor:
        gate, up = joined.chunk(2, dim=-1)
        return up * self.act_fn(gate)


class _Llama4Moe(nn.Module):
    """A layer of Llama 4 that runs each expert on the tokens of its own."""

    hidden_dim: int
    top_k: int
    router: nn.Module
    experts: nn.Module
    shared_expert: nn.Module

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """The output, `(tokens, hidden)`, and the router's logits, `(tokens, experts)`."""
        x = hidden_states.reshape(-1, self.hidden_dim)
        scores, logits = self.router(x)
        chosen = torch.topk(logits, self.top_k, dim=1).indices  # as the router chose
        return self.shared_expert(x) + self.experts(x, chosen, scores.gather(1, chosen)), logits


def _unstack_llama4(parent: Any, module: Any) -> None:
    _unstack(module, _Llama4Experts, transposed=True)
    _change_class(parent, _Llama4Moe)


def _change_class(module: Any, kind: type[nn.Module]) -> None:
    """Let the module compute as `kind` does, and keep what `kind` leaves to it, such as its own gate."""
    own = type(module)
    module.__class__ = type(f"Unstacked{own.__name__}", (kind, own), {})
