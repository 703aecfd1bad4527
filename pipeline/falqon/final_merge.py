"""The final merge: it decides what is deployed, so its rounding is chosen for the output, not for the weight.

Rounding `T = W + B A` to the nearest code loses nearly all of a small update, as W lies on the grid already and
every change under half a step falls back. `compensated` rounding (`fp8pipe.numerics.quantizers`) keeps
`|| X (Q - T)^T ||` small for the layer's real inputs instead. A row whose target is on the grid keeps every code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fp8pipe.numerics.grids import E4M3
from fp8pipe.numerics.quantizers import compensated_round
from pipeline.falqon.flush import FlushReport, flush_report, target_rows, write_rows
from pipeline.falqon.layer import FalqonLinear
from pipeline.falqon.rules import FinalMerge

_COLUMNS = 128  # of a block of the solver
# Of H's mean diagonal. A few outlier inputs dominate that mean in LLMs: GPTQ's usual 0.01 would damp all others into
# plain nearest rounding.
_DAMPING = 0.001
_MOMENT_BYTES = 1 << 29  # second moments held at once

Inputs = Callable[[], Iterable[dict[str, Tensor]]]


def compensated_codes(target: Tensor, moments: Tensor) -> Tensor:
    """Round `target` to E4M3 so that the error of `X target^T` is small for inputs with second moments `moments`.

    Args:
        target: `(out, in)` fp32 code units.
        moments: `(in, in)` fp32, X^T X up to a factor.

    Returns:
        `(out, in)` float8_e4m3fn codes.
    """
    found = compensated_round(
        target, moments, lambda value, _: E4M3.cast(value).float(), block=_COLUMNS, damping=_DAMPING
    )
    return E4M3.cast(found.rounded)


@torch.no_grad()
def merge_all(
    model: nn.Module,
    layers: dict[str, FalqonLinear],
    how: FinalMerge,
    inputs: Inputs,
    on_progress: Callable[[int], None] = lambda done: None,
) -> dict[str, FlushReport]:
    """Merge all of B in every layer; afterwards the codes alone are the model.

    Args:
        model: run on `inputs` for the second moments; layers merge in order, so later ones see the codes of
            earlier ones.
        layers: by name, in module order; changed in place, B cleared.
        how: rounding.
        inputs: called for a fresh pass over model inputs.
        on_progress: told the number of layers done so far.

    Returns:
        What the merge did, by layer.
    """
    reports: dict[str, FlushReport] = {}
    for group in _groups(layers, how):
        moments = _second_moments(model, group, inputs) if how is FinalMerge.COMPENSATED else {}
        for name, layer in group.items():
            reports[name] = _merge_layer(layer, moments.get(name))
            on_progress(len(reports))
    return reports


def _merge_layer(layer: FalqonLinear, moments: Tensor | None) -> FlushReport:
    rows = torch.arange(layer.out_features, device=layer.codes.device)
    target = target_rows(layer, rows)
    codes = E4M3.cast(target) if moments is None else compensated_codes(target, moments)
    report = flush_report(layer.weight_codes.float(), target, codes.float())
    write_rows(layer, rows, codes)
    layer.lora_B.data.zero_()
    return report


def _groups(layers: dict[str, FalqonLinear], how: FinalMerge) -> Iterator[dict[str, FalqonLinear]]:
    """Consecutive layers whose second moments fit the budget together."""
    group: dict[str, FalqonLinear] = {}
    used = 0
    for name, layer in layers.items():
        cost = 4 * layer.in_features**2 if how is FinalMerge.COMPENSATED else 0
        if group and used + cost > _MOMENT_BYTES:
            yield group
            group, used = {}, 0
        group[name] = layer
        used += cost
    if group:
        yield group


def held_moments(widths: Iterable[int]) -> int:
    """Bytes of second moments that a compensated merge holds at once.

    Args:
        widths: input features of the FALQON layers, in order.
    """
    largest = used = 0
    for width in widths:
        cost = 4 * width**2
        used = cost if used and used + cost > _MOMENT_BYTES else used + cost
        largest = max(largest, used)
    return largest


def _second_moments(model: nn.Module, layers: dict[str, FalqonLinear], inputs: Inputs) -> dict[str, Tensor]:
    moments: dict[str, Tensor] = {}
    with _observed(layers, moments):
        for batch in inputs():
            model(**batch, use_cache=False)
    return moments


@contextmanager
def _observed(layers: dict[str, FalqonLinear], moments: dict[str, Tensor]) -> Iterator[None]:
    """While active, every forward pass adds `X^T X` of each layer's input to `moments`."""

    def observer(name: str) -> Callable[[Tensor], None]:
        def observe(x: Tensor) -> None:
            flat = x.float()
            if name in moments:
                moments[name].addmm_(flat.t(), flat)
            else:
                moments[name] = flat.t() @ flat

        return observe

    for name, layer in layers.items():
        layer.observer = observer(name)
    try:
        yield
    finally:
        for layer in layers.values():
            layer.observer = None
