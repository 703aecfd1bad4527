"""Linear layers with the same input as one layer, whose only trainable tensor is the adapter's B.

One layer can replace several linear layers with the same input (q/k/v, gate/up): their weights are stacked in W, and
they share the input's cast, the scale, A, O_A and every GEMM. Because of the shared scale, engines that fuse such
layers can use the codes unchanged. Which layers share an input is observed in a forward pass rather than derived from
their names, so this works for any architecture. If the layers ever get different inputs, each of them runs the stacked
layer by itself, and the results are still correct.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.falqon.layer import FalqonLinear


class StackedOutput:
    """Runs a stacked layer once for all its parts, and returns to each part its own columns of the output."""

    def __init__(self, layer: FalqonLinear) -> None:
        self.layer = layer
        self._source: Tensor | None = None  # the input that gave `_outputs`; None once all outputs are returned
        self._version = -1
        self._grad_mode = False
        self._outputs: dict[int, Tensor] = {}

    def part(self, x: Tensor, index: int) -> Tensor:
        """The output of part `index` for `x`; the first part to be called computes it for all parts."""
        same = self._source is x and self._version == _version(x) and self._grad_mode == torch.is_grad_enabled()
        if not same or index not in self._outputs:
            self._outputs = dict(enumerate(self.layer.forward_parts(x, self.layer.parts)))
            self._source, self._version, self._grad_mode = x, _version(x), torch.is_grad_enabled()
        # Returned only once: keeping a reference to it, or to x, would keep activations alive after the step.
        output = self._outputs.pop(index)
        if not self._outputs:
            self._source = None
        return output


def _version(x: Tensor) -> int:
    """Autograd's counter of in-place modifications of `x`, or -1 under torch.compile, which cannot trace it.

    The constant is safe: layers are grouped only if, in the probe pass, their shared input was not modified between
    them.
    """
    return -1 if torch.compiler.is_compiling() else x._version


class FalqonPart(nn.Module):
    """Replaces one of the linear layers whose weights are stacked in a `FalqonLinear`.

    Only the first part registers the stacked layer (as submodule `stacked`), so that its parameters appear once.

    Args:
        output: shared by all parts of the stacked layer.
        index: the index of this part.
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
