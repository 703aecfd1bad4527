"""The experts of mixture-of-experts (MoE) models as one linear layer per expert and projection, and their routers.

transformers stacks the expert weights of a layer into one tensor per projection, but most checkpoints store each
expert separately, and engines read them that way. Once unstacked (`unstacking`), each projection of an expert is an
ordinary linear layer with its own scale and adapter, which the same code trains, quantizes and exports as any other. An
expert that receives no tokens has no gradient and stays unchanged.

Routers are recognized by their structure rather than by name: a router is a sibling of the experts module, or the only
linear layer of one, and its weight has one row per expert.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn

from fp8pipe.core.errors import ConfigurationError

__all__ = [
    "EXPERTS_PER_TOKEN", "PROJECTIONS", "Expert", "StackedExpert", "UnstackedExperts", "call_every_expert",
    "check_expert_counts", "expert_of", "find_routers", "in_experts", "joins_experts", "wrong_expert_settings",
]  # fmt: skip

# The stacks of transformers' modules, and the layers of an expert that each holds.
PROJECTIONS: Final = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
# Settings of config.json: the number of experts of a layer, and how many of them a token goes to.
_COUNTS: Final = ("num_local_experts", "num_experts", "n_routed_experts")
EXPERTS_PER_TOKEN: Final = "num_experts_per_tok"
_MERGE: Final = "MergeModulelist"  # transformers' operation that stacks separately stored tensors
_CONCATENATE: Final = "Concatenate"


class Expert(nn.Module):
    """The linear layers of one expert, which computes `down(act(gate(x)) * up(x))`; `UnstackedExperts` applies them.

    `projections` has a weight `(out, in)` for each name of a linear layer; weights are not copied.
    """

    def __init__(self, projections: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, weight in projections.items():
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
            self.add_module(name, linear)


class StackedExpert(nn.Module):
    """One expert of a stack of transposed weights with biases: the parts of the stacks, as views of them."""

    def __init__(self, projections: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        kind: Any = Conv1D  # transformers leaves its constructor without types
        for name, (weight, bias) in projections.items():
            with torch.device("meta"):
                linear = kind(weight.shape[1], weight.shape[0])  # holds its weight as (in, out)
            linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
            linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
            self.add_module(name, linear)


class UnstackedExperts(nn.Module):
    """The experts of one layer as modules `0`, `1`, ..., each run in turn on the tokens routed to it, or all together.

    Attributes:
        call_all: also call the experts that no token is routed to, on an input of shape `(0, hidden)`.
        weighs_inputs: the routing weight of a token multiplies the input of an expert, not its output.
        grouped: computes the same for all experts at once, given this module and the arguments of `forward`; returns
            None where it cannot. None runs them in turn.
    """

    num_experts: int
    call_all: bool = False
    weighs_inputs: bool = False
    grouped: Callable[[UnstackedExperts, Tensor, Tensor, Tensor], Tensor | None] | None = None

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """For each token, the sum of the outputs of its experts, weighted as `weighs_inputs` says.

        Args:
            hidden_states: `(tokens, hidden)`, floating point.
            top_k_index: int64 `(tokens, k)`, the experts of each token; entries equal to `num_experts` are skipped.
            top_k_weights: `(tokens, k)`, floating point, the routing weight of each of these experts.

        Returns:
            `(tokens, hidden)`, dtype of `hidden_states`.
        """
        if self.grouped is not None and not self.call_all:
            together = self.grouped(self, hidden_states, top_k_index, top_k_weights)
            if together is not None:
                return together
        summed = torch.zeros_like(hidden_states)
        reached = range(self.num_experts) if self.call_all else top_k_index.unique().tolist()
        for number in reached:
            if number == self.num_experts:
                continue
            place, token = torch.where((top_k_index == number).t())
            expert: Any = self.get_submodule(str(number))
            x, weight = hidden_states[token], top_k_weights[token, place, None]
            if self.weighs_inputs:
                weighted = expert.down_proj(self._inner(expert, x * weight))
            else:
                weighted = expert.down_proj(self._inner(expert, x)) * weight
            summed.index_add_(0, token, weighted.to(summed.dtype))
        return summed

    def _inner(self, expert: Any, x: Tensor) -> Tensor:
        """The gated activation, by the model family's own `_apply_gate`, which takes gate and up in one tensor."""
        stacked = isinstance(expert, StackedExpert)
        joined = expert.gate_up_proj(x) if stacked else torch.cat([expert.gate_proj(x), expert.up_proj(x)], dim=-1)
        product: Tensor = self._apply_gate(joined)  # type: ignore[operator]
        return product


def joins_experts(rule: Any) -> bool:
    """Whether all that a transformers conversion rule does is stack experts, and possibly concatenate gate and up."""
    kinds = [type(operation).__name__ for operation in rule.operations]
    sources = len(rule.source_patterns)
    return (kinds, sources) in (([_MERGE], 1), ([_MERGE, _CONCATENATE], 2))


