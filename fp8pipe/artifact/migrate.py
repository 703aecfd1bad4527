"""Manifests of older schemas, brought to today's before they are validated.

Schema 1 had no checksum beside the manifest. Schema 2 kept what was particular to a kind in a free dictionary
(`extra`), gates without their comparison, and the encoding of a layer in a sentence.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from fp8pipe.artifact.gate import read_gate

__all__ = ["migrate"]

_SENTENCE: Final = re.compile(r"(\d+)-bit (int|e4m3|nvfp4)")
_BITS: Final = {"e4m3": 8, "nvfp4": 4}


def migrate(data: Mapping[str, Any]) -> dict[str, Any]:
    """Common fields of a manifest of schema 1 or 2 in today's form; `details` is still the free dictionary."""
    number_format = data.get("number_format")
    return {
        **{key: value for key, value in data.items() if key != "extra"},
        "layers": [_layer(layer, number_format) for layer in data.get("layers", [])],
        "gates": [read_gate(gate) for gate in data.get("gates", [])],
        "details": dict(data.get("extra", {})),
    }


def _layer(layer: Mapping[str, Any], number_format: Mapping[str, Any] | None) -> dict[str, Any]:
    kept = {key: layer[key] for key in ("name", "shape") if key in layer}
    reason = str(layer.get("reason", ""))
    if not layer.get("converted"):
        return {**kept, "reason": reason}
    if number_format is None:
        return {**kept, "reason": reason}  # merged into bf16: trained, and stored as floats
    found = _SENTENCE.match(reason)
    name = found[2] if found else str(number_format["name"])
    name = name if name in ("int", *_BITS) else "int"  # the manifest of a ViT named its precision: w4a8
    bits = int(found[1]) if found else _BITS.get(name)
    weight = {"format": name, "bits": bits, "granularity": number_format["granularity"]}
    return {**kept, "weight": weight, "reason": "" if found else reason}
