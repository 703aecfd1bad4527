"""Static quantization of inputs in torch: what an exported graph computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from exporters.tensorrt.language.calibrate import pre_hooks
from fp8pipe.numerics.grids import E4M3


@contextmanager
def static_inputs(model: nn.Module, scales: Mapping[str, float]) -> Iterator[None]:
    """While active, the inputs of the named layers are rounded to E4M3 with a fixed scale each."""

    def rounding(scale: float) -> Callable[[Tensor], Tensor]:
        return lambda x: (E4M3.cast(x.float() / scale).float() * scale).to(x.dtype)

    with pre_hooks(model, {name: rounding(scale) for name, scale in scales.items()}):
        yield
