"""Turning a causal LM's linear layers into FALQON layers, and saying of each layer what was done and why.

What is left out is left out by role: the output head is whatever the model names as its output embeddings, and tied
weights are recognized by sharing storage with another module. Names decide nothing, so a model whose head
happens to have a convenient width is not treated differently.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fp8pipe.artifact import Encoding, LayerRecord
from fp8pipe.artifact import ScaleRule as Rule
from fp8pipe.core.errors import ConfigurationError
from fp8pipe.numerics.casts import ScaleRule, quantize_weight
from pipeline.falqon.gradient import Losses, gradient_sketches
from pipeline.falqon.initialise import adapter_directions
from pipeline.falqon.layer import FalqonLinear
from pipeline.falqon.rules import Initialisation, UpdateRule
from pipeline.falqon.shared import FalqonPart, StackedOutput, find_shared_inputs


@dataclass(frozen=True, slots=True)
class Candidate:
    """A linear layer that can be converted.

    Attributes:
        name: module path.
        module: `nn.Linear` or transformers' Conv1D.
        transposed: the stored weight is (in, out).
    """

    name: str
    module: nn.Module
    transposed: bool

    def weight(self) -> Tensor:
        """The weight as `(out, in)`."""
        parameter = self.module.get_parameter("weight").detach()
        return parameter.t().contiguous() if self.transposed else parameter

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        rows, cols = self.module.get_parameter("weight").shape
        return (cols, rows) if self.transposed else (rows, cols)


def find_candidates(model: nn.Module) -> tuple[list[Candidate], list[LayerRecord]]:
    """Layers to convert, and records of the linear layers left out with the reason.

    Raises:
        ConfigurationError: the model has no linear layer to convert, or is already quantized.
    """
    _refuse_quantized(model)
    finder: Callable[[], nn.Module | None] | None = getattr(model, "get_output_embeddings", None)
    head = finder() if finder is not None else None
    owners = _storage_owners(model)
    candidates: list[Candidate] = []
    skipped: list[LayerRecord] = []
    for name, module in model.named_modules():
        transposed = type(module).__name__ == "Conv1D"
        if not (isinstance(module, nn.Linear) or transposed):
            continue
        candidate = Candidate(name, module, transposed)
        if module is head:
            skipped.append(LayerRecord(name=name, reason="output head", shape=candidate.shape))
        elif len(owners[_identity(module.get_parameter("weight"))]) > 1:
            skipped.append(LayerRecord(name=name, reason="weight tied to another module", shape=candidate.shape))
        else:
            candidates.append(candidate)
    if not candidates:
        raise ConfigurationError(
            "the model has no linear layer to convert",
            why=f"{type(model).__name__} holds {len(skipped)} linear layers, all of them heads or tied"
            if skipped
            else f"{type(model).__name__} holds no nn.Linear and no Conv1D",
            fix="choose a causal language model whose attention and MLP are linear layers",
        )
    return candidates, skipped


def check_rank(candidates: list[Candidate], rank: int) -> None:
    """Refuse a rank that some layer cannot hold.

    Raises:
        ConfigurationError: naming the smallest layer.
    """
    smallest = min(candidates, key=lambda c: min(c.shape))
    limit = min(smallest.shape)
    if not 1 <= rank <= limit:
        raise ConfigurationError(
            f"rank {rank} does not fit this model",
            why=f"the smallest layer, {smallest.name}, is {smallest.shape}: the rank must be 1..{limit}",
            fix=f"use --rank {min(limit, max(rank, 1))} or less",
        )


def convert_model(
    model: nn.Module,
    rule: UpdateRule,
    *,
    rank: int,
    initialisation: Initialisation,
    seed: int,
    stored: dict[str, Tensor] | None = None,
    losses: Losses | None = None,
) -> tuple[list[FalqonGroup], list[LayerRecord]]:
    """Replace every candidate by a FALQON layer, in place, and freeze everything but B.

    Args:
        model: a causal LM in its training dtype.
        rule: decides scale rule, whether B is live, and whether layers with one input are stacked.
        rank: rows of A in every layer.
        initialisation: where A comes from.
        seed: fixes the random draws, layer by layer.
        stored: codes and scales of an earlier conversion (`NAME.codes`, `NAME.scale_quant`), used instead of
            computing them again.
        losses: runs a few training batches, yielding each one's loss; the `gradient` initialisation needs it.

    Returns:
        The FALQON layers with the linear layers each stands for, and one record a linear layer, converted or not.

    Raises:
        ConfigurationError: nothing to convert, an already quantized model, or a rank too large.
    """
    candidates, records = find_candidates(model)
    check_rank(candidates, rank)
    model.requires_grad_(False)
    by_name = {c.name: c for c in candidates}
    names = [[name] for name in by_name]
    if rule.stacked:
        names = find_shared_inputs(model, list(by_name), _probe(model))
    rows: dict[str, Tensor] = {}
    if initialisation is Initialisation.GRADIENT and stored is None:
        if losses is None:
            raise ValueError("the gradient initialisation needs training losses")
        rows = gradient_sketches(model, names, losses, rank, seed)
    groups = []
    for index, members in enumerate(names):
        group = [by_name[name] for name in members]
        layer = _build(group, rule, rank, initialisation, seed + index, stored, rows.get(members[0]))
        _install(model, members, layer)
        groups.append(FalqonGroup(tuple(members), tuple(c.transposed for c in group), layer))
        records.extend(_record(name, rows, layer) for name, rows in zip(members, layer.parts, strict=True))
    return groups, records


@dataclass(frozen=True, slots=True)
class FalqonGroup:
    """A FALQON layer and the linear layers whose weights it stacks.

    Attributes:
        members: module paths, in the order of `layer.parts`.
        transposed: for each member, whether the checkpoint stores its weight as (in, out).
        layer: the layer.
    """

    members: tuple[str, ...]
    transposed: tuple[bool, ...]
    layer: FalqonLinear

    @property
    def name(self) -> str:
        """Key of the group in saved states: its first member."""
        return self.members[0]


def _record(name: str, rows: int, layer: FalqonLinear) -> LayerRecord:
    reason = "linear" if len(layer.parts) == 1 else f"linear, stacked with {len(layer.parts) - 1} of the same input"
    tensorwise = layer.scale_rule is ScaleRule.EXACT
    rule = Rule.AMAX if tensorwise else Rule.POWER_OF_TWO
    weight = Encoding(format="e4m3", bits=8, granularity="per-tensor", scale_rule=rule)
    inputs = weight.model_copy(update={"dynamic": True, "granularity": "per-tensor" if tensorwise else "per-token"})
    return LayerRecord(name=name, shape=(rows, layer.in_features), weight=weight, activation=inputs, reason=reason)


def _build(
    group: list[Candidate],
    rule: UpdateRule,
    rank: int,
    initialisation: Initialisation,
    seed: int,
    stored: dict[str, Tensor] | None,
    gradient_rows: Tensor | None,
) -> FalqonLinear:
    weights = [candidate.weight() for candidate in group]
    device = weights[0].device
    if stored is not None:
        codes, scale = (stored[f"{group[0].name}.{key}"].to(device) for key in ("codes", "scale_quant"))
    else:
        weight = torch.cat(weights).float()
        generator = torch.Generator().manual_seed(seed)
        a = adapter_directions(weight, rank, initialisation, rule.scale, generator, gradient_rows)
        # One scale for both: A is far smaller than W, so W's codes are those of plain quantization.
        codes, scale = quantize_weight(torch.cat([weight, a]), rule.scale)
    return FalqonLinear(
        codes, scale, rank=rank, parts=tuple(w.shape[0] for w in weights), bias=_stacked_bias(group, weights),
        live=rule.live, scale_rule=rule.scale,
    )  # fmt: skip


def _stacked_bias(group: list[Candidate], weights: list[Tensor]) -> Tensor | None:
    biases = [getattr(candidate.module, "bias", None) for candidate in group]
    if all(bias is None for bias in biases):
        return None
    return torch.cat([w.new_zeros(w.shape[0]) if b is None else b for b, w in zip(biases, weights, strict=True)])


def _install(model: nn.Module, members: list[str], layer: FalqonLinear) -> None:
    output = StackedOutput(layer)
    for index, name in enumerate(members):
        parent, _, child = name.rpartition(".")
        module = layer if len(members) == 1 else FalqonPart(output, index)
        setattr(model.get_submodule(parent), child, module)


def _probe(model: nn.Module) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    return {"input_ids": torch.zeros(1, 2, dtype=torch.long, device=device)}


def _storage_owners(model: nn.Module) -> dict[int, set[str]]:
    owners: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(_identity(parameter), set()).add(name)
    return owners


def _identity(parameter: Tensor) -> int:
    """Equal for tied weights; on the meta device, where storage has no address, the object itself."""
    return parameter.data_ptr() or id(parameter)


def _refuse_quantized(model: nn.Module) -> None:
    config = getattr(model, "config", None)
    method = getattr(config, "quantization_config", None)
    low = [n for n, p in model.named_parameters() if p.dtype.itemsize < 2 and p.dim() == 2]
    if method is None and not low:
        return
    raise ConfigurationError(
        "the base model is already quantized",
        why=f"its configuration says {method}" if method is not None else f"{low[0]} is stored in 8 bits or fewer",
        fix="start from the bf16 or fp32 checkpoint of the same model",
    )
