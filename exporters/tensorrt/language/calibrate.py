"""Calibrate static activation scales on real text, and measure how well a model predicts held-out answers.

The magnitudes of each input are counted in a histogram with one bin for every bfloat16 magnitude (15 bits). One pass in
any order and a fixed amount of memory suffice; afterwards the clipped share, percentiles and the squared error of any
scale can be computed from the histogram. A scale is a power of two: division by it is exact, so the codes are the same
whether an engine divides in half or in single precision. Rounding the scale up to a power of two costs less than one of
E4M3's 18 binades. Scales computed from `amax` clip no value that occurred in calibration.

The artifact itself quantizes activations with one dynamic scale per token. With static scales the model is a different
function, so its quality cannot be checked by comparing codes, but only by the perplexity on held-out answers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from exporters.tensorrt.language.target import Calibration, InputScale
from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.language.text import IGNORED, Encoded
from fp8pipe.numerics.grids import E4M3, amax_scale

_BINS: Final = 1 << 15  # number of bfloat16 bit patterns without the sign bit
_CLIPPED: Final = 1e-5  # share of values that the method `percentile` may clip
_BINADES: Final = 12  # number of powers of two that the method `mse` tries, from that of `amax` downwards
# Exponents of the smallest and the largest power of two that FP16 can represent.
_SMALLEST, _LARGEST = -24, 15


@dataclass(slots=True)
class InputCounts:
    """Histogram of the magnitudes of one linear layer's input."""

    # `(32768,)` int64, indexed by the bfloat16 bits of the magnitude
    counts: Tensor = field(default_factory=lambda: torch.zeros(_BINS, dtype=torch.int64))
    amax: float = 0.0  # the largest magnitude, exact

    def add(self, x: Tensor) -> None:
        """Count the values of `x`, of any shape and float dtype; if it has NaN or infinity, only `amax` is updated."""
        magnitude = x.detach().abs()
        largest = float(magnitude.max())
        self.amax = largest if math.isnan(largest) else max(self.amax, largest)
        if not math.isfinite(largest):
            return
        bits = magnitude.to(torch.bfloat16).reshape(-1).view(torch.int16)
        self.counts += torch.bincount(bits.int(), minlength=_BINS)

    @property
    def total(self) -> int:
        """The number of values counted so far."""
        return int(self.counts.sum())

    def clipped(self, scale: float) -> float:
        """The share of values that exceed the range of E4M3 with this scale, between 0 and 1."""
        return float(self.counts[_magnitudes() > E4M3.max * scale].sum()) / max(1, self.total)

    def error(self, scale: float) -> float:
        """Mean squared error of rounding to E4M3 with this scale."""
        values = _magnitudes().double()
        rounded = E4M3.cast(values / scale).double() * scale
        seen = self.counts > 0
        return float(((values - rounded)[seen].square() * self.counts[seen]).sum()) / max(1, self.total)

    def quantile(self, beyond: float) -> float:
        """A magnitude that at most the share `beyond` (0 to 1) of the values exceeds, accurate to one bin."""
        above = self.counts.flip(0).cumsum(0).flip(0)
        return min(self.amax, float(_magnitudes()[int((above > beyond * self.total).nonzero().max())]))


def run_whole(model: nn.Module) -> Callable[[Sequence[Tensor]], Iterator[Tensor]]:
    """A function that runs ids `(batch, tokens)` through a transformers model, one after the other, to logits."""

    def run(texts: Sequence[Tensor]) -> Iterator[Tensor]:
        with torch.no_grad():
            for ids in texts:
                yield model(input_ids=ids, use_cache=False).logits

    return run


def count_inputs(
    model: nn.Module, layers: Sequence[str], text: Sequence[Encoded],
    run: Callable[[Sequence[Tensor]], Iterator[Tensor]] | None = None,
) -> dict[str, InputCounts]:  # fmt: skip
    """Run a model on text and count the magnitudes of its linear layers' inputs.

    Args:
        model: a transformers model in evaluation mode.
        layers: module paths of the linear layers.
        text: sequences, which are run one at a time, without padding.
        run: runs token ids through the model, as `run_whole` does, which is the default.

    Returns:
        The histograms by module path; layers that read the same tensor share one object.

    Raises:
        ConfigurationError: an input is NaN or infinite, or a layer was never called.
    """
    groups: dict[str, InputCounts] = {}
    ids = [torch.tensor([example.input_ids]) for example in text]
    with pre_hooks(model, _observers(layers, groups)):
        for _ in (run or run_whole(model))(ids):
            pass
    broken = [name for name in layers if name not in groups or not math.isfinite(groups[name].amax)]
    if broken:
        raise ConfigurationError(
            f"{len(broken)} layer(s) cannot be calibrated",
            why=f"the first: the input of {broken[0]} "
            f"{'was never computed' if broken[0] not in groups else 'is NaN or infinite'}",
            fix="check the model's training; to use the model without static scales, export with --target vllm",
        )
    return groups


def static_scale(counts: InputCounts, method: Calibration) -> InputScale:
    """The static scale of one input: a power of two, chosen by the given method (see `Calibration`)."""
    covering = _power_of_two(counts.amax / E4M3.max)
    if method is Calibration.AMAX:
        scale = covering
    elif method is Calibration.PERCENTILE:
        scale = _power_of_two(counts.quantile(_CLIPPED) / E4M3.max)
    else:
        candidates = [_power_of_two(covering * 2.0**-step) for step in range(_BINADES)]
        scale = min(candidates, key=lambda candidate: (counts.error(candidate), -candidate))
    return InputScale(scale=scale, amax=counts.amax, clipped=counts.clipped(scale), values=counts.total)


