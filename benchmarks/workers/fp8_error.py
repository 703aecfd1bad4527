"""Compare an FP8 checkpoint with the bf16 one that it was made from.

    python fp8_error.py SOURCE CHECKPOINT

Says the number of quantized weights, the bytes of the weight files, and the error of all quantized weights together:
the norm of the difference over the norm of the weights.
"""

from __future__ import annotations

import sys
from pathlib import Path

from protocol import say
from safetensors import safe_open

CODES = ("F8_E4M3",)


def main() -> None:
    source, checkpoint = map(Path, sys.argv[1:])
    originals = {name: file for file in sorted(source.glob("*.safetensors")) for name in _names(file)}
    error = norm = 0.0
    count = 0
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, framework="pt") as found:
            for name in found.keys():  # noqa: SIM118
                if found.get_slice(name).get_dtype() not in CODES:
                    continue
                with safe_open(originals[name], framework="pt") as first:
                    true = first.get_tensor(name).float()
                scale = found.get_tensor(f"{name}_scale").float()
                scale = scale[:, None] if scale.ndim == 1 and scale.numel() > 1 else scale
                error += float((found.get_tensor(name).float() * scale - true).double().square().sum())
                norm += float(true.double().square().sum())
                count += 1
    size = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    say({"quantized": count, "megabytes": size / 1e6, "relative_error": (error / norm) ** 0.5 if norm else 0.0})


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as found:
        return list(found.keys())


if __name__ == "__main__":
    main()
