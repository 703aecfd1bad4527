"""The fine-tuning stage: base model and text in, one artifact out.

The order matters: everything that can be refused is refused before the model is touched, and the deployed
weights are written, reopened and compared before the artifact gets its name.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fp8pipe.artifact import Artifact, ArtifactWriter, Gate, LayerRecord, NumberFormat, Parent
from fp8pipe.compat import import_transformers
from fp8pipe.errors import ConfigurationError, MissingCapabilityError
from fp8pipe.progress import track
from fp8pipe.sources import ModelSource, check_unquantized, resolve_model
from pipeline.baselines import LoraMethod
from pipeline.falqon import native
from pipeline.falqon.method import FalqonMethod
from pipeline.falqon.rules import update_rule
from pipeline.training.checkpoint import CheckpointStore
from pipeline.training.config import FinetuneConfig
from pipeline.training.data import Batches, encode, load_records, split
from pipeline.training.evaluate import heldout_loss
from pipeline.training.loop import Trainer
from pipeline.training.method import Method
from pipeline.training.plot import plot_run
from pipeline.weights import checkpoint_names, count_differing, weights_digest, write_checkpoint

_LOG = logging.getLogger(__name__)
_CHECKPOINTS, _METRICS = "checkpoints", "metrics.jsonl"


@dataclass(frozen=True, slots=True)
class TrainingText:
    """The user's text as batches.

    Attributes:
        train: training batches.
        heldout: held-out batches, each visited once an evaluation.
        facts: counts for the manifest.
        warnings: what was dropped or defaulted.
    """

    train: Batches
    heldout: Batches
    facts: dict[str, Any]
    warnings: list[str]


def finetune(config: FinetuneConfig, output: Path, *, force: bool = False, resume: bool = False) -> Artifact:
    """Run the stage.

    Args:
        config: the resolved configuration.
        output: the artifact's directory; must not exist unless `force`.
        force: replace an existing artifact.
        resume: continue the unfinished run of `output`, if there is one.

    Returns:
        The finished artifact (kind `falqon` or `lora-merged`).

    Raises:
        Fp8PipeError: see the error's own text; checkpoints written so far stay in `OUTPUT.partial`.
    """
    check_device(config.device)
    source = resolve_model(config.model)
    check_unquantized(source.path)
    text = load_text(config, source)
    kind = "falqon" if config.method == "falqon" else "lora-merged"
    with ArtifactWriter(output, kind=kind, stage="finetune", force=force, resume=resume) as writer:
        for warning in text.warnings:
            writer.warn(warning)
        model = load_model(config, source)
        method = build_method(config)
        store = CheckpointStore(writer.root / _CHECKPOINTS, config.keep_checkpoints)
        records = _prepare(config, model, method, store)
        converted = [record.name for record in records if record.converted]
        names = checkpoint_names(source.path, converted, getattr(model, "base_model_prefix", ""))
        trainer = Trainer(config, model, method, text.train, text.heldout, store, writer.root / _METRICS)
        if trainer.resume():
            _LOG.info("resumed after step %d", trainer.step)
        _announce(records)
        with track(config.steps, "training", done=trainer.step) as progress:
            trainer.run(lambda m: progress.advance(loss=m["loss"], tokens_per_second=m["tokens_per_second"]))
        return _deploy(config, source, text, writer, trainer, records, names)


def check_device(device: str) -> None:
    """Refuse a device that is not there.

    Raises:
        MissingCapabilityError: CUDA asked for and absent, or without FP8.
    """
    if device == "cpu":
        return
    if not torch.cuda.is_available():
        raise MissingCapabilityError(
            "no CUDA device is available", why="torch.cuda.is_available() is false", fix="use --device cpu"
        )
    capability = torch.cuda.get_device_capability()
    if capability < (8, 9):
        raise MissingCapabilityError(
            f"{torch.cuda.get_device_name()} has no FP8 tensor cores",
            why=f"its compute capability is {capability[0]}.{capability[1]}; FP8 begins at 8.9",
            fix="use a GPU of the Ada, Hopper or Blackwell generation, or --device cpu",
        )


def load_text(config: FinetuneConfig, source: ModelSource) -> TrainingText:
    """Read, split, encode and batch the training text.

    Raises:
        ConfigurationError: data that is empty, malformed, or without answers.
    """
    tokenizer = import_transformers().AutoTokenizer.from_pretrained(source.path)
    records = load_records(config.data)
    train, heldout = split(records, heldout_fraction=config.heldout_fraction, seed=0)
    heldout = heldout[: config.heldout_limit]
    encoded_train = encode(train, tokenizer, config.sequence_length)
    encoded_heldout = encode(heldout, tokenizer, config.sequence_length)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    common = {"batch_size": config.batch_size, "sequence_length": config.sequence_length, "pad_id": pad or 0}
    facts = {"records": len(records), "train": len(train), "heldout": len(heldout)}
    return TrainingText(
        train=Batches(encoded_train.examples, seed=config.seed, packing=config.packing, **common),
        heldout=Batches(encoded_heldout.examples, seed=0, packing=config.packing, **common),
        facts=facts,
        warnings=[*encoded_train.warnings],
    )


def load_model(config: FinetuneConfig, source: ModelSource) -> nn.Module:
    """The base model in the configured dtype, on its device."""
    auto = import_transformers().AutoModelForCausalLM
    try:
        model = auto.from_pretrained(source.path, dtype=getattr(torch, config.dtype))
    except (ValueError, KeyError, OSError) as error:
        raise ConfigurationError(
            f"{config.model} cannot be loaded as a causal language model",
            why=str(error).splitlines()[0],
            fix="give a decoder model that transformers' AutoModelForCausalLM knows",
        ) from error
    model.config.use_cache = False
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.to(config.device)


def build_method(config: FinetuneConfig) -> Method:
    """The method that the configuration names."""
    if config.method == "falqon":
        return FalqonMethod(
            update_rule(config.update_rule), rank=config.rank, rows=config.rows, initialisation=config.initialisation,
            seed=config.seed,
        )  # fmt: skip
    return LoraMethod(rank=config.rank, alpha=config.lora_alpha, seed=config.seed, quantized=config.method == "qlora")


def _prepare(config: FinetuneConfig, model: nn.Module, method: Method, store: CheckpointStore) -> list[LayerRecord]:
    described = config.model_dump(mode="json")
    if store.started():
        store.check_config(described)
        return method.prepare(model, store.base())
    records = method.prepare(model)
    store.begin(described, method.base_state())
    return records


def _announce(records: list[LayerRecord]) -> None:
    done = [record for record in records if record.converted]
    skipped = [record for record in records if not record.converted]
    _LOG.info("converted %d of %d linear layers", len(done), len(records))
    for record in skipped:
        _LOG.info("left out: %s (%s)", record.name, record.reason)


def _deploy(
    config: FinetuneConfig,
    source: ModelSource,
    text: TrainingText,
    writer: ArtifactWriter,
    trainer: Trainer,
    records: list[LayerRecord],
    names: dict[str, str],
) -> Artifact:
    """Last flush, evaluation of what is deployed, weights on disk and read back, manifest."""
    model, method = trainer.model, trainer.method
    report = method.finish(model, trainer.calibration_inputs)
    heldout = (text.heldout.at(i) for i in range(len(text.heldout)))
    deployed = heldout_loss(model, heldout, config.device)
    untuned = next(line["heldout_loss"] for line in trainer.history if "heldout_loss" in line)
    trainer.record({"step": trainer.step, "deployed_loss": deployed})
    weights = {names[name]: value for name, value in method.deployed_weights().items()}
    write_checkpoint(source.path, writer.root, weights)
    _write_adapter(writer, method)
    differing = count_differing(writer.root, weights)
    writer.gate(Gate(name="reopened bytes differing", value=differing, threshold=0, passed=differing == 0))
    learned = Gate(
        name="held-out loss of the deployed weights", value=deployed, threshold=untuned, passed=deployed < untuned,
        detail="nats an answer token; below the untuned model",
    )  # fmt: skip
    writer.gate(learned)
    if not learned.passed:
        writer.warn(
            f"the tuned model is no better on held-out text than the untuned one ({deployed:.4f}, {untuned:.4f})"
        )
    plot_run(trainer.history, writer.root / "plot.png", f"{config.method} on {source.origin}")
    transposed = [name for name, weight in weights.items() if weight.transposed]
    return writer.commit(
        config=config.model_dump(mode="json"),
        seed=config.seed,
        parents=[Parent(kind="model", digest=weights_digest(source.path), path=source.origin)],
        number_format=NumberFormat(name="e4m3", granularity="per-tensor") if config.method == "falqon" else None,
        runtime={"device": config.device, "threads": torch.get_num_threads(), "native": native.library() is not None},
        layers=[r.model_copy(update={"name": names.get(r.name, r.name)}) for r in records],
        extra={
            "adapter": "flushed" if config.method == "falqon" else "merged", "rule": config.update_rule,
            "rank": config.rank, "base_dtype": config.dtype, "transposed": transposed, "data": text.facts,
            "last_flush": report.health() if report is not None else None,
            "heldout_loss": {"untuned": untuned, "deployed": deployed},
        },
        exclude=[_CHECKPOINTS],
    )  # fmt: skip


def _write_adapter(writer: ArtifactWriter, method: Method) -> None:
    from safetensors.torch import save_file

    tensors = method.adapter()
    if tensors:
        save_file(
            {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, writer.root / "adapter.safetensors"
        )
