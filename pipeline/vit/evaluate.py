"""Evaluate models, such as teacher and quantized model, on labelled images: top-1 and top-5 accuracy."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fp8pipe.core.devices import to_device
from fp8pipe.core.errors import ConfigurationError
from fp8pipe.core.work import Item, Job, LocalPool, WorkPool
from fp8pipe.models.samples import sample_name
from fp8pipe.models.vision.image_folder import ImageFolder, batches, check_pictures, read_image_folder
from fp8pipe.models.vision.prepare import vision_outputs
from fp8pipe.models.vision.preprocessing import Preprocessing
from fp8pipe.models.vision.quantized import QuantizedVit
from fp8pipe.models.vision.samples import digits_folder
from fp8pipe.models.vision.sources import VisionModel

Model = Callable[[Tensor], Tensor]
ACCURACY_JOB = "accuracy"  # name of the job that counts right answers
_ROWS = 64  # images in a batch
_ITEM = 8 * _ROWS  # images in an item of work


def read_evaluation_folder(source: str | Path, classes: tuple[str, ...] | None) -> ImageFolder:
    """Read a folder of labelled images and check that it suits the model.

    Args:
        source: a folder with one subfolder per class, named as the model's class, or `sample:digits`.
        classes: the model's class names; None if its outputs are not mutually exclusive classes.

    Raises:
        ConfigurationError: `source` is no image folder, `classes` is None, a subfolder is not named as a class, or an
            image is damaged.
    """
    if classes is None:
        raise ConfigurationError(
            "this model cannot be evaluated on labelled pictures",
            why="its outputs are features, values or a single label, not classes that exclude each other",
            fix="put a classifier on it first (scripts/linear_probe.py), or leave --evaluate out",
        )
    sample = sample_name(str(source), ("digits",), "picture")
    path = digits_folder() if sample else Path(source)
    folder = read_image_folder(path)
    unknown = sorted(set(folder.classes) - set(classes))
    if unknown:
        shown = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
        raise ConfigurationError(
            f"the folders of {path} are not classes of the model",
            why=f"no such class: {shown}; the model has {len(classes)}, beginning with {', '.join(classes[:5])}",
            fix="name each folder as the model names its class",
        )
    check_pictures(folder)
    return folder


def compared_models(vision: VisionModel, quantized: QuantizedVit) -> dict[str, Model]:
    """The two models whose accuracy `quantize-vit` measures."""
    return {"teacher": lambda pixels: vision_outputs(vision.model, pixels), "quantized": quantized}


def folder_digest(folder: ImageFolder) -> str:
    """SHA-256 over names, sizes and classes of a folder's pictures, to tell whether two machines have the same."""
    files = [(file.relative_to(folder.path).as_posix(), file.stat().st_size) for file in folder.files]
    return hashlib.sha256(json.dumps([files, folder.classes, folder.labels]).encode()).hexdigest()


@torch.no_grad()
def accuracy(
    models: dict[str, Model], folder: ImageFolder, preprocessing: Preprocessing, classes: tuple[str, ...],
    device: torch.device, pool: WorkPool | None = None, payload: bytes = b"",
) -> dict[str, Any]:  # fmt: skip
    """Top-1 and top-5 accuracy of every model on the same images.

    Args:
        models: by name, functions that map normalized pixels `(N, 3, H, W)` to logits `(N, C)`, both on `device`.
        folder: the labelled images.
        preprocessing: the preprocessing of all models.
        classes: names of the C classes, in the order of the logits.
        device: the device of the models.
        pool: shares the images with other processes, which then count with `hit_counter`.
        payload: what these processes need to load the models.

    Returns:
        The number of `images`, and for each model `top1` and `top5` as fractions.

    Raises:
        ConfigurationError: an image cannot be read; the error names it.
    """
    count = len(folder.files)
    hits = {name: [0, 0] for name in models}
    job = Job(ACCURACY_JOB, math.ceil(count / _ITEM), payload)
    counter = hit_counter(models, folder, preprocessing, classes, device)
    for _, found in (pool or LocalPool()).results(job, counter):
        for name, (top1, top5) in json.loads(found).items():
            hits[name] = [hits[name][0] + top1, hits[name][1] + top5]
    return {"images": count} | {
        name: {"top1": top1 / count, "top5": top5 / count} for name, (top1, top5) in hits.items()
    }


def hit_counter(
    models: dict[str, Model], folder: ImageFolder, preprocessing: Preprocessing, classes: tuple[str, ...],
    device: torch.device,
) -> Item:  # fmt: skip
    """A function that counts, for one item of work, the images whose class is the first or among the first five.

    The arguments are those of `accuracy`. It returns the two counts by model, as JSON.
    """
    index = torch.tensor([classes.index(name) for name in folder.classes])

    @torch.no_grad()
    def count(number: int) -> bytes:
        rows = list(range(len(folder.files)))[number * _ITEM : (number + 1) * _ITEM]
        hits = {name: torch.zeros(2, dtype=torch.int64, device=device) for name in models}
        labels = torch.tensor([folder.labels[row] for row in rows]).split(_ROWS)
        for codes, part in zip(batches(folder, rows, preprocessing, _ROWS), labels, strict=True):
            pixels, wanted = to_device(preprocessing.normalize(codes), device), to_device(index[part], device)
            for name, model in models.items():
                logits = model(pixels)
                right = logits.topk(min(5, logits.shape[1]), dim=1).indices == wanted[:, None]
                right &= logits.isfinite().all(1, keepdim=True)  # topk treats NaN as the largest value
                hits[name] += torch.stack([right[:, 0].sum(), right.any(1).sum()])
        return json.dumps({name: found.tolist() for name, found in hits.items()}).encode()

    return count
