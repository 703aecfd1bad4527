"""The structure of a vision transformer, observed in a forward pass instead of derived from module names.

Quantization and image synthesis need to know every matrix multiplication of the forward pass: the attentions with their
heads, tokens, prefix tokens and windows, and the linears with their inputs. They are recorded by `probe` while the
model runs on blank images. A matrix multiplication, softmax or convolution anywhere else would silently stay in
floating point, so it is an error that names the module.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.vision.plain import cuts_without_overlap
from fp8pipe.models.vision.prepare import class_count
from fp8pipe.models.vision.probe import IMAGES, AttentionCall, LinearCall, probe, size_fix


@dataclass(frozen=True, slots=True)
class AttentionSite:
    """One attention of the model.

    Attributes:
        name: name of the module that computes it.
        heads: number of heads H.
        head_dim: width d of the queries and keys of one head.
        tokens: number of keys N (in each window, if there are windows).
        prefix_tokens: number of tokens before the patch tokens (class token, distillation token, registers).
        grid: (rows, columns) of the patch tokens, which are in row-major order.
        windows: number of windows per image; 1 for global attention.
        mask: whether a mask or bias is added to the logits (position bias, mask of shifted windows).
        queries: number of query tokens; equal to `tokens` in self-attention, smaller for pooling with learned queries.
    """

    name: str
    heads: int
    head_dim: int
    tokens: int
    prefix_tokens: int
    grid: tuple[int, int]
    windows: int
    mask: bool
    queries: int

    @property
    def pools(self) -> bool:
        """Whether learned queries pool the tokens; such an attention has no map from tokens to tokens."""
        return self.queries != self.tokens


@dataclass(frozen=True, slots=True)
class LinearSite:
    """One linear layer, or the patch embedding.

    Attributes:
        name: name of the module.
        kind: "linear" for an nn.Linear, or "patch" for the patch embedding, an nn.Conv2d.
        shape: (out, in) of the weight; for a patch embedding, `in` is channels x height x width of a patch.
        input_group: name of the first linear that reads the same tensor object (q, k and v share one).
        bias: whether the layer has a bias.
        rows: number of input vectors for each image.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    input_group: str
    bias: bool
    rows: int = 1


