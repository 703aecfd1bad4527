"""Intercepts attention: a handler function computes every attention of a model, without changes to the model's code.

All supported attention modules call `torch.nn.functional.scaled_dot_product_attention` (`prepare_model` ensures this).
A context manager replaces this function, which works for all model families. Uses are reading attention maps for a
loss, inserting quantizers, and writing out the explicit formula for an export. Outside the context nothing is changed,
and torch's fused kernels remain in use.

The replacement affects the whole process: only one context can be active at a time, and forward passes in other threads
are intercepted too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from fp8pipe.core.errors import ConfigurationError

Hook = Callable[[Tensor], Tensor]


class AttentionHandler(Protocol):
    """A function that computes an attention instead of the model."""

    def __call__(self, name: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """Compute the output of an attention.

        Args:
            name: name of the calling module, as in `model.named_modules()`.
            q: queries (B, H, Nq, d), not yet multiplied by `scale`. B also counts windows.
            k: keys (B, H, N, d).
            v: values (B, H, N, d).
            mask: added to the logits, broadcastable to (B, H, Nq, N); None if there is no mask.
            scale: factor applied to the logits, usually 1/sqrt(d).

        Returns:
            (B, H, Nq, d).
        """


def explicit_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    on_logits: Hook | None = None,
    on_probs: Hook | None = None,
) -> Tensor:
    """softmax((q·scale) kᵀ + mask) v, in exactly this order: q is scaled before the matrix multiplication.

    Args:
        q: (B, H, Nq, d).
        k: (B, H, N, d).
        v: (B, H, N, d).
        mask: additive or None, broadcastable to (B, H, Nq, N).
        scale: factor for q; 1.0 if q is already scaled.
        on_logits: called with the logits (q·scale) kᵀ (B, H, Nq, N) before the mask; its result replaces them.
        on_probs: called with the probabilities (B, H, Nq, N); its result replaces them.

    Returns:
        (B, H, Nq, d).
    """
    if scale != 1.0:
        q = q * scale
    logits = q @ k.transpose(-2, -1)  # (B, H, Nq, d) @ (B, H, d, N)
    if on_logits is not None:
        logits = on_logits(logits)
    if mask is not None:
        logits = logits + mask
    probs = logits.softmax(dim=-1)
    if on_probs is not None:
        probs = on_probs(probs)
    return probs @ v  # (B, H, Nq, N) @ (B, H, N, d)


@contextmanager
def module_stack(modules: Collection[tuple[str, nn.Module]]) -> Iterator[list[str]]:
    """A context that yields a list of the names of those `modules` that are running at the moment, outermost first.

    The list is updated by hooks while the model runs.
    """
    stack: list[str] = []

    def entering(name: str) -> Callable[..., None]:
        return lambda module, args: stack.append(name)

    def leaving(module: nn.Module, args: Any, output: Any) -> None:
        stack.pop()

    with ExitStack() as hooks:
        for name, module in modules:
            hooks.enter_context(module.register_forward_pre_hook(entering(name)))
            # always_call removes the name even if the forward raises.
            hooks.enter_context(module.register_forward_hook(leaving, always_call=True))
        yield stack


@contextmanager
def intercept_attention(model: nn.Module, names: Collection[str], handler: AttentionHandler) -> Iterator[None]:
    """Pass every attention of `names` to `handler` while the context is active.

    Attention in other modules, and in other models, runs as usual. The interception works under autograd, autocast and
    non-strict `torch.export`, and ends with the context, also after an exception.

    Args:
        model: the model that will run.
        names: modules that call the fused attention, as listed by `VitStructure.attention_names`.
        handler: called instead of the fused attention.

    Raises:
        ConfigurationError: a name is not a module of the model; or, when the model runs, an attention is causal, uses
            dropout, or shares keys among heads.
        RuntimeError: another context is already active.
    """
    if getattr(functional.scaled_dot_product_attention, "_fp8pipe_intercepts", False):
        raise RuntimeError("attention is intercepted already; leave that context first")
    fused = functional.scaled_dot_product_attention
    with module_stack([(name, _module(model, name)) for name in names]) as stack:

        def intercepted(
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attn_mask: Tensor | None = None,
            dropout_p: float = 0.0,
            is_causal: bool = False,
            scale: float | None = None,
            enable_gqa: bool = False,
        ) -> Tensor:
            if not stack:
                return fused(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
            name = stack[-1]
            _refuse(name, dropout_p, is_causal, enable_gqa)
            scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
            if attn_mask is not None and attn_mask.dtype == torch.bool:  # True means that the key takes part
                attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -math.inf)
            return handler(name, query, key, value, attn_mask, scale)

        intercepted._fp8pipe_intercepts = True  # type: ignore[attr-defined]
        functional.scaled_dot_product_attention = intercepted
        try:
            yield
        finally:
            functional.scaled_dot_product_attention = fused


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise ConfigurationError(
            f"the model has no module {name}", why=str(error), fix="take the names from read_structure(model, ...)"
        ) from error


def _refuse(name: str, dropout: float, causal: bool, grouped: bool) -> None:
    reasons = [f"it drops attention probabilities (p={dropout})"] if dropout > 0 else []
    reasons += ["it is causal"] if causal else []
    reasons += ["its heads share keys and values"] if grouped else []
    if reasons:
        raise ConfigurationError(
            f"the attention {name} is of a kind that is not supported",
            why=" and ".join(reasons),
            fix="put the model in eval mode" if dropout > 0 else "use a plain vision transformer",
        )