def expert_of(rule: Any, stored: str, pattern: str, joined: str) -> str | None:
    """Map the name of an expert's tensor in a checkpoint to the name of the unstacked weight in the model.

    Args:
        rule: the conversion rule of transformers that stacks the experts.
        stored: name of the tensor in the checkpoint, after any earlier renaming rules.
        pattern: the source pattern of `rule` that `stored` matches.
        joined: name of the stacked tensor in the model.

    Returns:
        The name of the weight; None if `rule` does not stack experts, or `stored` has no expert number.
    """
    module, _, leaf = joined.rpartition(".")
    sources = list(rule.source_patterns)
    if leaf not in PROJECTIONS or not joins_experts(rule) or len(sources) != len(PROJECTIONS[leaf]):
        return None
    number = re.search(pattern.replace("*.", r"(\d+)\."), stored)
    return None if number is None else f"{module}.{number[1]}.{PROJECTIONS[leaf][sources.index(pattern)]}.weight"


def find_routers(model: nn.Module) -> frozenset[str]:
    """Names of the routers: those whose 2-D weight has one row per expert, among the siblings of an experts module.

    A router is such a sibling itself, or the one linear layer that the sibling holds.
    """
    routers: set[str] = set()
    for name, module in model.named_modules():
        count = _expert_count(module)
        if count is None or not name:
            continue
        parent = name.rpartition(".")[0]
        for child, sibling in model.get_submodule(parent).named_children():
            inside = [] if sibling is module else _only_weight(sibling)
            routers.update(f"{parent}.{child}{leaf}" for leaf, weight in inside if weight.shape[0] == count)
    return frozenset(routers)


def _only_weight(module: nn.Module) -> list[tuple[str, Tensor]]:
    """A module's own 2-D weight or the only one in it, after the name of its owner in `module`: "" or ".gate"."""
    found = [(name, parameter) for name, parameter in module.named_parameters() if parameter.dim() >= 2]
    own = [(name, parameter) for name, parameter in found if name == "weight"]
    chosen = own or (found if len(found) == 1 and found[0][0].endswith(".weight") else [])
    return [(f".{name}".removesuffix(".weight"), parameter) for name, parameter in chosen if parameter.dim() == 2]


def _expert_count(module: nn.Module) -> int | None:
    if isinstance(module, UnstackedExperts):
        return module.num_experts
    counts = [parameter.shape[0] for parameter in module.parameters(recurse=False) if parameter.dim() == 3]
    # A single 3-D tensor could be a convolution kernel.
    return counts[0] if len(counts) > 1 and len(set(counts)) == 1 else None


def in_experts(model: nn.Module, name: str) -> bool:
    """Whether the named module belongs to an unstacked expert."""
    parts = name.split(".")
    return any(isinstance(model.get_submodule(".".join(parts[:end])), UnstackedExperts) for end in range(len(parts)))


@contextmanager
def call_every_expert(model: nn.Module) -> Iterator[None]:
    """Within the context, also call experts that receive no tokens, so that hooks see all of them in one pass."""
    layers = [module for module in model.modules() if isinstance(module, UnstackedExperts)]
    for layer in layers:
        layer.call_all = True
    try:
        yield
    finally:
        for layer in layers:
            layer.call_all = False


def check_expert_counts(origin: str, declared: Iterable[str], stored: Iterable[str]) -> None:
    """Check that a checkpoint has as many experts in each layer as its config.json declares.

    Args:
        origin: the model's name in messages.
        declared: names of the tensors of the model built from config.json, with experts unstacked.
        stored: names of the tensors in the checkpoint, converted to the model's naming.

    Raises:
        ConfigurationError: the numbers differ in some layer; the message gives both.
    """
    wanted, found = _counts(declared), _counts(stored)
    for layer, count in wanted.items():
        if layer in found and found[layer] != count:
            raise ConfigurationError(
                f"{origin} has {found[layer]} experts in {layer}, but its config.json declares {count}",
                why="the router has one row per declared expert, so the numbers must be equal",
                fix="complete the download, or use the config.json that belongs to these weights",
            )


def wrong_expert_settings(config: Any, place: str = "") -> Iterator[str]:
    """Contradictions about experts in a config.json, at any depth, in words with both numbers."""
    if not isinstance(config, Mapping):
        return
    counts = {name: config[name] for name in _COUNTS if isinstance(config.get(name), int)}
    if len(set(counts.values())) > 1:
        yield " and ".join(f"{place}{name} is {count}" for name, count in counts.items())
    chosen, count = config.get(EXPERTS_PER_TOKEN), min(counts.values(), default=0)
    if isinstance(chosen, int) and count and not 1 <= chosen <= count:  # without experts it has no meaning
        yield f"{place}{EXPERTS_PER_TOKEN} is {chosen}, of {count} experts"
    for key, value in config.items():
        yield from wrong_expert_settings(value, f"{place}{key}.")


def _counts(names: Iterable[str]) -> dict[str, int]:
    """Number of experts by the name of the module that contains them."""
    numbers: dict[str, set[str]] = {}
    leaves = "|".join(leaf for stack, group in PROJECTIONS.items() for leaf in {stack, *group})
    for name in names:
        if match := re.fullmatch(rf"(.+)\.(\d+)\.(?:{leaves})\.weight", name):
            numbers.setdefault(match[1], set()).add(match[2])
    return {layer: len(found) for layer, found in numbers.items()}
