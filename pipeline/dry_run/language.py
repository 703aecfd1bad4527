"""A dry run of fine-tuning: the real stage and training text, on the same architecture with fewer decoder layers.

Widths, vocabulary, batches and dtypes are those of the real run. Weights are random; no weight of the real model is
read. `pipeline.finetune.plan` starts this module as a separate process.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch

from fp8pipe.artifact.kinds import TunedDetails
from fp8pipe.core.config import build_config
from fp8pipe.core.plan import enter_phase
from fp8pipe.models.language.sources import ModelSource
from fp8pipe.models.language.structure import model_class
from pipeline.dry_run.process import CheckpointMeter, perform
from pipeline.finetune.batches import Batch, Batches
from pipeline.finetune.config import FinetuneConfig
from pipeline.finetune.stage import TrainingText, load_text, tune

STEPS: Final = 3  # the first one allocates the optimizer state, the last one is logged
_LOOKED_AT: Final = 512  # maximum number of batches that are searched for the largest ones
_ACCUMULATED: Final = 2  # maximum number of micro-batches per step: more than two do not raise the peak memory


def layer_count(settings: Any) -> int:
    """The number of decoder layers in a transformers configuration."""
    return int(settings.get_text_config(decoder=True).num_hidden_layers)


def with_layers(settings: Any, count: int) -> Any:
    """A copy of a transformers configuration with only the first `count` decoder layers.

    Lists with one entry per layer (such as `layer_types`) are truncated to the same number.
    """
    settings = copy.deepcopy(settings)
    text = settings.get_text_config(decoder=True)
    full = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list | tuple) and len(value) == full and full > count:
            setattr(text, name, value[:count])
    text.num_hidden_layers = count
    return settings


def write_model(settings: Any, dtype: torch.dtype, folder: Path) -> None:
    """Write a checkpoint with random weights of the given dtype to `folder`."""
    torch.manual_seed(0)
    model = model_class(settings)._from_config(settings, dtype=dtype)
    model.save_pretrained(folder)


class _Largest(Batches):
    """The batches of a run, largest first and repeated endlessly, so that a few steps reach the peak memory.

    Args:
        batches: the batches of the real run.
        looked_at: how many of them the real run uses; at most the first 512 of these are considered.
        kept: number of largest batches to use; None for all.
    """

    def __init__(self, batches: Batches, looked_at: int, kept: int | None = None) -> None:
        self._whole, self._looked_at, self._kept = batches, looked_at, kept
        seen = ((batches.at(index), index) for index in range(min(looked_at, _LOOKED_AT)))
        sizes = [(batch.input_ids.numel() + batch.answer_tokens, index) for batch, index in seen]
        self.mean = sum(size for size, _ in sizes) / len(sizes)
        self.largest = max(sizes)[0]
        self._largest_first = [index for _, index in sorted(sizes, reverse=True)[:kept]]

    def __len__(self) -> int:
        return len(self._largest_first)

    @property
    def batches(self) -> int:
        """The number of batches of the real run, including those that are not used here."""
        return len(self._whole)

    def unpacked(self) -> _Largest:
        return _Largest(self._whole.unpacked(), self._looked_at, self._kept)

    def at(self, step: int) -> Batch:
        return self._whole.at(self._largest_first[step % len(self._largest_first)])


def _text(config: FinetuneConfig, source: ModelSource) -> tuple[TrainingText, _Largest, _Largest]:
    whole = load_text(config, source)
    train = _Largest(whole.train, config.steps * config.gradient_accumulation)
    heldout = _Largest(whole.heldout, len(whole.heldout), 1)
    return replace(whole, train=train, heldout=heldout), train, heldout


def run(job: dict[str, Any], output: Path) -> tuple[CheckpointMeter, dict[str, Any]]:
    """Run the fine-tuning stage on a small model and collect its measurements.

    Args:
        job: `config`, the fields of a `FinetuneConfig`; `base`, the directory of the real model, whose tokenizer and
            chat template are used; `model`, the directory of the model with few layers.
        output: path of the artifact to write.

    Returns:
        The measurements by phase, and facts for extrapolation: size of the mean batch relative to the largest one,
        number of held-out batches, `in_features` of the merged layers, and the packing result.
    """
    config = build_config(FinetuneConfig, job["config"])
    with CheckpointMeter(output.with_name(f"{output.name}.partial"), "final merge", "checkpoints") as meter:
        enter_phase("text")
        text, train, heldout = _text(config, ModelSource(Path(job["base"]), config.model))
        fixed = {"steps": STEPS, "log_every": STEPS, "keep_checkpoints": 1}
        never = dict.fromkeys(("evaluate_every", "save_every", "warmup_steps"), 0)
        accumulated = min(config.gradient_accumulation, _ACCUMULATED)
        small = config.model_copy(update=fixed | never | {"gradient_accumulation": accumulated})
        artifact = tune(small, ModelSource(Path(job["model"]), config.model), text, output)
    inputs = {record.name: record.shape[1] for record in artifact.manifest.layers if record.shape}
    details = artifact.manifest.details_of(TunedDetails)
    merged = [inputs[name] for name in details.final_merge_layers]
    if config.packing and details.packing is not None and details.packing.how == "off":
        train, heldout = train.unpacked(), heldout.unpacked()
    facts = {
        "train_share": train.mean / train.largest, "heldout_share": heldout.mean / heldout.largest,
        "heldout_batches": float(heldout.batches),
    }  # fmt: skip
    packing = None if details.packing is None else details.packing.model_dump(mode="json")
    return meter, {**facts, "merged": merged, "packing": packing}


if __name__ == "__main__":
    sys.exit(perform(run))
