"""Runs a TensorRT engine in this process, on the first GPU; torch manages GPU memory and streams.

Serving other vision exports does not need torch. The engine stored in the export is used if it fits the GPU and the
installed version of TensorRT; otherwise it is rebuilt (`ready_engine`).
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import numpy as np

from fp8pipe.core.errors import BadArtifactError, MissingCapabilityError
from fp8pipe.core.machine import gpus
from serving.vision.engine import ServedModel

_MODULES = {"rtx": "tensorrt_rtx", "enterprise": "tensorrt"}


def open_tensorrt(model: ServedModel) -> tuple[Any, str, tuple[int, ...]]:
    """Load the engine of an export.

    Returns:
        A function that runs it, (n, 3, H, W) float32 -> (n, C) float32; a description of where it runs; and the batch
        sizes within the engine's profile, ascending, beginning with 1.

    Raises:
        MissingCapabilityError: there is no GPU, or torch or TensorRT is not installed.
        BadArtifactError: the engine cannot be loaded, or does not accept a batch of one image.
    """
    if importlib.util.find_spec("torch") is None:
        raise MissingCapabilityError(
            f"{model.name} is a TensorRT export, and torch is not installed", why="torch manages the GPU's memory",
            fix="pip install torch, or export with --target onnx and serve that",
        )  # fmt: skip
    device = next(iter(gpus()), None)
    if device is None:
        raise MissingCapabilityError(
            f"{model.name} is a TensorRT export, and there is no GPU", why="torch sees no CUDA device",
            fix="serve it on a machine with an NVIDIA GPU, or export with --target onnx for this one",
        )  # fmt: skip
    from exporters.tensorrt.engine_cache import ready_engine

    ready = ready_engine(model.artifact.root, f"{device.capability[0]}.{device.capability[1]}")
    module = _MODULES[ready.recipe.builder]
    try:
        trt = importlib.import_module(module)
    except ImportError as error:
        raise MissingCapabilityError(f"{module} is not installed", fix="pip install 'fp8pipe[trt-rtx]'") from error
    low, _, high = (shape[0] for shape in ready.recipe.profiles[model.input_name])
    runner = _Runner(trt, ready.path.read_bytes(), model)
    sizes = tuple(sorted({low, high} | {size for size in (1, 2, 4, 8, 16, 32, 64) if low <= size <= high}))
    if sizes[0] != 1:
        raise BadArtifactError(
            f"the engine of {model.name} cannot be served",
            why=f"its smallest batch is {low}, but requests may hold one image",
            fix="export it with a batch range that starts at 1",
        )  # fmt: skip
    return runner, f"TensorRT on {device.name}", sizes


class _Runner:
    """Runs an engine in one execution context; not thread-safe."""

    def __init__(self, trt: Any, engine: bytes, model: ServedModel) -> None:
        import torch

        self._torch: Any = torch
        self._logger = trt.Logger(trt.Logger.ERROR)
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(engine)
        if self._engine is None:
            raise BadArtifactError(
                f"the engine of {model.name} cannot be loaded", why="TensorRT rejects it",
                fix="remove it from the cache: it will be rebuilt",
            )  # fmt: skip
        self._context = self._engine.create_execution_context()
        self._names = (model.input_name, model.output_name)
        types = {trt.DataType.FLOAT: torch.float32, trt.DataType.HALF: torch.float16}
        self._types = tuple(types[self._engine.get_tensor_dtype(name)] for name in self._names)
        self._stream = self._torch.cuda.Stream()

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        # Run one batch on this object's CUDA stream, and wait for the result.
        torch, (source, result) = self._torch, self._names
        with torch.cuda.stream(self._stream):
            given = torch.from_numpy(np.ascontiguousarray(pixels)).cuda().to(self._types[0])
            self._context.set_input_shape(source, tuple(given.shape))
            shape = tuple(self._context.get_tensor_shape(result))
            output = torch.empty(shape, dtype=self._types[1], device=given.device)
            self._context.set_tensor_address(source, given.data_ptr())
            self._context.set_tensor_address(result, output.data_ptr())
            if not self._context.execute_async_v3(self._stream.cuda_stream):
                raise RuntimeError("execute_async_v3 failed")
        self._stream.synchronize()
        found: np.ndarray = output.float().cpu().numpy()
        return found
