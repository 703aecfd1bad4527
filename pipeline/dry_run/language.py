"""A dry run of fine-tuning: the real stage and the real text, on the model's own architecture with few layers.

Widths, vocabulary, batches and dtypes are the real ones; weights are random, and no weight of the real model is read.
Started as a process of its own by `pipeline.finetune.plan`.
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

STEPS: Final = 3  # the first makes the optimizer's state, the last is logged
_LOOKED_AT: Final = 512  # batches among which the largest is sought
_ACCUMULATED: Final = 2  # micro-batches: from the second on none takes more memory


def layer_count(settings: Any) -> int:
    """Decoder layers of a transformers configuration."""
    return int(settings.get_text_config(decoder=True).num_hidden_layers)


def with_layers(settings: Any, count: int) -> Any:
    """A copy of the configuration with its first `count` layers alone, in all lists that hold one entry a layer."""
    settings = copy.deepcopy(settings)
    text = settings.get_text_config(decoder=True)
    full = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list | tuple) and len(value) == full and full > count:
            setattr(text, name, value[:count])
    text.num_hidden_layers = count
    return settings


def write_model(settings: Any, dtype: torch.dtype, folder: Path) -> None:
    """A checkpoint of random weights, as the real one is stored."""
    torch.manual_seed(0)
    model = model_class(settings)._from_config(settings, dtype=dtype)
    model.save_pretrained(folder)


class _Largest(Batches):
    """The largest batches of a run, largest first, over and over; of all of them, or of the first `kept`."""

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
        """How many there are in all."""
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
    """Fine-tune as `config` says, from `base` (tokenizer and templates) and `model` (the small one)."""
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
