"""Which linear feeds which attention, and which norm feeds which linear: read from the numbers of one pass.

Names differ from family to family, tensors do not: a linear feeds an attention if slices of its output are the queries,
keys or values, bit for bit, and a linear reads a norm if its input is that norm's output. What matches nothing (rotary
positions, norms on queries, biases added elsewhere) stays unknown, and is then left as it is.
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
    """Output rows `start` to `start + width - 1` of a linear, head after head."""

    linear: str
    start: int
    width: int

    @property
    def slice(self) -> slice:
        """To index the linear's weight and bias with."""
        return slice(self.start, self.start + self.width)


@dataclass(frozen=True, slots=True)
class AttentionWiring:
    """The linears around one attention; None where none matches."""

    site: AttentionSite  # the attention
    q: Rows | None  # rows that are its queries
    k: Rows | None  # rows that are its keys
    v: Rows | None  # rows that are its values
    projection: str | None  # the linear that reads its output, all heads side by side


@dataclass(frozen=True, slots=True)
class Wiring:
    """What was found."""

    attentions: tuple[AttentionWiring, ...]  # in the order of their calls
    readers: dict[str, tuple[str, ...]]  # by LayerNorm, the linears that read its output
    order: tuple[str, ...]  # names of all modules that hold parameters of their own, in the order of their calls


@dataclass(slots=True)
class _Seen:
    """Inputs and outputs of one pass; kept, since equal ones are looked for."""

    linears: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)
    attentions: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)

    def note(self, name: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        """Note what a module reads and gives."""
        self.order.append(name)
        if isinstance(module, nn.Linear):
            self.linears[name] = (args[0], output)
        elif isinstance(module, nn.LayerNorm):
            self.norms[name] = output

    def attend(self, name: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """Note the operands and the output of an attention."""
        output = explicit_attention(q, k, v, mask, scale)
        self.attentions[name] = {"q": q, "k": k, "v": v, "output": output}
        return output


@torch.no_grad()
def read_wiring(model: nn.Module, structure: VitStructure) -> Wiring:
    """The wiring of a prepared model in eval mode, from one pass over two images of noise."""
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
    """`(B, H, N, d)` as `(B * N, H * d)`."""
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
