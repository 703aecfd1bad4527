"""Converts ("prepares") a loaded timm or transformers model to the uniform form that all other modules expect.

A prepared model computes the same function, but all its matrix multiplications are `nn.Linear`, `nn.Conv2d` or calls of
`scaled_dot_product_attention`:

* timm modules with a `fused_attn` switch have it turned on; transformers models use their "sdpa" implementation;
* BEiT and EVA add the biases of q and v in their own code, to the result of a linear without bias; they become the bias
  of that linear, with zeros for k;
* `nn.MultiheadAttention` (in pooling heads) stores its three projections in one parameter; it is replaced by a module
  with separate linears.

Artifacts use the parameter names of the prepared model. `vision_outputs` runs a model and returns its outputs as a
tensor (N, C), whatever type the library returns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fp8pipe.core.errors import ConfigurationError, first_line


class ProjectedAttention(nn.Module):
    """Replacement for an `nn.MultiheadAttention` over (N, L, E) inputs, with separate linear projections.

    Args:
        attention: the module to replace, whose weights are copied; batch first, without dropout or extra keys.
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        width = attention.embed_dim
        self.num_heads = attention.num_heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        weights = attention.in_proj_weight.detach().chunk(3)
        biases = attention.in_proj_bias.detach().chunk(3)
        with torch.no_grad():
            for linear, weight, bias in zip((self.q_proj, self.k_proj, self.v_proj), weights, biases, strict=True):
                linear.weight.copy_(weight)
                linear.bias.copy_(bias)
        self.out_proj = nn.Linear(width, width)
        self.out_proj.load_state_dict(attention.out_proj.state_dict())

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, None]:
        """Attention of queries (N, Lq, E) over keys and values (N, L, E).

        Returns:
            The output (N, Lq, E), and None in place of the attention weights.

        Raises:
            ConfigurationError: the options contain a mask.
        """
        masks = sorted(name for name in ("key_padding_mask", "attn_mask") if options.get(name) is not None)
        if masks:
            raise ConfigurationError(
                "a pooling attention with a mask is not supported", why=", ".join(masks), fix="call it without"
            )
        q, k, v = self._split(self.q_proj(query)), self._split(self.k_proj(key)), self._split(self.v_proj(value))
        x = functional.scaled_dot_product_attention(q, k, v)
        return self.out_proj(x.transpose(1, 2).flatten(2)), None

    def _split(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (N, H, L, d)
        return heads


def prepare_model(model: nn.Module) -> nn.Module:
    """Convert a model in place, as described for this module; also to eval mode and float32, without gradients.

    Preparing a prepared model changes nothing.

    Args:
        model: a timm or transformers model with its weights loaded.

    Returns:
        The same model.

    Raises:
        ConfigurationError: an attention cannot be rewritten; the error names the module.
    """
    model.eval().float().requires_grad_(False)
    if hasattr(model, "set_attn_implementation"):
        _use_sdpa(model)
    for name, module in list(model.named_modules()):
        if isinstance(getattr(module, "fused_attn", None), bool):
            module.fused_attn = True
        if all(hasattr(module, part) for part in ("qkv", "q_bias", "k_bias", "v_bias")):
            _merge_biases(name, module)
        for child_name, child in module.named_children():
            if isinstance(child, nn.MultiheadAttention):
                _check_plain(f"{name}.{child_name}".strip("."), child)
                setattr(module, child_name, ProjectedAttention(child))
    return model.eval().requires_grad_(False)


def _use_sdpa(model: Any) -> None:
    if model.config._attn_implementation == "sdpa":
        return
    try:
        model.set_attn_implementation("sdpa")
    except (ValueError, ImportError) as error:
        raise ConfigurationError(
            f"{type(model).__name__} cannot use torch's scaled_dot_product_attention",
            why=first_line(error),
            fix="use a vision transformer of transformers that supports attn_implementation='sdpa'",
        ) from error


def _merge_biases(name: str, module: Any) -> None:
    """Merge the biases of q and v (with zeros for k) into the bias of the combined qkv linear."""
    qkv, q_bias, k_bias, v_bias = module.qkv, module.q_bias, module.k_bias, module.v_bias
    if not isinstance(qkv, nn.Linear) or q_bias is None:
        return
    if qkv.bias is not None:
        raise ConfigurationError(
            f"the attention {name} has biases both in its linear and beside it",
            why="they would be added twice",
            fix="use a model that was built with one of them",
        )
    qkv.bias = nn.Parameter(torch.cat((q_bias.detach(), k_bias.detach(), v_bias.detach())), requires_grad=False)
    module.q_bias = module.k_bias = module.v_bias = None


def _check_plain(name: str, attention: nn.MultiheadAttention) -> None:
    supported = (
        attention.in_proj_weight is not None
        and attention.in_proj_bias is not None
        and attention.bias_k is None
        and not attention.add_zero_attn
        and attention.batch_first
        and attention.dropout == 0
    )
    if not supported:
        raise ConfigurationError(
            f"the attention {name} is an nn.MultiheadAttention of a kind that is not supported",
            why="it has dropout, extra keys, keys of another width, or no bias",
            fix="use a model whose attention is plain",
        )


def vision_outputs(model: nn.Module, pixels: Tensor) -> Tensor:
    """Run a model, and return the logits of a classifier or the pooled features of a backbone.

    Args:
        model: a timm or transformers vision model, in eval mode.
        pixels: normalized images (N, 3, H, W).

    Returns:
        (N, C), the tensor that the model returned, not a copy.

    Raises:
        ConfigurationError: the model returns neither logits nor pooled features.
    """
    outputs = model(pixels)
    found = outputs if isinstance(outputs, Tensor) else _of_transformers(outputs)
    if found is None or found.ndim != 2:
        shape = "nothing of that kind" if found is None else f"shape {tuple(found.shape)}"
        raise ConfigurationError(
            f"{type(model).__name__} gives neither logits nor pooled features",
            why=f"expected one vector per image, found {shape}",
            fix="use an image classifier, or a backbone that pools its tokens",
        )
    return found


def class_count(model: nn.Module) -> int | None:
    """The number of classes of a classifier; None for a backbone."""
    if type(model).__name__.endswith(("ForImageClassification", "ForImageClassificationWithTeacher")):
        return int(model.config.num_labels) or None  # type: ignore[union-attr, arg-type]
    count: Any = getattr(model, "num_classes", None)  # timm: 0 without a head
    return count if isinstance(count, int) and count > 0 else None


def _of_transformers(outputs: Any) -> Tensor | None:
    values = (getattr(outputs, name, None) for name in ("logits", "image_embeds", "pooler_output"))
    return next((value for value in values if isinstance(value, Tensor)), None)
