"""Writing the trained weights over a copy of the base checkpoint, and reading them back to be sure.

Names come from the checkpoint, never from the module tree: transformers renames weights when it loads. Everything
that was not trained (embeddings, norms, tokenizer) is carried over byte for byte, shard by shard, so memory
stays near one shard.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fp8pipe.artifact import disk_guard
from fp8pipe.core.errors import BadArtifactError, ConfigurationError
from fp8pipe.models.checkpoint.sidecars import BASE_MODEL_FILES, companion_files


class Deployed(NamedTuple):
    """A weight in the form that is served, in the checkpoint's orientation.

    Attributes:
        values: FP8 codes, or a plain weight.
        scale_dequant: fp32 scalar, `codes * scale_dequant`; None for a plain weight.
        transposed: the checkpoint's orientation is (in, out).
    """

    values: Tensor
    scale_dequant: Tensor | None
    transposed: bool


Weights = dict[str, Deployed]

_INDEX = "model.safetensors.index.json"


def shard_paths(base: Path) -> list[Path]:
    """The safetensors files of a checkpoint, as its index lists them (or all of them).

    Raises:
        ConfigurationError: there are none.
    """
    index = base / _INDEX
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        paths = [base / name for name in names]
    else:
        paths = sorted(base.glob("*.safetensors"))
    missing = [path.name for path in paths if not path.exists()]
    if not paths or missing:
        raise ConfigurationError(
            f"{base} has no complete safetensors weights",
            why=f"missing: {', '.join(missing)}" if missing else "no *.safetensors file is there",
            fix="convert the checkpoint to safetensors (transformers' save_pretrained writes it)",
        )
    return paths


def checkpoint_names(base: Path, modules: Iterable[str], prefix: str) -> dict[str, str]:
    """For each module path, its name in the checkpoint (without `.weight`).

    Args:
        base: the base checkpoint.
        modules: module paths in the loaded model.
        prefix: the model's `base_model_prefix`, which checkpoints of the bare model lack.

    Raises:
        ConfigurationError: a module's weight is not in the checkpoint under either name.
    """
    present = {name for path in shard_paths(base) for name in _keys(path)}
    names: dict[str, str] = {}
    for module in modules:
        bare = module.removeprefix(f"{prefix}.")
        found = [name for name in (module, bare, f"{prefix}.{module}") if f"{name}.weight" in present]
        if not found:
            raise ConfigurationError(
                f"the weight of {module} is not in the checkpoint under a name that can be traced",
                why=f"neither {module}.weight nor {bare}.weight is among its {len(present)} tensors",
                fix="save the model once with transformers' save_pretrained and start from that",
            )
        names[module] = found[0]
    return names


def tensor_elements(base: Path) -> int:
    """Elements of all tensors of a checkpoint, from its headers."""
    total = 0
    for path in shard_paths(base):
        with safe_open(path, "pt") as shard:
            total += sum(math.prod(shard.get_slice(key).get_shape()) for key in shard.keys())  # noqa: SIM118
    return total


def weights_digest(base: Path) -> str:
    """sha256 over the checkpoint's shards, for the record of parents."""
    digest = hashlib.sha256()
    for path in shard_paths(base):
        with path.open("rb") as handle:
            while block := handle.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def write_checkpoint(base: Path, root: Path, weights: Weights) -> None:
    """Copy the base checkpoint to `root`, with `weights` in place of the tensors they name.

    Args:
        base: the base checkpoint's directory.
        root: destination; exists.
        weights: by checkpoint name without `.weight`.
    """
    for relative in companion_files(base, BASE_MODEL_FILES):
        (root / relative).parent.mkdir(exist_ok=True)
        shutil.copyfile(base / relative, root / relative)
    shards = shard_paths(base)
    weight_map: dict[str, str] = {}
    total = 0
    for path in shards:
        tensors = dict(_shard(path, weights))
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        with disk_guard(root, size):
            save_file(tensors, root / path.name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, path.name)
        total += size
    if len(shards) > 1 or shards[0].name != "model.safetensors":
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (root / _INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _shard(path: Path, weights: Weights) -> Iterator[tuple[str, Tensor]]:
    with safe_open(path, "pt") as shard:
        for key in shard.keys():  # noqa: SIM118 (not a mapping)
            name = key.removesuffix(".weight")
            if key.endswith(".weight") and name in weights:
                values, scale, _ = weights[name]
                yield key, values.cpu().contiguous()
                if scale is not None:
                    yield f"{name}.weight_scale", scale.cpu().float()
            else:
                yield key, shard.get_tensor(key)


def count_differing(root: Path, weights: Weights) -> int:
    """Reopen a written checkpoint and count the bytes of `weights` (and scales) that differ from it.

    Raises:
        BadArtifactError: a weight is missing.
    """
    differing, seen = 0, set()
    for path in shard_paths(root):
        with safe_open(path, "pt") as shard:
            for key in shard.keys():  # noqa: SIM118 (not a mapping)
                name = key.removesuffix(".weight").removesuffix(".weight_scale")
                if name not in weights:
                    continue
                values, scale, _ = weights[name]
                expected = scale if key.endswith(".weight_scale") else values
                if expected is None:
                    raise BadArtifactError(f"{key} was written although {name} is not quantized")
                differing += int((_raw(shard.get_tensor(key)) != _raw(expected.cpu())).sum())
                seen.add(key)
    wanted = {f"{n}.weight" for n in weights} | {
        f"{n}.weight_scale" for n, w in weights.items() if w.scale_dequant is not None
    }
    if wanted - seen:
        raise BadArtifactError(f"weights are missing from {root}", why=", ".join(sorted(wanted - seen)[:5]))
    return differing


def _raw(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _keys(path: Path) -> list[str]:
    with safe_open(path, "pt") as shard:
        return list(shard.keys())
