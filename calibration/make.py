"""Makes or reads calibration images by any method: synthetic, noise, from a folder, or from an earlier artifact.

Synthetic images are made in batches that are stored as they are finished, so that an interrupted run can be resumed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calibration.config import SynthesisConfig
from calibration.generator import Synthesizer
from calibration.image_set import ImageSet
from calibration.views import image_stream, normal
from fp8pipe.artifact.writer import lock
from fp8pipe.core.errors import BadArtifactError, ConfigurationError
from fp8pipe.core.work import Item, Job, LocalPool, WorkPool
from fp8pipe.models.vision.image_folder import UNLABELLED, batches, list_pictures
from fp8pipe.models.vision.sources import VisionModel
from fp8pipe.models.vision.structure import VitStructure

FOLDER_PREFIX, ARTIFACT_PREFIX = "images:", "artifact:"
ARTIFACT_IMAGES = "calibration"  # folder in an artifact
IMAGES_JOB = "images"  # name of the job that makes synthetic images
METHODS = ("synthetic", "patch-similarity", "gaussian")
OnBatch = Callable[[int, ImageSet], None]


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """Which images to make or read.

    Raises:
        ConfigurationError: the method is unknown; the message lists the known ones.
    """

    method: str  # synthetic, patch-similarity, gaussian, images:DIR, or artifact:DIR (images of an artifact)
    count: int  # number of images
    seed: int  # seed of their random streams, or of the selection from a folder
    synthesis: SynthesisConfig  # for the methods synthetic and patch-similarity

    def __post_init__(self) -> None:
        if self.method in METHODS or self.method.startswith((FOLDER_PREFIX, ARTIFACT_PREFIX)):
            return
        raise ConfigurationError(
            f"there is no calibration method {self.method!r}",
            why=f"it is one of {', '.join(METHODS)}, images:DIR (of a folder), artifact:DIR (of an artifact)",
            fix="use --calibration synthetic",
        )


def make_images(
    request: ImageRequest,
    vision: VisionModel,
    structure: VitStructure,
    *,
    checkpoints: Path | None = None,
    on_batch: OnBatch = lambda first, batch: None,
    pool: WorkPool | None = None,
) -> ImageSet:
    """Make or read the requested images.

    Args:
        request: the request.
        vision: the float model to calibrate.
        structure: the model's structure.
        checkpoints: directory in which finished batches are stored, for a resumed run.
        on_batch: called with every batch of made images, and before it the number of its first image; also with those
            that an earlier run has made. The order is not fixed.
        pool: shares the batches of synthetic images with other processes, which then compute them with `batch_maker`.

    Raises:
        ConfigurationError: a folder does not exist or has too few images, images became NaN in every attempt, or
            another process is making images in `checkpoints`.
    """
    given = read_images(request, vision, structure)
    if given is not None:
        return given
    structure = _targets(vision, structure)
    if request.method == "gaussian":
        streams = [image_stream(request.seed, i) for i in range(request.count)]
        noise = vision.preprocessing.to_uint8(normal(streams, 3, *structure.image_size))
        made = ImageSet(noise, None, request.method, request.seed)
        on_batch(0, made)
        return made
    if checkpoints is None:
        return _synthesize(request, vision, structure, None, on_batch, pool or LocalPool())
    checkpoints.mkdir(parents=True, exist_ok=True)
    with lock(checkpoints):  # an earlier run that is still active would write the same batches
        _prepare(checkpoints, request, vision)
        return _synthesize(request, vision, structure, checkpoints, on_batch, pool or LocalPool())


def read_images(request: ImageRequest, vision: VisionModel, structure: VitStructure) -> ImageSet | None:
    """Read the requested images from a folder or an artifact; None if the method makes new images.

    Raises:
        Fp8PipeError: there are no images or too few, or one cannot be read.
    """
    if request.method.startswith(FOLDER_PREFIX):
        return _from_folder(request, vision)
    return _from_artifact(request, structure) if request.method.startswith(ARTIFACT_PREFIX) else None


def batch_maker(request: ImageRequest, vision: VisionModel, structure: VitStructure, spans: bytes) -> Item:
    """A function that makes the batches of one item of work, and returns them as bytes for `ImageSet.from_bytes`.

    Args:
        request: the request; its method is synthetic or patch-similarity.
        vision: the float model.
        structure: the model's structure.
        spans: payload of the job: for each item the numbers of its first image and of the one after its last, and
            rank 0's request and number of threads.

    Raises:
        ConfigurationError: this request is not that of rank 0.
        ConfigurationError: the model has no attention maps to compare, or does not support a configured option.
    """
    shared = json.loads(spans)
    ours = _described(request, vision)
    if different := sorted(key for key in ours if shared["request"][key] != ours[key]):
        raise ConfigurationError(
            "this process was started for other images than rank 0",
            why=f"these differ: {', '.join(different)}",
            fix="start every process with the same model and the same options",
        )
    torch.set_num_threads(shared["threads"])  # products in fp32 can depend on it
    return _maker(_synthesizer(request, vision, structure), shared["spans"])


def _maker(synthesizer: Synthesizer, spans: Sequence[tuple[int, int]]) -> Item:
    def make(number: int) -> bytes:
        first, end = spans[number]
        return synthesizer.batch(first, end - first).to_bytes()

    return make


def _synthesizer(request: ImageRequest, vision: VisionModel, structure: VitStructure) -> Synthesizer:
    config = request.synthesis
    if request.method == "patch-similarity":  # PSAQ-ViT's loss instead of MimiQ's
        config = config.model_copy(update={"similarity": 0.0, "entropy": 1.0})
    return Synthesizer(vision, _targets(vision, structure), config, request.seed)


def _targets(vision: VisionModel, structure: VitStructure) -> VitStructure:
    """The structure without classes if the model has none to make images for (regression, or a single label)."""
    return replace(structure, classes=None) if vision.architecture.choices is None else structure


def _synthesize(
    request: ImageRequest, vision: VisionModel, structure: VitStructure, checkpoints: Path | None,
    on_batch: OnBatch, pool: WorkPool,
) -> ImageSet:  # fmt: skip
    # Make the images that no earlier run has stored in `checkpoints`, and join all batches.
    size, parts = request.synthesis.batch_size, {}
    for first in range(0, request.count, size):
        if checkpoints is not None and _place(checkpoints, first).is_dir():
            parts[first] = ImageSet.load(_place(checkpoints, first))
            on_batch(first, parts[first])
    # As many batches as a GPU can hold are made together, but stored one by one: a resumed run may have another GPU.
    synthesizer = _synthesizer(request, vision, structure)
    missing = [first for first in range(0, request.count, size) if first not in parts]
    spans = _spans(missing, request, synthesizer.at_once)
    shared = {"request": _described(request, vision), "spans": spans, "threads": torch.get_num_threads()}
    job = Job(IMAGES_JOB, len(spans), json.dumps(shared).encode())
    for number, made in pool.results(job, _maker(synthesizer, spans)):
        first, end = spans[number]
        whole = replace(ImageSet.from_bytes(made), method=request.method)
        for start in range(first, end, size):
            parts[start] = whole.part(start - first, min(start + size, end) - first)
            if checkpoints is not None:
                _keep(parts[start], _place(checkpoints, start))
            on_batch(start, parts[start])
    whole = ImageSet.joined([parts[first] for first in sorted(parts)])
    return replace(
        whole, method=request.method, seed=request.seed, labels=None if structure.classes is None else whole.labels
    )


def _spans(missing: list[int], request: ImageRequest, at_once: int | None) -> list[tuple[int, int]]:
    """First image and end of each item of work: consecutive missing batches, as many as a GPU can hold."""
    size, spans = request.synthesis.batch_size, list[tuple[int, int]]()
    together = max(1, (at_once or 0) // size) * size
    for first in missing:
        end = min(first + size, request.count)
        if spans and spans[-1][1] == first and end - spans[-1][0] <= together:
            spans[-1] = (spans[-1][0], end)
        else:
            spans.append((first, end))
    return spans


def _place(checkpoints: Path, first: int) -> Path:
    return checkpoints / f"batch-{first:06d}"


def _keep(part: ImageSet, folder: Path) -> None:
    """Store a batch in `folder`, atomically."""
    scratch = folder.with_name(f"writing-{folder.name}")
    shutil.rmtree(scratch, ignore_errors=True)
    part.save(scratch)
    scratch.rename(folder)


def _described(request: ImageRequest, vision: VisionModel) -> dict[str, Any]:
    """All that images depend on, in JSON's types."""
    return {
        "method": request.method, "count": request.count, "seed": request.seed, "model": vision.digest,
        "synthesis": request.synthesis.model_dump(mode="json"),
    }  # fmt: skip


