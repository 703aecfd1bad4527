"""Find out which linear layers compute an attention's operands, and which read a norm's output, by comparing tensors.

Names differ between model families, so they are not used. Instead, tensors of one forward pass are compared bit for
bit: a linear layer computes queries, keys or values if these equal a slice of its output, and it reads a norm if its
input equals the norm's output. If nothing matches (because of rotary positions, norms on queries, or biases added
elsewhere), the connection is unknown, and that part of the model is not transformed.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from fp8pipe.models.vision.attention import explicit_attention, intercept_attention
from fp8pipe.models.vision.prepare import vision_outputs
from fp8pipe.models.vision.structure import AttentionSite, VitStructure

_IMAGES = 2


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows `start` to `start + width - 1` of the weight of the linear layer called `linear`, ordered by head."""

    linear: str
    start: int
    width: int

    @property
    def slice(self) -> slice:
        """These rows as a slice, to index the layer's weight and bias."""
        return slice(self.start, self.start + self.width)


@dataclass(frozen=True, slots=True)
class AttentionWiring:
    """The linear layers before and after one attention; None if no layer matches."""

    site: AttentionSite  # the attention
    q: Rows | None  # rows that compute its queries
    k: Rows | None  # rows that compute its keys
    v: Rows | None  # rows that compute its values
    projection: str | None  # the linear layer that reads its output, with all heads concatenated


@dataclass(frozen=True, slots=True)
class Wiring:
    """How the linear layers, attentions and norms of a model are connected."""

    attentions: tuple[AttentionWiring, ...]  # in call order
    readers: dict[str, tuple[str, ...]]  # for each LayerNorm, the linear layers that read its output
    order: tuple[str, ...]  # names of all modules with parameters of their own, in call order


@dataclass(slots=True)
class _Seen:
    """The tensors of one forward pass that are compared."""

    linears: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # input and output
    norms: dict[str, Tensor] = field(default_factory=dict)  # output
    attentions: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # `q`, `k`, `v` and `output`
    order: list[str] = field(default_factory=list)  # names of modules in call order

    def note(self, name: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        """Record the input and output of a module."""
        self.order.append(name)
        if isinstance(module, nn.Linear):
            self.linears[name] = (args[0], output)
        elif isinstance(module, nn.LayerNorm):
            self.norms[name] = output

    def attend(self, name: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """Record the operands and the output of an attention."""
        output = explicit_attention(q, k, v, mask, scale)
        self.attentions[name] = {"q": q, "k": k, "v": v, "output": output}
        return output


@torch.no_grad()
def read_wiring(model: nn.Module, structure: VitStructure) -> Wiring:
    """Determine the connections in a prepared model in evaluation mode, with one forward pass of two noise images."""
    seen = _Seen()
    used = set(structure.linear_names)
    holders = [
        (n, m) for n, m in model.named_modules() if n and m._parameters and (n in used or not isinstance(m, nn.Linear))
    ]
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(_IMAGES, 3, *structure.image_size, generator=generator)
    pixels = pixels.to(next(model.parameters()).device)
    with ExitStack() as hooks:
        for name, module in holders:
            hooks.enter_context(module.register_forward_hook(partial(seen.note, name)))
        hooks.enter_context(intercept_attention(model, structure.attention_names, seen.attend))
        vision_outputs(model, pixels)
    attentions = tuple(_attention(site, seen) for site in structure.attentions)
    readers = {
        norm: tuple(name for name, (x, _) in seen.linears.items() if _same(x, output))
        for norm, output in seen.norms.items()
    }
    return Wiring(attentions, readers, tuple(seen.order))


def _attention(site: AttentionSite, seen: _Seen) -> AttentionWiring:
    tensors = seen.attentions[site.name]
    q, k, v = (_rows(_merged(tensors[what]), seen) for what in ("q", "k", "v"))
    output = _merged(tensors["output"])
    projection = next((name for name, (x, _) in seen.linears.items() if _same(x, output)), None)
    return AttentionWiring(site, q, k, v, projection)


def _merged(heads: Tensor) -> Tensor:
    """Reshape `(B, H, N, d)` to `(B * N, H * d)`."""
    return heads.transpose(1, 2).flatten(2).flatten(0, 1)


def _rows(wanted: Tensor, seen: _Seen) -> Rows | None:
    width = wanted.shape[1]
    for name, (_, output) in seen.linears.items():
        flat = output.flatten(0, -2)
        if flat.shape[0] != wanted.shape[0]:
            continue
        for start in range(0, flat.shape[1] - width + 1, width):
            if torch.equal(flat[:, start : start + width], wanted):
                return Rows(name, start, width)
    return None


def _same(x: Tensor, other: Tensor) -> bool:
    return x is other or (x.shape[-1] == other.shape[-1] and torch.equal(x.flatten(0, -2), other.flatten(0, -2)))
