"""The end of the stage `quantize-vit`: deploy the student, pass the gates, evaluate, and commit the artifact."""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch

from calibration.image_set import ImageSet
from calibration.make import ARTIFACT_IMAGES, FOLDER_PREFIX
from fp8pipe.artifact import Artifact, ArtifactWriter, NumberFormat, Parent, ScaleRule
from fp8pipe.artifact.kinds import Accuracy, FirstLast, TransformFacts, VitDetails
from fp8pipe.core.plan import enter_phase
from fp8pipe.core.work import WorkPool
from fp8pipe.models.vision.image_folder import ImageFolder
from fp8pipe.models.vision.quantized import QuantizedVit, layer_records, save_quantized
from fp8pipe.models.vision.sources import VisionModel
from fp8pipe.models.vision.structure import VitStructure
from fp8pipe.numerics.kinds import granularity
from pipeline.tracking.reporter import TRACKERS_FILE
from pipeline.vit.config import QuantizeVitConfig
from pipeline.vit.evaluate import accuracy, compared_models
from pipeline.vit.gates import agreement_gate, code_gate, rebuild_gate
from pipeline.vit.payload import accuracy_payload
from pipeline.vit.student import Student
from pipeline.vit.transforms.apply import Transformed

__all__ = ["CHECKPOINTS", "IMAGES_WORK", "Run", "are_pictures", "deploy"]

IMAGES_WORK, CHECKPOINTS = "images.partial", "checkpoints"  # directories that are not part of the artifact
_METRICS = "metrics.jsonl"
_PROBE_IMAGES = 8


@dataclass(frozen=True, slots=True)
class Run:
    """A student that has been distilled, and what it was made of.

    Attributes:
        config: the resolved configuration.
        vision: the original model, on the configured device.
        structure: its structure.
        images: the calibration images, on the host.
        student: the distilled student.
        history: the metrics of each step of the distillation.
        transformed: what was done to the teacher.
        seconds: duration of each part of the stage so far.
    """

    config: QuantizeVitConfig
    vision: VisionModel
    structure: VitStructure
    images: ImageSet
    student: Student
    history: list[dict[str, float]]
    transformed: Transformed
    seconds: dict[str, float]


def deploy(run: Run, folder: ImageFolder | None, writer: ArtifactWriter, pool: WorkPool | None) -> Artifact:
    """Deploy the student, write it, pass the gates, evaluate it, and commit the artifact.

    Args:
        run: at the end of the distillation.
        folder: labelled images to evaluate on, if any.
        writer: the writer of the artifact.
        pool: shares the evaluation with other processes.
    """
    enter_phase("deploy")
    quantized = run.student.deploy()
    save_quantized(writer.root, quantized)
    run.images.save(writer.root / ARTIFACT_IMAGES, run.vision.architecture.classes)
    (writer.root / _METRICS).write_text("".join(json.dumps(line) + "\n" for line in run.history))
    quantized = _pass_gates(run, quantized, writer)
    measured = _evaluate(run, quantized, folder, writer, pool)
    enter_phase("commit")
    config = run.config
    return writer.commit(
        config=config.model_dump(mode="json"),
        seed=config.seed,
        parents=[Parent(kind="model", digest=run.vision.digest.removeprefix("sha256:"), path=run.vision.origin)],
        number_format=NumberFormat(name=str(config.precision), granularity=granularity(config.precision.kind)),
        preprocessing=run.vision.preprocessing.model_dump(mode="json"),
        runtime={"device": config.device, "threads": torch.get_num_threads()},
        layers=layer_records(quantized, rule=ScaleRule.LEARNED if config.distill.steps else ScaleRule.CALIBRATED),
        details=_details(run, measured),
        exclude=[CHECKPOINTS, IMAGES_WORK, TRACKERS_FILE], volatile=[_METRICS],
    )  # fmt: skip


def _pass_gates(run: Run, quantized: QuantizedVit, writer: ArtifactWriter) -> QuantizedVit:
    """Add the gates and warnings to the artifact; returns the deployed model on the configured device."""
    pixels = run.vision.preprocessing.normalize(run.images.images)
    writer.gate(code_gate(quantized))
    writer.gate(rebuild_gate(quantized, pixels[:_PROBE_IMAGES], writer.root, writer.root / CHECKPOINTS))
    enter_phase("agree")
    device = torch.device(run.config.device)
    quantized = quantized.to(device)  # so far on the CPU, for writing and for the comparison with the rebuilt model
    similarity = agreement_gate(run.vision, quantized, pixels, run.structure, device)
    writer.gate(similarity)
    if not similarity.passed:
        writer.warn(f"the quantized model follows its teacher poorly: {similarity.name} {similarity.value:.3f}")
    if run.structure.is_backbone:
        writer.warn(
            "a backbone: images have no class prior, and distillation compares features (1 - cosine), not logits"
        )
    return quantized


def _evaluate(
    run: Run, quantized: QuantizedVit, folder: ImageFolder | None, writer: ArtifactWriter, pool: WorkPool | None
) -> Accuracy | None:
    """The accuracy on the labelled images; None if there are none."""
    vision, classes = run.vision, run.vision.architecture.choices
    if folder is None or classes is None:
        return None
    enter_phase("evaluate")
    shared = b"" if pool is None else accuracy_payload(writer.root, vision, folder)
    device = torch.device(run.config.device)
    models = compared_models(vision, quantized)
    return Accuracy.model_validate(accuracy(models, folder, vision.preprocessing, classes, device, pool, shared))


def _details(run: Run, measured: Accuracy | None) -> VitDetails:
    images, history = run.images, run.history
    return VitDetails(
        precision=str(run.config.precision), edges=run.config.edges, allocation=run.config.allocation,
        images=len(images.images),
        image_method="images" if are_pictures(images) else images.method,  # so that no local path is recorded
        image_losses=images.mean_losses,
        seconds={name: round(value, 1) for name, value in run.seconds.items()},
        transforms=TransformFacts(done=list(run.transformed.steps), left_out=list(run.transformed.notes)),
        seconds_per_image=round(run.seconds["images"] / len(images.images), 3),
        loss=FirstLast(first=history[0]["loss"], last=history[-1]["loss"]) if history else None,
        accuracy=measured,
    )  # fmt: skip


def are_pictures(images: ImageSet) -> bool:
    """Whether calibration images are files of a folder, rather than made by a method."""
    return images.method.startswith(FOLDER_PREFIX)
