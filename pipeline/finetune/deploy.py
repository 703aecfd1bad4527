"""The end of the fine-tuning stage: merge the adapter, evaluate what will be deployed, and write it as an artifact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from fp8pipe.artifact import Artifact, ArtifactWriter, Comparison, Gate, LayerRecord, NumberFormat, Verdict
from fp8pipe.artifact.kinds import HeldoutLoss, KvCacheFacts, TunedDetails
from fp8pipe.core.machine import return_freed_memory
from fp8pipe.core.plan import enter_phase
from fp8pipe.models.checkpoint.quantized.base import read_base
from fp8pipe.models.checkpoint.tensors import model_parent
from fp8pipe.models.language.ending import GENERATION_FILE
from fp8pipe.models.language.sources import ModelSource
from fp8pipe.numerics.backends import library
from pipeline.falqon.flush import FlushReport
from pipeline.finetune.config import FinetuneConfig
from pipeline.finetune.kv_cache import measure_kv_cache
from pipeline.finetune.loop import Trainer, plot_run
from pipeline.finetune.processes import Processes, RunWriter
from pipeline.finetune.weights import Weights, merge_facts, renamed, write_deployed

if TYPE_CHECKING:
    from pipeline.finetune.text import TrainingText


_FORMATS: Final = {
    "fp8": NumberFormat(name="e4m3", granularity="per-tensor"),
    "nvfp4": NumberFormat(name="nvfp4", granularity="per-block"),
}


@dataclass(frozen=True, slots=True)
class Run:
    """What a run was made of.

    Attributes:
        config: the resolved configuration.
        source: the base model.
        text: the training text.
        names: names of the trained layers in the checkpoint, by module path.
        records: one record per linear layer.
        processes: those that train it.
    """

    config: FinetuneConfig
    source: ModelSource
    text: TrainingText
    names: dict[str, str]
    records: list[LayerRecord]
    processes: Processes


@dataclass(frozen=True, slots=True)
class _Outcome:
    """The trained model: what is written, and what the manifest says about it."""

    weights: Weights
    adapter: dict[str, Tensor]
    merged: dict[str, FlushReport]
    losses: HeldoutLoss
    kv_cache: KvCacheFacts | None


def deploy(
    run: Run, trainer: Trainer, writer: RunWriter, *, exclude: Sequence[str], volatile: Sequence[str], plot: str
) -> Artifact:
    """Merge the adapter, evaluate the deployed weights, write them, read them back, and commit the artifact.

    Args:
        run: what the model was trained with.
        trainer: at the end of training.
        writer: the writer of the artifact.
        exclude: see `ArtifactWriter.commit`.
        volatile: see `ArtifactWriter.commit`.
        plot: name of the file of the plot, which is volatile, too.
    """
    outcome = _finish(run, trainer, writer)

    def write() -> Artifact:
        assert isinstance(writer, ArtifactWriter)  # which the process that calls this has
        plot_run(trainer.history, writer.root / plot, f"{run.config.method} on {run.source.origin}")
        return _write(run, trainer, writer, outcome, exclude, [*volatile, plot])

    return_freed_memory()
    enter_phase("write")
    return run.processes.finished(write, writer.output)


def _finish(run: Run, trainer: Trainer, writer: RunWriter) -> _Outcome:
    model, method, text, device = trainer.model, trainer.method, run.text, run.config.device
    return_freed_memory()  # what the steps have freed is in blocks of other sizes than the merge needs
    enter_phase("final merge")
    merged = method.finish(model, trainer.calibration_inputs, trainer.calibration_losses)
    enter_phase("evaluate")
    deployed = run.processes.heldout_loss(model, text.heldout, device)
    untuned = next(line["heldout_loss"] for line in trainer.history if "heldout_loss" in line)
    trainer.record({"step": trainer.step, "deployed_loss": deployed})
    enter_phase("calibrate")
    alone = run.processes.size == 1
    kv_cache, missing = measure_kv_cache(model, text.train, text.heldout, run.names, device, alone=alone)
    # Not the figures, as the main process's count, and no message, which may hold an address.
    run.processes.same(kv_cache is None, "whether an FP8 key/value cache is possible")
    if missing:
        writer.warn(f"this model cannot be exported with an FP8 key/value cache: {missing}")
    return _Outcome(
        *run.processes.results(method), merged, HeldoutLoss(untuned=untuned, deployed=deployed), kv_cache
    )  # fmt: skip


def _write(
    run: Run, trainer: Trainer, writer: ArtifactWriter, outcome: _Outcome, exclude: Sequence[str],
    volatile: Sequence[str],
) -> Artifact:  # fmt: skip
    config, source, text, losses = run.config, run.source, run.text, outcome.losses
    transposed = write_deployed(writer, source.path, outcome.weights, outcome.adapter, run.names)
    if text.template.origin == "plain":  # not the base model's own template, so it must be stored for serving
        (writer.root / "chat_template.jinja").write_text(text.template.template, encoding="utf-8")
    if text.ending.settings is not None:  # engines must stop at the token that ends the trained answers
        (writer.root / GENERATION_FILE).write_text(text.ending.text, encoding="utf-8")
    _learned(losses, writer)
    adapter = "merged" if config.precision is None else "flushed"
    rule = config.update_rule if config.method == "falqon" else None
    return writer.commit(
        config=config.model_dump(mode="json"),
        seed=config.seed,
        parents=[model_parent(source.path, source.origin, read_base(source.path).stored)],
        number_format=_FORMATS[config.precision] if config.precision is not None else None,
        runtime={
            "device": config.device, "threads": torch.get_num_threads(), "native": library() is not None,
            "attention": getattr(trainer.model.config, "_attn_implementation", None), "compiled": trainer.compiled,
            **run.processes.facts,
        },
        layers=renamed(run.records, run.names),
        details=TunedDetails(
            adapter=adapter, rule=rule, rank=config.rank,
            base_dtype=config.dtype, transposed=transposed, data=text.facts, packing=text.packing,
            stop_token_added=text.ending.added,
            **merge_facts(outcome.merged, run.names),
            heldout_loss=losses, kv_cache=outcome.kv_cache,
        ),
        exclude=exclude, volatile=volatile,
    )  # fmt: skip


def _learned(losses: HeldoutLoss, writer: ArtifactWriter) -> None:
    learned = Gate(
        name="held-out loss of the deployed weights", value=losses.deployed, comparison=Comparison.BELOW,
        threshold=losses.untuned, detail="nats per answer token; below the untuned model", failure=Verdict.REGRESSION,
    )  # fmt: skip
    writer.gate(learned)
    if not learned.passed:
        writer.warn(
            "the tuned model is no better on held-out text than the untuned one "
            f"({losses.deployed:.4f}, {losses.untuned:.4f})"
        )
