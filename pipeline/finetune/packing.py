"""Whether a model keeps packed examples apart, found out by running it once as it was loaded.

A packed row holds several examples whose positions restart. From these many architectures build a mask that lets no
example see another. Others ignore them: ALiBi and learned positions that count on, recurrent layers and convolutions
whose state runs through the row, classes that never pass positions on to their mask. So one row of the run's own width
is tried before the first step: other tokens in its first example must not move the logits of the others, and the
logits of each example must be those of the example alone, wherever it stands. Both are measured by what the first
token of an example does to its own later logits, so that small weights hide nothing, and against the noise of
computing the same row in another shape.

Where the plain row leaks, transformers' own masks (one per kind of layer, windows included, in the form that the
attention of the model takes) are tried in the same way. Where these do not help either, nothing is packed.
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

_FIRST, _SPREAD, _LAST = 16, 8, 8  # places of an example that are looked at
# Parts of an example's own effect. A neighbour moves an isolated example by nothing at all, but for experts whose
# tokens are grouped anew; an example alone is computed in other shapes, which moves last bits.
_MOVED: Final = {torch.float32: 1e-5}
_MOVED_IN_HALF: Final = 5e-3
_APART: Final = {torch.float32: 1e-3}
_APART_IN_HALF: Final = 0.1
_NOISE_MOVED, _NOISE_APART, _MOST = 2, 8, 0.5  # multiples of the measured noise, and never more than this


@dataclass(frozen=True, slots=True)
class _Row:
    """A packed row and its variants.

    Attributes:
        examples: int64 `(length,)` each; the first is short, so that it can be replaced; the second is the longest.
        first: of the first one's shape, with other tokens everywhere.
        second: the second one with another first token.
    """

    examples: list[Tensor]
    first: Tensor
    second: Tensor

    @property
    def position_ids(self) -> Tensor:
        """`(1, L)`, restarting."""
        return torch.cat([torch.arange(len(example)) for example in self.examples])[None]

    @property
    def compared(self) -> tuple[int, ...]:
        """Examples that are looked at: at the row's start, after a short one, and at its end."""
        return tuple(sorted({0, 1, len(self.examples) - 1}))


@dataclass(frozen=True, slots=True)
class _Alone:
    """Examples that share no row, and how exactly they can be told.

    Attributes:
        logits: of the compared examples at their places, fp32 `(places, V)`.
        own: largest change of the second example's later logits when its first token changes.
        noise: largest difference between two ways to compute the same, part of `own`.
    """

    logits: dict[int, Tensor]
    own: float
    noise: float


def find_packing(model: nn.Module, batch: Batch) -> PackingFacts:
    """How rows of several examples can be given to the model, and what they do to each other without help.

    Args:
        model: as loaded, on its device; left as it was found.
        batch: the run's first batch, packed: the probe takes its width, its longest example and its tokens.
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
    """What a user who asked for packing and does not get it is told; empty otherwise."""
    if found is None or not found.reason:
        return ""
    return f"packing is off: each row holds one example, so a step sees fewer tokens; {found.reason}"


def give_masks(model: nn.Module) -> RemovableHandle:
    """From now on the model gets a mask per example with every input that has positions and no mask."""

    def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        positions = kwargs.get("position_ids")
        if positions is None or kwargs.get("attention_mask") is not None:
            return None
        return args, kwargs | {"attention_mask": _masks(model, positions)}

    return model.register_forward_pre_hook(add, with_kwargs=True)


def _masks(model: Any, position_ids: Tensor) -> Any:
    """What the model would build from `(B, L)` positions if it looked at them: a mask, or one per kind of layer."""
    import_transformers()
    from transformers.masking_utils import create_masks_for_generate

    shape = position_ids.new_empty((*position_ids.shape, 0), dtype=model.dtype)  # of the embeddings; no values are read
    return create_masks_for_generate(model.config, shape, None, None, position_ids=position_ids)


def _make_row(batch: Batch) -> _Row:
    """A row as wide as the batch's, of random tokens out of the batch, no example longer than its longest."""
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
    """Where an example is looked at: its first and last tokens, and some between."""
    spread = torch.linspace(0, length - 1, _SPREAD).long()
    places: Tensor = torch.cat([torch.arange(length)[:_FIRST], spread, torch.arange(length)[-_LAST:]]).unique()
    return places


def _logits(model: nn.Module, ids: Tensor, position_ids: Tensor, rows: Tensor) -> Tensor:
    """fp32 `(len(rows), V)` of the rows of the flattened `(B, L)` input."""
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
    """How far another first example moves the others, and how far examples are from what they are alone; parts of
    their own effect."""
    starts = torch.tensor([0, *map(len, row.examples)]).cumsum(0).tolist()
    wanted = {index: starts[index] + _places(len(row.examples[index])) for index in row.compared}
    rows = torch.cat(list(wanted.values()))
    sizes = [len(places) for places in wanted.values()]
    before = _logits(model, torch.cat(row.examples)[None], row.position_ids, rows)
    after = _logits(model, torch.cat([row.first, *row.examples[1:]])[None], row.position_ids, rows)
    moved = (after - before)[sizes[0] :].abs().max()
    parts = zip(before.split(sizes), alone.logits.values(), strict=True)
    apart = torch.stack([(packed - single).abs().max() for packed, single in parts]).max()
    own = alone.own or math.nan  # without an effect of its own, nothing can be told
    return float(moved) / own, float(apart) / own


def _leak_with_masks(model: nn.Module, row: _Row, alone: _Alone) -> tuple[float, float] | None:
    """`_leak` with masks; None where the model takes none."""
    handle = give_masks(model)
    try:
        return _leak(model, row, alone)
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return None  # whatever a class says about a mask that it does not expect
    finally:
        handle.remove()


def _apart(model: Any, leak: tuple[float, float], alone: _Alone) -> bool:
    """Whether both figures of `_leak` are noise; NaN is not."""
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
            "examples in one row would not be what they are alone: another neighbour changes an example's logits "
            f"{moved:.2g} times as much as another first token of its own does, and a row around it {apart:.2g} times"
        )
    else:
        seen = "examples in one row might see each other: no token was seen to affect a later one, so nothing can tell"
    if masked is None:
        return f"{seen}; the model takes no mask that would keep them apart"
    return f"{seen}; with a mask per example a neighbour still counts {masked[0]:.2g} times"
