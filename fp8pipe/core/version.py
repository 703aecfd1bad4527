"""The version of this package, and what else decides how it behaves here: its commit, Python, and the libraries."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Final

from fp8pipe.core.machine import distribution_version

__version__ = "0.1.0"

# Those that decide values, files or speed.
_LIBRARIES: Final = (
    "torch", "transformers", "peft", "bitsandbytes", "timm", "onnx", "onnxruntime", "tensorrt", "tensorrt-rtx",
    "triton",
)  # fmt: skip


def build_facts() -> str:
    """Version and commit, Python and system, and the versions of libraries, for `--version`; imports none of them.

    The commit is known in a wheel that was built from a checkout. An installation in place has none: it is the
    directory that the second line names.
    """
    here = Path(__file__).resolve()
    commit = here.with_name("COMMIT")
    built = f" (commit {commit.read_text(encoding='utf-8').strip()})" if commit.is_file() else ""
    found = [(name, distribution_version(name)) for name in _LIBRARIES]
    return "\n".join(
        (
            f"fp8pipe {__version__}{built}",
            f"from {here.parents[2]}",
            f"Python {platform.python_version()} on {platform.system()} {platform.machine()}",
            ", ".join(f"{name} {version}" for name, version in found if version),
        )
    )
