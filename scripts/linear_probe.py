"""Train a linear classifier on the features of a vision backbone, with the images of a folder.

    python scripts/linear_probe.py --model sample:vit-s --data FOLDER --output DIR
        [--image-size N] [--train-fraction X] [--seed N] [--decay X] [--batch-size N] [--dtype bfloat16|float32]
        [--split SPLIT]

FOLDER contains one subfolder of images per class. The inputs of the classifier are the class token and the mean of the
patch tokens (see `fp8pipe.models.vision.architecture.ClassAndPatches`). They are computed once and standardized; then a
multinomial logistic regression with an L2 term is fitted with L-BFGS, and the standardization is folded into its
weights. The loss is convex and minimized to convergence, so the result depends only on the seed of the split, and not
on a training schedule. DIR is a model directory for every command that accepts a vision model.

The held-out part is used only once, for the accuracy that is printed at the end. With --split, both parts are written
as image folders of symbolic links, SPLIT/train and SPLIT/held-out, for calibration and evaluation on the same images.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from fp8pipe.core.errors import ConfigurationError, Fp8PipeError
from fp8pipe.models.vision.architecture import ClassAndPatches, build
from fp8pipe.models.vision.image_folder import ImageFolder, batches, read_image_folder
from fp8pipe.models.vision.sources import VisionModel, load_vision_model, save_vision_model
from fp8pipe.numerics.bf16 import widen_bf16_products


@dataclass(frozen=True, slots=True)
class Probe:
    """A backbone with its new head.

    Attributes:
        vision: the classifier.
        train_rows: indices of the images that the head was fitted on.
        held_out_rows: indices of the other images.
        held_out_top1: top-1 accuracy on them, 0 to 1; features in the chosen dtype, head in float32.
    """

    vision: VisionModel
    train_rows: list[int]
    held_out_rows: list[int]
    held_out_top1: float


def split_rows(labels: tuple[int, ...], train_fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Split the images of each class at random into `train_fraction` for training and the rest.

    Returns:
        Sorted indices of the training images and of the held-out images.

    Raises:
        ConfigurationError: one part would have no image of a class.
    """
    random = torch.Generator().manual_seed(seed)
    train: list[int] = []
    held_out: list[int] = []
    for label in sorted(set(labels)):
        rows = [row for row, one in enumerate(labels) if one == label]
        order = [rows[i] for i in torch.randperm(len(rows), generator=random).tolist()]
        cut = round(len(rows) * train_fraction)
        if not 0 < cut < len(rows):
            raise ConfigurationError(
                f"class {label} cannot be split",
                why=f"it has {len(rows)} images, of which {cut} would be for training",
                fix="give more images of it, or another --train-fraction",
            )
        train += order[:cut]
        held_out += order[cut:]
    return sorted(train), sorted(held_out)


def with_head(vision: VisionModel, classes: tuple[str, ...]) -> VisionModel:
    """The backbone with a randomly initialized classification head for `classes`.

    Raises:
        TypeError: the architecture cannot be built with such a head.
    """
    architecture = vision.architecture.model_copy(update={"classes": classes, "head": "probe", "activation": "softmax"})
    model = build(architecture)
    if not isinstance(model, ClassAndPatches):
        raise TypeError(type(model))
    model.backbone.load_state_dict(vision.model.state_dict())
    return VisionModel.of(model.state_dict(), architecture, vision.preprocessing, vision.origin)


@torch.no_grad()
def folder_features(
    vision: VisionModel, folder: ImageFolder, rows: list[int], batch_size: int, dtype: torch.dtype
) -> Tensor:
    """Compute the inputs of the head for some images of a folder.

    Args:
        vision: a model with such a head, see `with_head`.
        folder: the image folder.
        rows: indices of the images.
        batch_size: images per batch.
        dtype: compute dtype of the backbone.

    Returns:
        (len(rows), width) float32.
    """
    if not isinstance(vision.model, ClassAndPatches):
        raise TypeError(type(vision.model))
    parts = []
    for codes in batches(folder, rows, vision.preprocessing, batch_size):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            parts.append(vision.model.features(vision.preprocessing.normalize(codes)).float())
    return torch.cat(parts)


