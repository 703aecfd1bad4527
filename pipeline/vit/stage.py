"""The stage `quantize-vit`: make calibration images, calibrate and distill a student, and write it as an artifact.

The artifact is verified: a new process rebuilds the model from its files, and the outputs must be bit-identical.
"""

from __future__ import annotations

import copy
import json
import logging
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from calibration.image_set import ImageSet
from calibration.make import ARTIFACT_IMAGES, FOLDER_PREFIX, ImageRequest, make_images, read_images
from fp8pipe.artifact import (
    Artifact,
    ArtifactWriter,
    Gate,
    NumberFormat,
    Parent,
    ScaleRule,
    check_place,
)
from fp8pipe.artifact.kinds import VIT_KIND, Accuracy, FirstLast, TransformFacts, VitDetails
from fp8pipe.core.devices import on_device, parts_on
from fp8pipe.core.plan import enter_phase
from fp8pipe.core.progress import track
from fp8pipe.core.work import WorkPool
from fp8pipe.models.vision.image_folder import ImageFolder
from fp8pipe.models.vision.quantized import QuantizedVit, layer_records, save_quantized
from fp8pipe.models.vision.sources import VisionModel, load_vision_model
from fp8pipe.models.vision.structure import VitStructure, read_structure
from fp8pipe.numerics.bf16 import widen_bf16_products
from fp8pipe.numerics.convolutions import plain_convolutions
from fp8pipe.numerics.kinds import Kind, granularity
from pipeline.finetune.checkpoint import CheckpointStore
from pipeline.tracking.config import require_trackers
from pipeline.tracking.reporter import TRACKERS_FILE, Reporter, reporting
from pipeline.tracking.tracker import Subject
from pipeline.vit.augment import first_views
from pipeline.vit.config import QuantizeVitConfig
from pipeline.vit.distill import Distiller
from pipeline.vit.evaluate import accuracy, compared_models, read_evaluation_folder
from pipeline.vit.gates import agreement_gate, code_gate
from pipeline.vit.initialise import (
    activation_bits,
    activation_kinds,
    choose_quantizer,
    choose_steps,
    compensate_model,
    sample_sites,
    second_moments,
    weight_formats,
)
from pipeline.vit.payload import accuracy_payload
from pipeline.vit.student import Student
from pipeline.vit.transforms.apply import Transformed, apply_transforms

_LOG = logging.getLogger(__name__)
_IMAGES_WORK, _CHECKPOINTS, _METRICS = "images.partial", "checkpoints", "metrics.jsonl"
_PROBE_IMAGES = 8
_BATCH = 32


def quantize_vit(
    config: QuantizeVitConfig, output: Path, *, force: bool = False, resume: bool = False, pool: WorkPool | None = None
) -> Artifact:
    """Quantize a vision transformer and write the result as an artifact.

    Args:
        config: the resolved configuration.
        output: directory of the artifact; must not exist unless `force` is set.
        force: replace an existing artifact.
        resume: continue the unfinished run of `output`, if there is one.
        pool: shares synthesis and evaluation with other processes, which run `assist_quantize_vit`.

    Returns:
        The finished artifact (kind `vit`).

    Raises:
        Fp8PipeError: the stage failed; finished images and checkpoints are kept in `OUTPUT.partial`.
    """
    config = on_device(config)
    require_trackers(config.report_to)
    check_place(output, force=force, resume=resume)
    widen_bf16_products()
    image_request(config)  # rejects an unknown method
    vision = load_vision_model(config.model, config.size, activation=config.activation)
    folder = None if config.evaluate is None else read_evaluation_folder(config.evaluate, vision.architecture.choices)
    return quantize(config, vision, folder, output, force=force, resume=resume, pool=pool)


def image_request(config: QuantizeVitConfig) -> ImageRequest:
    """The request for the configured calibration images."""
    return ImageRequest(config.calibration, config.images, config.seed, config.synthesis)


def quantize(
    config: QuantizeVitConfig,
    vision: VisionModel,
    folder: ImageFolder | None,
    output: Path,
    *,
    force: bool = False,
    resume: bool = False,
    pool: WorkPool | None = None,
) -> Artifact:
    """Run the rest of the stage after the model has been loaded; see `quantize_vit`.

    It calls `enter_phase` at the beginning of each phase, by which dry runs measure memory and time. The model is moved
    to the configured device; images stay on the host. `folder` holds the labelled images to evaluate on, if any.
    """
    device = torch.device(config.device)
    with plain_convolutions(device):
        structure = read_structure(vision.model, vision.architecture.image_size)
        given = read_images(image_request(config), vision, structure)  # before any output, as this may raise an error
        placed = replace(vision, model=vision.model.to(device))
        return _write(config, placed, structure, given, folder, output, force=force, resume=resume, pool=pool)


