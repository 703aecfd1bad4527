"""Compiling a decoder layer at a time, on CUDA: what lies between the products of a FALQON layer is then few passes.

A graph a decoder layer, the same for all of them, takes seconds to compile where one of the whole model takes minutes.
Checkpointing stays around the compiled layer, where torch runs it as ever. `TORCH_COMPILE_DISABLE=1`, torch's own
switch, keeps everything uncompiled.

Rounding must not change: a fused kernel would keep in fp32 what uncompiled operators round to bf16, and a value rounded
to FP8 from there may be another. So these roundings are kept. Under them FP8 casts are exact on every GPU for
power-of-two scales. Triton's cast on compute capability 8.9 goes through fp16, which would round twice under other
scales: methods that have such are not compiled.
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
    """Let each decoder layer of `model`, prepared and on its device, run compiled from its next call on.

    Args:
        model: of transformers; on a CPU it stays as it is.
        exact_casts: all FP8 scales are powers of two.

    Returns:
        Whether it is compiled. Where CUDA would allow it and something is missing, the log says what.
    """
    first = next(model.parameters())
    if not first.is_cuda or first.dtype != torch.bfloat16 or not exact_casts:
        return False
    if missing := _missing(first.get_device()):
        _LOG.warning("decoder layers run uncompiled, which takes longer: %s", missing)
        return False
    # Layers share their code, and a model may have several kinds.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    fall_back()
    torch.compiler.assume_constant_result(cuda.capability)
    for module in model.modules():
        if isinstance(module, UnstackedExperts):  # which of them run, on how many tokens, differs from step to step
            module.forward = torch.compiler.disable(module.forward)  # type: ignore[method-assign]
    for layer in decoder_layers(model):
        wrap_layer(layer, torch.compile(layer.forward, options=OPTIONS))
    return True


def fall_back() -> None:
    """From now on, a layer that will not compile runs as it is, and torch's log says so.

    The backward pass is compiled together with the forward pass: at its own first call nothing could replace it.
    """
    torch._dynamo.config.suppress_errors = True
    torch._functorch.config.force_non_lazy_backward_lowering = True


def uncompiled() -> AbstractContextManager[Any]:
    """While active, compiled layers run as they are."""
    # Its import takes a second and 80 MB, and where nobody did that nothing is compiled.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def decoder_layers(model: nn.Module) -> list[Any]:
    """The layers of a model of transformers that it can checkpoint: its decoder layers."""
    import_transformers()
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def wrap_layer(layer: Any, compiled: Callable[..., Any]) -> None:
    """Let `layer` run `compiled`, its forward pass, within its checkpoint, if it has one."""
    checkpointed, layer.gradient_checkpointing = layer.gradient_checkpointing, False

    def forward(*args: Any, **kwargs: Any) -> Any:
        if checkpointed and layer.training:
            return layer._gradient_checkpointing_func(partial(compiled, **kwargs), *args)
        return compiled(*args, **kwargs)

    layer.forward = forward


def _missing(index: int) -> str | None:
    """What torch.compile lacks to compile for a GPU."""
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
