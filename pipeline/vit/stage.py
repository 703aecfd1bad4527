"""The stage `quantize-vit`: make calibration images, calibrate and distill a student, and write it as an artifact.

The artifact is verified: a new process rebuilds the model from its files, and the outputs must be bit-identical.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from calibration.image_set import ImageSet
from calibration.make import ImageRequest, make_images, read_images
from fp8pipe.artifact import Artifact, ArtifactWriter, check_place
from fp8pipe.artifact.kinds import VIT_KIND
from fp8pipe.core.devices import on_device, parts_on, to_device
from fp8pipe.core.plan import enter_phase
from fp8pipe.core.progress import track
from fp8pipe.core.work import WorkPool
from fp8pipe.models.vision.image_folder import ImageFolder
from fp8pipe.models.vision.quantized import Quantizer
from fp8pipe.models.vision.sources import VisionModel, load_vision_model
from fp8pipe.models.vision.structure import VitStructure, read_structure
from fp8pipe.numerics.bf16 import widen_bf16_products
from fp8pipe.numerics.convolutions import plain_convolutions
from fp8pipe.numerics.kinds import Kind
from pipeline.finetune.checkpoint import CheckpointStore
from pipeline.tracking.config import require_trackers
from pipeline.tracking.reporter import Reporter, reporting
from pipeline.tracking.tracker import Subject
from pipeline.vit.allocation import allocate_bits
from pipeline.vit.augment import first_views
from pipeline.vit.config import QuantizeVitConfig
from pipeline.vit.deploy import CHECKPOINTS, IMAGES_WORK, Run, are_pictures, deploy
from pipeline.vit.distill import Distiller
from pipeline.vit.evaluate import read_evaluation_folder
from pipeline.vit.initialise import (
    activation_bits,
    activation_kinds,
    choose_quantizer,
    choose_steps,
    sample_sites,
    weight_formats,
)
from pipeline.vit.output_ranges import refine_ranges
from pipeline.vit.rounding import compensate_model, input_moments, refit_model
from pipeline.vit.student import Student
from pipeline.vit.transforms.apply import Transformed, apply_transforms

_LOG = logging.getLogger(__name__)
_BATCH = 32
_COMPARED = 16  # images on which every site is rounded to every width in turn


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
        store = CheckpointStore(writer.root / CHECKPOINTS, keep=2)
        if store.started():
            store.check_config(described, {"model": vision.digest})
        else:
            store.begin(described, {"model": vision.digest})
        for note in vision.notes:
            writer.warn(note)
        started = time.perf_counter()
        enter_phase("images")
        images = given or _make(config, vision, structure, writer.root / IMAGES_WORK, pool, reporter)
        for note in (*vision.notes, *structure.notes, *images.notes):
            writer.warn(note)
        seconds = {"images": time.perf_counter() - started}
        started = time.perf_counter()
        student, history, transformed = _train(config, vision, structure, images, store, reporter)
        seconds["training"] = time.perf_counter() - started
        run = Run(config, vision, structure, images, student, history, transformed, seconds)
        artifact = deploy(run, folder, writer, pool)
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
    measured = pixels if are_pictures(images) else first_views(pixels, config.distill, config.seed, device)
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
    first = to_device(pixels[:_BATCH], device)

    def ranges(widths: Mapping[str, int]) -> dict[str, Quantizer]:
        chosen = {site: choose_quantizer(values, widths[site], kinds[site]) for site, values in samples.items()}
        return refine_ranges(vision, structure, chosen, widths, first)

    if config.allocation == "sensitivity":
        bits = allocate_bits(vision, structure, bits, ranges, first[:_COMPARED])
    activations = ranges(bits)
    formats = weight_formats(structure, config.precision, config.edges)
    if config.rounding == "nearest":
        return Student(vision, structure, formats, choose_steps(vision, formats), activations)
    moments = input_moments(vision, structure, activations, parts_on(pixels, _BATCH, device))
    vision = replace(vision, model=copy.deepcopy(vision.model))
    refit_model(vision.model, structure, formats, moments)
    steps = choose_steps(vision, formats)
    compensate_model(vision.model, structure, formats, steps, moments)
    return Student(vision, structure, formats, steps, activations)
