"""Estimates the seconds of each phase of a fine-tuning run on a CPU, in the form of the cost model of GPUs.

A phase takes the time of its matrix products and of its memory traffic, at the rates measured on this machine
(`pipeline.dry_run.rates`). Python's time per operator is not counted except where operators are small and many: the
final merge rounds column by column.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from pipeline.dry_run.costs import Product
from pipeline.dry_run.rates import Rates
from pipeline.dry_run.workload import Workload

_ATTENTION_BACKWARD: Final = 2.5  # attention: relative to forward (FlashAttention, arXiv 2205.14135)
# Traffic of a layer's elementwise operators, forward and backward, relative to the activations that it saves: as
# counted on a FALQON layer of Llama (`costs.FALQON_LAYERS`).
_FORWARD, _BACKWARD = 5, 10
_LOSS: Final = 50  # bytes per logit: fp32 log-softmax, its gradient, and their casts
_DECODED: Final = 5  # bytes per weight: a code is read, a bf16 value written and read
_OPTIMIZER: Final = 40  # bytes per trained value and step
_CONVERTED: Final = 60  # bytes per weight: error, scale, codes
_ROUNDED: Final = 300  # bytes per weight: the update, its target and the cast in fp32, several times
_CANDIDATES: Final = 3000  # bytes per weight: NVFP4 rounds a block with six scales, in a dozen operators each
_COLUMN: Final = 150e-6  # seconds: a dozen operators on a column
_FP64: Final = 4  # times slower than bf16 products, at least
_START: Final = 8.0  # seconds: imports, loading, manifest
_WRITE: Final = 2.0  # seconds, beside the bytes: plot, manifest
# In a model, products and operators take longer than one that is repeated for a measurement, whose matrices stay in the
# caches: 1.6 to 1.9 times in the runs that docs/planning.md compares.
_COLD: Final = 1.7


@dataclass(frozen=True, slots=True)
class Schedule:
    """How often phases occur, and the mean size of a micro-batch relative to the largest.

    Attributes:
        calibration_batches: training batches that the ranges of keys and values are measured on.
        cache_batches: held-out batches that are run with and without an FP8 key/value cache.
    """

    steps: int
    accumulation: int
    evaluations: int
    heldout_batches: int
    calibration_batches: int
    cache_batches: int
    saves: int
    gradient_batches: int
    merge_batches: int
    train_share: float
    heldout_share: float


def phase_seconds(work: Workload, often: Schedule, rates: Rates) -> Mapping[str, float]:
    """Seconds of all occurrences of each phase."""
    cold = Rates(rates.products / _COLD, rates.memory / _COLD)
    step = often.accumulation * often.train_share * _micro_batch(work, cold)
    step += _OPTIMIZER * work.trained / cold.memory
    held = often.heldout_share * _forward(work, cold, work.rank)
    written = work.shard + work.codes + 2 * sum(work.stored)
    return {
        "start": _START,
        "prepare": _prepare(work, often, cold),
        "step": often.steps * step,
        "evaluate": often.evaluations * often.heldout_batches * held,
        "calibrate": often.calibration_batches * often.train_share * _forward(work, cold, 0)
        + 2 * often.cache_batches * held,
        "save": often.saves * 6 * 12 * work.trained / rates.memory,
        "final merge": _final_merge(work, often, rates),
        "write": _WRITE + 10 * written / rates.memory,
    }


def _micro_batch(work: Workload, rates: Rates) -> float:
    forwards = 2 if work.checkpointing else 1
    backward = _products(work.products(work.rank, gradient=True), work, rates) + _head(work, rates)
    backward += _ATTENTION_BACKWARD * _attention(work, rates) + _BACKWARD * work.layers * work.saved / rates.memory
    return forwards * _forward(work, rates, work.rank) + backward


def _forward(work: Workload, rates: Rates, rank: int) -> float:
    products = _products(work.products(rank, gradient=False), work, rates)
    elementwise = _FORWARD * work.layers * work.saved / rates.memory
    return products + elementwise + _attention(work, rates) + _head(work, rates)


def _products(products: Sequence[Product], work: Workload, rates: Rates) -> float:
    decoded = 0.0 if work.method == "lora" else _DECODED * work.weights / rates.memory
    return sum(rates.seconds(product, work.itemsize) for product in products) + decoded


def _head(work: Workload, rates: Rates) -> float:
    """The output head and half of the loss, once."""
    product = Product(max(1, work.answers), work.hidden, work.vocabulary, 1)
    return rates.seconds(product, work.itemsize) + _LOSS / 2 * work.answers * work.vocabulary / rates.memory


def _attention(work: Workload, rates: Rates) -> float:
    return 4 * work.tokens * work.length * work.query * work.layers / rates.products


def _prepare(work: Workload, often: Schedule, rates: Rates) -> float:
    found = _CONVERTED * work.weights / rates.memory
    if work.gradients:
        passes = 2 * often.gradient_batches  # the layers' forward pass is repeated
        found += passes * (2 * _forward(work, rates, 0) + _products(work.products(0, gradient=True), work, rates))
    return found


def _final_merge(work: Workload, often: Schedule, rates: Rates) -> float:
    if not work.compensated:
        return _ROUNDED * work.weights / rates.memory
    tokens = often.merge_batches * work.tokens * often.train_share
    found = often.merge_batches * often.train_share * _forward(work, rates, work.rank)
    if work.packed:  # first the gradients; and each block is rounded with several scales
        found += often.merge_batches * often.train_share * _micro_batch(work, rates)
        found += _CANDIDATES * work.weights / rates.memory
    for group in work.groups:
        moments = 2 * tokens * group.share * group.width**2
        solver = 2 * group.width**3  # a factor, its inverse, and the factor of that
        rounding = group.rows * group.width**2
        found += (moments + _FP64 * solver + rounding) * 2 / rates.products + _COLUMN * group.width
    return found
