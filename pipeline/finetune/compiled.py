"""Compile decoder layers one by one with torch.compile, on CUDA, to fuse the elementwise kernels between the GEMMs.

A graph per decoder layer, shared by all of them, compiles in seconds, whereas a graph of the whole model takes minutes.
Activation checkpointing stays outside the compiled layer and works as usual. Torch's own switch,
`TORCH_COMPILE_DISABLE=1`, turns compilation off.

Compilation must not change rounding: a fused kernel would keep in fp32 what uncompiled operators round to bf16, and
could then round to a different FP8 value. So these bf16 roundings are emulated. With them, FP8 casts with power-of-two
scales give the same codes on every GPU. On compute capability 8.9, Triton's cast goes through fp16, which would round
twice with other scales, so methods with such scales are not compiled.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from fp8pipe.core.machine import FP8_CAPABILITY
from fp8pipe.models.compat import import_transformers
from fp8pipe.models.language.experts import UnstackedExperts
from fp8pipe.numerics import cuda

_LOG = logging.getLogger(__name__)
OPTIONS: dict[str, Any] = {"emulate_precision_casts": True}


def compile_layers(model: nn.Module, *, exact_casts: bool) -> bool:
    """Compile each decoder layer of `model`, which is prepared and on its device, on its next call.

    Args:
        model: a transformers model; on a CPU it is not changed.
        exact_casts: whether all FP8 scales are powers of two.

    Returns:
        Whether layers are compiled. If only a prerequisite is missing on a GPU, a warning says which.
    """
    first = next(model.parameters())
    if not first.is_cuda or first.dtype != torch.bfloat16 or not exact_casts:
        return False
    if missing := _missing(first.get_device()):
        _LOG.warning("decoder layers run uncompiled, which takes longer: %s", missing)
        return False
    # All layers share one code object, and each kind of layer in a model counts as a recompilation of it.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    fall_back()
    torch.compiler.assume_constant_result(cuda.capability)
    for module in model.modules():
        if isinstance(module, UnstackedExperts):  # which experts run, and on how many tokens, varies by step
            module.forward = torch.compiler.disable(module.forward)  # type: ignore[method-assign]
    for layer in decoder_layers(model):
        wrap_layer(layer, torch.compile(layer.forward, options=OPTIONS))
    return True


def fall_back() -> None:
    """From now on, a layer that fails to compile runs uncompiled, and torch's log says so.

    The backward pass is compiled together with the forward pass: if it failed later, at its first call, there would be
    no fallback.
    """
    torch._dynamo.config.suppress_errors = True
    torch._functorch.config.force_non_lazy_backward_lowering = True


def uncompiled() -> AbstractContextManager[Any]:
    """A context in which compiled layers run uncompiled."""
    # Importing torch._dynamo takes a second and 80 MB; if it has not been imported, nothing is compiled.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def decoder_layers(model: nn.Module) -> list[Any]:
    """The decoder layers of a transformers model: those that support gradient checkpointing."""
    import_transformers()
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def wrap_layer(layer: Any, compiled: Callable[..., Any]) -> None:
    """Make `layer` run `compiled` as its forward pass, inside gradient checkpointing if that is enabled."""
    checkpointed, layer.gradient_checkpointing = layer.gradient_checkpointing, False

    def forward(*args: Any, **kwargs: Any) -> Any:
        if checkpointed and layer.training:
            return layer._gradient_checkpointing_func(partial(compiled, **kwargs), *args)
        return compiled(*args, **kwargs)

    layer.forward = forward


def _missing(index: int) -> str | None:
    """What torch.compile lacks to compile for a GPU, or None."""
    if os.environ.get("TORCH_COMPILE_DISABLE") == "1":
        return "TORCH_COMPILE_DISABLE=1 is set"
    if cuda.capability(index) < FP8_CAPABILITY:
        return "this GPU has no FP8 tensor cores"
    from torch.utils._triton import has_triton

    if not has_triton():
        return "Triton is missing, or does not know this GPU (pip install triton)"
    if not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
        return "Triton needs a C compiler (install gcc)"
    return None
