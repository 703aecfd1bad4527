"""Compile decoder layers one by one with torch.compile, on CUDA, to fuse the elementwise kernels between the GEMMs.

The graph of one decoder layer, reused for all layers, compiles in seconds; a graph of the whole model takes minutes.
Activation checkpointing is applied around the compiled layer and works as usual. Compilation can be turned off with
torch's own environment variable, `TORCH_COMPILE_DISABLE=1`.

Compilation must not change rounding. A fused kernel would keep intermediate results in fp32 that separate operators
round to bf16, so a value could later be rounded to a different FP8 code. These bf16 roundings are therefore emulated in
fused kernels. FP8 casts with power-of-two scales then give the same codes on every GPU. With other scales this is not
so on compute capability 8.9, where Triton casts via fp16 and thus rounds twice; methods with such scales are not
compiled.
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
    """Make each decoder layer of `model` compile when it is next called.

    Args:
        model: a transformers model, prepared by the training method and on its device; unchanged if layers cannot be
            compiled, as on a CPU or in fp32.
        exact_casts: whether all FP8 scales are powers of two; if not, layers are not compiled.

    Returns:
        Whether layers will be compiled. If a GPU only lacks a prerequisite, a warning names it.
    """
    first = next(model.parameters())
    if not first.is_cuda or first.dtype != torch.bfloat16 or not exact_casts:
        return False
    if missing := _missing(first.get_device()):
        _LOG.warning("decoder layers run uncompiled, which takes longer: %s", missing)
        return False
    # All decoder layers share one code object, of which each kind of layer in a model is another compilation.
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
    """Configure torch.compile to run a layer uncompiled, with a message in torch's log, if it fails to compile.

    The backward pass is compiled together with the forward pass. If it were compiled only when first called, a failure
    then would end the run, as the forward pass would already have run compiled.
    """
    torch._dynamo.config.suppress_errors = True
    torch._functorch.config.force_non_lazy_backward_lowering = True


def uncompiled() -> AbstractContextManager[Any]:
    """A context in which all compiled layers run uncompiled."""
    # Importing torch._dynamo takes a second and 80 MB; if it has not been imported, nothing is compiled.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def decoder_layers(model: nn.Module) -> list[Any]:
    """The decoder layers of a transformers model: those that support gradient checkpointing, but no vision tower's.

    The layers of a tower are not trained, and each size of image would be another graph.
    """
    import_transformers()
    from transformers.modeling_layers import GradientCheckpointingLayer

    decoder: nn.Module = getattr(model, "get_decoder", lambda: model)()
    return [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]


def wrap_layer(layer: Any, compiled: Callable[..., Any]) -> None:
    """Make `layer` run `compiled` as its forward pass, inside gradient checkpointing if that is enabled."""
    checkpointed, layer.gradient_checkpointing = layer.gradient_checkpointing, False

    def forward(*args: Any, **kwargs: Any) -> Any:
        if checkpointed and layer.training:
            return layer._gradient_checkpointing_func(partial(compiled, **kwargs), *args)
        return compiled(*args, **kwargs)

    layer.forward = forward


def _missing(index: int) -> str | None:
    """The reason why torch.compile cannot compile for the GPU with that index; None if it can."""
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