def _write(
    config: QuantizeVitConfig, vision: VisionModel, structure: VitStructure, given: ImageSet | None,
    folder: ImageFolder | None, output: Path, *, force: bool, resume: bool, pool: WorkPool | None,
) -> Artifact:  # fmt: skip
    """Make and write the artifact from inputs that have been checked."""
    described = config.model_dump(mode="json")
    with (
        ArtifactWriter(output, kind=VIT_KIND, stage="quantize-vit", force=force, resume=resume) as writer,
        reporting(config.report_to, Subject(writer.output, "quantize-vit", described), writer.root) as reporter,
    ):
        store = CheckpointStore(writer.root / _CHECKPOINTS, keep=2)
        if store.started():
            store.check_config(described, {"model": vision.digest})
        else:
            store.begin(described, {"model": vision.digest})
        for note in vision.notes:
            writer.warn(note)
        started = time.perf_counter()
        enter_phase("images")
        images = given or _make(config, vision, structure, writer.root / _IMAGES_WORK, pool, reporter)
        for note in (*vision.notes, *structure.notes, *images.notes):
            writer.warn(note)
        seconds = {"images": time.perf_counter() - started}
        started = time.perf_counter()
        student, history, transformed = _train(config, vision, structure, images, store, reporter)
        seconds["training"] = time.perf_counter() - started
        artifact = _finish(
            config, vision, structure, images, student, history, transformed, seconds, folder, writer, pool
        )
        reporter.tag(artifact)
        return artifact


