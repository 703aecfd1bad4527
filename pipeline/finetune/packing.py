"""Test whether a model keeps packed examples apart, by running it once after loading.

A packed row holds several examples whose positions restart at zero. Many architectures build a mask from the positions
that lets no example attend to another. Others do not: ALiBi or learned positions that ignore them, recurrent layers and
convolutions whose state runs through the whole row, classes that do not use positions for their mask. So one row of the
run's own width is tried before the first step: changing the tokens of its first example must not change the logits of
the others, and each example's logits must be the same as those of the example alone, wherever it is in the row. Both
differences are measured relative to the effect that an example's first token has on its own later logits, so that small
weights cannot hide a leak, and compared with the numerical noise of computing the same row in another shape.

If examples leak, transformers' own masks (one per kind of layer, sliding windows included, in the format of the model's
attention) are tried in the same way. If these do not help either, packing is turned off.
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

_FIRST, _SPREAD, _LAST = 16, 8, 8  # positions of an example that are compared
# Tolerances, relative to an example's own effect (see above). A neighbour does not change an isolated example at all,
# except through experts, whose tokens are grouped differently; running an example alone changes shapes and last bits.
_MOVED: Final = {torch.float32: 1e-5}
_MOVED_IN_HALF: Final = 5e-3
_APART: Final = {torch.float32: 1e-3}
_APART_IN_HALF: Final = 0.1
_NOISE_MOVED, _NOISE_APART, _MOST = 2, 8, 0.5  # multiples of the measured noise; the upper limit


@dataclass(frozen=True, slots=True)
class _Row:
    """A packed row and its variants.

    Attributes:
        examples: int64 `(length,)` each; the first is a short one that can be replaced; the second is the longest.
        first: a replacement of the first example, of the same shape but with a different token everywhere.
        second: the second example with a different first token.
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
        """Indices of the compared examples: at the row's start, after the short one, and at the row's end."""
        return tuple(sorted({0, 1, len(self.examples) - 1}))


@dataclass(frozen=True, slots=True)
class _Alone:
    """Results for examples that are run alone, and the numerical noise of such results.

    Attributes:
        logits: of each compared example at its compared positions, fp32 `(positions, V)`.
        own: largest change of the second example's later logits when its first token changes.
        noise: largest difference between two ways to compute the same logits, relative to `own`.
    """

    logits: dict[int, Tensor]
    own: float
    noise: float


def find_packing(model: nn.Module, batch: Batch) -> PackingFacts:
    """Find out how packed rows must be given to the model, and how much examples affect each other without a mask.

    Args:
        model: as loaded, on its device; restored to its state on return.
        batch: the run's first batch, packed: the probe uses its width, its longest example's length and its tokens.
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
    """The warning if packing was requested but is turned off; otherwise empty."""
    if found is None or not found.reason:
        return ""
    return f"packing is off: each row holds one example, so a step sees fewer tokens; {found.reason}"


def give_masks(model: nn.Module) -> RemovableHandle:
    """From now on, add a mask that isolates examples to each call of the model with positions but without a mask."""

    def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        positions = kwargs.get("position_ids")
        if positions is None or kwargs.get("attention_mask") is not None:
            return None
        return args, kwargs | {"attention_mask": _masks(model, positions)}

    return model.register_forward_pre_hook(add, with_kwargs=True)


def _masks(model: Any, position_ids: Tensor) -> Any:
    """The mask that isolates examples, built from `(B, L)` positions: one, or a mapping with one per kind of layer."""
    import_transformers()
    from transformers.masking_utils import create_masks_for_generate

    shape = position_ids.new_empty((*position_ids.shape, 0), dtype=model.dtype)  # of the embeddings, without values
    return create_masks_for_generate(model.config, shape, None, None, position_ids=position_ids)


def _make_row(batch: Batch) -> _Row:
    """A row as wide as the batch, of random tokens from the batch, with no example longer than its longest one."""
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
    """How much replacing the first example changes the logits of the others, and how much logits in the row differ from
    those of examples run alone; both relative to an example's own effect."""
    starts = torch.tensor([0, *map(len, row.examples)]).cumsum(0).tolist()
    wanted = {index: starts[index] + _places(len(row.examples[index])) for index in row.compared}
    rows = torch.cat(list(wanted.values()))
    sizes = [len(places) for places in wanted.values()]
    before = _logits(model, torch.cat(row.examples)[None], row.position_ids, rows)
    after = _logits(model, torch.cat([row.first, *row.examples[1:]])[None], row.position_ids, rows)
    moved = (after - before)[sizes[0] :].abs().max()
    parts = zip(before.split(sizes), alone.logits.values(), strict=True)
    apart = torch.stack([(packed - single).abs().max() for packed, single in parts]).max()
    own = alone.own or math.nan  # without such an effect a leak cannot be detected
    return float(moved) / own, float(apart) / own


def _leak_with_masks(model: nn.Module, row: _Row, alone: _Alone) -> tuple[float, float] | None:
    """`_leak` with masks; None if the model accepts no such mask."""
    handle = give_masks(model)
    try:
        return _leak(model, row, alone)
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return None  # different classes fail differently on an unexpected mask
    finally:
        handle.remove()


def _apart(model: Any, leak: tuple[float, float], alone: _Alone) -> bool:
    """Whether both figures of `_leak` are within noise; NaN is not."""
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
