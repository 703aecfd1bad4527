"""Linear layers that read the same tensor (q/k/v, gate/up) become one FALQON layer.

They then share the cast of their input, one scale, one A and one GEMM; a shared scale also means that engines which
fuse such layers keep every code. Which layers belong together is observed in a pass, not guessed from names, so it
works for any architecture; were it ever wrong at run time, the layers would compute their rows one by one and still be
right.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn

from pipeline.falqon.layer import FalqonLinear


class StackedOutput:
    """Runs a stacked layer once for all its parts and hands each part its columns."""

    def __init__(self, layer: FalqonLinear) -> None:
        self.layer = layer
        self._source: weakref.ref[Tensor] | None = None
        self._version = -1
        self._grad_mode = False
        self._outputs: dict[int, Tensor] = {}

    def part(self, x: Tensor, index: int) -> Tensor:
        """The output of part `index` for `x`; computed by whichever part asks first."""
        same = self._source is not None and self._source() is x and self._version == x._version
        if not same or self._grad_mode != torch.is_grad_enabled() or index not in self._outputs:
            self._outputs = dict(enumerate(self.layer.forward_parts(x, self.layer.parts)))
            self._source, self._version, self._grad_mode = weakref.ref(x), x._version, torch.is_grad_enabled()
        # Handed out once: holding on to it would keep the activations of the whole step alive.
        return self._outputs.pop(index)


class FalqonPart(nn.Module):
    """One linear layer's place in the model, whose weight is some rows of a stacked `FalqonLinear`.

    The first part owns the stacked layer (as submodule `stacked`), so its parameters appear once.
    """

    def __init__(self, output: StackedOutput, index: int) -> None:
        super().__init__()
        self.output = output
        self.index = index
        if index == 0:
            self.stacked = output.layer

    def forward(self, x: Tensor) -> Tensor:
        """Apply this part to `(..., in)`; returns `(..., rows of this part)`."""
        return self.output.part(x, self.index)
