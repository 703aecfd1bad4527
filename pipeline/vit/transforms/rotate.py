"""Rotations that do not change a model's outputs: inside each attention head, and of the whole residual stream.

After a random rotation, channels have similar magnitudes and nearly normally distributed values (as in QuaRot, arXiv
2404.00456), which suits a grid with one scale per tensor. Every attention allows two rotations R inside its heads:

* Queries q and keys k of a head can be rotated by the same orthogonal matrix: `(qR)(kR)^T = qk^T`.
* Values v can be rotated if the projection W after them is rotated back: `(p vR)(R^T W) = p v W`, with probabilities p.

The rotation Q of the residual stream is folded into the weights around the stream. LayerNorm without gain and bias
commutes with every orthogonal Q that maps the vector of ones to itself: mean and norm are preserved, so `LN(Qx) = Q
LN(x)`. First, gains and biases of norms are folded into the linear layers after them, and layer scales into the linear
layers before them. Then all weights that write to the stream are multiplied by Q, and all that read from it by its
transpose. The outputs of the model stay the same, and the inputs of its linear layers no longer have outlier channels.
(SliceGPT, arXiv 2401.15024, uses this invariance for RMSNorm; preserving the vector of ones extends it to LayerNorm
without changes of the architecture.)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fp8pipe.models.vision.structure import VitStructure
from pipeline.vit.transforms.wiring import Rows, Wiring


class NotRotatable(Exception):
    """Raised if the residual stream cannot be rotated; the message names the part of the model that prevents it."""


def ones_keeping_rotation(size: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix Q `(size, size)`, float64, that maps the vector of ones to itself."""
    first = torch.full((size, 1), size**-0.5, dtype=torch.float64)
    rest = torch.randn(size, size - 1, generator=generator, dtype=torch.float64)
    basis, _ = torch.linalg.qr(torch.cat([first, rest], dim=1))
    inner = torch.eye(size, dtype=torch.float64)
    inner[1:, 1:] = random_rotation(size - 1, generator)
    rotated: Tensor = basis @ inner @ basis.T
    return rotated


@torch.no_grad()
def rotate_residual(model: nn.Module, structure: VitStructure, wiring: Wiring, generator: torch.Generator) -> int:
    """Rotate the residual stream by a random orthogonal matrix.

    Args:
        model: changed in place.
        structure: the model's structure.
        wiring: the connections of its layers.
        generator: a CPU generator for the rotation.

    Returns:
        1, the number of rotated streams.

    Raises:
        NotRotatable: the rotation would change the output of some part; the model may already be partly changed.
    """
    if structure.is_backbone:
        raise NotRotatable("a backbone gives the stream itself, as features")
    if any(site.windows > 1 for site in structure.attentions):
        raise NotRotatable("a stream that is merged between stages has no one width")
    width = structure.linears[0].shape[0]
    readers = _readers(model, structure, wiring, width)
    read = {name for names in readers.values() for name in names}
    writers = [s.name for s in structure.linears if s.shape[0] == width and s.name not in read]
    inner = {rows.linear for a in wiring.attentions for rows in (a.q, a.k, a.v) if rows is not None}
    if not set(writers).isdisjoint(inner):
        raise NotRotatable("a linear that feeds an attention does not read a norm")
    _fold_layer_scales(model, structure, wiring, writers, width)
    rotation = ones_keeping_rotation(width, generator).to(next(model.parameters()).device)
    for norm, linears in readers.items():
        _fold_norm(model, norm, linears, rotation)
    for name in writers:
        for parameter in model.get_submodule(name).parameters(recurse=False):
            flat = parameter.double().flatten(1) if parameter.dim() > 1 else parameter.double()
            parameter.copy_((rotation @ flat).view_as(parameter))
    for parameter in _embeddings(model, width):
        parameter.copy_(parameter.double() @ rotation.T)
    return 1


def _readers(model: nn.Module, structure: VitStructure, wiring: Wiring, width: int) -> dict[str, tuple[str, ...]]:
    """The linear layers whose input is the output of each norm on the stream, by norm.

    If exactly one norm has no such layer, its output is assumed to reach the heads through pooling.

    Raises:
        NotRotatable: the layers after a norm are not known.
    """
    on_stream = [n for n in wiring.readers if tuple(model.get_submodule(n).normalized_shape) == (width,)]  # type: ignore[arg-type]
    readers = {norm: wiring.readers[norm] for norm in on_stream if wiring.readers[norm]}
    silent = [norm for norm in on_stream if norm not in readers]
    known = {name for linears in readers.values() for name in linears}
    heads = tuple(name for name in structure.heads if name not in known)
    if heads and len(silent) == 1:
        readers[silent.pop()] = heads
    if silent:
        raise NotRotatable(f"{silent[0]} is a norm that no linear reads directly")
    return readers


