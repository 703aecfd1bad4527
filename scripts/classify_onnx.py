"""Classify images with an exported ONNX model: everything that an inference service needs, in one file.

    python scripts/classify_onnx.py EXPORT image.jpg ... [--top 5]
    python scripts/classify_onnx.py EXPORT FOLDER

FOLDER contains one subfolder of images per class, named as the model's classes; the accuracy on them is printed. The
script needs onnxruntime, numpy, Pillow and the files of the export, but neither torch nor this project. Its
preprocessing gives bit-identical results to the preprocessing of the original model.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"}
BATCH = 64


def read_rgb(path: Path, recipe: dict) -> Image.Image:
    """Read an image of any mode as 8-bit RGB, and apply its EXIF orientation.

    Raises:
        SystemExit: the image cannot be read, or has floating-point pixels.
    """
    try:
        image = ImageOps.exif_transpose(Image.open(path))
        image.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise SystemExit(f"{path} cannot be read as an image: {error}") from error
    if image.mode == "F":
        raise SystemExit(f"{path}: floating-point pixels have no known range")
    if image.mode.startswith("I"):  # 16-bit greyscale: keep the 8 high bits
        image = Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8))
    transparent = "A" in image.getbands() or image.info.get("transparency") is not None
    if recipe.get("transparency") == "white" and transparent:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")


def preprocess(image: Image.Image, recipe: dict) -> np.ndarray:
    """Preprocess an RGB image as the export's preprocessing.json (`recipe`) specifies; returns (3, H, W) float32."""
    height, width = resized(image, recipe)
    if (image.height, image.width) != (height, width):
        if recipe.get("resizer") == "torchvision":
            image = resample(image, (height, width), recipe["interpolation"])
        else:
            image = image.resize((width, height), Image.Resampling[recipe["interpolation"].upper()])
    rows, columns = recipe["crop"]
    anchor = recipe.get("anchor", "even")
    top, left = start(height, rows, anchor), start(width, columns, anchor)
    canvas = Image.new("RGB", (columns, rows), tuple(recipe.get("padding", (0, 0, 0))))
    canvas.paste(image, (-left, -top))
    codes = np.asarray(canvas).transpose(2, 0, 1)
    mean, std = (np.array(recipe[key], np.float32).reshape(3, 1, 1) for key in ("mean", "std"))
    return (codes.astype(np.float32) / np.float32(recipe["divisor"]) - mean) / std


def resized(image: Image.Image, recipe: dict) -> tuple[int, int]:
    """(height, width) to which the image is resized before the crop."""
    side = recipe["resize"]
    if side is None:
        return image.height, image.width
    if isinstance(side, list):
        if recipe.get("ratio", "free") == "free":
            return side[0], side[1]
        shrink = image.height / side[0], image.width / side[1]
        factor = min(shrink) if recipe["ratio"] == "cover" else max(shrink)
        return max(1, round(image.height / factor)), max(1, round(image.width / factor))
    if image.height <= image.width:
        return side, side * image.width // image.height
    return side * image.height // image.width, side


def resample(image: Image.Image, size: tuple[int, int], kernel: str) -> Image.Image:
    """Resize an image to (height, width) with torchvision's integer arithmetic.

    The width is resized first, then the height; both results are rounded to 8 bits.
    """
    planes = np.asarray(image).transpose(2, 0, 1)
    for wanted in reversed(size):
        if planes.shape[2] != wanted:
            weights, places = integer_weights(planes.shape[2], wanted, kernel)
            sums = planes.astype(np.float64) @ weights  # sums of integers, exact in fp64
            planes = np.floor(sums / 2**places + 0.5).clip(0, 255).astype(np.uint8)
        planes = planes.swapaxes(1, 2)
    return Image.fromarray(np.ascontiguousarray(planes.transpose(1, 2, 0)))


def integer_weights(given: int, wanted: int, kernel: str) -> tuple[np.ndarray, int]:
    """Fixed-point resampling weights for one axis.

    Args:
        given: length of the axis in the image.
        wanted: length of the axis after resizing.
        kernel: bilinear, bicubic or lanczos.

    Returns:
        Integers of at most 15 bits, `(given, wanted)`, and the number of fractional bits.
    """
    scale = given / wanted
    stretch = max(scale, 1.0)
    support = {"bilinear": 1, "bicubic": 2, "lanczos": 3}[kernel] * stretch
    centers = scale * (np.arange(wanted)[:, None] + 0.5)
    starts = np.maximum((centers - support + 0.5).astype(np.int64), 0)
    ends = np.minimum((centers + support + 0.5).astype(np.int64), given)
    pixels = np.arange(given)
    x = np.abs((pixels - starts + (starts - centers) + 0.5) * (1.0 / stretch))
    if kernel == "bilinear":
        weights = np.maximum(1.0 - x, 0.0)
    elif kernel == "bicubic":
        near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
        weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    else:
        weights = np.where(x < 3, np.sinc(x) * np.sinc(x / 3), 0.0)
    weights = np.where((pixels >= starts) & (pixels < ends), weights, 0.0)
    weights /= np.cumsum(weights, axis=1)[:, -1:]
    places = 0
    while places < 22 and int(0.5 + float(weights.max()) * 2 ** (places + 1)) < 1 << 15:
        places += 1
    return np.trunc(weights * 2**places + np.copysign(0.5, weights)).T, places


