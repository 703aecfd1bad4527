"""Training checkpoints: safetensors files that are written atomically and suffice for a bit-identical resume.

A checkpoint holds everything that steps change: the trained parameters, the codes if the update rule changes them after
steps, and the optimizer state. Data order, learning rate and stochastic rounding are functions of the step number, so
they need no other state. Codes and scales of the converted base lie next to the checkpoints
(`pipeline.falqon.base_files`). Only the newest checkpoints are kept.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fp8pipe.artifact import disk_guard
from fp8pipe.artifact.writer import sync
from fp8pipe.core.errors import BadArtifactError, ConfigurationError

ENCODED_TEXT: Final = "the encoded training text"  # key of its sha256 among the recorded inputs of a run
RUN: Final = "run.json"  # is there once a run is prepared
_PREFIX = "step-"
_STATE, _TENSORS = "state.json", "state"
_SUFFIX = ".safetensors"
_SHARD_BYTES = 1 << 30  # limits host memory use, as safetensors copies all tensors of a file from the GPU at once


Shard = dict[str, Tensor]


def _as_it_is(shard: Shard) -> Shard:
    return shard


class CheckpointStore:
    """The checkpoints of one run, in one directory.

    Args:
        root: the directory; created by the first write.
        keep: how many of the newest checkpoints to keep.
    """

    def __init__(self, root: Path, keep: int) -> None:
        self.root, self.keep = root, keep

    def begin(self, config: dict[str, Any], inputs: dict[str, str] | None = None) -> None:
        """Record the settings of a new run, for `check_config` in a resumed run, once preparation is complete.

        Args:
            config: the resolved configuration.
            inputs: sha256 of the input files and of the encoded text, by name.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        _atomic_text(self.root / RUN, json.dumps({"config": config, "inputs": inputs or {}}, indent=1, sort_keys=True))

    def started(self) -> bool:
        """Whether `begin` completed in an earlier process."""
        return (self.root / RUN).exists()

    def check_config(self, config: dict[str, Any], inputs: dict[str, str] | None = None) -> None:
        """Refuse to resume a run that was started with another configuration or other inputs.

        Raises:
            ConfigurationError: something differs; the message lists every such field, or every such file.
        """
        run = json.loads((self.root / RUN).read_text())
        stored = run["config"]
        different = [
            f"{key}: {stored.get(key)!r} then, {config.get(key)!r} now"
            for key in sorted(stored.keys() | config.keys())
            if stored.get(key) != config.get(key)
        ]
        if different:
            raise ConfigurationError(
                f"the run in {self.root.parent} was started with another configuration",
                why="; ".join(different),
                fix="resume with the same options, or start anew (--force, or another --output)",
            )
        found = inputs or {}
        changed = [name for name, digest in run["inputs"].items() if found.get(name) != digest]
        if changed == [ENCODED_TEXT]:
            then, now = run["inputs"][ENCODED_TEXT], found.get(ENCODED_TEXT)
            raise ConfigurationError(
                f"the training text is encoded differently than when the run in {self.root.parent} was started",
                why=f"token ids, labels and images: sha256 {then} then, {now} now. No local data file changed; "
                "possible causes: a changed image; a chat template that inserts the current date (strftime_now); a "
                "changed tokenizer, chat template or remote data set; another version of transformers or tokenizers",
                fix="restore what changed (a fixed date in the chat template), or start anew (--force, or another "
                "--output)",
            )
        changed = [name for name in changed if name != ENCODED_TEXT]  # a consequence of the changed file
        if changed:
            raise ConfigurationError(
                f"{', '.join(changed)} changed since the run in {self.root.parent} was started",
                why="; ".join(f"{name}: sha256 {run['inputs'][name]} then, {found.get(name)} now" for name in changed),
                fix="restore the file, or start anew (--force, or another --output)",
            )

    def steps(self) -> list[int]:
        """Step numbers of the complete checkpoints, oldest first."""
        found = self.root.glob(f"{_PREFIX}*/{_STATE}")
        return sorted(int(path.parent.name.removeprefix(_PREFIX)) for path in found)

    def save(
        self, step: int, tensors: dict[str, Tensor], state: dict[str, Any], whole: Callable[[Shard], Shard] = _as_it_is
    ) -> Path:
        """Write a checkpoint, then delete the oldest ones if there are more than `keep`.

        Args:
            step: number of completed steps.
            tensors: trained tensors and optimizer state.
            state: JSON-serializable state, such as the history of metrics.
            whole: makes the tensors of a file whole, if they are distributed over processes; called for one file at a
                time, in the order of `in_shards`.

        Returns:
            The directory of the checkpoint.
        """
        target = self.root / f"{_PREFIX}{step:08d}"
        scratch = self.root / f"writing-{step:08d}"
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.rmtree(target, ignore_errors=True)
        scratch.mkdir(parents=True)
        _write_shards(scratch, _TENSORS, in_shards(tensors), whole)
        _atomic_text(scratch / _STATE, json.dumps({"step": step, **state}))
        scratch.rename(target)
        sync(self.root)
        for old in self.steps()[: -self.keep]:
            shutil.rmtree(self.root / f"{_PREFIX}{old:08d}")
        return target

    def load(self, step: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and state of a checkpoint.

        Raises:
            BadArtifactError: the checkpoint cannot be read.
        """
        folder = self.root / f"{_PREFIX}{step:08d}"
        try:
            return _load_shards(folder, _TENSORS), json.loads((folder / _STATE).read_text())
        except Exception as error:
            raise BadArtifactError(
                f"the checkpoint {folder} cannot be read",
                why=str(error),
                fix="delete that folder: --resume then continues from the checkpoint before it",
            ) from error


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: dict[nn.Parameter, str]) -> dict[str, Tensor]:
    """The optimizer's state as tensors called `optimizer/PARAMETER/KEY`; numbers become 0-d tensors."""
    return {
        f"optimizer/{name}/{key}": (value if isinstance(value, Tensor) else torch.tensor(value)).detach()
        for parameter, name in names.items()
        for key, value in optimizer.state.get(parameter, {}).items()
        if value is not None
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, names: dict[nn.Parameter, str], tensors: dict[str, Tensor]
) -> None:
    """Restore the state that `optimizer_tensors` returned, with the optimizer's own `load_state_dict`.

    That method gives each entry the device and dtype that the optimizer needs: fused AdamW needs `step` on the
    parameter's device, other optimizers need it on the CPU, and some tensors of bitsandbytes must not be cast.

    Args:
        optimizer: changed in place.
        names: the names of its parameters, as given to `optimizer_tensors`.
        tensors: the tensors of a checkpoint; those of other names are ignored.
    """
    groups = optimizer.state_dict()["param_groups"]
    places = {names[p]: place for place, p in enumerate(p for g in optimizer.param_groups for p in g["params"])}
    state: dict[int, dict[str, Any]] = {}
    for path, tensor in tensors.items():
        if path.startswith("optimizer/"):
            name, _, key = path.removeprefix("optimizer/").rpartition("/")
            number = tensor.dim() == 0 and not tensor.is_floating_point()
            state.setdefault(places[name], {})[key] = int(tensor) if number else tensor
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def in_shards(tensors: dict[str, Tensor]) -> list[Shard]:
    """The tensors of each file of a checkpoint, in order; sizes are those of whole tensors."""
    shards: list[Shard] = [{}]
    used = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if shards[-1] and used + size > _SHARD_BYTES:
            shards.append({})
            used = 0
        shards[-1][name] = tensor
        used += size
    return shards


def _write_shards(folder: Path, stem: str, shards: list[Shard], whole: Callable[[Shard], Shard]) -> None:
    """Write `STEM.safetensors`, or, if there are several shards, `STEM-0001-of-0003.safetensors` and so on."""
    for index, shard in enumerate(shards, 1):
        part = f"-{index:04d}-of-{len(shards):04d}" if len(shards) > 1 else ""
        _write(folder / f"{stem}{part}{_SUFFIX}", whole(shard))


def _load_shards(folder: Path, stem: str) -> dict[str, Tensor]:
    """Read the tensors that `_write_shards` wrote.

    Raises:
        FileNotFoundError: a shard is missing.
    """
    files = sorted(folder.glob(f"{stem}*{_SUFFIX}"))
    count = int(files[0].stem.rpartition("-of-")[2]) if files and "-of-" in files[0].stem else 1
    if len(files) != count:
        raise FileNotFoundError(f"{folder}: {len(files)} of {count} file(s) {stem}*{_SUFFIX} are there")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    dense, storages = {}, set()
    for name, tensor in tensors.items():
        whole = tensor.contiguous()
        storage = whole.untyped_storage().data_ptr()
        # safetensors rejects tensors that share memory, as the quantization maps of bitsandbytes' 8-bit optimizers do.
        dense[name] = whole.clone() if storage in storages else whole
        storages.add(storage)
    need = sum(tensor.numel() * tensor.element_size() for tensor in dense.values())
    with disk_guard(path, need):
        save_file(dense, path)
        sync(path)
    with safe_open(path, "pt") as reopened:
        if set(reopened.keys()) != set(dense):
            raise BadArtifactError(f"{path} was not written whole", fix="check the disk and run again")


def _atomic_text(path: Path, text: str) -> None:
    scratch = path.with_suffix(".writing")
    with disk_guard(path, len(text)):
        scratch.write_text(text)
        sync(scratch)
    scratch.rename(path)
