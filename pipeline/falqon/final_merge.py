"""Merge all of B into the FP8 codes, in place, at the end of training.

The final merge determines the deployed weights, so its rounding minimizes the error of the layer's output rather than
that of the weights. Rounding `T = W + B A` to the nearest code loses nearly all of a small update, as W is already on
the FP8 grid and every change below half a quantization step is rounded away. Instead, `compensated` rounding
(`fp8pipe.numerics.quantizers`) chooses codes Q that keep `|| X (Q - T)^T ||` small for the layer's real inputs X. A row
whose target values are all on the grid is stored exactly.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from fp8pipe.core.machine import return_freed_memory
from fp8pipe.numerics.grids import E4M3
from fp8pipe.numerics.quantizers import compensated_round
from pipeline.falqon.flush import FlushReport, flush_report, rounded_rows, target_rows
from pipeline.falqon.layer import FalqonLinear
from pipeline.falqon.rules import FinalMerge
from pipeline.finetune.compiled import uncompiled

_LOG = logging.getLogger(__name__)
_COLUMNS = 128  # columns per block in GPTQ's solver
# Damping of GPTQ's Hessian H, as a fraction of the mean of its diagonal. In LLMs a few outlier channels dominate that
# mean, so that GPTQ's usual 0.01 would amount to round-to-nearest for all other channels.
_DAMPING = 0.001
_MOMENT_BYTES = 1 << 29  # maximum total size of the second moments in memory at the same time

Inputs = Callable[[], Iterable[dict[str, Tensor]]]
Merged = tuple[dict[str, FlushReport], list[str]]
MergeGroup = Callable[[nn.Module, dict[str, FalqonLinear], FinalMerge, Inputs], Merged]


def second_moments(model: nn.Module, layers: Mapping[str, FalqonLinear], inputs: Inputs) -> dict[str, Tensor]:
    """`X^T X` of each layer's input X, summed over all batches: fp32 `(in, in)`, by name.

    A layer that no token reached, such as an expert, has no entry.
    """
    moments: dict[str, Tensor] = {}
    with observed_inputs(layers, partial(add_moment, moments)):
        for batch in inputs():
            model(**batch, use_cache=False)
    return moments


def add_moment(moments: dict[str, Tensor], name: str, x: Tensor) -> None:
    """Add `X^T X` of the input X `(tokens, in)` of one call of the layer `name` to its second moments."""
    flat = x.float()
    if name in moments:
        moments[name].addmm_(flat.t(), flat)
    else:
        moments[name] = flat.t() @ flat


@contextmanager
def observed_inputs(layers: Mapping[str, FalqonLinear], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """A context in which `see` is called with the name and the input `(tokens, in)` of each call of these layers."""
    for name, layer in layers.items():
        layer.observer = partial(see, name)
    try:
        with uncompiled():  # torch.compile would not trace the observers
            yield
    finally:
        for layer in layers.values():
            layer.observer = None


def merge_group(model: nn.Module, layers: dict[str, FalqonLinear], how: FinalMerge, inputs: Inputs) -> Merged:
    """Merge all of B into the codes of some layers, after which their B is zero.

    Args:
        model: see `merge_all`; with compensated rounding, it is run on `inputs` before anything is changed.
        layers: by name; changed in place.
        how: the rounding.
        inputs: see `merge_all`.

    Returns:
        A report of the merge for each layer, and the names of trained layers that were to be compensated but have not
        been reached by any token, so that they are rounded to nearest.
    """
    moments = second_moments(model, layers, inputs) if how is FinalMerge.COMPENSATED else {}
    unseen = [name for name, layer in layers.items() if is_unseen(layer, how, moments.get(name))]
    return {name: merge_layer(layer, moments.get(name)) for name, layer in layers.items()}, unseen


@torch.no_grad()
def merge_all(
    model: nn.Module, layers: dict[str, FalqonLinear], how: FinalMerge, inputs: Inputs, merge: MergeGroup,
) -> dict[str, FlushReport]:  # fmt: skip
    """Merge all of B into the codes of every layer at the end of training, after which B is zero.

    Args:
        model: the model that contains the layers. For compensated rounding it is run on `inputs` to collect second
            moments, group by group, so that later groups get the inputs that result from the merged earlier layers.
        layers: by name, in module order; changed in place.
        how: the rounding of the merge.
        inputs: called once for each group of layers; returns an iterable over keyword arguments of the model.
        merge: as `merge_group`.

    Returns:
        A report of the merge for each layer.
    """
    reports: dict[str, FlushReport] = {}
    names = list(layers)
    for places in merge_groups([layer.in_features for layer in layers.values()]):
        found, unseen = merge(model, {names[place]: layers[names[place]] for place in places}, how, inputs)
        reports |= found
        _warn_unseen(unseen)
    return reports


def is_unseen(layer: FalqonLinear, how: FinalMerge, moments: Tensor | None) -> bool:
    """Whether the rounding of a layer with an update should be compensated, but no token has reached it."""
    return how is FinalMerge.COMPENSATED and moments is None and bool(layer.lora_B.any())


def _warn_unseen(names: list[str]) -> None:
    if names:
        _LOG.warning(
            "no token of the final merge's batches reached %d trained layer(s), the first %s: their update is rounded "
            "to the nearest codes; more `final_merge_batches` may reach them",
            len(names),
            names[0],
        )


def merge_layer(layer: FalqonLinear, moments: Tensor | None) -> FlushReport:
    """Merge all of B into W's codes, in place, after which B is zero; returns a report of the change.

    Args:
        layer: has all of its rows.
        moments: `(in, in)` fp32, proportional to X^T X: rounding minimizes the error of `X target^T` for inputs X with
            these second moments. None rounds to the nearest code.
    """
    if moments is not None:
        return_freed_memory()  # the solver needs blocks of other sizes than those of activations, or of another layer
    codes, report = _all_rows(layer, moments)
    layer.weight_codes.view(torch.uint8).copy_(codes.view(torch.uint8))
    layer.lora_B.data.zero_()
    return report


def _all_rows(layer: FalqonLinear, moments: Tensor | None) -> tuple[Tensor, FlushReport]:
    """W's codes with all of B merged, and a report of the change; changes nothing."""
    every = torch.arange(layer.out_features, device=layer.codes.device)
    if moments is None:
        return rounded_rows(layer, every)
    target = target_rows(layer, every)
    found = compensated_round(
        target, moments, lambda value, _: E4M3.cast(value).float(), block=_COLUMNS, damping=_DAMPING
    )
    codes = E4M3.cast(found.rounded)
    return codes, flush_report(layer.weight_codes.float(), target, codes.float())


def merge_groups(widths: Sequence[int]) -> Iterator[list[int]]:
    """Split layers into groups of consecutive ones whose fp32 second moments together fit into `_MOMENT_BYTES`.

    A layer whose moments alone exceed that limit is a group of its own.

    Args:
        widths: `in_features` of each layer.

    Returns:
        An iterator over groups of indices into `widths`.
    """
    group: list[int] = []
    used = 0
    for place, width in enumerate(widths):
        cost = 4 * width**2
        if group and used + cost > _MOMENT_BYTES:
            yield group
            group, used = [], 0
        group.append(place)
        used += cost
    if group:
        yield group


def held_moments(widths: Sequence[int], processes: int = 1) -> int:
    """Peak memory of second moments during a compensated merge, bytes, in one process or in each of several.

    Args:
        widths: `in_features` of each layer.
        processes: their number; each holds the moments of the layers that it rounds.
    """
    sizes = ([4 * widths[place] ** 2 for place in group] for group in merge_groups(widths))
    return max((max(-(-sum(each) // processes), *each) for each in sizes), default=0)