@dataclass(frozen=True, slots=True)
class VitStructure:
    """All layers of a model that quantization and image synthesis work with.

    Attributes:
        attentions: the attentions in call order.
        linears: the linears in call order; the patch embedding is the first.
        patch_embed: name of the patch embedding.
        heads: names of the classification linears; empty for a backbone. A model with a distillation head has two,
            whose outputs are averaged.
        image_size: (height, width) of the images, pixels.
        patch_grid: (rows, columns) of patches in an image.
        classes: number of classes; None for a backbone.
        constants: names of linears whose results do not depend on the pixels; they are not quantized, and exports store
            their results.
    """

    attentions: tuple[AttentionSite, ...]
    linears: tuple[LinearSite, ...]
    patch_embed: str
    heads: tuple[str, ...]
    image_size: tuple[int, int]
    patch_grid: tuple[int, int]
    classes: int | None
    constants: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the user about linears that are not quantized."""
        if not self.constants:
            return ()
        some = ", ".join(self.constants[:4]) + (", ..." if len(self.constants) > 4 else "")
        return (f"{len(self.constants)} linears stay float: what they read does not depend on the picture ({some})",)

    @property
    def attention_names(self) -> tuple[str, ...]:
        """Names of the modules that compute attention, to be passed to `intercept_attention`."""
        return tuple(site.name for site in self.attentions)

    @property
    def linear_names(self) -> tuple[str, ...]:
        """Names of the linears, including the patch embedding, in call order."""
        return tuple(site.name for site in self.linears)

    @property
    def is_backbone(self) -> bool:
        """Whether the model outputs features rather than logits."""
        return not self.heads


def read_structure(model: nn.Module, image_size: tuple[int, int]) -> VitStructure:
    """Run a model on blank images, and determine its structure.

    Args:
        model: a model prepared by `prepare_model`.
        image_size: (height, width) of the images, pixels.

    Raises:
        ConfigurationError: the model does not run at that size, or has a part that cannot be analysed; the error names
            the module.
    """
    found = probe(model, image_size)
    patch = _patch_embedding(found.linears, model)
    _check_coverage(patch, image_size, model)
    attentions = tuple(_attention_site(call, patch.grid, model) for call in found.attentions)
    linears = _linear_sites(found.linears, model)
    classes = class_count(model)
    heads = tuple(call.name for call in found.after if tuple(call.output_shape) == (IMAGES, classes))
    if classes is not None and not heads:
        raise ConfigurationError(
            f"the head of {type(model).__name__} was not found",
            why=f"no linear after the last attention has {classes} outputs",
            fix="use a model whose head is a linear layer, or one without a head",
        )
    return VitStructure(attentions, linears, patch.name, heads, image_size, patch.grid, classes, found.constants)


def _patch_embedding(linears: tuple[LinearCall, ...], model: nn.Module) -> LinearCall:
    patches = [call for call in linears if isinstance(call.module, nn.Conv2d)]
    kind = type(model).__name__
    if not patches or patches[0] is not linears[0]:
        raise ConfigurationError(
            f"{kind} has no patch embedding that can be read",
            why=f"its first layer is {linears[0].name if linears else 'none'}, not a convolution over patches",
            fix="use a model that embeds patches with one nn.Conv2d",
        )
    overlapping = [call for call in patches if not cuts_without_overlap(call.module)]
    if wrong := next(iter(overlapping or patches[1:]), None):
        raise ConfigurationError(
            f"{kind} has a convolution beside its patch embedding: {wrong.name}",
            why=f"{wrong.module}; only patches cut without overlap are read",
            fix="use a plain vision transformer (no convolutional stem or blocks)",
        )
    return patches[0]


def _check_coverage(patch: LinearCall, image_size: tuple[int, int], model: nn.Module) -> None:
    """Reject an image size at which the patches do not cover the last rows or columns; a convolution ignores these."""
    kernel = patch.module.kernel_size
    covered = (patch.grid[0] * int(kernel[0]), patch.grid[1] * int(kernel[1]))  # type: ignore[index]
    if covered[0] < image_size[0] or covered[1] < image_size[1]:
        raise ConfigurationError(
            f"{type(model).__name__} would not see all of an image of {image_size[0]}x{image_size[1]} pixels",
            why=f"its patches of {kernel} cover {covered[0]}x{covered[1]}",
            fix=size_fix(model, image_size),
        )


def _attention_site(call: AttentionCall, patch_grid: tuple[int, int], model: nn.Module) -> AttentionSite:
    if call.batch % IMAGES:
        raise ConfigurationError(
            f"the attention {call.name} cannot be read",
            why=f"{IMAGES} images became a batch of {call.batch}, which is no whole number of windows",
            fix="use a model that attends within images",
        )
    windows = call.batch // IMAGES
    prefix, grid = _token_layout(call.name, model.get_submodule(call.name), call.tokens, windows, patch_grid)
    return AttentionSite(
        call.name, call.heads, call.head_dim, call.tokens, prefix, grid, windows, call.mask, call.queries
    )


def _linear_sites(calls: tuple[LinearCall, ...], model: nn.Module) -> tuple[LinearSite, ...]:
    names: set[str] = set()
    weights: dict[int, str] = {}
    readers: dict[int, str] = {}
    sites = []
    for call in calls:
        weight = getattr(call.module, "_parameters", {}).get("weight")
        problem = ""
        if call.name in names:
            problem = "it is called more than once in a forward"
        elif weight is None:
            problem = "its weight is computed (a parametrization), not a parameter"
        elif id(weight) in weights:
            problem = f"it shares its weight with {weights[id(weight)]}"
        if problem or weight is None:
            raise ConfigurationError(
                f"the linear {call.name} of {type(model).__name__} cannot be read",
                why=problem,
                fix="use a model in which every layer has its own weight and runs once",
            )
        names.add(call.name)
        weights[id(weight)] = call.name
        group = readers.setdefault(id(call.input), call.name)
        kind = "patch" if isinstance(call.module, nn.Conv2d) else "linear"
        shape = (weight.shape[0], weight.numel() // weight.shape[0])
        bias = getattr(call.module, "bias", None) is not None
        rows = math.prod(call.output_shape) // (shape[0] * IMAGES)
        sites.append(LinearSite(call.name, kind, shape, group, bias, rows))
    return tuple(sites)


def _token_layout(
    name: str, module: nn.Module, tokens: int, windows: int, patch_grid: tuple[int, int]
) -> tuple[int, tuple[int, int]]:
    """Number of prefix tokens of an attention over `tokens` keys, and (rows, columns) of its patch tokens.

    A global attention over at least as many tokens as there are patches is assumed to have its additional tokens at the
    front. An attention over fewer tokens, or in windows, is assumed to have only patch tokens (which later stages may
    have merged). The sides of a window are taken from the module's `window_size`; without it, the window must be
    square.
    """
    area = patch_grid[0] * patch_grid[1]
    if windows == 1 and tokens >= area:
        return tokens - area, patch_grid
    said = pair_of_integers(getattr(module, "window_size", None))
    if said is not None and said[0] * said[1] == tokens:
        return 0, said
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ConfigurationError(
            f"the windows of the attention {name} cannot be read",
            why=f"{tokens} tokens are no square, and the module does not name its window",
            fix="choose an image size that gives square windows",
        )
    return 0, (side, side)


def pair_of_integers(size: Any) -> tuple[int, int] | None:
    """(height, width) from two integers, or from one integer for both sides; None for anything else."""
    if isinstance(size, int):
        return size, size
    if isinstance(size, tuple | list) and len(size) == 2 and all(isinstance(side, int) for side in size):
        return int(size[0]), int(size[1])
    return None
