"""Train `sample:vit-digits`: a small ViT for the training part of scikit-learn's digits data set.

    python scripts/train_vit_digits.py --output fp8pipe/models/vision/weights/vit_digits \\
        [--epochs N] [--seed N] [--threads N]

The weights in `fp8pipe/models/vision/weights/vit_digits` were written by this script with its default options. On
another machine, or with another number of threads, the weights differ slightly, at the same accuracy. The model is a
timm `VisionTransformer`: 24 x 24 pixels, patch size 4, 37 tokens, width 96, 6 heads of 16, 6 layers, 0.67 M parameters.
They are stored as float16 and converted to float32 when they are loaded. If you replace the weights, update their
digest in `fp8pipe/models/vision/samples.py`.

The held-out part is used only for the accuracy that is printed at the end: training stops at a fixed step, and the last
weights are kept.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from fp8pipe.models.vision.architecture import Architecture, build
from fp8pipe.models.vision.samples import DIGITS_CLASSES, DIGITS_PREPROCESSING, Digits, digits_split
from fp8pipe.models.vision.sources import WEIGHTS_FILE, VisionModel, load_vision_model, save_vision_model

ARCHITECTURE = Architecture(
    library="timm",
    name="vit_tiny_patch16_224",
    arguments={
        "img_size": 24, "patch_size": 4, "embed_dim": 96, "depth": 6, "num_heads": 6, "num_classes": 10,
    },
    image_size=(24, 24),
    classes=DIGITS_CLASSES,
    head="classifier",
)  # fmt: skip
BATCH = 64
PEAK_RATE = 2e-3


def inputs(part: Digits) -> Tensor:
    """The images as model inputs, (N, 3, 24, 24) float32, after the same preprocessing that the artifact contains."""
    from PIL import Image

    images = (Image.fromarray(image.permute(1, 2, 0).numpy()) for image in part.images)
    return torch.stack([DIGITS_PREPROCESSING.image_to_tensor(image) for image in images])


def augment(pixels: Tensor, random: torch.Generator) -> Tensor:
    """Randomly rotate, scale, shear and shift each image a little, filling with black; vary contrast and brightness.

    Args:
        pixels: (N, 3, H, W) float32, normalized; not modified.
        random: source of randomness.
    """
    count = len(pixels)

    def draw(width: float) -> Tensor:
        return (torch.rand(count, generator=random) * 2 - 1) * width

    angle, shear, zoom = draw(math.radians(14)), draw(0.15), 1 + draw(0.12)
    rows = [zoom * angle.cos(), zoom * (shear - angle.sin()), draw(0.14), zoom * angle.sin(), zoom * angle.cos()]
    theta = torch.stack([*rows, draw(0.14)], dim=1).view(count, 2, 3)
    grid = functional.affine_grid(theta, list(pixels.shape), align_corners=False)
    black = -1.0  # the pixel value 0 after normalization with mean 0.5 and standard deviation 0.5
    moved = functional.grid_sample(pixels - black, grid, align_corners=False) + black
    return moved * (1 + draw(0.1))[:, None, None, None] + draw(0.1)[:, None, None, None]


def initialize(model: nn.Module, random: torch.Generator) -> None:
    """Initialize the weight matrices in place with a truncated normal distribution.

    The standard deviation is 0.1 for the patch embedding and 0.02 for all others.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            std = 0.1 if "patch_embed" in name else 0.02
            nn.init.trunc_normal_(parameter, std=std, generator=random)


def train(model: nn.Module, pixels: Tensor, labels: Tensor, epochs: int, random: torch.Generator) -> None:
    """Train the model in place with AdamW, linear warm-up and cosine decay to zero.

    Args:
        model: the classifier.
        pixels: (N, 3, 24, 24) float32, normalized.
        labels: (N,) int64.
        epochs: number of passes over the images.
        random: source of randomness for the order and the augmentation.
    """
    steps = epochs * (len(labels) // BATCH)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE)
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / steps)),
    )
    begun = time.perf_counter()
    for epoch in range(epochs):
        order = torch.randperm(len(labels), generator=random)[: len(labels) // BATCH * BATCH]
        total = 0.0
        for rows in order.split(BATCH):
            logits = model(augment(pixels[rows], random))
            loss = functional.cross_entropy(logits, labels[rows], label_smoothing=0.1)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item() * len(rows)
        print(f"epoch {epoch + 1:3d}  loss {total / len(order):.4f}  {time.perf_counter() - begun:.0f} s", flush=True)


@torch.no_grad()
def accuracy(model: nn.Module, part: Digits) -> float:
    """Top-1 accuracy, 0 to 1."""
    return (model(inputs(part)).argmax(dim=-1) == part.labels).float().mean().item()


def main() -> None:
    """Train the model, save it, and print the accuracy of the saved model."""
    parser = argparse.ArgumentParser(description="Train sample:vit-digits.")
    parser.add_argument("--output", type=Path, default=Path("vit_digits"), help="directory to write")
    parser.add_argument("--epochs", type=int, default=60, help="passes over the 1198 images")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and augmentation")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train_part, held_out = digits_split()
    random = torch.Generator().manual_seed(options.seed)
    model = build(ARCHITECTURE).requires_grad_(True)
    initialize(model, random)
    train(model, inputs(train_part), train_part.labels, options.epochs, random)
    model.requires_grad_(False)
    vision = VisionModel.of(model.state_dict(), ARCHITECTURE, DIGITS_PREPROCESSING, "train_vit_digits")
    save_vision_model(vision, options.output)
    weights = load_file(options.output / WEIGHTS_FILE)
    save_file({name: tensor.half() for name, tensor in weights.items()}, options.output / WEIGHTS_FILE)
    saved = load_vision_model(str(options.output))
    print(f"training top-1 {accuracy(saved.model, train_part):.4f}")
    print(f"held-out top-1 {accuracy(saved.model, held_out):.4f}")


if __name__ == "__main__":
    main()