def scales_by_layer(counts: Mapping[str, InputCounts], method: Calibration) -> dict[str, InputScale]:
    """The static scale of every layer, by module path; layers that share a histogram get the same scale."""
    found: dict[int, InputScale] = {}
    for count in counts.values():
        if id(count) not in found:
            found[id(count)] = static_scale(count, method)
    return {name: found[id(count)] for name, count in counts.items()}


@contextmanager
def pre_hooks(model: nn.Module, hooks: Mapping[str, Callable[[Tensor], Tensor | None]]) -> Iterator[None]:
    """A context in which functions are called with the inputs of modules.

    Args:
        model: the model.
        hooks: functions by module path. Each is called with the module's first argument, and may return a replacement
            for it; None leaves it unchanged.
    """

    def hook(function: Callable[[Tensor], Tensor | None]) -> Any:
        def run(module: nn.Module, args: Any) -> Any:
            found = function(args[0])
            return None if found is None else (found, *args[1:])

        return run

    handles = [model.get_submodule(n).register_forward_pre_hook(hook(function)) for n, function in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _observers(layers: Sequence[str], groups: dict[str, InputCounts]) -> dict[str, Callable[[Tensor], None]]:
    # The last input and its histogram. The reference keeps the tensor alive, so that `is` identifies it reliably.
    last: list[tuple[Tensor, InputCounts]] = []

    def observe(name: str, x: Tensor) -> None:
        if last and last[0][0] is x:
            groups.setdefault(name, last[0][1])
            return
        counts = groups.setdefault(name, InputCounts())
        counts.add(x)
        last[:] = [(x, counts)]

    return {name: partial(observe, name) for name in layers}


def _magnitudes() -> Tensor:
    """The magnitude that each bin of a histogram counts, fp32 `(32768,)`; the last ones are infinity and NaN."""
    return torch.arange(_BINS, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()


def _power_of_two(least: float) -> float:
    """The smallest power of two that is at least `least`, limited to those that FP16 can represent."""
    exponent = _SMALLEST if least <= 0 else math.ceil(math.log2(least))
    return 2.0 ** min(max(exponent, _SMALLEST), _LARGEST)


# Number of texts that are scored per batch; batches save time, as a graph dequantizes its weights once per batch.
BATCH = 8


@dataclass(frozen=True, slots=True)
class Score:
    """A model's negative log-likelihoods of the answer tokens of some text."""

    losses: Tensor  # `(tokens,)` fp32, nats; two scores of the same text have the same order

    @property
    def tokens(self) -> int:
        """The number of answer tokens."""
        return self.losses.numel()

    @property
    def nats(self) -> float:
        """The mean loss per answer token, in nats."""
        return float(self.losses.double().mean())

    @property
    def perplexity(self) -> float:
        """The perplexity, exp(nats)."""
        return math.exp(self.nats)

    def error_against(self, other: Score) -> float:
        """The standard error of the difference between two mean losses, in nats, computed from per-token differences.

        `other` is a score of the same text.
        """
        difference = self.losses.double() - other.losses.double()
        return float(difference.std() / math.sqrt(self.tokens)) if self.tokens > 1 else math.inf


def score_torch(model: nn.Module, text: Sequence[Encoded]) -> Score:
    """Score a transformers model on text."""
    return score(text, run_whole(model))


def score(text: Sequence[Encoded], run: Callable[[Sequence[Tensor]], Iterable[Tensor]]) -> Score:
    """Score any model on text.

    Args:
        text: the sequences.
        run: a function that returns logits `(batch, tokens, vocabulary)` for each of several token ids `(batch,
            tokens)` int64.
    """
    batches, wanted = [], []
    ordered = sorted(text, key=lambda example: len(example.input_ids))
    for start in range(0, len(ordered), BATCH):
        part = ordered[start : start + BATCH]
        longest = len(part[-1].input_ids)
        # Padding at the end has no effect, as no token attends to later ones.
        batches.append(torch.tensor([[*x.input_ids, *[0] * (longest - len(x.input_ids))] for x in part]))
        wanted.append(torch.tensor([[*x.labels, *[IGNORED] * (longest - len(x.labels))] for x in part])[:, 1:])
    losses = []
    for labels, logits in zip(wanted, run(batches), strict=True):
        keep = labels != IGNORED
        found = logits[:, :-1][keep].float()
        losses.append(nn.functional.cross_entropy(found, labels[keep], reduction="none"))
    return Score(torch.cat(losses))


@contextmanager
def dynamic_inputs(model: nn.Module, layers: Sequence[str]) -> Iterator[None]:
    """A context in which the inputs of `layers` are rounded to E4M3 with one scale per token, `amax / 448`."""

    def rounded(x: Tensor) -> Tensor:
        values = x.float()
        scale = amax_scale(values.abs().amax(-1, keepdim=True), E4M3)
        return (E4M3.cast(values / scale).float() * scale).to(x.dtype)

    with pre_hooks(model, {name: rounded for name in layers}):
        yield