def _fold_norm(model: nn.Module, norm: str, linears: tuple[str, ...], rotation: Tensor) -> None:
    """Fold a norm's gain into the linear layers after it, and its bias if they all have one; rotate their inputs back.

    Raises:
        NotRotatable: the bias cannot be folded, and the gain is too small to keep it in the norm.
    """
    module = model.get_submodule(norm)
    gain, bias = module.get_parameter("weight").double(), module.get_parameter("bias").double()
    layers = [model.get_submodule(name) for name in linears]
    foldable = all(getattr(layer, "bias", None) is not None for layer in layers)
    if not foldable and bool((bias != 0).any()) and float(gain.abs().min()) < 1e-3 * float(gain.abs().max()):
        raise NotRotatable(f"{norm} has gains near zero, and a bias that the linears after it cannot absorb")
    for layer in layers:
        weight = layer.get_parameter("weight")
        blocks = weight.double().view(weight.shape[0], -1, len(gain))  # a head may read several concatenated tokens
        if foldable:
            layer.get_parameter("bias").add_((blocks @ bias).sum(1).to(weight.dtype))
        weight.copy_(((blocks * gain) @ rotation.T).flatten(1))
    kept = torch.zeros_like(bias) if foldable else rotation @ (bias / gain)
    module.get_parameter("weight").fill_(1)
    module.get_parameter("bias").copy_(kept)


def _fold_layer_scales(
    model: nn.Module, structure: VitStructure, wiring: Wiring, writers: list[str], width: int
) -> None:
    """Fold layer scales (LayerScale, arXiv 2103.17239) into the linear layers whose outputs they scale, in place.

    Args:
        model: changed in place.
        structure: its structure.
        wiring: the connections of its layers.
        writers: the linear layers that write to the stream.
        width: width of the stream.

    Raises:
        NotRotatable: it is not clear what a vector of parameters scales.
    """
    for holder, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.LayerNorm):
            continue
        scales = [p for p in module._parameters.values() if p is not None and p.dim() == 1]
        if not scales:
            continue
        if any(len(p) != width for p in scales):
            raise NotRotatable(f"{holder} holds a vector of another width than the stream")
        inside = [name for name in writers if name.startswith(f"{holder}.")]
        if not inside:  # a separate module, which scales the output of the last such layer before it
            before = wiring.order[: wiring.order.index(holder)] if holder in wiring.order else ()
            inside = [name for name in before if name in writers][-1:]
        if len(inside) != len(scales):
            raise NotRotatable(f"it is not known which layer {holder} scales")
        for scale, name in zip(scales, inside, strict=True):
            for parameter in model.get_submodule(name).parameters(recurse=False):
                parameter.mul_(scale.view(-1, *(1,) * (parameter.dim() - 1)))
            scale.fill_(1)


def _embeddings(model: nn.Module, width: int) -> list[nn.Parameter]:
    """Class tokens, registers and position embeddings, which are added to the stream without a linear layer."""
    known = nn.Linear | nn.Conv2d | nn.LayerNorm
    held = [p for m in model.modules() if not isinstance(m, known) for p in m._parameters.values() if p is not None]
    return [p for p in held if p.dim() > 1 and p.shape[-1] == width]


def random_rotation(size: int, generator: torch.Generator) -> Tensor:
    """A uniformly distributed random orthogonal matrix `(size, size)`, float64."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    rotation: Tensor = q * r.diagonal().sign()
    return rotation


@torch.no_grad()
def rotate_heads(model: nn.Module, wiring: Wiring, generator: torch.Generator) -> int:
    """Rotate queries together with keys, and values together with the projection, for each attention head.

    Args:
        model: changed in place.
        wiring: the connections of its layers.
        generator: a CPU generator for the rotations.

    Returns:
        The number of rotated pairs: two for each attention whose linear layers are all known.
    """
    done, device = 0, next(model.parameters()).device
    for attention in wiring.attentions:
        site = attention.site
        if attention.q is not None and attention.k is not None:
            for head in range(site.heads):
                rotation = random_rotation(site.head_dim, generator).to(device)
                _rotate_rows(model, attention.q, head, rotation)
                _rotate_rows(model, attention.k, head, rotation)
            done += 1
        if attention.v is not None and attention.projection is not None:
            width = attention.v.width // site.heads  # values may be wider than queries
            weight = model.get_submodule(attention.projection).get_parameter("weight")
            for head in range(site.heads):
                rotation = random_rotation(width, generator).to(device)
                _rotate_rows(model, attention.v, head, rotation)
                columns = slice(head * width, (head + 1) * width)
                weight[:, columns] = (weight[:, columns].double() @ rotation.T).to(weight.dtype)
            done += 1
    return done


def _rotate_rows(model: nn.Module, rows: Rows, head: int, rotation: Tensor) -> None:
    size = rotation.shape[0]
    chosen = slice(rows.start + head * size, rows.start + (head + 1) * size)
    for parameter in model.get_submodule(rows.linear).parameters(recurse=False):
        parameter[chosen] = (rotation @ parameter[chosen].double()).to(parameter.dtype)
