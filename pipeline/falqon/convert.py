"""Replace a causal LM's linear layers with FALQON layers, and record for each layer what was done and why.

Layers are skipped because of their role in the model (such as the output head), never because of their name or shape.
So the result does not depend, for example, on whether the vocabulary size is a multiple of 16, as FP8 GEMMs need.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from fp8pipe.artifact import LayerRecord
from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.language.structure import ModelStructure, structure_of
from pipeline.falqon.base_files import BaseFiles
from pipeline.falqon.forms import Fp8Form
from pipeline.falqon.initialise import adapter_directions, gradient_sketches
from pipeline.falqon.layer import FalqonLinear
from pipeline.falqon.observed import Losses
from pipeline.falqon.rules import Initialisation, UpdateRule
from pipeline.falqon.stacked import FalqonPart, StackedOutput

_LOG = logging.getLogger(__name__)
_SHOWN = 3  # maximum number of layers that an error message lists


def read_convertible(model: nn.Module, rank: int) -> ModelStructure:
    """Check that the model can be converted with adapters of the given rank, and return its structure.

    A probe pass through the model determines which linear layers share an input.

    Raises:
        ConfigurationError: the model does not run on token ids alone, is already quantized, or has no linear layer
            to convert or one that is too small for the rank.
    """
    _refuse_quantized(model)
    structure = structure_of(model)
    if structure.trainable:
        structure = structure.probed(model)
    shapes = {name: structure.shape(name) for name in structure.trainable}
    if not shapes:
        left_out = "; ".join(f"{name}: {why}" for name, why in list(structure.left_out.items())[:_SHOWN])
        raise ConfigurationError(
            "the model has no linear layer to convert",
            why=f"{structure.architecture} has {len(structure.left_out)} linear layers, all left out: {left_out}"
            if structure.left_out
            else f"{structure.architecture} holds no nn.Linear and no Conv1D",
            fix="choose a causal language model whose attention and MLP are linear layers",
        )
    name, smallest = min(shapes.items(), key=lambda item: min(item[1]))
    limit = min(smallest)
    if not 1 <= rank <= limit:
        raise ConfigurationError(
            f"rank {rank} does not fit this model",
            why=f"the smallest layer, {name}, is {smallest}: the rank must be 1..{limit}",
            fix=f"use --rank {min(limit, max(rank, 1))} or less",
        )
    return structure


def left_out_records(structure: ModelStructure) -> list[LayerRecord]:
    """Records of the linear layers that are not trained, each with the reason."""
    left_out = structure.left_out.items()
    return [LayerRecord(name=name, reason=reason, shape=structure.shape(name)) for name, reason in left_out]


def convert_model(
    model: nn.Module,
    rule: UpdateRule,
    rank: int,
    initialisation: Initialisation,
    seed: int,
    *,
    base: BaseFiles | None = None,
    losses: Losses | None = None,
    place: torch.device | None = None,
) -> tuple[list[FalqonGroup], list[LayerRecord]]:
    """Replace every eligible linear layer with a FALQON layer on FP8 codes; see `convert_to`."""
    return convert_to(Fp8Form(rule), model, rule, rank, initialisation, seed, base=base, losses=losses, place=place)


def convert_to(
    form: Fp8Form,
    model: nn.Module,
    rule: UpdateRule,
    rank: int,
    initialisation: Initialisation,
    seed: int,
    *,
    base: BaseFiles | None = None,
    losses: Losses | None = None,
    place: torch.device | None = None,
) -> tuple[list[FalqonGroup], list[LayerRecord]]:
    """Replace every eligible linear layer with a FALQON layer, in place, and freeze everything but B.

    Args:
        form: the number format of the weights.
        model: a causal LM in its training dtype. Weights to convert may be on another device than the rest
            (`pipeline.finetune.streaming`).
        rule: determines the scale rule, whether B takes part in the forward pass, and whether layers that share an
            input are stacked.
        rank: number of rows of A in every layer.
        initialisation: how A is initialised.
        seed: determines the random draws of every layer.
        base: where codes and scales are written as they are computed, and found if an earlier process computed them;
            None keeps them in memory.
        losses: runs a few training batches and yields the loss of each; needed by the `gradient` initialisation.
        place: where the codes go; default: the device of the input embedding.

    Returns:
        The FALQON layers with the linear layers that each one replaces, and one record for every linear layer of the
        model, whether converted or not.

    Raises:
        ConfigurationError: nothing to convert, an already quantized model, a rank that is too large, or layers that
            the number format cannot store.
        BadArtifactError: a file of `base` is damaged.
        OutOfMemoryError: the disk is too full for the files of `base`.
    """
    structure = read_convertible(model, rank)
    form.check(structure)
    records = left_out_records(structure)
    model.requires_grad_(False)
    device = next(model.parameters()).device
    names = {members[0]: members for members in groups_of(structure, rule)}
    indices = {first: index for index, first in enumerate(names)}
    sizes = base_sizes(form, structure, rule, rank, initialisation)
    rows: dict[str, Tensor] = {}
    finished = base is not None and base.begin(*sizes)
    if initialisation is Initialisation.GRADIENT and not finished:
        if losses is None:
            raise ValueError("the gradient initialisation needs training losses")
        find = partial(gradient_sketches, model, tuple(names.values()), losses, rank, seed)
        rows = find() if base is None else base.directions(find)
        _tell_unreached([first for first in names if first not in rows])

    def quantized(first: str) -> dict[str, Tensor]:
        weights = [structure.weight(model, name).to(device) for name in names[first]]
        weight = torch.cat(weights) if len(weights) > 1 else weights[0]
        generator = torch.Generator().manual_seed(seed + indices[first])
        how = initialisation if first in rows or not rows else Initialisation.RANDOMIZED_SVD
        a = adapter_directions(weight, rank, how, rule.scale, generator, rows.get(first))
        return form.quantize(weight, a)

    groups = []
    for first, made in base.codes(quantized) if base is not None else ((name, quantized(name)) for name in names):
        members, found = names[first], {key: tensor.to(place or device) for key, tensor in made.items()}
        widths = [structure.shape(name)[0] for name in members]
        biases = [getattr(model.get_submodule(name), "bias", None) for name in members]
        layer = form.layer(found, rank, tuple(widths), _stacked_bias(biases, widths))
        _install(model, members, layer)
        groups.append(FalqonGroup(members, tuple(map(structure.transposed, members)), layer))
        records.extend(_record(name, rows, layer, form) for name, rows in zip(members, layer.parts, strict=True))
    return groups, records


def groups_of(structure: ModelStructure, rule: UpdateRule) -> tuple[tuple[str, ...], ...]:
    """The linear layers that become one FALQON layer each, in the order of conversion."""
    return structure.input_groups if rule.stacked else tuple((name,) for name in structure.trainable)


def base_bytes(
    form: Fp8Form, structure: ModelStructure, rule: UpdateRule, rank: int, initialisation: Initialisation
) -> int:
    """Bytes that `BaseFiles` takes of the disk, without headers; see `base_sizes`."""
    codes, directions = base_sizes(form, structure, rule, rank, initialisation)
    return sum(codes.values()) + directions


def base_sizes(
    form: Fp8Form, structure: ModelStructure, rule: UpdateRule, rank: int, initialisation: Initialisation
) -> tuple[dict[str, int], int]:
    """What `BaseFiles` will take of the disk: bytes of each layer's codes, and of the gradient's directions.

    Args:
        form: the number format.
        structure: after a probe pass, which may have been on the meta device.
        rule: as in `convert_model`.
        rank: as in `convert_model`.
        initialisation: as in `convert_model`.
    """
    shapes = {members[0]: [structure.shape(name) for name in members] for members in groups_of(structure, rule)}
    codes = {first: form.code_bytes(sum(out for out, _ in each), each[0][1], rank) for first, each in shapes.items()}
    directions = sum(4 * rank * each[0][1] for each in shapes.values())
    return codes, directions if initialisation is Initialisation.GRADIENT else 0


@dataclass(frozen=True, slots=True)
class FalqonGroup:
    """A FALQON layer and the linear layers whose weights are stacked in it.

    Attributes:
        members: module paths of these linear layers, in the order of `layer.parts`.
        transposed: for each member, whether the checkpoint stores its weight as (in, out).
        layer: the FALQON layer.
    """

    members: tuple[str, ...]
    transposed: tuple[bool, ...]
    layer: FalqonLinear

    @property
    def name(self) -> str:
        """The module path of the first member, used as the group's key in saved states."""
        return self.members[0]


