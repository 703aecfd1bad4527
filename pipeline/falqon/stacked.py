"""Linear layers with the same input as one layer, whose only trainable tensor is the adapter's B.

One layer can replace several linear layers with the same input (q/k/v, gate/up): their weights are stacked in W, and
they share the input's cast, the scale, A, O_A and every GEMM. Because of the shared scale, engines that fuse such
layers can use the codes unchanged. Which layers share an input is observed in a forward pass rather than derived from
their names, so this works for any architecture. If the layers ever get different inputs, each of them runs the stacked
layer by itself, and the results are still correct.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class StackedLinear(nn.Module):
    """One or more linear layers with the same input and one adapter, `y = x W^T + x A^T B^T + bias`.

    Subclasses store W and A, and compute the products.

    Args:
        shape: `(out, in)` of W.
        rank: number of rows of A.
        parts: number of rows of each linear layer that is stacked in W; default: a single layer with all rows.
        bias: `(out,)` or None, frozen.
        device: where B is.

    Raises:
        ValueError: `parts` do not add up to the rows of W.
    """

    bias: Tensor | None

    def __init__(
        self, shape: tuple[int, int], rank: int, parts: tuple[int, ...] | None, bias: Tensor | None,
        device: torch.device,
    ) -> None:  # fmt: skip
        super().__init__()
        self.rank = rank
        self.out_features, self.in_features = shape
        self.parts = parts or (self.out_features,)
        self.observer: Callable[[Tensor], None] | None = None  # called with every input, `(tokens, in)`
        if sum(self.parts) != self.out_features:
            raise ValueError(f"parts {self.parts} do not add up to {self.out_features} rows")
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, device=device))

    def product(self, x: Tensor, parts: tuple[int, ...]) -> tuple[Tensor, ...]:
        """The output without the bias for an input `(tokens, in)`, split along its last dimension into `parts`."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to `(..., in)` in bf16 or fp32; returns `(..., out)` in the same dtype."""
        (y,) = self.forward_parts(x, (self.out_features,))
        return y

    def forward_parts(self, x: Tensor, parts: tuple[int, ...]) -> tuple[Tensor, ...]:
        """Like `forward`, but with the output split along its last dimension into the widths `parts`.

        Without a bias, the returned tensors share one buffer.
        """
        flat = x.reshape(-1, self.in_features)
        if self.observer is not None:
            self.observer(flat)
        outputs = self.product(flat, parts)
        if self.bias is not None:
            outputs = tuple(y + b for y, b in zip(outputs, self.bias.split(parts), strict=True))
        return tuple(y.view(*x.shape[:-1], width) for y, width in zip(outputs, parts, strict=True))


class StackedOutput:
    """Runs a stacked layer once for all its parts, and returns to each part its own columns of the output."""

    def __init__(self, layer: StackedLinear) -> None:
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
    """Replaces one of the linear layers whose weights are stacked in a `StackedLinear`.

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