def fit_head(features: Tensor, labels: Tensor, classes: int, decay: float) -> nn.Linear:
    """Minimize mean cross-entropy + decay/2 * |W|^2 on standardized features.

    Args:
        features: (N, width) float32, not standardized.
        labels: (N,) int64.
        classes: number of classes.
        decay: strength of the L2 term.

    Returns:
        A float32 layer for unstandardized features, with the standardization folded into its weights.
    """
    mean, deviation = features.mean(dim=0), features.std(dim=0).clamp_min(1e-6)
    standard = (features - mean) / deviation
    weight = torch.zeros(classes, features.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=300, history_size=20, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = functional.cross_entropy(functional.linear(standard, weight, bias), labels)
        value = value + decay / 2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    head = nn.Linear(features.shape[1], classes)
    with torch.no_grad():
        head.weight.copy_(weight / deviation)
        head.bias.copy_(bias - head.weight @ mean)
    return head.requires_grad_(False)


def fit_probe(
    vision: VisionModel,
    folder: ImageFolder,
    *,
    train_fraction: float = 0.8,
    seed: int = 0,
    decay: float = 3e-2,
    batch_size: int = 32,
    dtype: torch.dtype = torch.bfloat16,
) -> Probe:
    """Split the folder, compute features, fit the head, and measure its accuracy on the held-out images.

    Args:
        vision: the backbone.
        folder: the image folder.
        train_fraction: share of each class that is used for training.
        seed: seed of the split.
        decay: strength of the L2 term.
        batch_size: images per batch.
        dtype: compute dtype of the backbone.

    Raises:
        ConfigurationError: a class has too few images to be split.
    """
    train_rows, held_out_rows = split_rows(folder.labels, train_fraction, seed)
    probed = with_head(vision, folder.classes)
    labels = torch.tensor(folder.labels)
    features = folder_features(probed, folder, train_rows, batch_size, dtype)
    head = fit_head(features, labels[train_rows], len(folder.classes), decay)
    probed.model.get_submodule("head").load_state_dict(head.state_dict())
    held_out = folder_features(probed, folder, held_out_rows, batch_size, dtype)
    top1 = (head(held_out).argmax(dim=-1) == labels[held_out_rows]).float().mean().item()
    origin = f"{vision.origin} + linear probe on {folder.path.name}"
    complete = VisionModel.of(probed.model.state_dict(), probed.architecture, probed.preprocessing, origin)
    return Probe(complete, train_rows, held_out_rows, top1)


def write_split(folder: ImageFolder, probe: Probe, place: Path) -> None:
    """Create symbolic links to the images in `place`/train and `place`/held-out, with one subfolder per class.

    Raises:
        ConfigurationError: `place` already exists.
    """
    if place.exists():
        raise ConfigurationError(
            f"{place} already exists", why="a split is never overwritten", fix="give another --split"
        )
    for part, rows in (("train", probe.train_rows), ("held-out", probe.held_out_rows)):
        for row in rows:
            link = place / part / folder.files[row].relative_to(folder.path)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(folder.files[row].resolve())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a linear classifier on the features of a vision backbone.")
    parser.add_argument("--model", required=True, help="a backbone: directory, timm:NAME or sample:vit-s")
    parser.add_argument("--data", required=True, type=Path, help="image folder, one folder per class")
    parser.add_argument("--output", required=True, type=Path, help="directory to write")
    parser.add_argument("--image-size", type=int, help="side in pixels (default: the model's own)")
    parser.add_argument(
        "--train-fraction", type=float, default=0.8, help="share of each class that is used for training"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the split")
    parser.add_argument("--decay", type=float, default=3e-2, help="strength of the L2 term")
    parser.add_argument("--batch-size", type=int, default=32, help="images per batch")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="dtype in which features are computed"
    )
    parser.add_argument("--split", type=Path, help="directory for links to the images of both parts")
    return parser.parse_args()


def main() -> int:
    """Run from the command line; prints a JSON summary as the last line, and returns the exit code."""
    options = _arguments()
    begun = time.perf_counter()
    widen_bf16_products()
    try:
        size = None if options.image_size is None else (options.image_size, options.image_size)
        folder = read_image_folder(options.data)
        probe = fit_probe(
            load_vision_model(options.model, size),
            folder,
            train_fraction=options.train_fraction,
            seed=options.seed,
            decay=options.decay,
            batch_size=options.batch_size,
            dtype=getattr(torch, options.dtype),
        )
        save_vision_model(probe.vision, options.output)
        if options.split is not None:
            write_split(folder, probe, options.split)
    except Fp8PipeError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    counts = {"train": len(probe.train_rows), "held_out": len(probe.held_out_rows)}
    seconds = round(time.perf_counter() - begun, 1)
    print(
        json.dumps({"output": str(options.output), "held_out_top1": probe.held_out_top1, **counts, "seconds": seconds})
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
