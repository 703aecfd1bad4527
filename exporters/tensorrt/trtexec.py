"""The command line that builds the same engine elsewhere: on the machine that will serve, with NVIDIA's `trtexec`.

Every flag is one of 10.x and of 11.x. `--stronglyTyped` is needed by 10.x, and accepted by 11.x, where networks are
always strongly typed. Flags of precision are not given: the graph holds the types, and 11.x has none.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from exporters.tensorrt.rtx import Shapes

__all__ = ["trtexec_command"]


def trtexec_command(
    graph: str, profiles: Mapping[str, Shapes], *, workspace_mib: int, version_compatible: bool = False
) -> str:
    """One line for a shell; the engine, its layers and the timing cache are written where it is run.

    Args:
        graph: path of the ONNX file, as it is to be written.
        profiles: smallest, usual and largest shape of each input; the names are the graph's.
        workspace_mib: scratch memory of the builder, MiB.
        version_compatible: whether later versions of the same major one shall load the engine.
    """
    shapes = [
        f"--{flag}Shapes=" + ",".join(f"{name}:{_sides(shape[index])}" for name, shape in profiles.items())
        for index, flag in enumerate(("min", "opt", "max"))
    ]
    flags = [
        f"--onnx={graph}", "--saveEngine=model.engine", "--stronglyTyped", *(shapes if profiles else []),
        f"--memPoolSize=workspace:{workspace_mib}", "--timingCacheFile=timing.cache",
        "--profilingVerbosity=detailed", "--exportLayerInfo=model.layers.json",
        *(["--versionCompatible"] if version_compatible else []), "--skipInference",
    ]  # fmt: skip
    return shlex.join(["trtexec", *flags])


def _sides(shape: tuple[int, ...]) -> str:
    return "x".join(str(side) for side in shape)
