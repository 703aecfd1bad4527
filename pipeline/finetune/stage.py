"""The fine-tuning stage, which makes an artifact from a base model and training text.

Everything that can be checked in advance is checked before the model is loaded. The deployed weights are written, read
back and compared before the artifact gets its final name.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from fp8pipe.artifact import (
    Artifact,
    ArtifactWriter,
    Comparison,
    Gate,
    LayerRecord,
    NumberFormat,
    Verdict,
    check_place,
)
from fp8pipe.artifact.kinds import FALQON_KIND, LORA_KIND, HeldoutLoss, PackingFacts, TunedDetails
from fp8pipe.core.devices import on_device
from fp8pipe.core.plan import by_reason, enter_phase, refuse_impossible
from fp8pipe.core.progress import track
from fp8pipe.models.checkpoint.names import checkpoint_names
from fp8pipe.models.checkpoint.quantized.base import read_base
from fp8pipe.models.checkpoint.tensors import model_parent
from fp8pipe.models.language.base import check_base, check_values
from fp8pipe.models.language.ending import GENERATION_FILE
from fp8pipe.models.language.sources import ModelSource, resolve_model
from fp8pipe.numerics.backends import library
from fp8pipe.numerics.bf16 import widen_bf16_products
from pipeline.falqon.base_files import BaseFiles
from pipeline.falqon.convert import read_convertible
from pipeline.falqon.method import FalqonMethod
from pipeline.finetune.checkpoint import CheckpointStore
from pipeline.finetune.config import FinetuneConfig
from pipeline.finetune.image_check import check_images
from pipeline.finetune.kv_cache import measure_kv_cache
from pipeline.finetune.loading import least_memory, load_model, weights_digest
from pipeline.finetune.loop import Trainer, plot_run
from pipeline.finetune.loss import answer_count, answer_loss, heldout_loss, model_inputs
from pipeline.finetune.method import LoraMethod, Method, export_warnings
from pipeline.finetune.packing import find_packing, give_masks, packing_warning
from pipeline.finetune.room import check_room
from pipeline.finetune.text import TrainingText, load_text
from pipeline.finetune.weights import merge_facts, renamed, write_deployed

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
    check_place(output, force=force, resume=resume)
    widen_bf16_products()
    source = resolve_model(config.model)
    structure = check_base(source.path, config.model)
    if config.device == "cpu":
        refuse_impossible(least_memory(config, source, structure), f"the model {config.model}")
    enter_phase("text")
    text = load_text(config, source)
    check_values(source.path, config.model, structure)
    return tune(config, source, text, output, force=force, resume=resume)


def tune(
    config: FinetuneConfig,
    source: ModelSource,
    text: TrainingText,
    output: Path,
    *,
    force: bool = False,
    resume: bool = False,
) -> Artifact:
    """Run the rest of the stage after the text has been loaded; for the arguments see `finetune`.

    It calls `enter_phase` at the beginning of each phase, by which dry runs measure memory and time.
    """
    kind = FALQON_KIND if config.method == "falqon" else LORA_KIND
    with ArtifactWriter(output, kind=kind, stage="finetune", force=force, resume=resume) as writer:
        for warning in [*read_base(source.path).warnings(), *text.warnings]:
            writer.warn(warning)
        enter_phase("load")
        model = load_model(config, source)
        structure = read_convertible(model, config.rank)
        names = checkpoint_names(source.path, structure.naming, structure.trainable)
        for warning in export_warnings(source.path, config.method, names.values()):
            writer.warn(warning)
        text = _keep_apart(config, model, text)
        if warning := packing_warning(text.packing):
            writer.warn(warning)
        method = build_method(config)
        store = CheckpointStore(writer.root / _CHECKPOINTS, config.keep_checkpoints)
        enter_phase("prepare")
        records = _prepare(config, source, model, method, store, text)
        trainer = Trainer(config, model, method, text.train, text.heldout, store, writer.root / _METRICS)
        check_room(config, source.path, trainer, writer.root, names.values())
        if trainer.resume():
            _LOG.info("resumed after step %d", trainer.step)
        _LOG.info("converted %d of %d linear layers", len(method.names), len(records))
        for left_out in by_reason({r.name: r.reason for r in records if r.name not in method.names}):
            _LOG.info("left out: %s", left_out)
        with track(config.steps, "training", done=trainer.step) as progress:
            trainer.run(lambda m: progress.advance(loss=m["loss"], tokens_per_second=m["tokens_per_second"]))
        return _deploy(config, source, text, writer, trainer, records, names)


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


def build_method(config: FinetuneConfig) -> Method:
    """Create the configured training method."""
    if config.method == "falqon":
        how = config.initialisation or config.rule.initialisation
        return FalqonMethod(config.rule, rank=config.rank, rows=config.rows, initialisation=how, seed=config.seed)
    alpha = config.rank if config.lora_alpha is None else config.lora_alpha
    return LoraMethod(rank=config.rank, alpha=alpha, seed=config.seed, quantized=config.method == "qlora")


def _prepare(
    config: FinetuneConfig, source: ModelSource, model: nn.Module, method: Method, store: CheckpointStore,
    text: TrainingText,
) -> list[LayerRecord]:  # fmt: skip
    described = config.model_dump(mode="json")
    if config.packing and text.packing is not None and text.packing.how != "positions":
        described["packing"] = text.packing.how  # so that a run cannot be resumed with different packing
    inputs = text.digests | {f"the weights of {config.model}": weights_digest(source.path)}
    if started := store.started():
        store.check_config(described, inputs)

    def losses() -> Iterator[torch.Tensor]:
        for index in range(config.gradient_batches):
            batch = text.train.at(index)
            with method.forward_context():
                inputs, answers = model_inputs(batch, config.device), max(1.0, answer_count(batch.labels))
                yield answer_loss(model, inputs, batch.labels, answers)

    key = hashlib.sha256(json.dumps([described, inputs], sort_keys=True).encode()).hexdigest()
    records = method.prepare(model, BaseFiles(store.root, key), losses)
    if not started:
        store.begin(described, inputs)
    return records


def _deploy(
    config: FinetuneConfig,
    source: ModelSource,
    text: TrainingText,
    writer: ArtifactWriter,
    trainer: Trainer,
    records: list[LayerRecord],
    names: dict[str, str],
) -> Artifact:
    """Merge the adapter, evaluate the deployed weights, write them, read them back, and commit the artifact."""
    model, method = trainer.model, trainer.method
    enter_phase("final merge")
    flushed = method.finish(model, trainer.calibration_inputs)
    heldout = (text.heldout.at(i) for i in range(len(text.heldout)))
    enter_phase("evaluate")
    deployed = heldout_loss(model, heldout, config.device)
    untuned = next(line["heldout_loss"] for line in trainer.history if "heldout_loss" in line)
    trainer.record({"step": trainer.step, "deployed_loss": deployed})
    enter_phase("calibrate")
    kv_cache, missing = measure_kv_cache(model, text.train, text.heldout, names, config.device)
    if missing:
        writer.warn(f"this model cannot be exported with an FP8 key/value cache: {missing}")
    enter_phase("write")
    transposed = write_deployed(writer, source.path, method.deployed_weights(), method.adapter(), names)
    if text.template.origin == "plain":  # not the base model's own template, so it must be stored for serving
        (writer.root / "chat_template.jinja").write_text(text.template.template, encoding="utf-8")
    if text.ending.settings is not None:  # engines must stop at the token that ends the trained answers
        (writer.root / GENERATION_FILE).write_text(text.ending.text, encoding="utf-8")
    learned = Gate(
        name="held-out loss of the deployed weights", value=deployed, comparison=Comparison.BELOW,
        threshold=untuned, detail="nats per answer token; below the untuned model", failure=Verdict.REGRESSION,
    )  # fmt: skip
    writer.gate(learned)
    if not learned.passed:
        writer.warn(
            f"the tuned model is no better on held-out text than the untuned one ({deployed:.4f}, {untuned:.4f})"
        )
    plot_run(trainer.history, writer.root / _PLOT, f"{config.method} on {source.origin}")
    falqon = config.method == "falqon"
    return writer.commit(
        config=config.model_dump(mode="json"),
        seed=config.seed,
        parents=[model_parent(source.path, source.origin, read_base(source.path).stored)],
        number_format=NumberFormat(name="e4m3", granularity="per-tensor") if falqon else None,
        runtime={
            "device": config.device, "threads": torch.get_num_threads(), "native": library() is not None,
            "attention": getattr(model.config, "_attn_implementation", None), "compiled": trainer.compiled,
        },
        layers=renamed(records, names),
        details=TunedDetails(
            adapter="flushed" if falqon else "merged", rule=config.update_rule if falqon else None, rank=config.rank,
            base_dtype=config.dtype, transposed=transposed, data=text.facts, packing=text.packing,
            stop_token_added=text.ending.added,
            **merge_facts(flushed, names),
            heldout_loss=HeldoutLoss(untuned=untuned, deployed=deployed), kv_cache=kv_cache,
        ),
        exclude=[_CHECKPOINTS], volatile=[_METRICS, _PLOT],
    )  # fmt: skip
