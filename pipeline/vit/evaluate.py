"""Evaluate models, such as teacher and quantized model, on labelled images: top-1 and top-5 accuracy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fp8pipe.core.devices import to_device
from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.samples import sample_name
from fp8pipe.models.vision.image_folder import ImageFolder, batches, check_pictures, read_image_folder
from fp8pipe.models.vision.preprocessing import Preprocessing
from fp8pipe.models.vision.samples import digits_folder

Model = Callable[[Tensor], Tensor]
_ROWS = 64


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


@torch.no_grad()
def accuracy(
    models: dict[str, Model], folder: ImageFolder, preprocessing: Preprocessing, classes: tuple[str, ...],
    device: torch.device,
) -> dict[str, Any]:  # fmt: skip
    """Top-1 and top-5 accuracy of every model on the same images.

    Args:
        models: by name, functions that map normalized pixels `(N, 3, H, W)` to logits `(N, C)`, both on `device`.
        folder: the labelled images.
        preprocessing: the preprocessing of all models.
        classes: names of the C classes, in the order of the logits.
        device: the device of the models.

    Returns:
        The number of `images`, and for each model `top1` and `top5` as fractions.

    Raises:
        ConfigurationError: an image cannot be read; the error names it.
    """
    index = torch.tensor([classes.index(name) for name in folder.classes])
    hits = {name: torch.zeros(2, dtype=torch.int64, device=device) for name in models}
    raw = batches(folder, list(range(len(folder.files))), preprocessing, _ROWS)
    for codes, labels in zip(raw, torch.tensor(folder.labels).split(_ROWS), strict=True):
        pixels, wanted = to_device(preprocessing.normalize(codes), device), to_device(index[labels], device)
        for name, model in models.items():
            logits = model(pixels)
            right = logits.topk(min(5, logits.shape[1]), dim=1).indices == wanted[:, None]
            right &= logits.isfinite().all(1, keepdim=True)  # topk treats NaN as the largest value
            hits[name] += torch.stack([right[:, 0].sum(), right.any(1).sum()])
    count = len(folder.files)
    return {"images": count} | {
        name: {"top1": int(found[0]) / count, "top5": int(found[1]) / count} for name, found in hits.items()
    }
