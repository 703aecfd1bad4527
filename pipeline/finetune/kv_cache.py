"""What an FP8 key/value cache needs and costs: ranges from the training text, and the loss on held-out text.

Measured once, on the weights that are saved, since the text and the model are at hand only here. An export with an FP8
cache takes its scales from these ranges, and is refused if the loss says that the cache costs too much. Examples run
unpacked: a cache does not tell the examples of a row apart.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fp8pipe.artifact.kinds import KvAmax, KvCacheFacts
from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.language.kv_cache import (
    cache_argument,
    cache_scale,
    observe_ranges,
    rounding_cache,
    why_unsupported,
)
from pipeline.finetune.batches import Batch, Batches
from pipeline.finetune.compiled import uncompiled
from pipeline.finetune.loss import answer_count, answer_loss, model_inputs

_LOG = logging.getLogger(__name__)
CALIBRATION_RECORDS: Final = 32
HELDOUT_RECORDS: Final = 64
# What models that are not made for a cache of this kind raise.
_FAILURES: Final = (
    ConfigurationError, AttributeError, IndexError, KeyError, NotImplementedError, TypeError, ValueError,
)  # fmt: skip
# What no model is to blame for; torch can be built without `distributed`.
_OTHERS: Final = (torch.OutOfMemoryError, *((dist.DistError,) if dist.is_available() else ()))


def measure_kv_cache(
    model: nn.Module, train: Batches, heldout: Batches, names: Mapping[str, str], device: str, *, alone: bool = True
) -> tuple[KvCacheFacts | None, str]:
    """Calibrate on training records and compare the held-out loss with and without an FP8 key/value cache.

    Args:
        model: the finished model, on `device`; its training mode is restored.
        train: training batches; the first records of the first epoch are used.
        heldout: held-out batches; the first rows are used.
        names: names in the checkpoint, by path of the linear layers that have one (without `.weight`).
        device: as torch names it.
        alone: whether no other process takes part. A RuntimeError may tell that one of them is lost, so it is raised
            if others do, while in one process it counts as one of a model that has no such cache.

    Returns:
        The facts for the manifest, and an empty string; or None, and why the model has no such cache.

    Raises:
        RuntimeError: memory ran out, or a connection was lost.
    """
    tolerated = (*_FAILURES, RuntimeError) if alone else _FAILURES
    was_training = model.training
    model.eval()
    try:
        if reason := why_unsupported(model.config):
            return None, reason
        with uncompiled():
            return _measured(model, train.unpacked(), heldout.unpacked(), names, device), ""
    except _OTHERS:
        raise
    except tolerated as error:  # a run of hours must not be lost to what only an FP8 cache needs
        return None, str(error) or type(error).__name__
    finally:
        model.train(was_training)


def _measured(
    model: nn.Module, train: Batches, heldout: Batches, names: Mapping[str, str], device: str
) -> KvCacheFacts:
    calibration, evaluated = _first(train, CALIBRATION_RECORDS), _first(heldout, HELDOUT_RECORDS)
    ranges = observe_ranges(model, ((model_inputs(batch, device), batch.lengths) for batch in calibration))
    scales = {seen.layer: (cache_scale(seen.k), cache_scale(seen.v)) for seen in ranges.values()}
    losses, rounded = (
        _losses(model, evaluated, device, cache) for cache in (lambda: None, lambda: rounding_cache(model, scales))
    )
    counts = torch.tensor([answer_count(batch.labels) for batch in evaluated], dtype=torch.float64)
    tokens = max(1.0, float(counts.sum()))
    return KvCacheFacts(
        records=sum(len(batch.lengths) for batch in calibration), tokens=sum(batch.tokens for batch in calibration),
        amax={_stored(name, names): KvAmax(layer=seen.layer, k=seen.k, v=seen.v) for name, seen in ranges.items()},
        heldout_tokens=int(counts.sum()), loss=float(losses.sum()) / tokens, fp8_loss=float(rounded.sum()) / tokens,
        error=_standard_error(rounded - losses, counts),
    )  # fmt: skip


def _first(batches: Batches, records: int) -> list[Batch]:
    """The first batches of an epoch, until they hold that many records."""
    found: list[Batch] = []
    while len(found) < len(batches) and sum(len(batch.lengths) for batch in found) < records:
        found.append(batches.at(len(found)))
    return found


@torch.no_grad()
def _losses(model: nn.Module, batches: Sequence[Batch], device: str, cache: Callable[[], Any]) -> Tensor:
    """The summed loss of the answer tokens of every batch, nats, float64; `cache` makes the cache of a batch."""
    found = [
        float(answer_loss(model, {**model_inputs(batch, device), **cache_argument(model, cache())}, batch.labels))
        for batch in batches
    ]
    return torch.tensor(found, dtype=torch.float64)


def _standard_error(differences: Tensor, counts: Tensor) -> float | None:
    """Standard error of the mean difference per token, from how much the batches disagree about it; None for one batch.

    Args:
        differences: summed over each batch, float64 `(batches,)`.
        counts: tokens of each batch, likewise.
    """
    batches, tokens = len(counts), float(counts.sum())
    if batches < 2 or not tokens:
        return None
    residuals = differences - counts * (differences.sum() / tokens)
    return float((residuals.square().sum() * batches / (batches - 1)).sqrt()) / tokens


def _stored(name: str, names: Mapping[str, str]) -> str:
    """An attention module's name in the checkpoint, from that of a linear layer in it."""
    for module, stored in names.items():
        rest = module.removeprefix(f"{name}.")
        if rest != module and stored.endswith(f".{rest}"):
            return stored.removesuffix(f".{rest}")
    return name
