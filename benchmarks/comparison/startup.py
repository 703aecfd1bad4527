"""Start-up: commands that only say their version, imports of peers, and servers until their first answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from comparison.environments import Environment, peer, project
from comparison.harness import Command, Comparison, Contender, Settings
from comparison.models import FP8PIPE
from comparison.processes import environment_of
from comparison.results import Metric
from comparison.servers import OURS_ENVIRONMENT, Kind, Server, fp8pipe_server, litserve_server
from comparison.vision import prepare

_SECONDS = Metric(name="seconds", label="seconds", better="lower")
_PEAK = Metric(name="peak_mib", label="peak memory, MiB", better="lower")
_ABOUT = """A whole process, from start to end. Peers have no command that says their version, so what a script that
uses them begins with stands for it: the import. `python -c pass` is the interpreter alone."""
_ABOUT_SERVER = """From the start of the process to its first answer, on the INT8 export of the comparison `vision` at
{size} pixels. `fp8pipe serve` hashes every file of the export, and times batch sizes and numbers of streams with
random pixels before it is ready; with fixed settings (`--streams {threads} --threads 1 --max-batch 1`) it does not
compare as many."""
_IMPORTS = {
    "llm-compressor": ("llmcompressor", "import llmcompressor"),
    "ModelOpt": ("modelopt", "import modelopt.torch.quantization, modelopt.torch.export"),
    "NNCF": ("openvino", "import nncf, openvino"),
    "LitServe": ("litserve", "import litserve"),
}


def build(settings: Settings) -> Comparison:
    """Commands and imports."""
    ours = project("torch")

    def contender(name: str, where: Environment, arguments: Sequence[str], *, own: bool = False) -> Contender:
        log = settings.work / f"startup-{name.replace(' ', '-')}.log"

        def start() -> Command:
            return Command([where.python(), *arguments], log, environment_of(project=where.project))

        return Contender(name, where, start, own)

    contenders = [
        contender("fp8pipe --version", ours, [*FP8PIPE[1:], "--version"], own=True),
        contender("fp8pipe --help", ours, [*FP8PIPE[1:], "--help"], own=True),
        contender("python -c pass", ours, ["-c", "pass"]),
        contender("import torch", ours, ["-c", "import torch"]),
        *(contender(f"import {name}", peer(where, settings.environments), ["-c", text])
          for name, (where, text) in _IMPORTS.items()),
    ]  # fmt: skip
    return Comparison(
        title="Start-up of commands", about=_ABOUT, metrics=(_SECONDS, _PEAK), contenders=tuple(contenders),
        baseline=contenders[0].name, rounds=settings.choose(7, 1), warmup=settings.choose(1, 0),
    )  # fmt: skip


@dataclass(frozen=True)
class _Start:
    """Starts a server and ends it, once per round."""

    kind: Kind

    def round(self) -> dict[str, float]:
        server = Server(self.kind)
        server.close()
        return {"seconds": server.seconds}

    def close(self) -> None:
        """Nothing runs between the rounds."""


def build_server(settings: Settings) -> Comparison:
    """Servers until their first answer."""
    folder, size = prepare(settings)
    export, pixels = folder / "ours", np.load(folder / "heldout.npy")[:1]

    def contender(name: str, where: Environment, kind: Callable[[], Kind], *, ours: bool = False) -> Contender:
        return Contender(name, where, lambda: _Start(kind()), ours)

    fixed = ["--streams", str(settings.threads), "--threads", "1", "--max-batch", "1"]
    litserve, graph = peer("litserve", settings.environments), export / "model.onnx"
    contenders = (
        contender("fp8pipe serve, fixed", OURS_ENVIRONMENT, lambda: fp8pipe_server(settings, export, pixels, fixed),
                  ours=True),
        contender("fp8pipe serve", OURS_ENVIRONMENT, lambda: fp8pipe_server(settings, export, pixels, []), ours=True),
        contender("LitServe", litserve, lambda: litserve_server(settings, graph, pixels, 1)),
    )  # fmt: skip
    return Comparison(
        title="Start-up of vision servers", about=_ABOUT_SERVER.format(size=size, threads=settings.threads),
        metrics=(_SECONDS,), contenders=contenders, baseline=contenders[0].name, rounds=settings.choose(5, 1),
    )  # fmt: skip