def _tell_unreached(names: list[str]) -> None:
    if names:
        _LOG.warning(
            "no token of the first training batches reached the experts of %d layer(s), the first %s: their A comes "
            "from the quantization error (randomized-svd); more `gradient_batches` may reach them",
            len(names),
            names[0],
        )


def _record(name: str, rows: int, layer: FalqonLinear, form: Fp8Form) -> LayerRecord:
    reason = "linear" if len(layer.parts) == 1 else f"linear, stacked with {len(layer.parts) - 1} of the same input"
    weight, inputs = form.encodings()
    return LayerRecord(name=name, shape=(rows, layer.in_features), weight=weight, activation=inputs, reason=reason)


def _stacked_bias(biases: list[Tensor | None], widths: list[int]) -> Tensor | None:
    given = [bias for bias in biases if bias is not None]
    if not given:
        return None
    return torch.cat([given[0].new_zeros(n) if b is None else b for b, n in zip(biases, widths, strict=True)])


def _install(model: nn.Module, members: tuple[str, ...], layer: FalqonLinear) -> None:
    output = StackedOutput(layer)
    for index, name in enumerate(members):
        parent, _, child = name.rpartition(".")
        module = layer if len(members) == 1 else FalqonPart(output, index)
        setattr(model.get_submodule(parent), child, module)


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
