"""Calibrates static activation scales on real text, and measures how well a model predicts with them.

Input magnitudes are counted exactly, in a histogram with one bin per bfloat16 magnitude (15 bits): one pass, in any
order, with fixed memory, from which the clipped share, percentiles and squared error of any scale can be computed
afterwards. The scale is a power of two: dividing by it is exact, so the codes are the same whether an engine divides in
half or in single precision. That costs less than one of E4M3's 18 binades. Scales computed from `amax` clip nothing
that was seen in calibration.

The artifact is served with one dynamic scale per token. Static scales define a different function, so comparing codes
cannot show that they are good enough; the perplexity on held-out answers can.
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

_BINS: Final = 1 << 15  # bfloat16 without its sign
_CLIPPED: Final = 1e-5  # share of values that `percentile` may clip
_BINADES: Final = 12  # how many binades below amax `mse` searches
# The powers of two that FP16 represents exactly.
_SMALLEST, _LARGEST = -24, 15


@dataclass(slots=True)
class InputCounts:
    """Histogram of the magnitudes of one input."""

    # `(32768,)` int64, indexed by the bfloat16 bits of the magnitude
    counts: Tensor = field(default_factory=lambda: torch.zeros(_BINS, dtype=torch.int64))
    amax: float = 0.0  # the largest magnitude, exact

    def add(self, x: Tensor) -> None:
        """Count the values of a tensor of any shape and float dtype."""
        magnitude = x.detach().abs()
        largest = float(magnitude.max())
        self.amax = largest if math.isnan(largest) else max(self.amax, largest)
        if not math.isfinite(largest):
            return
        bits = magnitude.to(torch.bfloat16).reshape(-1).view(torch.int16)
        self.counts += torch.bincount(bits.int(), minlength=_BINS)

    @property
    def total(self) -> int:
        """Number of values seen."""
        return int(self.counts.sum())

    def clipped(self, scale: float) -> float:
        """Share of values that exceed the range of E4M3 with this scale."""
        return float(self.counts[_magnitudes() > E4M3.max * scale].sum()) / max(1, self.total)

    def error(self, scale: float) -> float:
        """Mean squared error of rounding to E4M3 with this scale."""
        values = _magnitudes().double()
        rounded = E4M3.cast(values / scale).double() * scale
        seen = self.counts > 0
        return float(((values - rounded)[seen].square() * self.counts[seen]).sum()) / max(1, self.total)

    def quantile(self, beyond: float) -> float:
        """The magnitude that is exceeded by a share `beyond` of the values."""
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
    """Run text through a model and count the inputs of its linears.

    The model must be in evaluation mode; sequences are run one at a time, without padding. Layers that read the same
    tensor share one object. `run` runs them; the whole model at once if None.

    Raises:
        ConfigurationError: an input that is not finite.
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
    """The smallest power of two that covers the range determined by the method."""
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
    """`static_scale` of every layer; layers that share counts share the result."""
    found: dict[int, InputScale] = {}
    for count in counts.values():
        if id(count) not in found:
            found[id(count)] = static_scale(count, method)
    return {name: found[id(count)] for name, count in counts.items()}


@contextmanager
def pre_hooks(model: nn.Module, hooks: Mapping[str, Callable[[Tensor], Tensor | None]]) -> Iterator[None]:
    """Within this context, each named module's input is passed to its function, which may return a replacement."""

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
    last: list[tuple[Tensor, InputCounts]] = []  # holds a reference to the tensor, so that its identity stays unique

    def observe(name: str, x: Tensor) -> None:
        if last and last[0][0] is x:
            groups.setdefault(name, last[0][1])
            return
        counts = groups.setdefault(name, InputCounts())
        counts.add(x)
        last[:] = [(x, counts)]

    return {name: partial(observe, name) for name in layers}


def _magnitudes() -> Tensor:
    """The value of every bin, fp32; the last ones are infinity and NaN."""
    return torch.arange(_BINS, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()


def _power_of_two(least: float) -> float:
    """The smallest power of two that is at least `least` and representable in FP16."""
    exponent = _SMALLEST if least <= 0 else math.ceil(math.log2(least))
    return 2.0 ** min(max(exponent, _SMALLEST), _LARGEST)


# Number of texts scored per batch: a graph dequantizes its weights once per batch.
BATCH = 8


@dataclass(frozen=True, slots=True)
class Score:
    """Negative log-likelihoods of answer tokens."""

    losses: Tensor  # `(tokens,)` fp32, nats; two scores of the same text have the same order

    @property
    def tokens(self) -> int:
        """Number of answer tokens."""
        return self.losses.numel()

    @property
    def nats(self) -> float:
        """Mean loss per token."""
        return float(self.losses.double().mean())

    @property
    def perplexity(self) -> float:
        """exp(nats)."""
        return math.exp(self.nats)

    def error_against(self, other: Score) -> float:
        """Standard error of the difference of the two means, nats, from per-token differences."""
        difference = self.losses.double() - other.losses.double()
        return float(difference.std() / math.sqrt(self.tokens)) if self.tokens > 1 else math.inf


def score_torch(model: nn.Module, text: Sequence[Encoded]) -> Score:
    """Score a transformers model."""
    return score(text, run_whole(model))


def score(text: Sequence[Encoded], run: Callable[[Sequence[Tensor]], Iterable[Tensor]]) -> Score:
    """Score what returns `(batch, tokens, vocabulary)` logits for each of several `(batch, tokens)` ids."""
    batches, wanted = [], []
    ordered = sorted(text, key=lambda example: len(example.input_ids))
    for start in range(0, len(ordered), BATCH):
        part = ordered[start : start + BATCH]
        longest = len(part[-1].input_ids)
        # Padding after a text has no effect: no token attends to later ones.
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
    """Within this context, inputs of `layers` are rounded to E4M3 with one scale per token, `amax / 448`."""

    def rounded(x: Tensor) -> Tensor:
        values = x.float()
        scale = amax_scale(values.abs().amax(-1, keepdim=True), E4M3)
        return (E4M3.cast(values / scale).float() * scale).to(x.dtype)

    with pre_hooks(model, {name: rounded for name in layers}):
        yield
