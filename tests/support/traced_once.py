"""Graphs traced once in a run of tests: tracing a net takes seconds, and many tests trace the same one.

The first trace of a net is real, and what it gave lies in the run's own temporary folder, which the worker processes
share. A net is known by everything that tracing can see: types, plain attributes, tensors, configuration, arguments.
Weights of linears and convolutions that the first trace stored as they were are exchanged for those of another net: it
is mostly other codes that tests quantize the same net to.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from exporters.graph import trace
from exporters.tensorrt.language import graph as language
from exporters.tensorrt.language import template

_WEIGHTED = (nn.Linear, nn.Conv2d)
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


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()


def weights_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Weights of linears and convolutions, but for those that another tensor of the net equals, or a number could."""
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    times = Counter(_bytes(tensor) for _, tensor in tensors)
    layers = {f"{name}.weight".lstrip(".") for name, part in module.named_modules() if isinstance(part, _WEIGHTED)}
    return {
        name: tensor for name, tensor in tensors
        if name in layers and times[_bytes(tensor)] == 1 and tensor.numel() and (tensor != tensor.flatten()[0]).any()
    }  # fmt: skip


def fingerprint(module: nn.Module, *given: object) -> str:
    """A digest of a net and of what it is traced with; of `weights_of`, types and shapes alone."""
    found, weights = hashlib.sha256(repr(given).encode()), weights_of(module)
    for name, part in module.named_modules():
        shown = {key: _plain(value) for key, value in vars(part).items() if key != "_modules"}
        found.update(f"{name} {type(part).__module__}.{type(part).__qualname__} {sorted(shown.items())}".encode())
        for key, tensor in [*part._parameters.items(), *part._buffers.items()]:
            if tensor is not None:
                found.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
                free = f"{name}.{key}".lstrip(".") in weights
                found.update(b"any" if free else _bytes(tensor))
    return found.hexdigest()


def _stored(model: Any, weights: dict[str, torch.Tensor]) -> dict[str, tuple[str, bool]] | None:
    """By a stored tensor's name, the weight that it is, and whether it lies transposed; None if one is not there."""
    forms = {(tuple(w.shape), _bytes(w)): (name, False) for name, w in weights.items()}
    forms |= {(tuple(w.T.shape), _bytes(w.T)): (name, True) for name, w in weights.items() if w.ndim == 2}
    tensors = {name: value.const_value for name, value in model.graph.initializers.items()}
    known = {name: forms.get((tuple(t.shape), t.tobytes())) for name, t in tensors.items()}
    found = {name: weight for name, weight in known.items() if weight is not None}
    complete = sorted(name for name, _ in found.values()) == sorted(weights)
    return found if complete else None


@contextmanager
def traced_once(folder: Path) -> Iterator[None]:
    """`export_program` of this project reads what this run has traced already."""
    real = trace.export_program
    folder.mkdir(exist_ok=True)

    def once(module: nn.Module, arguments: tuple[Any, ...], dynamic: Any, name: str, fix: str, **names: Any) -> Any:
        import onnx_ir as ir

        shapes = [(tuple(one.shape), one.dtype) if isinstance(one, torch.Tensor) else _plain(one) for one in arguments]
        weights = weights_of(module)
        place = folder / f"{fingerprint(module, shapes, str(dynamic), names)}.onnx"
        values = hashlib.sha256(b"".join(map(_bytes, weights.values()))).hexdigest()
        exact, exchanged = place.with_suffix(f".{values}.onnx"), place.with_suffix(".json")
        if not exchanged.exists() and not exact.exists():
            with _no_collection():
                model = real(module, arguments, dynamic, name, fix, **names)
            stored = _stored(model, weights)
            _write(exact if stored is None else place, ir.to_proto(model).SerializeToString())
            if stored is not None:
                _write(exchanged, json.dumps(stored).encode())
        if exact.exists():
            return ir.from_proto(_proto(exact))
        return ir.from_proto(_exchanged(_proto(place), json.loads(exchanged.read_bytes()), weights))

    trace.export_program = language.export_program = template.export_program = once
    yield
    trace.export_program = language.export_program = template.export_program = real


@contextmanager
def _no_collection() -> Iterator[None]:
    """Tracing makes so many objects that a tenth of its time is looking for garbage among them."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _write(place: Path, content: bytes) -> None:
    part = place.with_suffix(f".{os.getpid()}")
    part.write_bytes(content)
    part.replace(place)


def _exchanged(proto: Any, stored: dict[str, tuple[str, bool]], weights: dict[str, torch.Tensor]) -> Any:
    for tensor in proto.graph.initializer:
        if tensor.name in stored:
            name, transposed = stored[tensor.name]
            tensor.raw_data = _bytes(weights[name].T if transposed else weights[name])
    return proto


def _proto(place: Path) -> Any:
    import onnx

    return onnx.load_model_from_string(place.read_bytes())