def start(size: int, crop: int, anchor: str) -> int:
    """Offset of the crop along one axis, pixels; negative if the image is smaller than the crop."""
    if anchor == "corner":
        return 0
    if size < crop:
        return -((crop - size) // 2)
    return round((size - crop) / 2) if anchor == "even" else (size - crop) // 2


def open_model(export: Path) -> onnxruntime.InferenceSession:
    """Open the export's graph with the session settings recorded in its manifest, with which it was validated."""
    runtime = json.loads((export / "manifest.json").read_text(encoding="utf-8"))["runtime"]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    for key, value in runtime["session_entries"].items():
        options.add_session_config_entry(key, value)
    return onnxruntime.InferenceSession(
        str(export / "model.onnx"),
        options,
        disabled_optimizers=runtime["disabled_optimizers"],
        providers=["CPUExecutionProvider"],
    )


def classify(model: onnxruntime.InferenceSession, paths: list[Path], recipe: dict) -> np.ndarray:
    """Logits for the images, float32 (images, classes)."""
    pixels = np.stack([preprocess(read_rgb(path, recipe), recipe) for path in paths])
    return model.run(["logits"], {"pixels": pixels})[0]


def labelled(folder: Path, classes: list[str]) -> list[tuple[Path, int]]:
    """The images in the subfolders of `folder`, each with the index of its class.

    Raises:
        SystemExit: a subfolder is not named as a class of the model, or there are no images.
    """
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    unknown = [path.name for path in folders if path.name not in classes]
    if unknown:
        raise SystemExit(f"{folder}: the model has no class {', '.join(unknown[:5])}; it has {', '.join(classes[:5])}")
    found = [
        (path, classes.index(sub.name))
        for sub in folders
        for path in sorted(sub.rglob("*"))
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
    ]
    if not found:
        raise SystemExit(f"{folder} has no subfolders with images")
    return found


def print_accuracy(model: onnxruntime.InferenceSession, folder: Path, classes: list[str], recipe: dict) -> None:
    """Print top-1 and top-5 accuracy on all images of a folder."""
    images = labelled(folder, classes)
    first = five = 0
    for start in range(0, len(images), BATCH):
        chunk = images[start : start + BATCH]
        best = np.argsort(-classify(model, [path for path, _ in chunk], recipe), axis=1, kind="stable")[:, :5]
        right = best == np.array([label for _, label in chunk])[:, None]
        first, five = first + int(right[:, 0].sum()), five + int(right.any(1).sum())
    count = len(images)
    print(f"top-1 {first / count:.4f} ({first} of {count}), top-5 {five / count:.4f}")


def print_classes(
    model: onnxruntime.InferenceSession, path: Path, classes: list[str], recipe: dict, top: int, activation: str
) -> None:
    """Print the `top` most probable classes of one image; with activation "none", print all output values instead."""
    logits = classify(model, [path], recipe)[0].astype(np.float64)
    if activation == "none":
        print(f"{path}: " + ", ".join(f"{name} {value:.6g}" for name, value in zip(classes, logits, strict=True)))
        return
    shares = np.exp(logits - logits.max()) if activation == "softmax" else 1 / (1 + np.exp(-logits))
    shares /= shares.sum() if activation == "softmax" else 1
    best = np.argsort(-shares, kind="stable")[:top]
    print(f"{path}: " + ", ".join(f"{classes[i]} {shares[i]:.1%}" for i in best))


def main() -> None:
    """Print the most probable classes of each image, and the accuracy on each folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("export", type=Path)
    parser.add_argument("images", type=Path, nargs="+", help="images, or folders with one subfolder per class")
    parser.add_argument("--top", type=int, default=5, help="number of classes to print for an image")
    arguments = parser.parse_args()
    if not (arguments.export / "classes.json").is_file():
        raise SystemExit(f"{arguments.export} is a backbone: its outputs are features, not classes")
    classes = json.loads((arguments.export / "classes.json").read_text(encoding="utf-8"))
    recipe = json.loads((arguments.export / "preprocessing.json").read_text(encoding="utf-8"))
    manifest = json.loads((arguments.export / "manifest.json").read_text(encoding="utf-8"))
    # Exports that predate this field were all treated as softmax classifiers.
    activation = manifest.get("details", {}).get("output", {}).get("activation", "softmax")
    model = open_model(arguments.export)
    for path in arguments.images:
        if path.is_dir():
            print_accuracy(model, path, classes, recipe)
        else:
            print_classes(model, path, classes, recipe, arguments.top, activation)


if __name__ == "__main__":
    main()