def _prepare(checkpoints: Path, request: ImageRequest, vision: VisionModel) -> None:
    """Record the request in a directory of batches, or check that the batches there belong to the same request.

    Raises:
        BadArtifactError: the record is damaged.
        ConfigurationError: the batches were made for another request.
    """
    described = _described(request, vision)
    record = checkpoints / "request.json"
    if not record.is_file():
        scratch = record.with_suffix(".writing")
        scratch.write_text(json.dumps(described))
        scratch.replace(record)
        return
    try:
        stored = json.loads(record.read_text())
    except ValueError as error:
        raise BadArtifactError(f"{record} is damaged", why=str(error), fix="start over with --force") from error
    different = sorted(key for key in described if stored.get(key) != described[key])
    if different:
        raise ConfigurationError(
            f"the images in {checkpoints} were started with other settings",
            why=f"these differ: {', '.join(different)}",
            fix="resume with the same options, or start from scratch with --force",
        )


def _from_folder(request: ImageRequest, vision: VisionModel) -> ImageSet:
    # Draw images at random from a folder, and preprocess them.
    path = Path(request.method.removeprefix(FOLDER_PREFIX)).expanduser()
    folder = list_pictures(path)
    if len(folder.files) < request.count:
        raise ConfigurationError(
            f"{path} has too few pictures",
            why=f"{request.count} are needed, it holds {len(folder.files)}",
            fix=f"use --images {len(folder.files)} or fewer",
        )
    generator = torch.Generator().manual_seed(request.seed)
    rows = torch.randperm(len(folder.files), generator=generator)[: request.count].tolist()
    pixels: Tensor = torch.cat(list(batches(folder, rows, vision.preprocessing, size=64)))
    labels = torch.tensor([folder.labels[row] for row in rows]) if folder.classes != UNLABELLED else None
    return ImageSet(pixels, labels, request.method, None)


def _from_artifact(request: ImageRequest, structure: VitStructure) -> ImageSet:
    """Read the first images of an earlier run's artifact, so that models of several precisions can share images."""
    path = Path(request.method.removeprefix(ARTIFACT_PREFIX)).expanduser()
    if not (path / ARTIFACT_IMAGES).is_dir():
        raise ConfigurationError(
            f"{path} holds no calibration images",
            why="it has no folder " + ARTIFACT_IMAGES if path.is_dir() else "there is no such directory",
            fix="give the directory that an earlier `fp8pipe quantize-vit` wrote",
        )
    found = ImageSet.load(path / ARTIFACT_IMAGES)
    size = tuple(found.images.shape[2:])
    if len(found.images) < request.count or size != tuple(structure.image_size):
        raise ConfigurationError(
            f"the images of {path} cannot be used",
            why=f"it holds {len(found.images)} of {size}; {request.count} of {tuple(structure.image_size)} are needed",
            fix="use --images N for fewer, or make new ones with --calibration synthetic",
        )
    few = slice(request.count)
    losses = {name: values[few] for name, values in found.losses.items()}
    labels = None if found.labels is None else found.labels[few]
    return replace(found, images=found.images[few], labels=labels, losses=losses)
