"""Graphs traced once in a run of tests: tracing a net takes seconds, and many tests trace the same one.

The first trace of a net is real, and what it gave lies in the run's own temporary folder, which the worker processes
share. A net is known by everything that tracing can see: types, plain attributes, tensors, configuration, arguments.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from exporters.graph import trace
from exporters.tensorrt.language import graph as language
from exporters.tensorrt.language import template

_PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.Size)


def _plain(value: Any) -> Any:
    """What of an attribute can change a trace, in text; functions by where they stand in the source."""
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, (tuple, list)):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return [(key if isinstance(key, str) else "", _plain(one)) for key, one in value.items()]  # hooks are numbered
    if hasattr(value, "to_dict"):
        return repr(sorted(value.to_dict().items(), key=str))
    code = getattr(getattr(value, "__func__", value), "__code__", None)
    return f"{type(value).__qualname__} {code.co_filename}:{code.co_firstlineno}" if code else type(value).__qualname__


def fingerprint(module: nn.Module, *given: object) -> str:
    """A digest of a net and of what it is traced with."""
    found = hashlib.sha256(repr(given).encode())
    for name, part in module.named_modules():
        shown = {key: _plain(value) for key, value in vars(part).items() if key != "_modules"}
        found.update(f"{name} {type(part).__module__}.{type(part).__qualname__} {sorted(shown.items())}".encode())
        for key, tensor in [*part._parameters.items(), *part._buffers.items()]:
            if tensor is not None:
                plain = tensor.detach().contiguous().cpu()
                found.update(f"{key} {plain.dtype} {tuple(plain.shape)}".encode())
                found.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@contextmanager
def traced_once(folder: Path) -> Iterator[None]:
    """`export_program` of this project reads what this run has traced already."""
    real = trace.export_program
    folder.mkdir(exist_ok=True)

    def once(module: nn.Module, arguments: tuple[Any, ...], dynamic: Any, name: str, fix: str, **names: Any) -> Any:
        import onnx_ir as ir

        shapes = [(tuple(one.shape), one.dtype) if isinstance(one, torch.Tensor) else _plain(one) for one in arguments]
        place = folder / f"{fingerprint(module, shapes, str(dynamic), names)}.onnx"
        if not place.exists():
            model = real(module, arguments, dynamic, name, fix, **names)
            part = place.with_suffix(f".{os.getpid()}")
            part.write_bytes(ir.to_proto(model).SerializeToString())
            part.replace(place)
        return ir.from_proto(_proto(place))

    trace.export_program = language.export_program = template.export_program = once
    yield
    trace.export_program = language.export_program = template.export_program = real


def _proto(place: Path) -> Any:
    import onnx

    return onnx.load_model_from_string(place.read_bytes())
