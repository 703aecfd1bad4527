"""After halving and writing: only types may have changed. Read the file again and compare it with the graph before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fp8pipe.artifact import Gate

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["compare_halved", "stored_arrays"]


def stored_arrays(model: ir.Model) -> dict[str, Any]:
    """Copies of all stored tensors, by name."""
    values = model.graph.initializers.items()
    return {name: value.const_value.numpy().copy() for name, value in values if value.const_value is not None}


def compare_halved(before: Mapping[str, Any], written: ir.Model) -> list[Gate]:
    """Gates on a written FP16 graph.

    Args:
        before: the float32 graph's tensors (`stored_arrays`), whose every number was compared with the artifact.
        written: the file, read again.
    """
    after = stored_arrays(written)
    codes = scales = others = 0
    for name, array in before.items():
        found = after.get(name)
        if found is None or found.shape != array.shape:
            codes, scales, others = codes + 1, scales, others + 1
        elif array.dtype != np.float32:
            codes += int((found.view(np.uint8) != array.view(np.uint8)).sum()) if array.dtype.itemsize == 1 else 0
            others += int(array.dtype.itemsize > 1 and not np.array_equal(found, array))
        elif name.endswith("scale"):
            scales += int((found.astype(np.float32) != array).sum())
        else:
            with np.errstate(over="ignore"):
                expected = array if found.dtype == np.float32 else array.astype(np.float16)
            others += int(not np.array_equal(found, expected))
    detail = f"of {len(before)} stored tensors, the written file against the graph before halving"
    return [
        Gate(name=name, value=value, detail=detail)
        for name, value in (
            ("codes changed by halving", codes),
            ("scales changed by halving", scales),
            ("tensors not rounded once to FP16", others),
        )
    ]
