"""The fine-tuning stage, which makes an artifact from a base model and training text.

Everything that can be checked in advance is checked before the model is loaded. The deployed weights are written, read
back and compared before the artifact gets its final name.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fp8pipe.artifact import (
    Artifact,
    LayerRecord,
    check_place,
)
from fp8pipe.artifact.kinds import FALQON_KIND, LORA_KIND, PackingFacts
from fp8pipe.core.devices import on_device
from fp8pipe.core.machine import return_freed_memory
from fp8pipe.core.plan import by_reason, enter_phase, refuse_impossible
from fp8pipe.core.progress import track
from fp8pipe.models.checkpoint.names import checkpoint_names
from fp8pipe.models.checkpoint.quantized.base import read_base
from fp8pipe.models.language.base import check_base, check_values, unknown_tensors
from fp8pipe.models.language.sources import ModelSource, resolve_model
from fp8pipe.numerics.bf16 import widen_bf16_products
from pipeline.falqon.base_files import BaseFiles
from pipeline.falqon.convert import read_convertible
from pipeline.falqon.forms import form_of
from pipeline.finetune.checkpoint import CheckpointStore
from pipeline.finetune.config import FinetuneConfig
from pipeline.finetune.deploy import Run, deploy
from pipeline.finetune.image_check import check_images
from pipeline.finetune.loading import least_memory, load_model, weights_digest
from pipeline.finetune.loss import answer_count, answer_loss, model_inputs
from pipeline.finetune.method import Method, export_warnings
from pipeline.finetune.packing import find_packing, give_masks, packing_warning
from pipeline.finetune.processes import Processes, processes_of
from pipeline.finetune.room import check_room
from pipeline.finetune.text import TrainingText, load_text
from pipeline.tracking.config import require_trackers
from pipeline.tracking.reporter import TRACKERS_FILE, reporting
from pipeline.tracking.tracker import Subject

_LOG = logging.getLogger(__name__)
_CHECKPOINTS, _METRICS, _PLOT = "checkpoints", "metrics.jsonl", "plot.png"


def finetune(config: FinetuneConfig, output: Path, *, force: bool = False, resume: bool = False) -> Artifact:
    """Fine-tune a model and write the result as an artifact.

    Args:
        config: the resolved configuration.
        output: directory of the artifact; must not exist unless `force` is set.
        force: replace an existing artifact.
        resume: continue the unfinished run of `output`, if there is one.

    Returns:
        The finished artifact (kind `falqon` or `lora-merged`).

    Raises:
        Fp8PipeError: the stage failed; checkpoints written so far are kept in `OUTPUT.partial`.
    """
    config = on_device(config)
    widen_bf16_products()
    with processes_of(config) as processes:

        def read() -> tuple[ModelSource, TrainingText]:
            if processes.main:  # when others come here, it may have begun to write
                require_trackers(config.report_to)
                check_place(output, force=force, resume=resume)
            return _read_inputs(config)

        source, text = processes.in_turn(read)
        return tune(config, source, text, output, force=force, resume=resume, processes=processes)


def _read_inputs(config: FinetuneConfig) -> tuple[ModelSource, TrainingText]:
    """Find the base model and read the text, and refuse what cannot be used."""
    source = resolve_model(config.model)
    structure = check_base(source.path, config.model)
    if config.device == "cpu":
        refuse_impossible(least_memory(config, source, structure), f"the model {config.model}")
    enter_phase("text")
    text = load_text(config, source)
    check_values(source.path, config.model, structure)
    return source, text


def tune(
    config: FinetuneConfig,
    source: ModelSource,
    text: TrainingText,
    output: Path,
    *,
    force: bool = False,
    resume: bool = False,
    processes: Processes | None = None,
) -> Artifact:
    """Run the rest of the stage after the text has been loaded; for the arguments see `finetune`.

    It calls `enter_phase` at the beginning of each phase, by which dry runs measure memory and time.
    """
    kind = LORA_KIND if config.precision is None else FALQON_KIND
    processes = processes or Processes()
    trackers = config.report_to if processes.main else ()
    with (
        processes.writer(output, kind=kind, stage="finetune", force=force, resume=resume) as writer,
        reporting(
            trackers, Subject(writer.output, "finetune", config.model_dump(mode="json")), writer.root
        ) as reporter,
    ):
        for warning in [*read_base(source.path).warnings(), *text.warnings]:
            writer.warn(warning)
        enter_phase("load")
        model = load_model(config, source, shared=processes.size > 1)
        structure = read_convertible(model, config.rank)
        form_of(config.precision, config.rule).check(structure)
        names = checkpoint_names(source.path, structure.naming, structure.trainable)
        for warning in [
            *unknown_tensors(source.path, structure),
            *export_warnings(source.path, config.method, config.precision, names.values()),
        ]:
            writer.warn(warning)
        text = _keep_apart(config, model, text)
        if warning := packing_warning(text.packing):
            writer.warn(warning)
        store = CheckpointStore(writer.root / _CHECKPOINTS, config.keep_checkpoints)
        method = processes.method(config, store)
        enter_phase("prepare")
        key = _run_key(config, source, text)
        processes.same(key, "the configuration or an input")
        records = processes.in_turn(lambda: _prepare(config, model, method, store, text, key))
        return_freed_memory()  # its blocks have other sizes than those of a step, which would be added to them
        trainer = processes.trainer(config, model, method, text.train, text.heldout, store, writer.root / _METRICS)
        if processes.main:
            check_room(config, source.path, trainer, writer.root, names.values(), processes.spill_bytes(method))
        resumed = trainer.resume()
        processes.same(trainer.step, "the checkpoint to continue from")
        if resumed:
            _LOG.info("resumed after step %d", trainer.step)
        trainer.on_record = reporter.follow("training", trainer.history)
        _LOG.info("converted %d of %d linear layers", len(method.names), len(records))
        for left_out in by_reason({r.name: r.reason for r in records if r.name not in method.names}):
            _LOG.info("left out: %s", left_out)
        with track(config.steps, "training", done=trainer.step) as progress:
            trainer.run(lambda m: progress.advance(loss=m["loss"], tokens_per_second=m["tokens_per_second"]))
        run = Run(config, source, text, names, records, processes)
        artifact = deploy(run, trainer, writer, exclude=[_CHECKPOINTS, TRACKERS_FILE], volatile=[_METRICS], plot=_PLOT)
        reporter.tag(artifact)
        return artifact


def _keep_apart(config: FinetuneConfig, model: nn.Module, text: TrainingText) -> TrainingText:
    """The text with the packing result, and without packing if the model cannot isolate the examples of a row.

    If the model needs masks for that, a hook that adds them is registered.

    Raises:
        ConfigurationError: examples with images influence each other, or depend on later tokens.
    """
    check_images(model, text.train)
    if text.packing is not None:
        return text
    if not config.packing:
        return replace(text, packing=PackingFacts(how="off"))
    found = find_packing(model, text.train.at(0))
    if found.how == "off":
        return replace(text, train=text.train.unpacked(), heldout=text.heldout.unpacked(), packing=found)
    if found.how == "mask":
        give_masks(model)
    return replace(text, packing=found)


@dataclass(frozen=True, slots=True)
class _RunKey:
    """What determines a run, for refusing to resume another one: the configuration, and digests of all inputs."""

    described: dict[str, Any]
    inputs: dict[str, str]


def _run_key(config: FinetuneConfig, source: ModelSource, text: TrainingText) -> _RunKey:
    described = config.model_dump(mode="json")
    if config.packing and text.packing is not None and text.packing.how != "positions":
        described["packing"] = text.packing.how  # so that a run cannot be resumed with different packing
    return _RunKey(described, text.digests | {f"the weights of {config.model}": weights_digest(source.path)})


def _prepare(
    config: FinetuneConfig, model: nn.Module, method: Method, store: CheckpointStore, text: TrainingText, key: _RunKey
) -> list[LayerRecord]:
    if started := store.started():
        store.check_config(key.described, key.inputs)

    def losses() -> Iterator[torch.Tensor]:
        for index in range(config.gradient_batches):
            batch = text.train.at(index)
            with method.forward_context():
                inputs, answers = model_inputs(batch, config.device), max(1.0, answer_count(batch.labels))
                yield answer_loss(model, inputs, batch.labels, answers)

    digest = hashlib.sha256(json.dumps([key.described, key.inputs], sort_keys=True).encode()).hexdigest()
    records = method.prepare(model, BaseFiles(store.root, digest), losses)
    if not started:
        store.begin(key.described, key.inputs)
    return records