def _make(
    config: QuantizeVitConfig, vision: VisionModel, structure: VitStructure, folder: Path, pool: WorkPool | None,
    reporter: Reporter,
) -> ImageSet:  # fmt: skip
    with track(config.images, "images") as progress:

        def made(first: int, batch: ImageSet) -> None:
            progress.advance(len(batch.images))
            line = {f"synthesis/{name}": value for name, value in batch.mean_losses.items()}
            reporter.report("images", first // config.synthesis.batch_size, {"step": first + len(batch.images), **line})

        request = image_request(config)
        return make_images(request, vision, structure, checkpoints=folder, on_batch=made, pool=pool)


def _train(
    config: QuantizeVitConfig, vision: VisionModel, structure: VitStructure, images: ImageSet, store: CheckpointStore,
    reporter: Reporter,
) -> tuple[Student, list[dict[str, float]], Transformed]:  # fmt: skip
    """Apply equivalent transforms, initialise a student from the images, and distill it.

    Returns:
        The student, the metrics of its steps, and the transformed teacher.
    """
    enter_phase("transforms")
    pixels = vision.preprocessing.normalize(images.images)
    device = torch.device(config.device)
    measured = pixels if _are_pictures(images) else first_views(pixels, config.distill, config.seed, device)
    if config.precision.kind is Kind.INT:
        transformed = apply_transforms(vision, structure, measured, config.conditioning, config.seed)
    else:  # floating-point formats do not benefit from channels of similar magnitude
        transformed = Transformed(vision, (), ("equivalent transforms: left out, FP8 has its own exponents",))
    enter_phase("ranges")
    student = begin_student(config, transformed.vision, structure, measured)
    distiller = Distiller(student, transformed.vision, structure, pixels, config.distill, config.seed, store)
    if distiller.resume():
        _LOG.info("resumed after step %d", distiller.step)
    with track(config.distill.steps, "distillation", done=distiller.step) as progress:
        report = reporter.follow("distillation", distiller.history)

        def step(figures: dict[str, float]) -> None:
            progress.advance(loss=figures["loss"])
            report(figures)

        history = distiller.run(step)
    return student, history, transformed


def begin_student(config: QuantizeVitConfig, vision: VisionModel, structure: VitStructure, pixels: Tensor) -> Student:
    """Create a student with calibrated activation ranges and weight scales, and with compensated weights.

    Args:
        config: the resolved configuration.
        vision: the (transformed) float model; not changed.
        structure: its structure.
        pixels: normalized calibration images `(N, 3, H, W)`, on the host.

    Returns:
        The untrained student, on the device of the float model.
    """
    device = next(vision.model.parameters()).device
    bits = activation_bits(structure, config.precision, config.edges)
    kinds = activation_kinds(structure, config.precision)
    samples = sample_sites(vision, structure, parts_on(pixels, _BATCH, device), config.seed)
    activations = {site: choose_quantizer(values, bits[site], kinds[site]) for site, values in samples.items()}
    formats = weight_formats(structure, config.precision, config.edges)
    steps = choose_steps(vision, formats)
    if config.rounding == "compensated":
        moments = second_moments(vision, structure, activations, parts_on(pixels, _BATCH, device))
        vision = replace(vision, model=copy.deepcopy(vision.model))
        compensate_model(vision.model, structure, formats, steps, moments)
    return Student(vision, structure, formats, steps, activations)


def _finish(
    config: QuantizeVitConfig,
    vision: VisionModel,
    structure: VitStructure,
    images: ImageSet,
    student: Student,
    history: list[dict[str, float]],
    conditioned: Transformed,
    seconds: dict[str, float],
    folder: ImageFolder | None,
    writer: ArtifactWriter,
    pool: WorkPool | None,
) -> Artifact:
    enter_phase("deploy")
    quantized = student.deploy()
    save_quantized(writer.root, quantized)
    images.save(writer.root / ARTIFACT_IMAGES, vision.architecture.classes)
    (writer.root / _METRICS).write_text("".join(json.dumps(line) + "\n" for line in history))
    pixels = vision.preprocessing.normalize(images.images)
    for gate in (code_gate(quantized), _rebuild_gate(quantized, pixels[:_PROBE_IMAGES], writer.root)):
        writer.gate(gate)
    enter_phase("agree")
    device = torch.device(config.device)
    quantized = quantized.to(device)  # so far on the CPU, for writing and for the comparison with the rebuilt model
    similarity = agreement_gate(vision, quantized, pixels, structure, device)
    writer.gate(similarity)
    if not similarity.passed:
        writer.warn(f"the quantized model follows its teacher poorly: {similarity.name} {similarity.value:.3f}")
    if structure.is_backbone:
        writer.warn(
            "a backbone: images have no class prior, and distillation compares features (1 - cosine), not logits"
        )
    measured, classes = None, vision.architecture.choices
    if folder is not None and classes is not None:
        enter_phase("evaluate")
        shared = b"" if pool is None else accuracy_payload(writer.root, vision, folder)
        measured = accuracy(
            compared_models(vision, quantized), folder, vision.preprocessing, classes, device, pool, shared
        )
    enter_phase("commit")
    return writer.commit(
        config=config.model_dump(mode="json"),
        seed=config.seed,
        parents=[Parent(kind="model", digest=vision.digest.removeprefix("sha256:"), path=vision.origin)],
        number_format=NumberFormat(name=str(config.precision), granularity=granularity(config.precision.kind)),
        preprocessing=vision.preprocessing.model_dump(mode="json"),
        runtime={"device": config.device, "threads": torch.get_num_threads()},
        layers=layer_records(quantized, rule=ScaleRule.LEARNED if config.distill.steps else ScaleRule.CALIBRATED),
        details=VitDetails(
            precision=str(config.precision), edges=config.edges, images=len(images.images),
            image_method="images" if _are_pictures(images) else images.method,  # so that no local path is recorded
            image_losses=images.mean_losses,
            seconds={name: round(value, 1) for name, value in seconds.items()},
            transforms=TransformFacts(done=list(conditioned.steps), left_out=list(conditioned.notes)),
            seconds_per_image=round(seconds["images"] / len(images.images), 3),
            loss=FirstLast(first=history[0]["loss"], last=history[-1]["loss"]) if history else None,
            accuracy=None if measured is None else Accuracy.model_validate(measured),
        ),
        exclude=[_CHECKPOINTS, _IMAGES_WORK, TRACKERS_FILE], volatile=[_METRICS],
    )  # fmt: skip


def _are_pictures(images: ImageSet) -> bool:
    return images.method.startswith(FOLDER_PREFIX)


_FRESH = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from fp8pipe.models.vision.quantized import load_quantized
torch.set_num_threads(int(sys.argv[3]))
with torch.no_grad():
    logits = load_quantized(Path(sys.argv[1]))(load_file(Path(sys.argv[2]) / "probe.safetensors")["pixels"])
save_file({"logits": logits.contiguous()}, Path(sys.argv[2]) / "answer.safetensors")
"""


@torch.no_grad()
def _rebuild_gate(quantized: QuantizedVit, pixels: Tensor, root: Path) -> Gate:
    """A gate that the model, rebuilt from the written files in a new process, gives bit-identical logits.

    Args:
        quantized: the model that was written, on the CPU.
        pixels: normalized images `(N, 3, H, W)` to compare on.
        root: the directory with the written files.
    """
    scratch = root / _CHECKPOINTS  # deleted when the artifact is finished
    save_file({"pixels": pixels.contiguous()}, scratch / "probe.safetensors")
    command = [sys.executable, "-P", "-c", _FRESH, str(root), str(scratch), str(torch.get_num_threads())]
    ended = subprocess.run(command, capture_output=True, text=True)
    name = "logits differing after a fresh process"
    if ended.returncode:
        last = ended.stderr.strip().splitlines()[-1:] or ["no message"]
        return Gate(name=name, value=float(pixels.shape[0]), detail=last[0][:300])
    again = load_file(scratch / "answer.safetensors")["logits"]
    differing = int((again != quantized(pixels)).sum())
    return Gate(name=name, value=differing, detail=f"of {again.numel()}")
