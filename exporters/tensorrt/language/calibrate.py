"""Static activation scales from what every linear reads on real text, and how well a model predicts with them.

Magnitudes are counted exactly, by their 15 bits in bfloat16: one pass, any order, a fixed size, and clipping,
percentiles and squared errors of any scale follow afterwards. The scale is a power of two: dividing by it rounds
nothing, so the codes are the same whether an engine divides in half precision or in single. That costs less than one of
E4M3's 18 binades. Where a scale comes from `amax`, nothing that was seen is clipped.

The artifact is served with one dynamic scale per token. Static scales are another function, so no comparison of codes
can prove that they serve; a perplexity of held-out answers can.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
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
_BINADES: Final = 12  # how far below amax `mse` looks
# FP16 holds these powers of two exactly.
_SMALLEST, _LARGEST = -24, 15


@dataclass(slots=True)
class InputCounts:
    """Magnitudes that one input took."""

    # `(32768,)` int64, by bfloat16 bits of the magnitude
    counts: Tensor = field(default_factory=lambda: torch.zeros(_BINS, dtype=torch.int64))
    amax: float = 0.0  # the largest, exact

    def add(self, x: Tensor) -> None:
        """Count a tensor of any shape and float dtype."""
        magnitude = x.detach().abs()
        largest = float(magnitude.max())
        self.amax = largest if math.isnan(largest) else max(self.amax, largest)
        if not math.isfinite(largest):
            return
        bits = magnitude.to(torch.bfloat16).reshape(-1).view(torch.int16)
        self.counts += torch.bincount(bits.int(), minlength=_BINS)

    @property
    def total(self) -> int:
        """Values seen."""
        return int(self.counts.sum())

    def clipped(self, scale: float) -> float:
        """Share of values beyond the range of E4M3 on this scale."""
        return float(self.counts[_magnitudes() > E4M3.max * scale].sum()) / max(1, self.total)

    def error(self, scale: float) -> float:
        """Mean squared error of rounding to E4M3 on this scale."""
        values = _magnitudes().double()
        rounded = E4M3.cast(values / scale).double() * scale
        seen = self.counts > 0
        return float(((values - rounded)[seen].square() * self.counts[seen]).sum()) / max(1, self.total)

    def quantile(self, beyond: float) -> float:
        """The magnitude that a share of `beyond` exceeds."""
        above = self.counts.flip(0).cumsum(0).flip(0)
        return min(self.amax, float(_magnitudes()[int((above > beyond * self.total).nonzero().max())]))


def count_inputs(model: nn.Module, layers: Sequence[str], text: Sequence[Encoded]) -> dict[str, InputCounts]:
    """Run text through a model and count the inputs of its linears.

    The model is in evaluation mode; the text is run one sequence at a time, without padding. Layers that read one
    tensor share one object.

    Raises:
        ConfigurationError: an input that is not finite.
    """
    groups: dict[str, InputCounts] = {}
    with pre_hooks(model, _observers(layers, groups)), torch.no_grad():
        for example in text:
            model(input_ids=torch.tensor([example.input_ids]), use_cache=False)
    broken = [name for name in layers if name not in groups or not math.isfinite(groups[name].amax)]
    if broken:
        raise ConfigurationError(
            f"{len(broken)} layer(s) cannot be calibrated",
            why=f"the first: {broken[0]} read {'nothing' if broken[0] not in groups else 'NaN or infinity'}",
            fix="look at the model's training; export with --target vllm to use it without static scales",
        )
    return groups


def static_scale(counts: InputCounts, method: Calibration) -> InputScale:
    """The smallest power of two that covers the range which the method asks for."""
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
    """`static_scale` of every layer; layers that share their counts share the result."""
    found: dict[int, InputScale] = {}
    for count in counts.values():
        if id(count) not in found:
            found[id(count)] = static_scale(count, method)
    return {name: found[id(count)] for name, count in counts.items()}


@contextmanager
def pre_hooks(model: nn.Module, hooks: Mapping[str, Callable[[Tensor], Tensor | None]]) -> Iterator[None]:
    """While active, each named module's input passes its function first, which may give another one in its place."""

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
    last: list[tuple[Tensor, InputCounts]] = []  # the tensor itself is kept, so that its identity means something

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
    """The smallest power of two that is not below `least` and that FP16 holds."""
    exponent = _SMALLEST if least <= 0 else math.ceil(math.log2(least))
    return 2.0 ** min(max(exponent, _SMALLEST), _LARGEST)


# Texts scored together: what a graph dequantizes, it dequantizes once for all of them.
BATCH = 8


@dataclass(frozen=True, slots=True)
class Score:
    """Negative log-likelihoods of answer tokens."""

    losses: Tensor  # `(tokens,)` fp32, nats; two scores of one text have the same order

    @property
    def tokens(self) -> int:
        """Answer tokens."""
        return self.losses.numel()

    @property
    def nats(self) -> float:
        """Mean loss of a token."""
        return float(self.losses.double().mean())

    @property
    def perplexity(self) -> float:
        """exp(nats)."""
        return math.exp(self.nats)

    def error_against(self, other: Score) -> float:
        """Standard error of the difference of both means, nats, token by token."""
        difference = self.losses.double() - other.losses.double()
        return float(difference.std() / math.sqrt(self.tokens)) if self.tokens > 1 else math.inf


def score_torch(model: nn.Module, text: Sequence[Encoded]) -> Score:
    """Score a model of transformers."""
    with torch.no_grad():
        return score(text, lambda ids: model(input_ids=ids, use_cache=False).logits)


def score(text: Sequence[Encoded], logits: Callable[[Tensor], Tensor]) -> Score:
    """Score anything that gives `(batch, tokens, vocabulary)` logits for `(batch, tokens)` ids."""
    losses = []
    ordered = sorted(text, key=lambda example: len(example.input_ids))
    for start in range(0, len(ordered), BATCH):
        part = ordered[start : start + BATCH]
        longest = len(part[-1].input_ids)
        # What stands behind a text has no influence on it: no token sees a later one.
        ids = torch.tensor([[*x.input_ids, *[0] * (longest - len(x.input_ids))] for x in part])
        labels = torch.tensor([[*x.labels, *[IGNORED] * (longest - len(x.labels))] for x in part])[:, 1:]
        keep = labels != IGNORED
        found = logits(ids)[:, :-1][keep].float()
        losses.append(nn.functional.cross_entropy(found, labels[keep], reduction="none"))
    return Score(torch.cat(losses))


@contextmanager
def dynamic_inputs(model: nn.Module, layers: Sequence[str]) -> Iterator[None]:
    """While active, inputs of `layers` are rounded to E4M3 with one scale per token, `amax / 448`, as engines do."""

    def rounded(x: Tensor) -> Tensor:
        values = x.float()
        scale = amax_scale(values.abs().amax(-1, keepdim=True), E4M3)
        return (E4M3.cast(values / scale).float() * scale).to(x.dtype)

    with pre_hooks(model, {name: rounded for name in layers}):
        yield
