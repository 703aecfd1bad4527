"""Test whether a model isolates packed examples from each other, with a few forward passes after loading.

A packed row contains several examples whose positions restart at zero. Many architectures derive a mask from these
positions, so that no example attends to another. Others do not: models with ALiBi or with learned positions that ignore
`position_ids`, recurrent layers and convolutions whose state runs through the whole row, and classes whose masks do not
depend on positions. So one row of the run's own width is tested before the first step. Changing the tokens of its first
example must not change the logits of the others, and the logits of an example must be the same as those of the example
alone, wherever it is in the row. Both differences are measured relative to the effect that an example's first token has
on its own later logits, so that small weights cannot hide an influence, and are compared with the numerical noise of
computing the same logits in another shape.

If examples influence each other, the test is repeated with transformers' own masks (one per kind of layer, including
sliding windows, in the format of the model's attention). If these do not help either, packing is turned off.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fp8pipe.artifact.kinds import PackingFacts
from fp8pipe.models.compat import import_transformers
from pipeline.finetune.batches import Batch
from pipeline.finetune.loss import head_on_rows

_FIRST, _SPREAD, _LAST = 16, 8, 8  # number of compared positions at an example's start, spread over it, and at its end
# Tolerances, relative to the effect of an example's own first token (see above). `moved`: other examples in the row do
# not change an isolated example at all, except that experts may group its tokens differently. `apart`: running an
# example alone changes tensor shapes, and thereby the last bits of results.
_MOVED: Final = {torch.float32: 1e-5}
_MOVED_IN_HALF: Final = 5e-3
_APART: Final = {torch.float32: 1e-3}
_APART_IN_HALF: Final = 0.1
_NOISE_MOVED, _NOISE_APART, _MOST = 2, 8, 0.5  # tolerances as multiples of the measured noise, and their upper limit


NOT_WITH_IMAGES: Final = PackingFacts(
    how="off", reason="the data has images, whose tokens get positions from the model that do not restart in a row"
)


@dataclass(frozen=True, slots=True)
class _Row:
    """A packed row and its variants.

    Attributes:
        examples: int64 `(length,)` each; the first one is short, the second is the longest.
        first: a replacement of the first example: the same shape, with a different token at every position.
        second: a replacement of the second example, with a different first token only.
    """

    examples: list[Tensor]
    first: Tensor
    second: Tensor

    @property
    def position_ids(self) -> Tensor:
        """`(1, L)`, restarting at zero with each example."""
        return torch.cat([torch.arange(len(example)) for example in self.examples])[None]

    @property
    def compared(self) -> tuple[int, ...]:
        """Indices of the compared examples: the first, the second and the last one of the row."""
        return tuple(sorted({0, 1, len(self.examples) - 1}))


@dataclass(frozen=True, slots=True)
class _Alone:
    """Results of examples that are run alone, without packing, and their numerical noise.

    Attributes:
        logits: for each compared example, by index, the logits at its compared positions, fp32 `(positions, V)`.
        own: largest change of the second example's later logits when its first token changes.
        noise: largest difference between the second example's logits computed alone and in a batch of two, relative
            to `own`.
    """

    logits: dict[int, Tensor]
    own: float
    noise: float


def find_packing(model: nn.Module, batch: Batch) -> PackingFacts:
    """Test whether packed examples are isolated by positions alone, only with a mask, or not at all.

    Args:
        model: the model as loaded, on its device; unchanged on return.
        batch: the run's first packed batch. The test uses its width, the length of its longest example and its tokens.

    Returns:
        The result, with the measured influence of examples on each other without a mask.
    """
    row, training = _make_row(batch), model.training
    model.eval()
    try:
        with torch.no_grad():
            alone = _run_alone(model, row)
            plain = _leak(model, row, alone)
            isolated = _apart(model, plain, alone)
            masked = None if isolated else _leak_with_masks(model, row, alone)
    finally:
        model.train(training)
    moved, apart = (part if math.isfinite(part) else None for part in plain)
    if isolated:
        return PackingFacts(how="positions", moved=moved, apart=apart)
    if masked is not None and _apart(model, masked, alone):
        return PackingFacts(how="mask", moved=moved, apart=apart)
    return PackingFacts(how="off", moved=moved, apart=apart, reason=_reason(plain, masked))


def packing_warning(found: PackingFacts | None) -> str:
    """A warning if packing was requested but had to be turned off; otherwise an empty string."""
    if found is None or not found.reason:
        return ""
    return f"packing is off: each row holds one example, so a step sees fewer tokens; {found.reason}"


def give_masks(model: nn.Module) -> RemovableHandle:
    """Register a hook that gives the model a mask that isolates examples, derived from `position_ids`.

    Calls that have no `position_ids`, or that have an `attention_mask` already, are not changed.

    Returns:
        A handle whose `remove` removes the hook.
    """

    def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        positions = kwargs.get("position_ids")
        if positions is None or kwargs.get("attention_mask") is not None:
            return None
        return args, kwargs | {"attention_mask": _masks(model, positions)}

    return model.register_forward_pre_hook(add, with_kwargs=True)


def _masks(model: Any, position_ids: Tensor) -> Any:
    """Masks that isolate examples, built from `(B, L)` positions: one mask, or a dict with one per kind of layer."""
    import_transformers()
    from transformers.masking_utils import create_masks_for_generate

    shape = position_ids.new_empty((*position_ids.shape, 0), dtype=model.dtype)  # in place of the input embeddings
    return create_masks_for_generate(model.config, shape, None, None, position_ids=position_ids)


def _make_row(batch: Batch) -> _Row:
    """A row of random tokens from the batch, as wide as the batch, with no example longer than the batch's longest."""
    pool = batch.input_ids.unique()
    if len(pool) < 2:
        pool = torch.cat([pool, (pool + 1) % 2])
    generator = torch.Generator().manual_seed(0)
    width, longest = batch.input_ids.shape[1], int(batch.position_ids.max()) + 1
    short = max(2, min(longest, width) // 8)
    lengths = [short, min(longest, width - 2 * short)]
    while (left := width - sum(lengths)) >= 2:
        lengths.append(min(longest, left))

    def drawn(length: int) -> Tensor:
        return torch.randint(len(pool), (length,), generator=generator)

    def other(places: Tensor) -> Tensor:
        return (places + torch.randint(1, len(pool), places.shape, generator=generator)) % len(pool)

    examples = [drawn(length) for length in lengths]
    second = torch.cat([other(examples[1][:1]), examples[1][1:]])
    return _Row([pool[example] for example in examples], pool[other(examples[0])], pool[second])


def _places(length: int) -> Tensor:
    """The compared positions of an example: its first and last tokens, and some in between."""
    spread = torch.linspace(0, length - 1, _SPREAD).long()
    places: Tensor = torch.cat([torch.arange(length)[:_FIRST], spread, torch.arange(length)[-_LAST:]]).unique()
    return places


def _logits(model: nn.Module, ids: Tensor, position_ids: Tensor, rows: Tensor) -> Tensor:
    """Logits, fp32 `(len(rows), V)`, at the given rows of the flattened `(B, L)` input."""
    device = next(model.parameters()).device
    with head_on_rows(model, rows.to(device)):
        output = model(input_ids=ids.to(device), position_ids=position_ids.to(device), use_cache=False)
    logits: Tensor = output.logits.float().flatten(0, -2)
    return logits


def _run_alone(model: nn.Module, row: _Row) -> _Alone:
    found = {}
    for index in row.compared:
        ids = row.examples[index]
        found[index] = _logits(model, ids[None], torch.arange(len(ids))[None], _places(len(ids)))
    length, places = len(row.second), _places(len(row.second))
    both = _logits(
        model, torch.stack([row.examples[1], row.second]), torch.arange(length).repeat(2, 1),
        torch.cat([places, places + length]),
    )  # fmt: skip
    same, changed = both.chunk(2)
    own = float((changed - same)[places > 0].abs().max())
    return _Alone(found, own, float((same - found[1]).abs().max()) / own if own else 0.0)


def _leak(model: nn.Module, row: _Row, alone: _Alone) -> tuple[float, float]:
    """Measure how much the examples of a row influence each other, relative to the effect of an example's own token.

    Returns:
        `moved`, the largest change of the other examples' logits when the first example is replaced, and `apart`, the
        largest difference between logits in the row and those of the same examples run alone; both divided by
        `alone.own`, and NaN if that is zero.
    """
    starts = torch.tensor([0, *map(len, row.examples)]).cumsum(0).tolist()
    wanted = {index: starts[index] + _places(len(row.examples[index])) for index in row.compared}
    rows = torch.cat(list(wanted.values()))
    sizes = [len(places) for places in wanted.values()]
    before = _logits(model, torch.cat(row.examples)[None], row.position_ids, rows)
    after = _logits(model, torch.cat([row.first, *row.examples[1:]])[None], row.position_ids, rows)
    moved = (after - before)[sizes[0] :].abs().max()
    parts = zip(before.split(sizes), alone.logits.values(), strict=True)
    apart = torch.stack([(packed - single).abs().max() for packed, single in parts]).max()
    own = alone.own or math.nan  # if tokens have no effect on later ones, an influence cannot be detected
    return float(moved) / own, float(apart) / own


def _leak_with_masks(model: nn.Module, row: _Row, alone: _Alone) -> tuple[float, float] | None:
    """`_leak` with masks that isolate examples; None if the model does not accept such masks."""
    handle = give_masks(model)
    try:
        return _leak(model, row, alone)
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return None  # model classes raise different errors for masks that they do not accept
    finally:
        handle.remove()


def _apart(model: Any, leak: tuple[float, float], alone: _Alone) -> bool:
    """Whether both results of `_leak` are within the tolerances, that is, examples are isolated; false for NaN."""
    moved, apart = leak
    least_moved, least_apart = _MOVED.get(model.dtype, _MOVED_IN_HALF), _APART.get(model.dtype, _APART_IN_HALF)
    return (
        moved <= min(_MOST, max(least_moved, _NOISE_MOVED * alone.noise))
        and apart <= min(_MOST, max(least_apart, _NOISE_APART * alone.noise))
    )  # fmt: skip


def _reason(plain: tuple[float, float], masked: tuple[float, float] | None) -> str:
    moved, apart = plain
    if math.isfinite(moved):
        seen = (
            "examples in one row would influence each other: another neighbour changes an example's logits "
            f"{moved:.2g} times as much as another first token of its own, and packing {apart:.2g} times"
        )
    else:
        seen = "examples in one row might influence each other: no token affected a later one, so this cannot be tested"
    if masked is None:
        return f"{seen}; the model takes no mask that would keep them apart"
    return f"{seen}; with a mask per example the factor of another neighbour is still {masked[0]:.2g}"
