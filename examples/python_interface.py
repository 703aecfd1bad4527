"""Quantize, export and validate a vision transformer through the Python API, without the command line.

python examples/python_interface.py WORK_DIRECTORY
"""

from __future__ import annotations

import sys
from pathlib import Path

import fp8pipe


def main(work: str) -> None:
    """Quantize a small ViT without data, export it for ONNX Runtime, and validate the export against the artifact.

    Prints the verdict and every gate.

    Args:
        work: directory for the artifact and the export; existing ones are replaced.
    """
    root = Path(work)
    quantized = fp8pipe.quantize_vit(
        "sample:vit-digits", "w8a8", root / "digits", calibration="gaussian", images=8, distill={"steps": 0}, force=True
    )
    exported = fp8pipe.export(quantized.root, "onnx", root / "digits-onnx", force=True)
    record = fp8pipe.validate(exported.root, against=quantized.root)
    print(f"{record.verdict}: {exported.root}, digest {exported.digest[:12]}")
    for gate in record.gates:
        print(f"  {gate}")


if __name__ == "__main__":
    main(sys.argv[1])
